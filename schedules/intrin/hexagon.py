"""Hexagon with HVX: 32 vector registers of 128 bytes, versions v66 to v81.

Two forms exist of every version. The *real* form is for a DSP: from v68 on its floats are HVX's own
format (qf32). The *simulated* form keeps the integer instructions and computes floats as scalars;
it is what QEMU 7.2 executes, whose only CPU is a v67 without HVX floats. v66 has no vector floats,
so there the two are one.

HVX loads and stores ignore the low seven bits of an address. Buffers are declared with
`HexagonHvx.alignment`, and who calls a kernel checks them (`runtime/c/alignment.h`).
"""

from __future__ import annotations

from typing import Any

from tvm.tirx.script.builder import ir as T

from llamac.schedules.intrin.hexagon_plain import HexagonPlain, lanes_as_scalars, round_scalar
from llamac.schedules.intrin.isa import Isa, dtype_of, intrinsic, join, lanes_of

TRIPLE = "hexagon"
VERSIONS = (66, 68, 69, 73, 75, 79, 81)
FIRST_WITH_FLOATS = 68
# Kernels whose work is in integers: they use HVX where floats are scalars, too.
HVX_FAMILIES = frozenset({"qmatmul_hvx", "qmatmul_int8_hvx"})
# BFloat16 weights lie in blocks of 16 rows, half a vector.
PLAIN_FAMILIES = frozenset({"matmul"})
# The bits of 1/x are about this less the bits of x, to 12 %.
RECIPROCAL_SEED = 0x7EF311C3
LARGEST_DIVISOR = 2.0**120  # of which the seed is a normal number


def target_of(version: int, *, simulate: bool) -> dict[str, Any]:
    """TVM's target. Kind `llvm`: kind `hexagon` needs a host, a linker and its own options.

    Options of LLVM: vectors as we write them and no others, no data near the global pointer (nobody
    sets it), and no packet that loads what its own other slot stores, which QEMU 7.2 gets wrong.
    """
    attributes = [f"+hvxv{version}", "+hvx-length128b"]
    if version >= FIRST_WITH_FLOATS:
        attributes += ["-hvx-qfloat" if simulate else "+hvx-qfloat", "-hvx-ieee-fp"]
    return {
        "kind": "llvm",
        "mtriple": TRIPLE,
        "mcpu": f"hexagonv{version}",
        "mattr": attributes,
        "cl-opt": [
            "-hexagon-autohvx:bool=true",
            "-hexagon-small-data-threshold:uint=0",
            "-force-target-max-vector-interleave:uint=1",
            "-slot1-store-slot0-load:bool=false",
        ],
    }


