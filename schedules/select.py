"""Selection of the row whose logits are wanted: y[0] = x[meta[1]]."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

from tvm.tirx import PrimFunc
from tvm.tirx.script.builder import ir as T

from llamac.schedules.intrin.isa import Isa
from llamac.schedules.kernel import KernelBuilder

VERSION = 1
KNOBS: Mapping[str, tuple[int, ...]] = {}


@dataclass(frozen=True)
class TakeRowShape:
    """Rows x [tokens, k]; k is a multiple of 32."""

    tokens: int
    k: int


def valid(shape: TakeRowShape, isa: Isa, knobs: Mapping[str, int]) -> bool:
    """Whether rows are whole vectors."""
    return shape.k % 32 == 0 and not knobs


def default(shape: TakeRowShape, isa: Isa) -> dict[str, int]:
    """No knobs."""
    return {}


def make(shape: TakeRowShape, isa: Isa, *, name: str | None = None) -> PrimFunc:
    """Build `take_row(x f32[T, K], meta i32[2]) -> y f32[1, K]`; work = 1."""
    level = isa.name.replace("-", "_")
    with KernelBuilder(name or f"take_row_{shape.tokens}x{shape.k}_{level}", 1) as b:
        x = b.input("x", (shape.tokens, shape.k), "float32")
        meta = b.input("meta", (2,), "int32")
        y = b.output("y", (1, shape.k), "float32")
        with b.items() as item:
            row = T.Bind(T.Cast("int64", meta[1]))
            with T.serial(0, T.int64(shape.k // isa.lanes)) as i:
                isa.store(y, isa.load(x, row, i * isa.lanes), item, i * isa.lanes)
    return b.func
