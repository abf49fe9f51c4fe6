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

from llamac.schedules.intrin.hexagon_plain import HexagonPlain
from llamac.schedules.intrin.isa import Isa, intrinsic

TRIPLE = "hexagon"
VERSIONS = (66, 68, 69, 73, 75, 79, 81)
FIRST_WITH_FLOATS = 68
# Kernels whose work is in integers: they use HVX where floats are scalars, too.
HVX_FAMILIES = frozenset({"qmatmul_hvx", "qmatmul_int8_hvx"})


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

    def for_family(self, family: str) -> Isa:
        """This set for kernels with integer instructions of HVX; the others are scalar."""
        return self if family in HVX_FAMILIES else HexagonPlain(f"v{self.version}")

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
