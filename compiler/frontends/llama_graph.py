"""Recognize a Llama in a graph: which matrix is which, and the constants between them.

The matrices are found first. What each of them reads tells its role: the first three read the
residual stream, the next one what these three give, and so on, layer by layer, until one is left
that gives the logits. Then every piece of graph between them is proved to be what a Llama has
there, by computing it (`probes.py`). The order of layers comes from the graph, never from names.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from typing import TypeVar

import numpy as np

from llamac.compiler.config import LlamaConfig
from llamac.compiler.frontends.graph import Graph, Linear
from llamac.compiler.frontends.graph_pieces import Pieces
from llamac.compiler.frontends.probes import (
    NotRecognized,
    probe_attention,
    probe_head_dim,
    probe_identity,
    probe_norm,
    probe_rotation,
    sort_attention,
    sort_swiglu,
)
from llamac.compiler.frontends.rope_rule import read_rule

Progress = Callable[[str, int, int], None]
_Answer = TypeVar("_Answer")


@dataclass(frozen=True)
class Norm:
    """An RMSNorm: name of its weights, None if there are none, and its epsilon."""

    weight: str | None
    eps: float


@dataclass(frozen=True)
class Block:
    """One layer of a Llama; matrices by the names that `LlamaConfig.linear_shapes` has."""

    attention_norm: Norm
    ffn_norm: Norm
    linear: dict[str, Linear]


@dataclass(frozen=True)
class LlamaGraph:
    """A Llama, found in a graph.

    Attributes:
        config: sizes and constants.
        embedding: name of the table's value.
        blocks: the layers, in order.
        norm: the last one.
        output: the matrix that gives the logits.
        is_half: rows of q and k are in Hugging Face's order.
        coverage: how many operations of each kind are explained, by kind.
        unused: how many operations the logits do not depend on.
    """

    config: LlamaConfig
    embedding: str
    blocks: tuple[Block, ...]
    norm: Norm
    output: Linear
    is_half: bool
    coverage: dict[str, int]
    unused: int


def recognize_llama(graph: Graph, progress: Progress = lambda *_: None) -> LlamaGraph:
    """Find a Llama.

    Args:
        graph: of tokens to logits.
        progress: called as progress("layer 3", done, total).

    Raises:
        ModelUnsupported: it is none; the message names the value at which it is not.
    """
    return _Recognizer(graph, progress).run()


@dataclass
class _Walk:
    """What was found so far: names that were added to the residual stream, and layers."""

    stream: list[str]
    blocks: list[tuple[list[Linear], Linear, list[Linear], Linear]]


class _Recognizer:
    """One search; its steps in the order of `run`."""

    def __init__(self, graph: Graph, progress: Progress) -> None:
        self._graph, self._progress = graph, progress
        self._constants = graph.constants()
        self._table, self._embedded, tokens = self._find_embedding()
        self._pieces = Pieces(graph, tokens)
        self._logits = graph.outputs[0]
        self._linears = self._find_linears()
        outputs = (linear.node.name for linear in self._linears)
        self._edges = frozenset((self._embedded, *outputs))
        self._pieces.edges = self._edges
        self._feeds = {
            linear.node.name: frozenset(
                graph.reached([linear.x], self._edges, by_value=True) & self._edges
            )
            for linear in self._linears
        }

    def run(self) -> LlamaGraph:
        """Find everything."""
        walk, output = self._walk()
        config, is_half = self._sizes(walk)
        blocks = []
        for number, parts in enumerate(walk.blocks):
            self._progress(f"layer {number}", number, len(walk.blocks))
            blocks.append(self._prove_block(number, parts, walk, config, is_half))
        norm = self._prove_norm("the last norm", output.x, walk.stream, config.dim)
        self._prove_output(output, config.vocab_size)
        self._progress("recognized", len(walk.blocks), len(walk.blocks))
        epsilons = {n.eps for b in blocks for n in (b.attention_norm, b.ffn_norm)} | {norm.eps}
        if len(epsilons) > 1:
            raise self._graph.refuse(f"its norms have different epsilons: {sorted(epsilons)}")
        return LlamaGraph(
            replace(config, norm_eps=norm.eps),
            self._table,
            tuple(blocks),
            norm,
            output,
            is_half,
            *self._coverage(),
        )

    # -- Matrices ---------------------------------------------------------------------------------

    def _find_embedding(self) -> tuple[str, str, str]:
        """Names of the table, of what is looked up in it, and of the tokens."""
        found = [
            (*pair, node.name)
            for node in self._graph.nodes
            if (pair := self._graph.as_embedding(node, self._constants))
        ]
        if len(found) != 1:
            raise self._graph.refuse(f"it looks up rows of {len(found)} tables, expected one")
        table, tokens, name = found[0]
        inputs = self._graph.reached([tokens]) & self._graph.inputs.keys()
        if len(inputs) != 1:
            raise self._graph.refuse(f"the rows of {table} are not looked up for one input")
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

    def _readers(self, feeds: Sequence[str], used: set[str]) -> list[Linear]:
        """The matrices that read exactly these values."""
        return [
            linear
            for linear in self._linears
            if self._feeds[linear.node.name] == frozenset(feeds) and linear.node.name not in used
        ]

    def _walk(self) -> tuple[_Walk, Linear]:
        """Follow the residual stream from the embedding to the logits."""
        walk, used = _Walk([self._embedded], []), set[str]()

        def read(feeds: Sequence[str], count: int, what: str) -> list[Linear]:
            found = self._readers(feeds, used)
            if len(found) != count:
                raise self._graph.refuse(
                    f"layer {len(walk.blocks)}: {len(found)} matrices read {what}, expected "
                    f"{count}" + _listed(found)
                )
            used.update(linear.node.name for linear in found)
            return found

        while True:
            readers = self._readers(walk.stream, used)
            if len(readers) == 1 and len(used) == len(self._linears) - 1 and walk.blocks:
                return walk, readers[0]
            qkv = read(walk.stream, 3, "the residual stream before attention")
            [out] = read([linear.node.name for linear in qkv], 1, "what attention gives")
            walk.stream.append(out.node.name)
            gate_up = read(walk.stream, 2, "the residual stream after attention")
            [down] = read([linear.node.name for linear in gate_up], 1, "gate and up")
            walk.stream.append(down.node.name)
            walk.blocks.append((qkv, out, gate_up, down))

    # -- Pieces -----------------------------------------------------------------------------------

    def _prove(self, what: str, value: str, prove: Callable[[], _Answer]) -> _Answer:
        """Call a probe; say of which value it was if it fails."""
        try:
            return prove()
        except NotRecognized as error:
            raise self._graph.refuse(f"{what} (before {value!r}) {error}") from error

    def _width(self, linear: Linear) -> int:
        """N of a matrix."""
        return self._pieces.width(linear)

    def _attention(self, block: tuple[list[Linear], Linear, list[Linear], Linear]) -> list[Linear]:
        """q, k and v of a layer, in this order."""
        qkv, out = block[0], block[1]
        piece = self._pieces.piece([linear.node.name for linear in qkv], out.x)
        widths = [self._width(linear) for linear in qkv]
        tokens = self._pieces.num_tokens
        order = self._prove("attention", out.x, lambda: sort_attention(piece, widths, tokens))
        return [qkv[i] for i in order]

    def _sizes(self, walk: _Walk) -> tuple[LlamaConfig, bool]:
        """All sizes, and RoPE as the first layer has it; epsilon is found later."""
        first, tokens = walk.blocks[0], self._pieces.num_tokens
        qkv, out = self._attention(first), first[1]
        q_dim, kv_dim, v_dim = (self._width(linear) for linear in qkv)
        if kv_dim != v_dim:
            raise self._graph.refuse(f"keys have {kv_dim} values and values {v_dim}")
        piece = self._pieces.piece([linear.node.name for linear in qkv], out.x)
        widths, prove = (q_dim, kv_dim), self._prove
        head_dim = prove("attention", out.x, lambda: probe_head_dim(piece, *widths, tokens))
        rotation = prove(
            "attention", out.x, lambda: probe_rotation(piece, *widths, head_dim, tokens)
        )
        theta, scaling = prove("RoPE", out.x, lambda: read_rule(rotation.angles))
        vocab, dim = self._pieces.shape_of(self._table)
        config = LlamaConfig(
            dim=dim,
            num_layers=len(walk.blocks),
            num_heads=q_dim // head_dim,
            num_kv_heads=kv_dim // head_dim,
            head_dim=head_dim,
            ffn_dim=self._width(first[2][0]),
            vocab_size=vocab,
            norm_eps=1e-5,
            rope_theta=theta,
            rope_scaling=scaling,
        )
        return config, rotation.is_half

    def _prove_block(
        self,
        number: int,
        block: tuple[list[Linear], Linear, list[Linear], Linear],
        walk: _Walk,
        config: LlamaConfig,
        is_half: bool,
    ) -> Block:
        """All pieces of a layer."""
        qkv, (_, out, gate_up, down) = self._attention(block), block
        name, tokens = f"layer {number}, ", self._pieces.num_tokens
        attend = self._pieces.piece([linear.node.name for linear in qkv], out.x)
        self._prove(
            f"{name}attention", out.x, lambda: probe_attention(attend, config, is_half, tokens)
        )
        inner = self._pieces.piece([linear.node.name for linear in gate_up], down.x)
        order = self._prove(
            f"{name}feed-forward", down.x, lambda: sort_swiglu(inner, config.ffn_dim, tokens)
        )
        # As the names of `linear_shapes` follow each other.
        linears = [*qkv, out, gate_up[order[0]], down, gate_up[order[1]]]
        norms = [
            self._shared_norm(f"{name}{what}", readers, walk.stream[: 2 * number + 1 + i], config)
            for i, (what, readers) in enumerate(
                (("the norm before attention", qkv), ("the norm before feed-forward", gate_up))
            )
        ]
        linear = dict(zip(config.linear_shapes(), linears, strict=True))
        self._check_shapes(name, linear, config)
        return Block(norms[0], norms[1], linear)

    def _shared_norm(
        self, what: str, readers: Sequence[Linear], stream: Sequence[str], config: LlamaConfig
    ) -> Norm:
        """The norm that several matrices read; each may have a value of its own."""
        norms = {
            x: self._prove_norm(what, x, stream, config.dim)
            for x in dict.fromkeys(linear.x for linear in readers)
        }
        if len(set(norms.values())) != 1:
            raise self._graph.refuse(f"{what}: its readers have different norms")
        return next(iter(norms.values()))

    def _prove_norm(self, what: str, value: str, stream: Sequence[str], dim: int) -> Norm:
        """An RMSNorm of the residual stream."""
        inside = self._graph.reached([value], self._edges) & self._graph.weights.keys()
        vectors = [name for name in inside if self._graph.weights[name].shape == (dim,)]
        if len(vectors) > 1:
            raise self._graph.refuse(f"{what} (before {value!r}) has {len(vectors)} vectors")
        gamma = self._pieces.values(vectors[0]) if vectors else np.ones(dim)
        piece = self._pieces.piece(stream, value)
        tokens = self._pieces.num_tokens
        eps = self._prove(what, value, lambda: probe_norm(piece, len(stream), gamma, tokens))
        return Norm(vectors[0] if vectors else None, eps)

    def _prove_output(self, output: Linear, vocab: int) -> None:
        """Nothing follows the last matrix."""
        what = "the way from the last matrix to the logits"
        piece = self._pieces.piece([output.node.name], self._logits)
        tokens = self._pieces.num_tokens
        self._prove(what, self._logits, lambda: probe_identity(piece, vocab, tokens))

    def _check_shapes(self, name: str, linear: dict[str, Linear], config: LlamaConfig) -> None:
        """Compare with what the sizes ask for."""
        for part, (rows, _) in config.linear_shapes().items():
            found = self._width(linear[part])
            if found != rows:
                raise self._graph.refuse(f"{name}{part} has {found} rows, expected {rows}")

    def _coverage(self) -> tuple[dict[str, int], int]:
        """Operations that the logits depend on, by kind, and how many others there are."""
        needed = self._graph.reached([self._logits])
        kinds: dict[str, int] = {}
        for node in self._graph.nodes:
            if any(name in needed for name in node.outputs):
                kinds[node.op] = kinds.get(node.op, 0) + 1
        return kinds, len(self._graph.nodes) - sum(kinds.values())


def _listed(linears: Sequence[Linear]) -> str:
    names = ", ".join(repr(linear.node.name) for linear in linears[:4])
    return f": {names}" if names else ""
