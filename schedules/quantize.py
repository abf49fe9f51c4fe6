"""Dynamic quantization of activations to int8 codes, per token and asymmetric (rule "torchao").

Per row x of K floats, every step in float32 with IEEE rounding, ties to even:

    lo = min(min(x), 0)    hi = max(max(x), 0)    s = max((hi - lo) / 255, 2^-23)
    z  = clip(-128 - rint(lo / s), -128, 127)
    q  = clip(rint(x * (1 / s)) + z, -128, 127)

The codes equal `compiler/reference.py` bit for bit. Beside them a row has its (s, z) and, per group
of 32 codes, the offset -8 * sum(q) with which an int4 dot product starts (see `qmatmul.py`).
`QuantizedOutputs` is shared by every kernel that ends in a quantization.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

from tvm.tirx import PrimFunc
from tvm.tirx.script.builder import ir as T

from llamac.schedules.intrin.isa import Isa, lanes_of, vector
from llamac.schedules.kernel import KernelBuilder, local, opaque, store
from llamac.schedules.loop import loop

VERSION = 1
KNOBS: Mapping[str, tuple[int, ...]] = {}

GROUP = 32  # columns per offset; also the step of every loop over a row
OFFSET_FACTOR = -8  # the nibbles of int4 weights are stored as w + 8
MIN_SCALE = 2.0**-23

RowLoader = Callable[[Any], Any]


@dataclass(frozen=True)
class QuantizeShape:
    """codes [tokens, k] from x [tokens, k]; k is a multiple of 32."""

    tokens: int
    k: int


class Range:
    """The running minimum and maximum of a row, one pair of registers per chain of vectors.

    Args:
        isa: instruction set.
        chains: independent chains; one comparison waits for the one before in its chain.
        lanes: of the vectors, default all.
    """

    def __init__(self, isa: Isa, chains: int, lanes: int | None = None) -> None:
        self._isa, self._chains = isa, chains
        lanes = lanes or isa.lanes
        self._low = local(vector("float32", lanes), chains)
        self._high = local(vector("float32", lanes), chains)
        for i in range(chains):
            store(self._low, isa.splat(0.0, lanes), i)
            store(self._high, isa.splat(0.0, lanes), i)

    def add(self, chain: int, value: Any) -> None:
        """Take in a vector."""
        store(self._low, T.min(self._low[chain], value), chain)
        store(self._high, T.max(self._high[chain], value), chain)

    def ends(self) -> tuple[Any, Any]:
        """(min(x, 0), max(x, 0)) of all values taken in, as scalars."""
        low, high = self._low[0], self._high[0]
        for i in range(1, self._chains):
            low, high = T.min(low, self._low[i]), T.max(high, self._high[i])
        return self._isa.reduce_min(low), self._isa.reduce_max(high)


def row_params(isa: Isa, low: Any, high: Any) -> tuple[Any, Any, Any]:
    """(scale, 1 / scale, zero point) as float32 scalars, of a range that contains 0."""
    scale = opaque(T.max((high - low) / T.float32(255), T.float32(MIN_SCALE)), "float32")
    inverse = opaque(T.float32(1) / scale, "float32")
    zero = T.float32(-128) - isa.rint(opaque(low / scale, "float32"))
    zero = T.max(T.min(zero, T.float32(127)), T.float32(-128))
    return scale, inverse, opaque(zero, "float32")


def code_lanes(isa: Isa, value: Any, inverse: Any, zero: Any) -> Any:
    """int32 lanes with the codes of a vector of values; `inverse` and `zero` are splats."""
    lanes = lanes_of(value)
    rounded = isa.rint(T.Bind(value * inverse)) + zero
    clipped = T.max(T.min(rounded, isa.splat(127.0, lanes)), isa.splat(-128.0, lanes))
    return T.Bind(T.Cast(vector("int32", lanes), clipped))


class QuantizedOutputs:
    """The output tensors of a quantization: codes, (scale, zero point) and group offsets."""

    def __init__(self, b: KernelBuilder, isa: Isa, tokens: int, k: int) -> None:
        self._isa, self._k = isa, k
        self._codes = b.output("codes", (tokens, k), "int8")
        self._qparams = b.output("qparams", (tokens, 2), "float32")
        self._offsets = b.output("offsets", (tokens, k // GROUP), "int32")

    def write(self, row: Any, load: RowLoader, ends: tuple[Any, Any]) -> None:
        """Quantize one row.

        Args:
            row: its index.
            load: gives the float32 vector at a column; must give the same each time.
            ends: the row's range, see `row_range`.
        """
        isa = self._isa
        scale, inverse, zero = row_params(isa, *ends)
        store(self._qparams, scale, row, 0)
        store(self._qparams, zero, row, 1)
        inverses, zeros = T.Bind(isa.splat(inverse)), T.Bind(isa.splat(zero))
        with loop(self._k // GROUP) as group:
            total = isa.splat(T.int32(0))
            for offset in range(0, GROUP, isa.lanes):
                column = group * GROUP + offset
                codes = code_lanes(isa, load(column), inverses, zeros)
                isa.store(self._codes, T.Cast(f"int8x{isa.lanes}", codes), row, column)
                total = total + codes
            store(self._offsets, isa.reduce_add(total) * T.int32(OFFSET_FACTOR), row, group)


def row_range(isa: Isa, k: int, load: RowLoader) -> tuple[Any, Any]:
    """The range of a row, widened to contain 0."""
    ends = Range(isa, GROUP // isa.lanes)
    with loop(k // GROUP) as group:
        for i in range(GROUP // isa.lanes):
            ends.add(i, load(group * GROUP + i * isa.lanes))
    return ends.ends()


def valid(shape: QuantizeShape, isa: Isa, knobs: Mapping[str, int]) -> bool:
    """Whether rows are cut into whole groups."""
    return shape.k % GROUP == 0 and not knobs


def default(shape: QuantizeShape, isa: Isa) -> dict[str, int]:
    """No knobs: the kernel reads a row twice, the second time from the first-level cache."""
    return {}


def make(shape: QuantizeShape, isa: Isa, *, name: str | None = None) -> PrimFunc:
    """Build `quantize(x f32[T,K]) -> codes i8[T,K], qparams f32[T,2], offsets i32[T,K/32]`."""
    symbol = name or f"quantize_qai8dx_f32_{shape.tokens}x{shape.k}_{isa.suffix}"
    with KernelBuilder(symbol, shape.tokens) as b:
        x = b.input("x", (shape.tokens, shape.k), "float32")
        out = QuantizedOutputs(b, isa, shape.tokens, shape.k)
        with b.items() as row:

            def load(column: Any) -> Any:
                return T.Bind(isa.load(x, row, column))

            out.write(row, load, row_range(isa, shape.k, load))
    return b.func
