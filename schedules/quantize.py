"""Dynamic quantization of activations to int8 codes, per token and asymmetric (rule "torchao").

Per row x of K floats, every step in float32 with IEEE rounding, ties to even:

    lo = min(min(x), 0)    hi = max(max(x), 0)    s = max((hi - lo) / 255, 2^-23)
    z  = clip(-128 - rint(lo / s), -128, 127)
    q  = clip(rint(x * (1 / s)) + z, -128, 127)

The codes equal `compiler/reference.py` bit for bit. Beside them a row has its (s, z).
`QuantizedOutputs` is shared by every kernel that ends in a quantization; `Isa.codes` says what the
matrix products of an instruction set want to read:

    offset rows   codes [T, K], and per group of 32 codes the offset -8 * sum(q) with which the dot
                  product of unsigned nibbles starts (see `qmatmul.py`)
    pairs         no offsets. One token: [1, K]. More: panels of 16 tokens [T/16, K/32, 512], in
                  which a group is 8 pairs of tokens x 4 vectors of 16 bytes. Vector t holds, of the
                  first, then of the second token, the 8 codes of two chunks of 4: (0, 2), (1, 3),
                  (4, 6), (5, 7). This is how int4 matrix products meet them (`qmatmul_quads.py`).
                  T is rounded up; what no token fills is never written.
    panels        as pairs, but a group is 8 chunks x 16 tokens x 4 codes: a vector of 64 bytes for
                  outer products (`qmatmul_sme.py`).
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

from tvm.tirx import PrimFunc
from tvm.tirx.script.builder import ir as T

from llamac.schedules.intrin.isa import Isa, join, lanes_of, vector
from llamac.schedules.kernel import KernelBuilder, local, opaque, store
from llamac.schedules.loop import loop

VERSION = 1
KNOBS: Mapping[str, tuple[int, ...]] = {}

GROUP = 32  # columns per offset; also the step of every loop over a row
OFFSET_FACTOR = -8  # the nibbles of int4 weights are stored as w + 8
PANEL = 16  # tokens of a panel of paired codes
CHUNK_PAIRS = ((0, 2), (1, 3), (4, 6), (5, 7))
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


def has_offsets(isa: Isa) -> bool:
    """Whether a quantization also stores the group offsets."""
    return isa.codes == "offset rows"


def codes_shape(isa: Isa, tokens: int, k: int) -> tuple[int, ...]:
    """Shape of the codes of `tokens` rows of k values."""
    if has_offsets(isa) or tokens == 1:
        return (tokens, k)
    return (-(-tokens // PANEL), k // GROUP, PANEL * GROUP)


class QuantizedOutputs:
    """The output tensors of a quantization: codes, (scale, zero point), group offsets if any."""

    def __init__(self, b: KernelBuilder, isa: Isa, tokens: int, k: int) -> None:
        self._isa, self._k = isa, k
        self._is_paired = isa.codes == "pairs" and tokens > 1
        self._is_in_panels = isa.codes == "panels" and tokens > 1
        self._codes = b.output("codes", codes_shape(isa, tokens, k), "int8")
        self._qparams = b.output("qparams", (tokens, 2), "float32")
        if has_offsets(isa):
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
            columns = [group * GROUP + offset for offset in range(0, GROUP, isa.lanes)]
            codes = [code_lanes(isa, load(column), inverses, zeros) for column in columns]
            if self._is_paired:
                self._store_pairs(row, group, codes)
            elif self._is_in_panels:
                self._store_panel(row, group, codes)
            else:
                self._store_row(row, group, codes)
            if has_offsets(isa):
                total = codes[0]
                for more in codes[1:]:
                    total = total + more
                store(self._offsets, isa.reduce_add(total) * T.int32(OFFSET_FACTOR), row, group)

    def _store_row(self, row: Any, group: Any, codes: list[Any]) -> None:
        """Store the int32 codes of a group in their order, 16 at a time or more."""
        step = max(1, 16 // self._isa.lanes)
        for i in range(0, len(codes), step):
            wide = join(codes[i : i + step])
            narrow = T.Cast(f"int8x{lanes_of(wide)}", wide)
            column = group * GROUP + i * self._isa.lanes
            self._isa.store(self._codes, narrow, row, column, lanes=lanes_of(wide))

    def _store_pairs(self, row: Any, group: Any, codes: list[Any]) -> None:
        """Store the chunks of a group, each an int32x4, where the token's pair has its place."""
        panel, token = row // PANEL, row % PANEL
        first = T.Bind(token // 2 * (2 * GROUP) + token % 2 * 8)
        for t, (a, b) in enumerate(CHUNK_PAIRS):
            narrow = T.Cast("int8x8", join([codes[a], codes[b]]))
            self._isa.store(self._codes, narrow, panel, group, first + t * 16, lanes=8)

    def _store_panel(self, row: Any, group: Any, codes: list[Any]) -> None:
        """Store the chunks of a group, each an int32x4, at the token's place in the panel."""
        panel, first = row // PANEL, T.Bind(row % PANEL * 4)
        for chunk, values in enumerate(codes):
            narrow = T.Cast("int8x4", values)
            self._isa.store(self._codes, narrow, panel, group, first + chunk * 4 * PANEL, lanes=4)


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
    """Build `quantize(x f32[T,K]) -> codes i8, qparams f32[T,2]`, offsets i32[T,K/32] if any."""
    symbol = name or f"quantize_qai8dx_f32_{shape.tokens}x{shape.k}_{isa.suffix}"
    with KernelBuilder(symbol, shape.tokens, alignment=isa.alignment) as b:
        x = b.input("x", (shape.tokens, shape.k), "float32")
        out = QuantizedOutputs(b, isa, shape.tokens, shape.k)
        with b.items() as row:

            def load(column: Any) -> Any:
                return T.Bind(isa.load(x, row, column))

            out.write(row, load, row_range(isa, shape.k, load))
    return b.func
