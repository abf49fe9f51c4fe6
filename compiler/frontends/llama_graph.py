"""Recognize a Llama in a graph: which matrix is which, and the constants between them.

The matrices are found first (`llama_walk.py`). Then every piece of graph between them is proved to
be what a Llama has there, by computing it (`probes.py`).
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from typing import TypeVar

import numpy as np

from llamac.compiler.config import LlamaConfig
from llamac.compiler.frontends.graph import Graph, Linear
from llamac.compiler.frontends.llama_walk import LayerParts, Part, Walk, Walker
from llamac.compiler.frontends.probes import (
    NotRecognized,
    Piece,
    Rotation,
    probe_attention,
    probe_head_dim,
    probe_identity,
    probe_norm,
    probe_rotation,
    sort_attention,
    sort_swiglu,
)
from llamac.compiler.frontends.rope_rule import read_rule
from llamac.compiler.reference import Float64

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
    linear: dict[str, Part]


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
    output: Part
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


class _Recognizer:
    """One search; its steps in the order of `run`."""

    def __init__(self, graph: Graph, progress: Progress) -> None:
        self._graph, self._progress = graph, progress
        self._logits = graph.outputs[0]
        self._walker = Walker(graph)
        self._pieces = self._walker.pieces

    def run(self) -> LlamaGraph:
        """Find everything."""
        walk, output = self._walker.walk()
        config, rotation = self._sizes(walk)
        blocks = []
        for number, parts in enumerate(walk.layers):
            self._progress(f"layer {number}", number, len(walk.layers))
            blocks.append(self._prove_block(number, parts, walk, config, rotation))
        norm = self._prove_norm("the last norm", output.x, walk.stream, config.dim)
        self._prove_output(output, config.vocab_size)
        self._progress("recognized", len(walk.layers), len(walk.layers))
        epsilons = {n.eps for b in blocks for n in (b.attention_norm, b.ffn_norm)} | {norm.eps}
        if len(epsilons) > 1:
            raise self._graph.refuse(f"its norms have different epsilons: {sorted(epsilons)}")
        return LlamaGraph(
            replace(config, norm_eps=norm.eps),
            self._walker.table,
            tuple(blocks),
            norm,
            Part(output, slice(0, config.vocab_size)),
            rotation.is_half,
            *self._coverage(),
        )

    def _prove(self, what: str, value: str, prove: Callable[[], _Answer]) -> _Answer:
        """Call a probe; say of which value it was if it fails."""
        try:
            return prove()
        except NotRecognized as error:
            raise self._graph.refuse(f"{what} (before {value!r}) {error}") from error

    def _attention(self, layer: LayerParts) -> tuple[Piece, list[Part]]:
        """Attention as a function of q, k and v, and these parts in this order."""
        parts, value, tokens = layer.qkv.parts, layer.out.linear.x, self._pieces.num_tokens
        piece, widths = layer.qkv.piece(self._pieces, value), [part.width for part in parts]
        order = self._prove("attention", value, lambda: sort_attention(piece, widths, tokens))

        def attend(*given: Float64) -> Float64:
            return piece(*(given[order.index(i)] for i in range(len(parts))))

        return attend, [parts[i] for i in order]

    def _sizes(self, walk: Walk) -> tuple[LlamaConfig, Rotation]:
        """All sizes, and RoPE as the first layer has it; epsilon is found later."""
        first, tokens, prove = walk.layers[0], self._pieces.num_tokens, self._prove
        piece, (q, k, v) = self._attention(first)
        if k.width != v.width:
            raise self._graph.refuse(f"keys have {k.width} values and values {v.width}")
        value, widths = first.out.linear.x, (q.width, k.width)
        head_dim = prove("attention", value, lambda: probe_head_dim(piece, *widths, tokens))
        rotation = prove(
            "attention", value, lambda: probe_rotation(piece, *widths, head_dim, tokens)
        )
        theta, scaling = prove("RoPE", value, lambda: read_rule(rotation.angles))
        vocab, dim = self._pieces.shape_of(self._walker.table)
        config = LlamaConfig(
            dim=dim,
            num_layers=len(walk.layers),
            num_heads=q.width // head_dim,
            num_kv_heads=k.width // head_dim,
            head_dim=head_dim,
            ffn_dim=first.gate_up.parts[0].width,
            vocab_size=vocab,
            norm_eps=1e-5,
            rope_theta=theta,
            rope_scaling=scaling,
        )
        return config, rotation

    def _prove_block(
        self,
        number: int,
        layer: LayerParts,
        walk: Walk,
        config: LlamaConfig,
        rotation: Rotation,
    ) -> Block:
        """All pieces of a layer."""
        name, tokens = f"layer {number}, ", self._pieces.num_tokens
        attend, qkv = self._attention(layer)
        value = layer.out.linear.x
        self._prove(
            f"{name}attention", value, lambda: probe_attention(attend, config, rotation, tokens)
        )
        value = layer.down.linear.x
        inner, gate_up = layer.gate_up.piece(self._pieces, value), layer.gate_up.parts
        gate, up = self._prove(
            f"{name}feed-forward", value, lambda: sort_swiglu(inner, config.ffn_dim, tokens)
        )
        stream = walk.stream[: 2 * number + 2]
        first = self._shared_norm(f"{name}the norm before attention", qkv, stream[:-1], config)
        last = self._shared_norm(f"{name}the norm before feed-forward", gate_up, stream, config)
        # As the names of `linear_shapes` follow each other.
        parts = [*qkv, layer.out, gate_up[gate], layer.down, gate_up[up]]
        linear = dict(zip(config.linear_shapes(), parts, strict=True))
        for part, (rows, _) in config.linear_shapes().items():
            if linear[part].width != rows:
                found = linear[part].width
                raise self._graph.refuse(f"{name}{part} has {found} rows, expected {rows}")
        return Block(first, last, linear)

    def _shared_norm(
        self, what: str, readers: Sequence[Part], stream: Sequence[str], config: LlamaConfig
    ) -> Norm:
        """The norm that several matrices read; each may have a value of its own."""
        norms = {
            x: self._prove_norm(what, x, stream, config.dim)
            for x in dict.fromkeys(part.linear.x for part in readers)
        }
        if len(set(norms.values())) != 1:
            raise self._graph.refuse(f"{what}: its readers have different norms")
        return next(iter(norms.values()))

    def _prove_norm(self, what: str, value: str, stream: Sequence[str], dim: int) -> Norm:
        """An RMSNorm of the residual stream."""
        inside = self._graph.reached([value], self._walker.edges) & self._graph.weights.keys()
        vectors = [name for name in inside if self._graph.weights[name].shape == (dim,)]
        piece = self._pieces.piece(stream, value)
        tokens, reasons = self._pieces.num_tokens, list[str]()
        # An operator with several results reads the weights of its other results, too.
        candidates: list[str | None] = [*sorted(vectors)] or [None]
        for name in candidates:
            gamma = self._pieces.values(name) if name else np.ones(dim)
            try:
                return Norm(name, probe_norm(piece, len(stream), gamma, tokens))
            except NotRecognized as error:
                reasons.append(str(error))
        raise self._graph.refuse(f"{what} (before {value!r}) {reasons[-1]}")

    def _prove_output(self, output: Linear, vocab: int) -> None:
        """Nothing follows the last matrix."""
        what = "the way from the last matrix to the logits"
        piece = self._pieces.piece([output.node.name], self._logits)
        tokens = self._pieces.num_tokens
        self._prove(what, self._logits, lambda: probe_identity(piece, vocab, tokens))

    def _coverage(self) -> tuple[dict[str, int], int]:
        """Operations that the logits depend on, by kind, and how many others there are."""
        needed = self._graph.reached([self._logits])
        kinds: dict[str, int] = {}
        for node in self._graph.nodes:
            if any(name in needed for name in node.outputs) and node.name not in self._graph.packed:
                kinds[node.op] = kinds.get(node.op, 0) + 1
        every = len(self._graph.nodes) - len(self._graph.packed)
        return kinds, every - sum(kinds.values())
