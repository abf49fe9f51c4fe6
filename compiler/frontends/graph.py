"""A model as a graph of operations, whoever wrote it down: the input of `llama_graph.py`.

Nothing here knows what an operation means. A front end brings nodes in an order in which they can
be computed, the weights by name, and a function that computes one node in float64. What a part of
the graph is gets found out by computing it (`probes.py`), not by comparing how it is written.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, Protocol

import numpy as np
from numpy.typing import NDArray

from llamac.compiler.frontends.hf_packed import PackedWeights
from llamac.compiler.frontends.hf_tensors import RowOrder
from llamac.compiler.frontends.safetensors_file import SafeTensor
from llamac.runtime.errors import ModelUnsupported

Array = NDArray[Any]


@dataclass(frozen=True)
class Ref:
    """The value of that name, among the arguments of a node."""

    name: str


@dataclass(frozen=True)
class Node:
    """One operation.

    Attributes:
        op: its name, "aten.add.Tensor".
        args, kwargs: constants and `Ref`s, nested in lists and tuples.
        outputs: names of its values.
        shape_only: names of values of which it reads shape or dtype, and no element.
    """

    op: str
    args: tuple[Any, ...]
    kwargs: Mapping[str, Any]
    outputs: tuple[str, ...]
    shape_only: frozenset[str] = frozenset()

    @property
    def name(self) -> str:
        """Of its first value, for messages."""
        return self.outputs[0] if self.outputs else self.op

    def inputs(self) -> list[str]:
        """Names of the values that it reads."""
        found: list[str] = []
        _map_refs((self.args, dict(self.kwargs)), found.append)
        return found


@dataclass(frozen=True)
class Input:
    """What a caller gives: its shape (None: any size), and NumPy's letter of its dtype."""

    shape: tuple[int | None, ...]
    kind: str


class Stored(Protocol):
    """A weight in the file."""

    @property
    def shape(self) -> tuple[int, ...]:
        """Rows first."""

    def stored(self) -> SafeTensor:
        """The elements as they are."""

    def array(self) -> Any:
        """The values, as the front end's function wants them: floats in float64."""


@dataclass(frozen=True)
class Linear:
    """A product with a matrix of weights: y [..., N] of x [..., K].

    Attributes:
        node: that computes it.
        x: name of the value that it reads.
        weight: name of the matrix's value, which depends on weights only.
        is_transposed: the matrix is [K, N].
        has_bias: something is added, which no Llama has.
    """

    node: Node
    x: str
    weight: str
    is_transposed: bool
    has_bias: bool = False


Packed = Callable[[slice, RowOrder], PackedWeights]
"""Makes the weights of some rows of a matrix, in an order."""

Compute = Callable[[Node, Sequence[Any], Mapping[str, Any]], Any]


