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

from llamac.schedules.convert import narrow
from llamac.schedules.intrin.isa import Isa
from llamac.schedules.kernel import KernelBuilder, opaque, store
from llamac.schedules.loop import loop
from llamac.schedules.quantized import Quantization
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
        turns: codes of the rows of the table; None: float16.
        mask: codes of the mask, whose smallest stands for MASKED; None: float16.
    """

    tokens: int
    positions: int
    head_dim: int
    capacity: int
    turns: Quantization | None = None
    mask: Quantization | None = None


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
    chunk and for the tokens of the chunk up to the row's own, MASKED for all others. With codes,
    the outputs are codes of the same values; what is masked has the smallest code.
    """
    half = shape.head_dim // 2
    symbol = name or f"positions_{shape.tokens}x{shape.head_dim}_c{shape.capacity}_{isa.suffix}"
    with KernelBuilder(symbol, shape.tokens) as b:
        table = b.input("table", (shape.positions, 2, shape.head_dim), "float32")
        meta = b.input("meta", (2,), "int32")
        turns = (shape.tokens, 1, half, 1), _dtype(shape.turns)
        cos, sin = (b.output(name, *turns) for name in ("cos", "sin"))
        columns = (shape.tokens, shape.capacity + shape.tokens)
        mask = b.output("mask", columns, _dtype(shape.mask))
        with b.items() as token:
            first = opaque(T.Cast("int64", meta[0]))
            with loop(half) as i:
                # Rows of the table: c0, c0, c1, c1, ... and -s0, s0, -s1, s1, ...
                for place, row in ((cos, 0), (sin, 1)):
                    value = table[first + token, row, i * 2 + 1]
                    store(place, narrow(isa, value, shape.turns), token, 0, i, 0)
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
        isa.store(mask, _seen(isa, shape, position < end, lanes), token, column, lanes=lanes)


def _mask_chunk(mask: tirx.Buffer, shape: PositionsShape, isa: Isa, token: Any) -> None:
    """The columns of the chunk itself: a token sees those before it and itself."""
    with loop(shape.tokens) as i:
        store(mask, _seen(isa, shape, i <= token, 1), token, shape.capacity + i)


def _seen(isa: Isa, shape: PositionsShape, condition: Any, lanes: int) -> Any:
    """0 where a condition holds, MASKED where not."""
    values: tuple[Any, Any] = (T.float16(0.0), T.float16(MASKED))
    if shape.mask is not None:
        codes = (shape.mask.zero_point, shape.mask.limits[0])
        values = tuple(T.IntImm(shape.mask.dtype, code) for code in codes)
    return T.Select(condition, *(isa.splat(value, lanes) for value in values))


def _dtype(codes: Quantization | None) -> str:
    return "float16" if codes is None else codes.dtype
