"""Ranges of values: those that happen, under the names that graphs know them by."""

from __future__ import annotations

import itertools
from pathlib import Path

import numpy as np
import pytest

from llamac.compiler.calibration import calibrate
from llamac.compiler.frontends.meta import from_meta
from llamac.compiler.llama import ModelOptions, build_llama
from llamac.compiler.reference_model import KvCache, ReferenceModel
from llamac.runtime.errors import UsageError
from llamac.schedules.quantized import Quantization, ValueRange
from llamac.targets.chunk import cut_chunks

TINY = Path(__file__).resolve().parents[2] / "examples" / "tiny-llama"


def _ignore(what: str, done: int, total: int) -> None:
    """A progress that nobody watches."""


@pytest.mark.parametrize("form", ["spinquant", "qlora"])
@pytest.mark.parametrize("function", ["decode", "prefill_8"])
def test_every_value_of_a_chunk_has_a_range(form: str, function: str) -> None:
    checkpoint = from_meta(TINY / form)
    seen = calibrate(checkpoint, list(range(40)), _ignore)
    module = build_llama(checkpoint, ModelOptions(64, (8,)))
    for chunk in cut_chunks(module, function, 2):
        results = {step.results[0] for step in chunk.steps} | {chunk.source}
        assert {chunk.labels[name] for name in results} <= seen.keys()
        layers = {f"layers.{layer}.attention.wv.attention.scores" for layer in chunk.layers}
        assert layers <= seen.keys()
        assert len({chunk.labels[name] for name in results}) == len(results)


def test_the_stream_between_chunks_has_one_label() -> None:
    module = build_llama(from_meta(TINY / "spinquant"), ModelOptions(64, ()))
    chunks = cut_chunks(module, "decode", 1)
    assert chunks[0].labels[chunks[0].source] == "tok_embeddings"
    for before, after in itertools.pairwise(chunks):
        assert before.labels[before.sink] == after.labels[after.source]
        assert before.labels[before.sink].endswith("feed_forward.w2.add")


def test_ranges_are_those_of_the_model() -> None:
    checkpoint = from_meta(TINY / "spinquant")
    tokens = list(range(3, 43))
    seen = calibrate(checkpoint, tokens, _ignore)
    values = []
    model = ReferenceModel(
        checkpoint,
        quantize_activations=False,
        observe=lambda label, value: values.append((label, value)),
    )
    model.layer(
        "layers.0",
        model.embedding(tokens),
        np.ones((40, checkpoint.config.head_dim // 2, 2), np.float32) * [1, 0],
        KvCache("float32"),
        0,
    )
    first = dict(values)
    queries = first["layers.0.attention.wq"]
    assert seen["layers.0.attention.wq"] == ValueRange(queries.min(), queries.max())


def test_windows_see_nothing_of_each_other() -> None:
    checkpoint, tokens = from_meta(TINY / "spinquant"), list(range(32))
    cut, whole = (calibrate(checkpoint, tokens, _ignore, window=n) for n in (16, 32))
    halves = [calibrate(checkpoint, tokens[i : i + 16], _ignore) for i in (0, 16)]
    for label, found in cut.items():
        assert found == halves[0][label].union(halves[1][label])
    assert cut != whole


def test_too_short_a_text_is_refused() -> None:
    with pytest.raises(UsageError, match="15 tokens"):
        calibrate(from_meta(TINY / "spinquant"), list(range(15)), _ignore)


@pytest.mark.parametrize("dtype", ["uint8", "int8", "uint16", "int16"])
def test_codes_hold_the_range(dtype: str) -> None:
    seen = ValueRange(-1.5, 4.0)
    values = np.linspace(-1.5, 4.0, 1001)
    for made in (Quantization.asymmetric(seen, dtype), Quantization.symmetric(seen, dtype)):
        codes = made.quantize(values)
        assert codes.dtype == dtype
        assert np.abs(made.dequantize(codes) - values).max() <= made.scale / 2 * 1.001
        assert made.quantize(np.zeros(1))[0] == made.zero_point
    limits = np.iinfo(dtype)
    far = Quantization.asymmetric(seen, dtype).quantize(np.array([-1e9, 1e9]))
    assert far.tolist() == [limits.min, limits.max]


def test_a_value_that_never_changes_has_a_scale() -> None:
    made = Quantization.asymmetric(ValueRange(0.0, 0.0), "uint16")
    assert made.scale > 0
    assert made.dequantize(made.quantize(np.zeros(3))).tolist() == [0, 0, 0]