@dataclass(frozen=True)
class Graph:
    """A model.

    Attributes:
        source: for messages, the name of the file.
        nodes: every value is made before it is read.
        inputs: by name.
        shapes: of values, where known; None is any size.
        weights: by name; parameters, buffers and constants.
        outputs: names of what the model returns.
        compute: computes a node in float64 from values; tensors are the front end's own.
        to_array, from_array: between those and numpy's.
        as_linear: tells whether a node is a product with a matrix, given names of constants.
        as_embedding: names of table and tokens if a node looks up rows.
        packed: makes the weights of matrices that are codes in a form of the file's own.
    """

    source: str
    nodes: tuple[Node, ...]
    inputs: Mapping[str, Input]
    shapes: Mapping[str, tuple[int | None, ...]]
    weights: Mapping[str, Stored]
    outputs: tuple[str, ...]
    compute: Compute
    to_array: Callable[[Any], Array]
    from_array: Callable[[Array], Any]
    as_linear: Callable[[Node, frozenset[str]], Linear | None]
    as_embedding: Callable[[Node, frozenset[str]], tuple[str, str] | None]
    packed: Mapping[str, Packed] = field(default_factory=dict)
    makers: Mapping[str, Node] = field(init=False)

    def __post_init__(self) -> None:
        makers = {name: node for node in self.nodes for name in node.outputs}
        object.__setattr__(self, "makers", makers)

    def constants(self) -> frozenset[str]:
        """Names of all values that depend on weights only."""
        found = set(self.weights)
        for node in self.nodes:
            reads = node.inputs()
            if reads and all(name in found for name in reads):
                found.update(node.outputs)
        return frozenset(found)

    def reached(
        self, names: Iterable[str], edges: frozenset[str] = frozenset(), *, by_value: bool = False
    ) -> set[str]:
        """Values that the named ones are computed from, and they themselves.

        Args:
            names: of values.
            edges: are included and not passed.
            by_value: leave out values of which only shape or dtype matter.
        """
        found: set[str] = set()
        pending = list(names)
        while pending:
            name = pending.pop()
            if name in found:
                continue
            found.add(name)
            if name not in edges and name in self.makers:
                node = self.makers[name]
                reads = node.inputs()
                pending += [n for n in reads if not (by_value and n in node.shape_only)]
        return found

    def evaluate(self, names: Sequence[str], given: Mapping[str, Array]) -> list[Array]:
        """Compute values in float64.

        Args:
            names: of what is wanted.
            given: values by name, which are taken as they are: float64 or integers.

        Raises:
            ModelUnsupported: an operation that is not known, or cannot be computed.
        """
        values = {name: self.from_array(array) for name, array in given.items()}
        needed = self.reached(names, frozenset(values))
        for name in needed & self.weights.keys() - values.keys():
            values[name] = self.weights[name].array()
        for node in self.nodes:
            if any(name in needed and name not in values for name in node.outputs):
                self._run(node, values)
        missing = [name for name in names if name not in values]
        if missing:
            raise self.refuse(f"nothing computes the value {missing[0]}")
        return [self.to_array(values[name]) for name in names]

    def _run(self, node: Node, values: dict[str, Any]) -> None:
        """Compute a node and keep its values."""
        try:
            args, kwargs = _map_refs((node.args, dict(node.kwargs)), values.__getitem__)
            result = self.compute(node, args, kwargs)
        except ModelUnsupported:
            raise
        except Exception as error:
            what = str(error).splitlines() or [type(error).__name__]
            raise self.refuse(
                f"{node.op} ({node.name}) cannot be computed: {what[0]:.200}"
            ) from error
        results = result if len(node.outputs) > 1 else (result,)
        # What was given stays, even if the node that makes it has other outputs.
        for name, value in zip(node.outputs, results, strict=False):
            values.setdefault(name, value)

    def refuse(self, what: str, fix: str = "") -> ModelUnsupported:
        """The error for a graph that is not what it should be."""
        return ModelUnsupported(
            f"{self.source}: {what}.",
            cause="The graph is not that of a plain Llama, as far as llamac can tell by computing "
            "its parts.",
            fix=fix
            or "Export the model without changes to its layers, or give its weights as a "
            "folder of Hugging Face or in Meta's layout.",
        )


def _map_refs(value: Any, read: Callable[[str], Any]) -> Any:
    """Replace every `Ref` in nested lists, tuples and dictionaries."""
    if isinstance(value, Ref):
        return read(value.name)
    if isinstance(value, tuple | list):
        return type(value)(_map_refs(part, read) for part in value)
    if isinstance(value, dict):
        return {key: _map_refs(part, read) for key, part in value.items()}
    return value


def relative_error(found: Array, expected: Array) -> float:
    """Largest difference beside the largest expected magnitude; infinite for other shapes."""
    if found.shape != expected.shape or not np.isfinite(found).all():
        return float("inf")
    scale = float(np.abs(expected).max()) or 1.0
    return float(np.abs(found - expected).max()) / scale