class HexagonHvx(Isa):
    """One version of HVX.

    Args:
        version: of the DSP, one of VERSIONS.
        simulate: whether floats are scalars, so that QEMU 7.2 can run the kernels.
    """

    lanes = 32
    registers = 32
    alignment = 128

    def __init__(self, version: int, *, simulate: bool = False) -> None:
        if version not in VERSIONS:
            raise ValueError(f"HVX v{version} is not one of {VERSIONS}")
        self.version = version
        self.simulate = simulate or version < FIRST_WITH_FLOATS
        self.name = f"v{version}-hvx{'-simulated' if simulate else ''}"
        self.target = target_of(version, simulate=simulate)

    @property
    def scalar(self) -> Isa:
        """Without HVX: four lanes."""
        return HexagonPlain(f"v{self.version}")

    def for_family(self, family: str) -> Isa:
        """This set for kernels that profit from HVX; the others are scalar."""
        is_vector = family in HVX_FAMILIES if self.simulate else family not in PLAIN_FAMILIES
        return self if is_vector else self.scalar

    def dot_word_u8s8(self, acc: Any, vector: Any, word: Any) -> Any:
        """acc[i] += sum of 4 products of uint8 lanes 4i .. 4i+3 with the int8 bytes of a word.

        Args:
            acc: int32x32.
            vector: 128 bytes as int32x32.
            word: int32 in a scalar register. Two of these fit a packet.
        """
        return intrinsic("int32x32", "llvm.hexagon.V6.vrmpybus.acc.128B", acc, vector, word)

    def shift_bytes_right(self, vector: Any, bits: int) -> Any:
        """Logical shift of every byte of an int32x32."""
        return intrinsic("int32x32", "llvm.hexagon.V6.vlsrb.128B", vector, T.int32(bits))

    def halves_to_float32(self, words: Any, dtype: str) -> tuple[Any, Any]:
        """Both float16 or bfloat16 values of each of 32 words, the low ones first; exact.

        Floats of 16 bits are widened as integers: only v68 and later convert them, not to float32.
        """
        low = T.Bind(T.shift_left(words, self.splat(T.uint32(16))))
        high = T.Bind(T.bitwise_and(words, self.splat(T.uint32(0xFFFF0000))))
        if dtype == "bfloat16":
            return T.reinterpret("float32x32", low), T.reinterpret("float32x32", high)
        return self._widen(low), self._widen(high)

    def half_to_float32(self, words: Any, half: Any) -> Any:
        """The low (half = 0) or high (1) float16 of each of 32 words; exact."""
        bits = T.shift_left(words, self.splat(T.uint32(16) - T.Cast("uint32", half) * T.uint32(16)))
        return self._widen(T.Bind(T.bitwise_and(bits, self.splat(T.uint32(0xFFFF0000)))))

    def to_float32(self, value: Any, lanes: int | None = None) -> Any:
        """Convert lanes: float16 as integers, int8 by way of int32, which LLVM has in vectors."""
        dtype = dtype_of(value)
        if dtype == "float16x32":
            words = T.Cast("uint32x32", T.reinterpret("uint16x32", value))
            return self._widen(T.Bind(T.shift_left(words, self.splat(T.uint32(16)))))
        return super().to_float32(T.Cast("int32x32", value) if dtype == "int8x32" else value, lanes)

    def to_float16(self, value: Any) -> Any:
        """Convert finite float32 to float16 as integers, half to even, too large ones to infinity.

        Below 2^-14 the result counts steps of 2^-24.
        """
        if lanes_of(value) != self.lanes:
            return super().to_float16(value)
        bits = T.Bind(T.reinterpret("int32x32", value))
        size = T.Bind(T.bitwise_and(bits, self._int(0x7FFFFFFF)))
        odd = T.bitwise_and(T.shift_right(size, self._int(13)), self._int(1))
        rounded = size + self._int(0xFFF) + odd - self._int(112 << 23)
        normal = T.min(T.shift_right(rounded, self._int(13)), self._int(0x7C00))
        small = self._nearest_magnitude(T.Bind(size + self._int(24 << 23)))
        half = T.Select(size < self._int(113 << 23), small, normal)
        sign = T.bitwise_and(T.shift_right(bits, self._int(16)), self._int(0x8000))
        return T.reinterpret("float16x32", T.Cast("uint16x32", T.bitwise_or(half, sign)))

    def rint(self, value: Any) -> Any:
        """Round half to even as integers: sums in HVX's own format are not rounded as IEEE's."""
        if lanes_of(value) != self.lanes:
            return join([round_scalar(lane) for lane in lanes_as_scalars(value)])
        bits = T.Bind(T.reinterpret("int32x32", value))
        size = self._nearest_magnitude(T.Bind(T.bitwise_and(bits, self._int(0x7FFFFFFF))))
        sign = T.Bind(T.shift_right(bits, self._int(31)))
        return self.to_float32(T.Bind(T.bitwise_xor(size, sign) - sign))

    def _nearest_magnitude(self, bits: Any) -> Any:
        """The nearest integers, half to even, to non-negative float32 below 2^22, given as bits."""
        shift = T.max(self._int(150) - T.shift_right(bits, self._int(23)), self._int(1))
        shift = T.Bind(T.min(shift, self._int(25)))
        fraction = T.bitwise_and(bits, self._int(0x7FFFFF))
        mantissa = T.Bind(T.bitwise_or(fraction, self._int(1 << 23)))
        odd = T.bitwise_and(T.shift_right(mantissa, shift), self._int(1))
        below_half = T.shift_left(self._int(1), shift - self._int(1)) - self._int(1)
        return T.Bind(T.shift_right(mantissa + below_half + odd, shift))

    def silu(self, value: Any) -> Any:
        """Value / (1 + e^-value) with a reciprocal by Newton's iteration: HVX does not divide."""
        one, two = self.splat(1.0), self.splat(2.0)
        divisor = T.Bind(
            T.min(one + self.exp(self.splat(0.0) - value), self.splat(LARGEST_DIVISOR))
        )
        seed = self._int(RECIPROCAL_SEED) - T.reinterpret("int32x32", divisor)
        inverse = T.Bind(T.reinterpret("float32x32", seed))
        for _ in range(3):
            inverse = T.Bind(inverse * (two - divisor * inverse))
        return value * inverse

    def reduce(self, value: Any, combine: Any) -> Any:
        """Combine 32 lanes into a scalar: the vector with itself, turned by half, a quarter, ..."""
        if lanes_of(value) != self.lanes:
            return super().reduce(value, combine)
        dtype = dtype_of(value)
        for distance in (64, 32, 16, 8, 4):
            value = T.Bind(value)
            words = T.reinterpret("int32x32", value)
            turned = intrinsic("int32x32", "llvm.hexagon.V6.vror.128B", words, T.int32(distance))
            value = combine(value, T.Bind(T.reinterpret(dtype, turned)))
        words = T.reinterpret("int32x32", T.Bind(value))
        first = intrinsic("int32", "llvm.hexagon.V6.extractw.128B", words, T.int32(0))
        return T.Bind(T.reinterpret(dtype.removesuffix("x32"), first))

    def _int(self, value: int) -> Any:
        return self.splat(T.int32(value))

    def _widen(self, top: Any) -> Any:
        """Widen finite float16 in the upper halves of uint32x32: move the fields, subnormals too.

        A subnormal m * 2^-24 is what the float32 (1 + m / 2^10) * 2^-14 has over 2^-14.
        """
        sign = T.bitwise_and(top, self.splat(T.uint32(0x80000000)))
        fields = T.bitwise_and(top, self.splat(T.uint32(0x7FFF0000)))
        fields = T.Bind(T.shift_right(fields, self.splat(T.uint32(3))))
        normal = fields + self.splat(T.uint32(112 << 23))
        above = T.reinterpret("float32x32", T.Bind(fields + self.splat(T.uint32(113 << 23))))
        small = T.reinterpret("uint32x32", T.Bind(above - self.splat(2.0**-14)))
        magnitude = T.Select(fields < self.splat(T.uint32(1 << 23)), small, normal)
        return T.Bind(T.reinterpret("float32x32", T.bitwise_or(magnitude, sign)))


HEXAGON_VERSIONS = tuple(HexagonHvx(version) for version in VERSIONS)
