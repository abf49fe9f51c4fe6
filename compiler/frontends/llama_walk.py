"""Follow the residual stream through a graph: which matrix reads what.

The products with matrices of weights are found, and the values that each is computed from, up to
the next product. What reads the stream belongs to a layer's beginning, what reads only these to
its end. The order of layers comes from this, never from names.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from itertools import pairwise
from typing import NamedTuple

import numpy as np

from llamac.compiler.frontends.graph import Graph, Linear
from llamac.compiler.frontends.graph_pieces import Pieces
from llamac.compiler.frontends.probes import Piece


@dataclass(frozen=True)
class Part:
    """Some rows of a matrix: all, or those of one of several layers that were put into one."""

    linear: Linear
    rows: slice

    @property
    def width(self) -> int:
        """How many rows."""
        return int(self.rows.stop - self.rows.start)


@dataclass(frozen=True)
class Group:
    """Layers that read the same, as a matrix each or as one for all of them."""

    parts: tuple[Part, ...]

    @property
    def names(self) -> list[str]:
        """Names of the matrices' products."""
        return list(dict.fromkeys(part.linear.node.name for part in self.parts))

    def piece(self, pieces: Pieces, value: str) -> Piece:
        """The function from what the parts give to a value behind them."""
        piece = pieces.piece(self.names, value)
        if len(self.names) == len(self.parts):
            return piece
        return lambda *arrays: piece(np.concatenate(arrays, axis=1))


class LayerParts(NamedTuple):
    """The matrices of one layer."""

    qkv: Group
    out: Part
    gate_up: Group
    down: Part


@dataclass
class Walk:
    """What was found: names of what was added to the residual stream, in order, and layers."""

    stream: list[str]
    layers: list[LayerParts]


class Walker:
    """Finds the matrices of a model.

    Args:
        graph: of tokens to logits.

    Attributes:
        table: name of the embedding's table.
        pieces: between matrices.
        edges: names of what matrices and the embedding give.
    """

    def __init__(self, graph: Graph) -> None:
        self._graph = graph
        self._constants = graph.constants()
        self._logits = graph.outputs[0]
        self.table, self._embedded, tokens = self._find_embedding()
        self._linears = self._find_linears()
        outputs = (linear.node.name for linear in self._linears)
        self.edges = frozenset((self._embedded, *outputs))
        self.pieces = Pieces(graph, tokens, self.edges)
        self._feeds = {
            linear.node.name: frozenset(
                graph.reached([linear.x], self.edges, by_value=True) & self.edges
            )
            for linear in self._linears
        }
        self._used: set[str] = set()

    def walk(self) -> tuple[Walk, Linear]:
        """Follow the residual stream from the embedding to the matrix that gives the logits.

        Raises:
            ModelUnsupported: matrices read something else than those of a Llama.
        """
        walk = Walk([self._embedded], [])
        while True:
            readers = self._readers(walk.stream)
            if len(readers) == 1 and len(self._used) == len(self._linears) - 1 and walk.layers:
                return walk, readers[0]
            where = f"layer {len(walk.layers)}: "
            heads = self._read(walk.stream, (3, 1), f"{where}the residual stream before attention")
            out = self._read_one([h.node.name for h in heads], f"{where}what attention gives")
            walk.stream.append(out.linear.node.name)
            inner = self._read(walk.stream, (2, 1), f"{where}the residual stream after attention")
            down = self._read_one([n.node.name for n in inner], f"{where}gate and up")
            walk.stream.append(down.linear.node.name)
            q_dim = self.pieces.columns(out.linear)
            qkv, gate_up = self._divide_heads(heads, q_dim), self._divide(inner, 2)
            walk.layers.append(LayerParts(qkv, out, gate_up, down))

    def _find_embedding(self) -> tuple[str, str, str]:
        """Names of the table, of what is looked up in it, and of the tokens."""
        needed = self._graph.reached([self._logits])
        found = [
            (*pair, node.name)
            for node in self._graph.nodes
            if node.name in needed and (pair := self._graph.as_embedding(node, self._constants))
        ]
        if len(found) != 1:
            raise self._graph.refuse(f"it looks up rows of {len(found)} tables, expected one")
        table, tokens, name = found[0]
        inputs = self._graph.reached([tokens]) & self._graph.inputs.keys()
        if len(inputs) != 1:
            raise self._graph.refuse(f"the rows of {table!r} are not looked up for one input")
        return table, name, inputs.pop()

    def _find_linears(self) -> list[Linear]:
        """The products with matrices that the logits depend on, in the graph's order."""
        needed = self._graph.reached([self._logits])
        found = (self._graph.as_linear(node, self._constants) for node in self._graph.nodes)
        linears = [linear for linear in found if linear and linear.node.name in needed]
        for linear in linears:
            if linear.has_bias:
                raise self._graph.refuse(f"the product {linear.node.name!r} adds a bias")
        return linears

    def _readers(self, feeds: Sequence[str]) -> list[Linear]:
        """The matrices that read exactly these values."""
        wanted = frozenset(feeds)
        return [
            linear
            for linear in self._linears
            if self._feeds[linear.node.name] == wanted and linear.node.name not in self._used
        ]

    def _read(self, feeds: Sequence[str], counts: Sequence[int], what: str) -> list[Linear]:
        """The matrices that read these values, one of `counts` of them."""
        found = self._readers(feeds)
        if len(found) not in counts:
            names = ", ".join(repr(linear.node.name) for linear in found[:4])
            raise self._graph.refuse(
                f"{len(found)} matrices read {what}, expected {' or '.join(map(str, counts))}"
                + (f": {names}" if names else "")
            )
        self._used.update(linear.node.name for linear in found)
        return found

    def _read_one(self, feeds: Sequence[str], what: str) -> Part:
        """The one matrix that reads these values."""
        [linear] = self._read(feeds, (1,), what)
        return self._whole(linear)

    def _whole(self, linear: Linear) -> Part:
        return Part(linear, slice(0, self.pieces.width(linear)))

    def _divide(self, linears: Sequence[Linear], count: int) -> Group:
        """Layers of equal size."""
        if len(linears) == count:
            return Group(tuple(map(self._whole, linears)))
        [linear] = linears
        return self._cut(linear, [self.pieces.width(linear) // count] * count)

    def _divide_heads(self, linears: Sequence[Linear], q_dim: int) -> Group:
        """q, k and v; in one matrix they follow each other, and as many rows are left for k as v.

        Args:
            linears: one or three.
            q_dim: how many values attention gives.
        """
        if len(linears) > 1:
            return Group(tuple(map(self._whole, linears)))
        [linear] = linears
        kv_dim = (self.pieces.width(linear) - q_dim) // 2
        return self._cut(linear, [q_dim, kv_dim, kv_dim])

    def _cut(self, linear: Linear, widths: Sequence[int]) -> Group:
        """Rows of a matrix by layers."""
        ends = np.cumsum([0, *widths]).tolist()
        if ends[-1] != self.pieces.width(linear) or min(widths) < 1:
            raise self._graph.refuse(
                f"the {self.pieces.width(linear)} rows of {linear.node.name!r} cannot be divided "
                f"into {len(widths)} layers"
            )
        rows = (slice(start, stop) for start, stop in pairwise(ends))
        return Group(tuple(Part(linear, part) for part in rows))
