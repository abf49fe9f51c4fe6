"""Ranges of the values inside a model, seen while it reads a text.

A processor that computes with integers needs to know beforehand how large each value gets. The text
goes through the reference with activations that nobody quantizes, one layer at a time for all of
it, so that each weight is read once and only the residual stream of one layer is held.

Labels are those of `targets/chunk.py`, and these for values inside composites:

    <wv>.attention.scores          before softmax
    <norm>.mean_square, <norm>.unit    mean(x^2) of each token; x / sqrt(mean(x^2))
    <layer>.adaptor.A, .adaptor.B  A x, and what is added: scale * B (A x)
    <w3>.swiglu.hadamard.columns   R4 after its first product, see `targets/hadamard.py`
"""

from __future__ import annotations

from collections.abc import Callable, Sequence

from llamac.compiler.checkpoint import Checkpoint
from llamac.compiler.config import rope_table
from llamac.compiler.reference import Float64
from llamac.compiler.reference_model import KvCache, Observe, ReferenceModel
from llamac.runtime.errors import UsageError
from llamac.schedules.quantized import ValueRange
from llamac.targets.base import Progress

LEAST_TOKENS = 16
"""Fewer say nothing of what a value may be."""

WINDOW = 512
"""Tokens that see each other; a longer text is cut."""


class Ranges:
    """Smallest and largest of each value; an `Observe`."""

    def __init__(self) -> None:
        self._seen: dict[str, ValueRange] = {}

    def __call__(self, label: str, value: Float64) -> None:
        """Widen the range of a value."""
        found = ValueRange(float(value.min()), float(value.max()))
        before = self._seen.get(label)
        self._seen[label] = found if before is None else before.union(found)

    def ranges(self) -> dict[str, ValueRange]:
        """What was seen, by the labels of `targets/chunk.py`."""
        return dict(self._seen)


def calibrate(
    checkpoint: Checkpoint,
    tokens: Sequence[int],
    progress: Progress,
    *,
    window: int = WINDOW,
    also: Observe | None = None,
    after_layer: Callable[[int], None] | None = None,
) -> dict[str, ValueRange]:
    """Let a model read a text and return the ranges of its values.

    Args:
        checkpoint: the model.
        tokens: of the text, at least `LEAST_TOKENS`; in windows of `window`, each on its own.
        progress: called after each layer.
        window: length of a window.
        also: another observer of the same values.
        after_layer: called with the number of each layer when all windows are through.

    Raises:
        UsageError: too few tokens.
    """
    if len(tokens) < LEAST_TOKENS:
        raise UsageError(
            f"a text of {len(tokens)} tokens is too short to calibrate with",
            cause=f"ranges need {LEAST_TOKENS} tokens at least; a few hundred are good",
            fix="give a longer text, like the one that the model will be used on",
        )
    ranges = Ranges()
    observe = ranges if also is None else _both(ranges, also)
    model = ReferenceModel(checkpoint, quantize_activations=False, observe=observe)
    windows = [model.embedding(tokens[i : i + window]) for i in range(0, len(tokens), window)]
    for stream in windows:
        observe("tok_embeddings", stream)
    layers = checkpoint.config.num_layers
    table = rope_table(checkpoint.config, window)
    for layer in range(layers):
        progress(f"layer {layer}", layer, layers)
        # Windows inside layers: a mapped weight is read from disk once.
        for i, stream in enumerate(windows):
            rows = table[: len(stream)]
            windows[i] = model.layer(f"layers.{layer}", stream, rows, KvCache("float32"), 0)
        if after_layer is not None:
            after_layer(layer)
    progress("calibrated", layers, layers)
    return ranges.ranges()


def _both(first: Observe, second: Observe) -> Callable[[str, Float64], None]:
    def observe(label: str, value: Float64) -> None:
        first(label, value)
        second(label, value)

    return observe
