"""RMS normalization, alone or followed by quantization.

    r = 1 / sqrt(mean(x^2) + eps)        y = (x * r) * gamma

`rms_norm` stores y. `rms_norm_quantize` stores the int8 codes of y (`schedules/quantize.py`) and
never writes y to memory: a row is read three times, from the first-level cache after the first
time. When somebody needs y too (a LoRA branch works on the unquantized input), `with_float` stores
it as well.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from tvm import tirx
from tvm.tirx import PrimFunc
from tvm.tirx.script.builder import ir as T

from llamac.schedules.intrin.isa import Isa, intrinsic
from llamac.schedules.kernel import KernelBuilder, local, store
from llamac.schedules.loop import loop
from llamac.schedules.quantize import GROUP, QuantizedOutputs, Range

VERSION = 1
KNOBS: Mapping[str, tuple[int, ...]] = {}


@dataclass(frozen=True)
class RmsNormShape:
    """Rows x [tokens, k] and gamma [k]; k is a multiple of 32.

    Attributes:
        tokens: rows.
        k: columns.
        eps: added to the mean square.
        quantize: end in int8 codes.
        with_float: when quantizing, store y too.
    """

    tokens: int
    k: int
    eps: float
    quantize: bool = True
    with_float: bool = False


def valid(shape: RmsNormShape, isa: Isa, knobs: Mapping[str, int]) -> bool:
    """Whether rows are cut into whole groups."""
    return shape.k % GROUP == 0 and not knobs


def default(shape: RmsNormShape, isa: Isa) -> dict[str, int]:
    """No knobs."""
    return {}


def make(shape: RmsNormShape, isa: Isa, *, name: str | None = None) -> PrimFunc:
    """Build `rms_norm(x f32[T,K], gamma f32[K]) -> y f32[T,K]`, or with `shape.quantize`.

    `rms_norm_quantize(x, gamma) -> codes, qparams (and offsets) as in `quantize.py`, and
    y f32[T,K] after them with `shape.with_float`.
    """
    with KernelBuilder(name or _name(shape, isa), shape.tokens, alignment=isa.alignment) as b:
        x = b.input("x", (shape.tokens, shape.k), "float32")
        gamma = b.input("gamma", (shape.k,), "float32")
        out = QuantizedOutputs(b, isa, shape.tokens, shape.k) if shape.quantize else None
        y = None
        if shape.with_float or not shape.quantize:
            y = b.output("y", (shape.tokens, shape.k), "float32")
        with b.items() as row:
            factor = T.Bind(isa.splat(_inverse_rms(isa, x, row, shape)))

            def load(column: Any) -> Any:
                return T.Bind(T.Bind(isa.load(x, row, column) * factor) * isa.load(gamma, column))

            ends = Range(isa, GROUP // isa.lanes)
            with loop(shape.k // GROUP) as group:
                for i in range(GROUP // isa.lanes):
                    column = group * GROUP + i * isa.lanes
                    value = load(column)
                    if y is not None:
                        isa.store(y, value, row, column)
                    if out is not None:
                        ends.add(i, value)
            if out is not None:
                out.write(row, load, ends.ends())
    return b.func


def _name(shape: RmsNormShape, isa: Isa) -> str:
    op = "rms_norm_quantize_qai8dx" if shape.quantize else "rms_norm_f32"
    tail = "_with_float" if shape.quantize and shape.with_float else ""
    return f"{op}_f32_f32_{shape.tokens}x{shape.k}{tail}_{isa.suffix}"


def _inverse_rms(isa: Isa, x: tirx.Buffer, row: Any, shape: RmsNormShape) -> Any:
    """1 / sqrt(mean(x^2) + eps) of one row."""
    vectors = GROUP // isa.lanes
    sums = local(f"float32x{isa.lanes}", vectors)
    for i in range(vectors):
        store(sums, isa.splat(0.0), i)
    with loop(shape.k // GROUP) as group:
        for i in range(vectors):
            value = T.Bind(isa.load(x, row, group * GROUP + i * isa.lanes))
            store(sums, isa.fma(value, value, sums[i]), i)
    total = sums[0]
    for i in range(1, vectors):
        total = total + sums[i]
    mean = isa.reduce_add(total) / T.float32(shape.k)
    root = intrinsic("float32", "llvm.sqrt.f32", mean + T.float32(shape.eps))
    return T.Bind(T.float32(1) / root)
