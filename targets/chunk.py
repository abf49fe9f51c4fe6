"""Cut a function of composites into runs of whole layers, as plain steps.

The structure of the model is read from the IR and stands nowhere else: a chunk is a run of
consecutive composites, and what flows over its edges is found by looking who uses what. Embedding,
output layer and sampling belong to no layer and are in no chunk.
"""

from __future__ import annotations

import json
import re
from collections.abc import Collection, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, TypeAlias

from tvm import relax
from tvm.ir import IRModule

from llamac.runtime.errors import CoverageError

Labels: TypeAlias = Mapping[str, str]

_OUTSIDE = ("llamac.embedding", "llamac.take_row", "llamac.argmax")
_LAYER = re.compile(r"layers\.(\d+)\.")


@dataclass(frozen=True)
class Spec:
    """Shape and dtype of a value; `is_param`: an argument of the function, under its name."""

    shape: tuple[int, ...]
    dtype: str
    is_param: bool = False


@dataclass(frozen=True)
class Step:
    """One call of a composite: its kind, attributes, and names of arguments and results."""

    kind: str
    attrs: Mapping[str, Any]
    args: tuple[str, ...]
    results: tuple[str, ...]


@dataclass(frozen=True)
class Chunk:
    """A run of whole layers of one function.

    Attributes:
        function: "decode" or "prefill_32".
        layers: numbers of the layers, consecutive.
        tokens: T of the function.
        steps: the composites, in order.
        specs: of every name that the steps use.
        source: the value that enters, the residual stream [T, K].
        sink: the value that leaves, [T, K].
        labels: of the values, see `value_labels`.
    """

    function: str
    layers: tuple[int, ...]
    tokens: int
    steps: tuple[Step, ...]
    specs: Mapping[str, Spec]
    source: str
    sink: str
    labels: Labels

    @property
    def name(self) -> str:
        """A name for files and graphs: "decode_layers_0_3"."""
        return f"{self.function}_layers_{self.layers[0]}_{self.layers[-1]}"

    def caches(self) -> tuple[str, ...]:
        """Names of the caches, keys before values, layer by layer, without scales of rows."""
        attentions = (step for step in self.steps if step.kind == "llamac.attention")
        names = (name for step in attentions for name in step.args[4:])
        return tuple(name for name in names if name.endswith("_cache"))

    def linear_layers(self) -> tuple[str, ...]:
        """Layers of the checkpoint whose weights are in it, "layers.0.attention.wq"."""
        names = (n for step in self.steps for n in step.args if self.specs[n].is_param)
        weights = (n.partition(".adaptor.")[0] for n in names if _LAYER.match(n))
        layers = (n.removesuffix(".weight").removesuffix(".scales") for n in weights)
        return tuple(dict.fromkeys(n for n in layers if not n.endswith("_cache")))


def cut_chunks(
    mod: IRModule,
    function: str,
    layers_per_chunk: int,
    without: Collection[int] = (),
) -> list[Chunk]:
    """Cut a function into chunks of that many layers, fewer before a gap and at the end.

    Args:
        mod: of composites.
        function: its name.
        layers_per_chunk: at most.
        without: layers that go into no chunk.

    Raises:
        CoverageError: layers exchange more than the residual stream.
    """
    steps, specs, _ = read_function(mod, function)
    by_layer: dict[int, list[Step]] = {}
    for layer, step in _with_layers(steps):
        by_layer.setdefault(layer, []).append(step)
    chunks = []
    for layers in _runs([layer for layer in by_layer if layer not in without], layers_per_chunk):
        inside = [step for layer in layers for step in by_layer[layer]]
        chunks.append(_make_chunk(function, layers, inside, steps, specs))
    return chunks


def _runs(layers: Sequence[int], most: int) -> list[tuple[int, ...]]:
    """Divide ascending numbers into runs of consecutive ones, each of at most that many."""
    runs: list[tuple[int, ...]] = []
    for layer in layers:
        if runs and runs[-1][-1] == layer - 1 and len(runs[-1]) < most:
            runs[-1] += (layer,)
        else:
            runs.append((layer,))
    return runs


