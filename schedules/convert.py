"""Float32 activations as float16 and back, at the edges of a graph that computes in float16."""

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
class ConvertShape:
    """Rows of `k` values, a multiple of 32; `to` is "float16" or "float32"."""

    tokens: int
    k: int
    to: str


def valid(shape: ConvertShape, isa: Isa, knobs: Mapping[str, int]) -> bool:
    """Whether a row is cut into whole vectors."""
    return shape.k % 32 == 0 and shape.to in ("float16", "float32") and not knobs


def default(shape: ConvertShape, isa: Isa) -> dict[str, int]:
    """No knobs."""
    return {}


def make(shape: ConvertShape, isa: Isa, *, name: str | None = None) -> PrimFunc:
    """Build the kernel; work = tokens.

    To float16 its arguments are x f32 [T, K] and y f16 [1, T, K], as graphs have it; to float32
    they are x f16 [1, T, K] and y f32 [T, K]. Rounds half to even.
    """
    rows, graph = (shape.tokens, shape.k), (1, shape.tokens, shape.k)
    narrows = shape.to == "float16"
    symbol = name or f"convert_{shape.to}_{shape.tokens}x{shape.k}_{isa.suffix}"
    with KernelBuilder(symbol, shape.tokens) as b:
        x = b.input("x", rows if narrows else graph, "float32" if narrows else "float16")
        y = b.output("y", graph if narrows else rows, shape.to)
        with b.items() as token:
            with loop(shape.k // isa.lanes) as i:
                column = i * isa.lanes
                if narrows:
                    value = T.Bind(isa.load(x, token, column))
                    isa.store(y, isa.to_float16(value), 0, token, column)
                else:
                    value = T.Bind(isa.load(x, 0, token, column))
                    isa.store(y, isa.to_float32(value), token, column)
    return b.func
