"""The vector instruction set as generators see it: lanes, registers and a few operations.

Generators are written once over `Isa`; a subclass overrides the operations for which its processor
has an instruction. The base class uses plain TIR and is therefore correct on every LLVM target.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from tvm import tirx
from tvm.tirx.script.builder import ir as T

LOG2_E = 1.4426950408889634
# ln 2 as a sum of two floats: the first has few mantissa bits, so n * LN2_HI is exact.
LN2_HI = 0.693359375
LN2_LO = -2.12194440e-4
# Adding and subtracting 1.5 * 2^23 rounds a float32 below 2^22 to an integer, half to even.
ROUND_MAGIC = 12582912.0
# Minimax coefficients of (e^r - 1 - r) / r^2 on |r| <= ln 2 / 2, highest power first
# (the single-precision set of the Cephes library, S. Moshier).
EXP_COEFFICIENTS = (
    1.9875691500e-4,
    1.3981999507e-3,
    8.3334519073e-3,
    4.1665795894e-2,
    1.6666665459e-1,
    5.0000001201e-1,
)
EXP_MIN, EXP_MAX = -87.0, 88.0


class Isa:
    """One instruction set: how many lanes a vector has and which LLVM target compiles it.

    Attributes:
        name: as in kernel names and in the manifest, e.g. "avx2".
        lanes: float32 values in one vector register.
        registers: vector registers that the register allocator may use.
        features: CPU features that must all be present at load, in the manifest's words.
        target: the TVM target as a dict.
        codes: how the bytes of activation codes are arranged, see `schedules/quantize.py`.
        alignment: bytes to which every tensor of a kernel is aligned.
    """

    name: str = "generic"
    lanes: int = 4
    registers: int = 16
    features: tuple[str, ...] = ()
    target: dict[str, Any] = {"kind": "llvm"}  # noqa: RUF012 (read only)
    codes: str = "offset rows"
    alignment: int = 64

    @property
    def suffix(self) -> str:
        """The name as it stands at the end of kernel names."""
        return self.name.replace("-", "_")

    def scheduled_for(self, mcpu: str) -> Isa:
        """The same instructions, scheduled by LLVM for a core; most sets know one schedule."""
        return self

    @property
    def scalar(self) -> Isa | None:
        """The set for kernels whose tensors do not fit its vectors, None: all of them fit."""
        return None

    def for_family(self, family: str) -> Isa:
        """The instruction set of a level's kernels of a family; most levels are one set."""
        return self

    # -- moving data -----------------------------------------------------------------------------

    def load(self, buffer: tirx.Buffer, *index: Any, lanes: int | None = None) -> Any:
        """Load consecutive values of the last axis, starting at `index`."""
        *outer, last = index
        count = lanes or self.lanes
        return buffer[(*outer, T.ramp(last, 1, count) if count > 1 else last)]

    def store(self, buffer: tirx.Buffer, value: Any, *index: Any, lanes: int | None = None) -> None:
        """Store a vector at consecutive places of the last axis, starting at `index`."""
        *outer, last = index
        count = lanes or self.lanes
        T.buffer_store(buffer, value, [*outer, T.ramp(last, 1, count) if count > 1 else last])

    def splat(self, value: Any, lanes: int | None = None) -> Any:
        """Repeat a scalar (a Python float is float32) in all lanes."""
        scalar = T.float32(value) if isinstance(value, float) else value
        count = lanes or self.lanes
        return T.broadcast(scalar, count) if count > 1 else scalar

    def splat_bytes(self, word: Any) -> Any:
        """Repeat four bytes, given as one int32, in all lanes: int8 x 4 * lanes."""
        return T.reinterpret(f"int8x{4 * self.lanes}", T.broadcast(word, self.lanes))

    def prefetch(self, buffer: tirx.Buffer, *index: Any) -> None:
        """Ask for the cache line of an element, which may lie beyond the end of the buffer."""
        address = T.address_of(buffer[index])
        T.evaluate(
            T.call_llvm_intrin(
                "void", "llvm.prefetch.p0", address, T.int32(0), T.int32(3), T.int32(1)
            )
        )

    # -- conversions -----------------------------------------------------------------------------

    def to_float32(self, value: Any, lanes: int | None = None) -> Any:
        """Convert int32, float16 or int8 lanes to float32."""
        return T.Cast(vector("float32", lanes or self.lanes), value)

    def to_float16(self, value: Any) -> Any:
        """Convert float32 lanes to float16, rounding half to even."""
        return T.Cast(vector("float16", lanes_of(value)), value)

    def bfloat16_to_float32(self, bits: Any, lanes: int | None = None) -> Any:
        """Widen bfloat16 bits held as uint16."""
        count = lanes or self.lanes
        wide = T.Cast(vector("uint32", count), bits)
        return T.reinterpret(
            vector("float32", count), T.shift_left(wide, self.splat(T.uint32(16), count))
        )

    def load_scales(self, buffer: tirx.Buffer, dtype: str, *index: Any) -> Any:
        """Load float16 or bfloat16 (stored as uint16) values as float32."""
        value = self.load(buffer, *index)
        return self.bfloat16_to_float32(value) if dtype == "bfloat16" else self.to_float32(value)

    def half_to_float32(self, words: Any, half: Any) -> Any:
        """One float16 of each word; sets whose caches hold such words have it."""
        raise NotImplementedError(self.name)

    # -- arithmetic ------------------------------------------------------------------------------

    def fma(self, a: Any, b: Any, c: Any) -> Any:
        """A * b + c in float32; the base class rounds twice."""
        return a * b + c

    def rint(self, value: Any) -> Any:
        """Round to the nearest integer, half to even, for |value| < 2^22."""
        lanes = lanes_of(value)
        magic = self.splat(ROUND_MAGIC, lanes)
        # TVM's simplifier would fold (v + magic) - magic; it does not look through the bits.
        bits = T.Bind(T.reinterpret(vector("int32", lanes), value + magic))
        return T.reinterpret(vector("float32", lanes), bits) - magic

    def dot_u4s8(self, acc: Any, lhs: Any, rhs: Any) -> Any:
        """acc[i] += sum of 4 products of uint8 (below 16) and int8 lanes 4i .. 4i+3."""
        return self.dot_u8s8(acc, lhs, rhs)

    def dot_u8s8(self, acc: Any, lhs: Any, rhs: Any) -> Any:
        """acc[i] += sum of 4 products of uint8 and int8 lanes 4i .. 4i+3, exact."""
        wide = f"int32x{4 * self.lanes}"
        products = T.Bind(T.Cast(wide, lhs) * T.Cast(wide, rhs))
        for byte in range(4):
            acc = acc + pick(products, range(byte, 4 * self.lanes, 4))
        return acc

    def exp(self, value: Any) -> Any:
        """e^value to about 1e-7 relative; clamped to e^-87 .. e^88."""
        count = lanes_of(value)
        x = T.Bind(T.max(T.min(value, self.splat(EXP_MAX, count)), self.splat(EXP_MIN, count)))
        n = T.Bind(self.rint(x * self.splat(LOG2_E, count)))
        r = self.fma(n, self.splat(-LN2_HI, count), x)
        r = T.Bind(self.fma(n, self.splat(-LN2_LO, count), r))
        poly = self.splat(EXP_COEFFICIENTS[0], count)
        for coefficient in EXP_COEFFICIENTS[1:]:
            poly = self.fma(poly, r, self.splat(coefficient, count))
        mantissa = self.fma(poly, r * r, r + self.splat(1.0, count))
        exponent = T.Cast(vector("int32", count), n) + self.splat(T.int32(127), count)
        power = T.reinterpret(
            vector("float32", count), T.shift_left(exponent, self.splat(T.int32(23), count))
        )
        return T.Bind(mantissa * power)

    def silu(self, value: Any) -> Any:
        """Value / (1 + e^-value)."""
        one = self.splat(1.0, lanes_of(value))
        negative = self.splat(0.0, lanes_of(value)) - value
        return value / (one + self.exp(negative))

    # -- across lanes ----------------------------------------------------------------------------

    def reduce(self, value: Any, combine: Any) -> Any:
        """Combine all lanes into a scalar by halving; `combine` takes two equal vectors."""
        count = lanes_of(value)
        while count > 1:
            half = count // 2
            value = T.Bind(value)
            value = combine(pick(value, range(half)), pick(value, range(half, count)))
            count = half
        return T.Bind(value)

    def reduce_add(self, value: Any) -> Any:
        """Sum of all lanes."""
        return self.reduce(value, lambda a, b: a + b)

    def reduce_max(self, value: Any) -> Any:
        """Largest lane."""
        return self.reduce(value, T.max)

    def reduce_min(self, value: Any) -> Any:
        """Smallest lane."""
        return self.reduce(value, T.min)


