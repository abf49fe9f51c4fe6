"""x86-64 levels: AVX-512 VNNI, AVX-VNNI, AVX2, and a portable level for everything else."""

from __future__ import annotations

from typing import Any

from tvm.tirx.script.builder import ir as T

from llamac.schedules.intrin.isa import (
    Isa,
    dtype_of,
    float_intrinsic,
    intrinsic,
    lanes_of,
    vector,
)

TRIPLE = "x86_64-unknown-linux-gnu"


def _target(*features: str) -> dict[str, Any]:
    """Only what the level checks for: a named CPU would let LLVM use BMI, GFNI and more."""
    return {"kind": "llvm", "mtriple": TRIPLE, "mcpu": "x86-64", "mattr": list(features)}


class X86Portable(Isa):
    """Any x86-64 (SSE2): plain TIR, so that a bundle is right everywhere.

    Without F16C a cast to or from float16 would call a function of the compiler's library, so both
    are done on the bits.
    """

    name = "x86-64"
    target = _target()

    def to_float32(self, value: Any, lanes: int | None = None) -> Any:
        """Widen float16 by moving its fields and scaling by 2^112; exact, also for subnormals."""
        if not dtype_of(value).startswith("float16"):
            return super().to_float32(value, lanes)
        bits = _Bits(lanes_of(value))
        half = T.Bind(T.Cast(bits.integer, T.reinterpret(bits.short, value)))
        magnitude = T.Bind(T.shift_left(T.bitwise_and(half, bits.word(0x7FFF)), bits.word(13)))
        scaled = T.reinterpret(
            bits.integer, bits.as_float(magnitude) * self.splat(2.0**112, bits.lanes)
        )
        special = T.bitwise_or(magnitude, bits.word(0x7F800000))
        wide = T.Select(magnitude >= bits.word(0x7C00 << 13), special, scaled)
        sign = T.shift_left(T.bitwise_and(half, bits.word(0x8000)), bits.word(16))
        return T.Bind(bits.as_float(T.bitwise_or(wide, sign)))

    def to_float16(self, value: Any) -> Any:
        """Narrow float32 to float16, half to even, with subnormals, infinities and NaN."""
        bits = _Bits(lanes_of(value))
        word = T.Bind(T.reinterpret(bits.integer, value))
        magnitude = T.Bind(T.bitwise_and(word, bits.word(0x7FFFFFFF)))
        # Adding 0.5 puts the last bit of a float16 subnormal at the last bit of the float32.
        small = bits.as_float(magnitude) + self.splat(0.5, bits.lanes)
        small = T.reinterpret(bits.integer, small) - bits.word(0x3F000000)
        # Move the exponent by 112, add half of what is cut off, less one for an even neighbour.
        odd = T.bitwise_and(T.shift_right(magnitude, bits.word(13)), bits.word(1))
        normal = magnitude - bits.word(112 << 23) + bits.word(0xFFF) + odd
        half = T.Select(
            magnitude < bits.word(113 << 23), small, T.shift_right(normal, bits.word(13))
        )
        special = T.Select(magnitude > bits.word(0x7F800000), bits.word(0x7E00), bits.word(0x7C00))
        half = T.Select(magnitude >= bits.word(143 << 23), special, half)
        sign = T.bitwise_and(T.shift_right(word, bits.word(16)), bits.word(0x8000))
        short = T.Bind(T.Cast(bits.short, T.bitwise_or(half, sign)))
        return T.reinterpret(vector("float16", bits.lanes), short)


class _Bits:
    """Names and constants for work on the bits of `lanes` floats."""

    def __init__(self, lanes: int) -> None:
        self.lanes = lanes
        self.integer = vector("int32", lanes)
        self.short = vector("uint16", lanes)

    def word(self, value: int) -> Any:
        """An int32 constant in all lanes."""
        return T.broadcast(T.int32(value), self.lanes) if self.lanes > 1 else T.int32(value)

    def as_float(self, value: Any) -> Any:
        """The float32 with these bits."""
        return T.reinterpret(vector("float32", self.lanes), value)


class Avx2(Isa):
    """AVX2, FMA and F16C; int8 products through pmaddubsw."""

    name = "avx2"
    lanes = 8
    features: tuple[str, ...] = ("avx2", "fma", "f16c")
    target = _target("+avx2", "+fma", "+f16c")

    def fma(self, a: Any, b: Any, c: Any) -> Any:
        """A * b + c, rounded once."""
        return float_intrinsic("fma", lanes_of(a), a, b, c)

    def rint(self, value: Any) -> Any:
        """Round half to even: vroundps or vrndscaleps."""
        return float_intrinsic("nearbyint", lanes_of(value), value)

    def dot_u4s8(self, acc: Any, lhs: Any, rhs: Any) -> Any:
        """Two products below 16 * 128 fit int16, so pmaddubsw does not saturate."""
        pairs = intrinsic("int16x16", "llvm.x86.avx2.pmadd.ub.sw", lhs, rhs)
        return acc + intrinsic("int32x8", "llvm.x86.avx2.pmadd.wd", pairs, self._ones())

    def dot_u8s8(self, acc: Any, lhs: Any, rhs: Any) -> Any:
        """Split lhs into its low 7 bits and its top bit: neither half saturates pmaddubsw."""
        low = T.bitwise_and(lhs, T.broadcast(T.uint8(0x7F), 32))
        top = T.bitwise_and(lhs, T.broadcast(T.uint8(0x80), 32))
        return self.dot_u4s8(self.dot_u4s8(acc, low, rhs), top, rhs)

    def _ones(self) -> Any:
        return T.broadcast(T.int16(1), 16)


class AvxVnni(Avx2):
    """AVX2 with the 256-bit VNNI of client processors (no AVX-512)."""

    name = "avxvnni"
    features = ("avx2", "fma", "f16c", "avxvnni")
    target = _target("+avx2", "+fma", "+f16c", "+avxvnni")

    def dot_u4s8(self, acc: Any, lhs: Any, rhs: Any) -> Any:
        """One vpdpbusd."""
        return self.dot_u8s8(acc, lhs, rhs)

    def dot_u8s8(self, acc: Any, lhs: Any, rhs: Any) -> Any:
        """One vpdpbusd (LLVM 22 wants the byte operands as 32 x i8)."""
        return intrinsic("int32x8", "llvm.x86.avx512.vpdpbusd.256", acc, lhs, rhs)


class Avx512Vnni(Avx2):
    """AVX-512 with VNNI (Cascade Lake, Ice Lake, Sapphire Rapids, Zen 4 and later)."""

    name = "avx512vnni"
    lanes = 16
    registers = 32
    features = ("avx512f", "avx512bw", "avx512vl", "avx512dq", "avx512vnni", "fma", "f16c")
    target = _target(*(f"+{feature}" for feature in features))

    def dot_u4s8(self, acc: Any, lhs: Any, rhs: Any) -> Any:
        """One vpdpbusd."""
        return self.dot_u8s8(acc, lhs, rhs)

    def dot_u8s8(self, acc: Any, lhs: Any, rhs: Any) -> Any:
        """One vpdpbusd (LLVM 22 wants the byte operands as 64 x i8)."""
        return intrinsic("int32x16", "llvm.x86.avx512.vpdpbusd.512", acc, lhs, rhs)


# Best first: the order in which a library tries them at load.
X86_LEVELS: tuple[Isa, ...] = (Avx512Vnni(), AvxVnni(), Avx2(), X86Portable())
