"""Orthonormal Walsh-Hadamard transform of rows (SpinQuant's online R4), and its quantized form.

    y = H x / sqrt(k),  H natural (Sylvester) order, k a power of two

log2(k) stages of butterflies (a, b) -> (a + b, a - b) at distance 1, 2, 4, ... A pass over the row
does several stages in registers: the first one those within a vector (shuffles) and across up to 8
neighbouring vectors, the others three more each (radix 8). The row lives in `scratch`, which stays
in the first-level cache: 8192 floats need three passes with 16 lanes.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from tvm import tirx
from tvm.tirx import PrimFunc
from tvm.tirx.script.builder import ir as T

from llamac.schedules.intrin.isa import Isa, pick
from llamac.schedules.kernel import KernelBuilder
from llamac.schedules.loop import loop
from llamac.schedules.quantize import QuantizedOutputs, row_range

VERSION = 1
KNOBS: Mapping[str, tuple[int, ...]] = {"radix": (2, 4, 8)}  # vectors of a pass in registers


@dataclass(frozen=True)
class HadamardShape:
    """Rows [tokens, k], k a power of two and at least 32; `quantize` ends in int8 codes."""

    tokens: int
    k: int
    quantize: bool = True


def valid(shape: HadamardShape, isa: Isa, knobs: Mapping[str, int]) -> bool:
    """Whether the length is a power of two and of two vectors, and a pass fits the registers."""
    power = shape.k >= max(32, 2 * isa.lanes) and shape.k & (shape.k - 1) == 0
    return power and knobs["radix"] + 4 <= isa.registers


def default(shape: HadamardShape, isa: Isa) -> dict[str, int]:
    """Radix 8."""
    return {"radix": 8}


def make(shape: HadamardShape, isa: Isa, *, radix: int, name: str | None = None) -> PrimFunc:
    """Build `hadamard(x f32[T, K]) -> y f32[T, K]`; work = T.

    With `shape.quantize`: `(x) -> codes, qparams (and offsets) as in `quantize.py`, then y`.
    """
    level = isa.name.replace("-", "_")
    name = (
        name or f"hadamard{'_quantize' if shape.quantize else ''}_{shape.tokens}x{shape.k}_{level}"
    )
    with KernelBuilder(name, shape.tokens, alignment=isa.alignment) as b:
        x = b.input("x", (shape.tokens, shape.k), "float32")
        out = QuantizedOutputs(b, isa, shape.tokens, shape.k) if shape.quantize else None
        y = b.output("y", (shape.tokens, shape.k), "float32")
        with b.items() as row:
            _transform(shape, isa, radix, x, y, row)
            if out is not None:

                def load(column: Any) -> Any:
                    return T.Bind(isa.load(y, row, column))

                out.write(row, load, row_range(isa, shape.k, load))
    return b.func


def _transform(shape: HadamardShape, isa: Isa, radix: int, x: Any, y: Any, row: Any) -> None:
    """Emit the passes over one row; the last one scales."""
    vectors = shape.k // isa.lanes
    source, stride = x, 1
    while stride < vectors:
        count = min(radix, vectors // stride)
        is_last = stride * count == vectors
        with loop(vectors // (stride * count)) as outer, loop(stride) as inner:
            first = (outer * (stride * count) + inner) * isa.lanes
            columns = [first + i * stride * isa.lanes for i in range(count)]
            values = [T.Bind(isa.load(source, row, column)) for column in columns]
            if stride == 1:
                values = [_within(isa, value) for value in values]
            values = butterflies(values)
            for column, value in zip(columns, values, strict=True):
                factor = isa.splat(1.0 / math.sqrt(shape.k))
                isa.store(y, value * factor if is_last else value, row, column)
        source, stride = y, stride * count


def butterflies(values: Sequence[Any]) -> list[Any]:
    """All stages across the vectors of a pass."""
    values, distance = list(values), 1
    while distance < len(values):
        for i in range(len(values)):
            if not i & distance:
                a, b = values[i], values[i + distance]
                values[i], values[i + distance] = T.Bind(a + b), T.Bind(a - b)
        distance *= 2
    return values


def _within(isa: Isa, value: Any) -> Any:
    """All stages within a vector: add the vector with lanes swapped to itself with signs."""
    distance = 1
    while distance < isa.lanes:
        swapped = pick(value, [lane ^ distance for lane in range(isa.lanes)])
        signs = [T.float32(-1 if lane & distance else 1) for lane in range(isa.lanes)]
        sign = tirx.Shuffle(signs, [T.int32(lane) for lane in range(isa.lanes)])
        value = T.Bind(isa.fma(value, sign, swapped))
        distance *= 2
    return value
