"""What a graph must be told of the tokens' positions: rows of the RoPE table, and a mask.

A graph has no loops over positions and no branches: it looks at the whole cache and at the new
tokens behind it, and what a token must not see gets a score so low that its weight is 0.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from tvm import tirx
from tvm.tirx import PrimFunc
from tvm.tirx.script.builder import ir as T

from llamac.schedules.intrin.isa import Isa
from llamac.schedules.kernel import KernelBuilder, opaque, store
from llamac.schedules.loop import loop
from llamac.schedules.rope import BLOCK

VERSION = 1
KNOBS: Mapping[str, tuple[int, ...]] = {}

MASKED = -1000.0
"""In the mask, for keys that are not seen; what a graph makes of it is its own affair."""


@dataclass(frozen=True)
class PositionsShape:
    """A chunk of tokens before a cache.

    Attributes:
        tokens: T, of the chunk.
        positions: rows of the RoPE table; every position of a chunk must be below.
        head_dim: D.
        capacity: positions of the cache, C, a multiple of 16.
    """

    tokens: int
    positions: int
    head_dim: int
    capacity: int


def valid(shape: PositionsShape, isa: Isa, knobs: Mapping[str, int]) -> bool:
    """Whether the cache is cut into whole vectors."""
    return shape.capacity % BLOCK == 0 and shape.head_dim % 2 == 0 and not knobs


def default(shape: PositionsShape, isa: Isa) -> dict[str, int]:
    """No knobs."""
    return {}


def make(shape: PositionsShape, isa: Isa, *, name: str | None = None) -> PrimFunc:
    """Build the kernel; work = tokens.

    Arguments of the kernel: table f32 [P, 2, D] in the layout of `rope.py`, meta i32 [2], and the
    outputs cos and sin f16 [T, 1, D/2, 1] and mask f16 [T, C + T]: 0 for the positions before the
    chunk and for the tokens of the chunk up to the row's own, MASKED for all others.
    """
    half = shape.head_dim // 2
    symbol = name or f"positions_{shape.tokens}x{shape.head_dim}_c{shape.capacity}_{isa.suffix}"
    with KernelBuilder(symbol, shape.tokens) as b:
        table = b.input("table", (shape.positions, 2, shape.head_dim), "float32")
        meta = b.input("meta", (2,), "int32")
        cos, sin = (b.output(n, (shape.tokens, 1, half, 1), "float16") for n in ("cos", "sin"))
        mask = b.output("mask", (shape.tokens, shape.capacity + shape.tokens), "float16")
        with b.items() as token:
            first = opaque(T.Cast("int64", meta[0]))
            with loop(half) as i:
                # Rows of the table: c0, c0, c1, c1, ... and -s0, s0, -s1, s1, ...
                for place, row in ((cos, 0), (sin, 1)):
                    value = table[first + token, row, i * 2 + 1]
                    store(place, isa.to_float16(value), token, 0, i, 0)
            _mask_past(mask, shape, isa, token, first)
            _mask_chunk(mask, shape, isa, token)
    return b.func


def _mask_past(mask: tirx.Buffer, shape: PositionsShape, isa: Isa, token: Any, first: Any) -> None:
    """The columns of the cache: positions before the chunk are seen."""
    lanes = min(isa.lanes, BLOCK)
    end = T.Bind(isa.splat(T.Cast("int32", first), lanes))
    with loop(shape.capacity // lanes) as i:
        column = i * lanes
        position = T.ramp(T.Cast("int32", column), 1, lanes)
        isa.store(mask, _seen(isa, position < end, lanes), token, column, lanes=lanes)


def _mask_chunk(mask: tirx.Buffer, shape: PositionsShape, isa: Isa, token: Any) -> None:
    """The columns of the chunk itself: a token sees those before it and itself."""
    with loop(shape.tokens) as i:
        store(mask, _seen(isa, i <= token, 1), token, shape.capacity + i)


def _seen(isa: Isa, condition: Any, lanes: int) -> Any:
    """0 where a condition holds, MASKED where not."""
    zero, masked = (isa.splat(T.float16(value), lanes) for value in (0.0, MASKED))
    return T.Select(condition, zero, masked)