def vector(dtype: str, lanes: int) -> str:
    """Name of a vector type; one lane is the scalar type."""
    return f"{dtype}x{lanes}" if lanes > 1 else dtype


def dtype_of(value: Any) -> str:
    """Type of an expression, such as "float32x16"."""
    return str(value.ty.dtype if hasattr(value.ty, "dtype") else value.ty)


def lanes_of(value: Any) -> int:
    """Lanes of an expression."""
    dtype = dtype_of(value)
    return int(dtype.rpartition("x")[2]) if "x" in dtype else 1


def pick(value: Any, lanes: Any) -> Any:
    """The named lanes of a vector, as a shorter vector or a scalar."""
    return tirx.Shuffle([value], [T.int32(i) for i in lanes])


def join(vectors: Sequence[Any]) -> Any:
    """One vector with the lanes of vectors of equal type, in order."""
    if len(vectors) == 1:
        return vectors[0]
    count = sum(lanes_of(value) for value in vectors)
    return tirx.Shuffle(list(vectors), [T.int32(i) for i in range(count)])


def float_intrinsic(name: str, lanes: int, *args: Any) -> Any:
    """Call `llvm.<name>` on float32 scalars or vectors of `lanes`."""
    suffix = f"v{lanes}f32" if lanes > 1 else "f32"
    return intrinsic(vector("float32", lanes), f"llvm.{name}.{suffix}", *args)


def intrinsic(dtype: str, name: str, *args: Any) -> Any:
    """Call an LLVM intrinsic without side effects."""
    return T.call_llvm_pure_intrin(dtype, name, *args)
