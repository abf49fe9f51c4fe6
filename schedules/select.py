"""Selection of one row: y = x[meta[1]], the last valid token of a padded chunk."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

from tvm.tirx import PrimFunc
from tvm.tirx.script.builder import ir as T

from llamac.schedules.intrin.isa import Isa
from llamac.schedules.kernel import KernelBuilder
from llamac.schedules.loop import loop

VERSION = 1
KNOBS: Mapping[str, tuple[int, ...]] = {}


@dataclass(frozen=True)
class TakeRowShape:
    """y [1, k] from x [tokens, k]; k is a multiple of 32."""

    tokens: int
    k: int


def valid(shape: TakeRowShape, isa: Isa, knobs: Mapping[str, int]) -> bool:
    """Whether a row is cut into whole vectors."""
    return shape.k % 32 == 0 and not knobs


def default(shape: TakeRowShape, isa: Isa) -> dict[str, int]:
    """No knobs."""
    return {}


def make(shape: TakeRowShape, isa: Isa, *, name: str | None = None) -> PrimFunc:
    """Build `take_row(x f32[T,K], meta i32[2]) -> y f32[1,K]`; work = 1."""
    symbol = name or f"take_row_f32_f32_{shape.tokens}x{shape.k}_{isa.suffix}"
    with KernelBuilder(symbol, 1, alignment=isa.alignment) as b:
        x = b.input("x", (shape.tokens, shape.k), "float32")
        meta = b.input("meta", (2,), "int32")
        y = b.output("y", (1, shape.k), "float32")
        with b.items() as item:
            row = T.Bind(T.Cast("int64", meta[1]))
            with loop(shape.k // isa.lanes) as i:
                isa.store(y, isa.load(x, row, i * isa.lanes), item, i * isa.lanes)
    return b.func
