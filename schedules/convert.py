"""Float32 activations in the dtype of a graph's edge and back: float16, or codes of 16 bits."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import numpy as np
from tvm.tirx import PrimFunc
from tvm.tirx.script.builder import ir as T

from llamac.schedules.intrin.isa import Isa, lanes_of, vector
from llamac.schedules.kernel import KernelBuilder
from llamac.schedules.loop import loop
from llamac.schedules.quantized import Quantization

VERSION = 1
KNOBS: Mapping[str, tuple[int, ...]] = {}


@dataclass(frozen=True)
class ConvertShape:
    """A conversion of the residual stream.

    Attributes:
        tokens: rows.
        k: values of a row, a multiple of 32.
        to_graph: to what the graph has, or from it.
        codes: what the graph has; None: float16.
    """

    tokens: int
    k: int
    to_graph: bool
    codes: Quantization | None = None

    @property
    def dtype(self) -> str:
        """Of the graph's side."""
        return "float16" if self.codes is None else self.codes.dtype


def valid(shape: ConvertShape, isa: Isa, knobs: Mapping[str, int]) -> bool:
    """Whether a row is cut into whole vectors."""
    return shape.k % 32 == 0 and shape.dtype in ("float16", "int16", "uint16") and not knobs


def default(shape: ConvertShape, isa: Isa) -> dict[str, int]:
    """No knobs."""
    return {}


def make(shape: ConvertShape, isa: Isa, *, name: str | None = None) -> PrimFunc:
    """Build the kernel; work = tokens.

    To the graph its arguments are x f32 [T, K] and y [1, T, K], as graphs have it; from it they are
    x [1, T, K] and y f32 [T, K]. Float16 rounds half to even. Codes are

        clamp(rint(x * (1 / scale)) + zero_point)      all in float32, and back
        float32(code - zero_point) * scale
    """
    rows, graph = (shape.tokens, shape.k), (1, shape.tokens, shape.k)
    direction = "to" if shape.to_graph else "from"
    symbol = name or f"convert_{direction}_{shape.dtype}_{shape.tokens}x{shape.k}_{isa.suffix}"
    with KernelBuilder(symbol, shape.tokens) as b:
        if shape.to_graph:
            x, y = b.input("x", rows, "float32"), b.output("y", graph, shape.dtype)
        else:
            x, y = b.input("x", graph, shape.dtype), b.output("y", rows, "float32")
        with b.items() as token:
            with loop(shape.k // isa.lanes) as i:
                column = i * isa.lanes
                if shape.to_graph:
                    value = T.Bind(isa.load(x, token, column))
                    isa.store(y, narrow(isa, value, shape.codes), 0, token, column)
                else:
                    value = T.Bind(isa.load(x, 0, token, column))
                    isa.store(y, _widen(isa, value, shape.codes), token, column)
    return b.func


def narrow(isa: Isa, value: Any, codes: Quantization | None) -> Any:
    """Float32 lanes, or one float32, in the dtype of an edge."""
    if codes is None:
        return isa.to_float16(value)
    lanes = lanes_of(value)
    first, last = codes.limits
    inverse = float(np.float32(1) / np.float32(codes.scale))
    scaled = T.Bind(value * isa.splat(inverse, lanes))
    code = isa.rint(scaled) + isa.splat(float(codes.zero_point), lanes)
    code = T.max(T.min(code, isa.splat(float(last), lanes)), isa.splat(float(first), lanes))
    whole = T.Bind(T.Cast(vector("int32", lanes), code))
    return T.Cast(vector(codes.dtype, lanes), whole)


def _widen(isa: Isa, value: Any, codes: Quantization | None) -> Any:
    if codes is None:
        return isa.to_float32(value)
    whole = T.Cast(vector("int32", isa.lanes), value) - isa.splat(T.int32(codes.zero_point))
    return isa.to_float32(T.Bind(whole)) * isa.splat(codes.scale)
