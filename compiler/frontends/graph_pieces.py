"""Pieces of a graph as functions of matrices [T, N], whatever shapes the graph has.

The graph's own inputs are filled in: tokens, positions that count up from 0, a mask that shows
everything. A graph with a static batch gets the same rows for all of it.
"""

from __future__ import annotations

import math
from collections.abc import Sequence

import numpy as np

from llamac.compiler.frontends.graph import Array, Graph, Input, Linear
from llamac.compiler.frontends.probes import LEAST_TOKENS, Piece
from llamac.compiler.reference import Float64

_TOKENS = 5  # where the graph takes any number


class Pieces:
    """Evaluates pieces of a graph.

    Args:
        graph: of the model.
        tokens: name of the input that is looked up in the embedding.
        edges: values between pieces. Where only the shape of one matters, it is filled in.

    Attributes:
        num_tokens: T.
    """

    def __init__(self, graph: Graph, tokens: str, edges: frozenset[str]) -> None:
        self._graph, self._edges = graph, edges
        *batch, count = graph.inputs[tokens].shape or (None,)
        self.num_tokens = count or _TOKENS
        self._batch = math.prod(size or 1 for size in batch)
        if self.num_tokens < LEAST_TOKENS:
            raise graph.refuse(
                f"it takes {count} tokens at once, and llamac needs {LEAST_TOKENS} to see what it "
                "does with them",
                fix="Export it with a dynamic number of tokens, or with 8.",
            )
        used = graph.reached([graph.outputs[0]]) & graph.inputs.keys()
        self._inputs = {name: self._fill(name, graph.inputs[name], tokens) for name in used}

    def piece(self, names: Sequence[str], value: str) -> Piece:
        """The function from values of these names to another value."""
        others = self._graph.reached([value], self._edges) & self._edges - {*names, value}
        blank = {
            n: self._shaped(n, np.zeros((self.num_tokens, self.shape_of(n)[-1]))) for n in others
        }

        def run(*arrays: Float64) -> Float64:
            given = {n: self._shaped(n, a) for n, a in zip(names, arrays, strict=True)} | blank
            [found] = self._graph.evaluate([value], self._inputs | given)
            return self._rows(value, found)

        return run

    def width(self, linear: Linear) -> int:
        """N of a matrix."""
        return self.shape_of(linear.node.name)[-1]

    def columns(self, linear: Linear) -> int:
        """K of a matrix."""
        return self.shape_of(linear.weight)[-2 if linear.is_transposed else -1]

    def shape_of(self, name: str) -> tuple[int, ...]:
        """Shape of a value; sizes that are not fixed are 1."""
        stored = self._graph.weights.get(name)
        shape = stored.shape if stored else self._graph.shapes.get(name)
        if shape is None:
            raise self._graph.refuse(f"the shape of {name!r} is not known")
        return tuple(size or 1 for size in shape)

    def values(self, name: str) -> Float64:
        """A constant value in float64."""
        [found] = self._graph.evaluate([name], {})
        return np.asarray(found, np.float64)

    def _fill(self, name: str, what: Input, tokens: str) -> Array:
        """A value for an input: by its role, which only its name tells."""
        shape = tuple(size or self.num_tokens for size in what.shape)
        if name == tokens:
            shape = (*(size or 1 for size in what.shape[:-1]), self.num_tokens)
            return np.zeros(shape, np.int64)
        if "past" in name and what.kind == "f":  # an empty cache
            return np.zeros([size or (0 if i else 1) for i, size in enumerate(what.shape)])
        if "pos" in name and what.kind in "iu":
            return np.broadcast_to(np.arange(shape[-1] if shape else 1), shape).astype(np.int64)
        if "mask" in name and what.kind in "iub":
            return np.ones(shape, np.bool_ if what.kind == "b" else np.int64)
        raise self._graph.refuse(
            f"its input {name!r} is neither tokens nor positions, nor a mask of tokens",
            fix="Export a model that makes its own causal mask and keeps its own cache, or none.",
        )

    def _shaped(self, name: str, rows: Float64) -> Array:
        """Rows [T, N] in the shape of a value of the graph."""
        shape = self.shape_of(name)
        if len(shape) == 1 or len(shape) > 3:
            raise self._graph.refuse(f"{name!r} has {len(shape)} dimensions, expected 2 or 3")
        batched = np.repeat(rows[None], self._batch, axis=0)
        return batched if len(shape) == 3 else batched.reshape(-1, rows.shape[1])

    def _rows(self, name: str, found: Array) -> Float64:
        """The rows of the first of the batch, or its last row alone."""
        rows = np.asarray(found, np.float64).reshape(-1, found.shape[-1] if found.ndim else 1)
        if len(rows) not in (self._batch, self._batch * self.num_tokens):
            raise self._graph.refuse(f"{name!r} has {len(rows)} rows for {self.num_tokens} tokens")
        return rows[: len(rows) // self._batch]