def _make_chunk(
    function: str,
    layers: tuple[int, ...],
    inside: Sequence[Step],
    steps: Sequence[Step],
    specs: Mapping[str, Spec],
) -> Chunk:
    """Find what crosses the edges of a run of steps."""
    made = {name for step in inside for name in step.results}
    used = {name for step in inside for name in step.args}
    entering = [n for n in dict.fromkeys(used) if n not in made and not specs[n].is_param]
    elsewhere = {name for step in steps if step not in inside for name in step.args}
    leaving = [name for step in inside for name in step.results if name in elsewhere]
    if len(entering) != 1 or len(leaving) != 1:
        raise CoverageError(
            f"{function}: layers {layers[0]} to {layers[-1]} take {len(entering)} values and give "
            f"{len(leaving)} to others, expected one each",
            cause="only layers that hand on the residual stream alone can be cut apart",
            fix="compile this model for the CPU",
        )
    tokens = specs[entering[0]].shape[0]
    known = {name: specs[name] for name in used | made}
    every = value_labels(steps, specs)
    labels = {name: every[name] for name in known if name in every}
    return Chunk(function, layers, tokens, tuple(inside), known, entering[0], leaving[0], labels)


def value_labels(steps: Sequence[Step], specs: Mapping[str, Spec]) -> dict[str, str]:
    """Names of values that are the same in all functions of a model, for what is known of them.

    A step with weights gives its value their name: "tok_embeddings", "layers.0.attention.wq". Any
    other adds its kind to the label of its last operand: "layers.0.attention.wq.rope", and
    "layers.0.attention.wo.add" for the residual stream after attention. Values of the caches have
    no label.
    """
    labels: dict[str, str] = {}
    for step in steps:
        weights = [n for n in step.args if n.endswith(".weight") and specs[n].is_param]
        values = [labels[n] for n in step.args if n in labels]
        kind = step.kind.removeprefix("llamac.")
        label = weights[0].removesuffix(".weight") if weights else f"{values[-1]}.{kind}"
        labels[step.results[0]] = label
    return labels


def _with_layers(steps: Sequence[Step]) -> Iterator[tuple[int, Step]]:
    """Yield the steps that belong to a layer: that of its weights, or of the step before it."""
    layer: int | None = None
    for step in steps:
        numbers = [int(found[1]) for name in step.args if (found := _LAYER.match(name))]
        has_weights = any(name.endswith((".weight", ".scales")) for name in step.args)
        if numbers:
            layer = numbers[0]
        elif has_weights or step.kind in _OUTSIDE:
            layer = None
        if layer is not None:
            yield layer, step


def read_function(
    mod: IRModule, function: str
) -> tuple[list[Step], dict[str, Spec], dict[Any, tuple[str, ...]]]:
    """Read a Relax function of composites; values other than parameters are named v0, v1, ...

    Returns:
        The steps, what is known of each name, and the names of each variable, several of a tuple.
    """
    untyped: Any = mod
    body = untyped[function]
    names: dict[Any, tuple[str, ...]] = {}
    specs: dict[str, Spec] = {}
    for param in body.params:
        names[param] = (str(param.name),)
        specs[param.name] = _spec(param.ty, is_param=True)
    steps = []
    for binding in (b for block in body.body.blocks for b in block.bindings):
        value = binding.value
        if isinstance(value, relax.TupleGetItem):
            names[binding.var] = (names[value.tuple_value][value.index],)
        elif isinstance(value, relax.Call):
            types = getattr(binding.var.ty, "fields", [binding.var.ty])
            results = tuple(f"v{len(specs) + i}" for i in range(len(types)))
            specs |= {name: _spec(ty) for name, ty in zip(results, types, strict=True)}
            names[binding.var] = results
            composite = untyped[value.op]
            attrs = json.loads(str(composite.attrs["llamac.attrs"]))
            args = tuple(names[arg][0] for arg in value.args)
            steps.append(Step(str(composite.attrs["Composite"]), attrs, args, results))
    return steps, specs, names


def _spec(ty: Any, *, is_param: bool = False) -> Spec:
    return Spec(tuple(int(n) for n in ty.shape), str(ty.dtype), is_param)
