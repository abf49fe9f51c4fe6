"""An instruction set that llamac does not have: FMA and F16C without AVX2.

Kernel generators are written over `Isa`; what is not overridden here is plain TIR and right anyway.
"""

from __future__ import annotations

from typing import Any

from tvm.tirx.script.builder import ir as T

from llamac.schedules.intrin.isa import Isa, float_intrinsic, intrinsic, lanes_of


class Piledriver(Isa):
    """Four float32 lanes; int8 products through the 128-bit pmaddubsw of SSSE3."""

    name = "fma-f16c"
    lanes = 4
    features = ("fma", "f16c")

    def __init__(self, target: dict[str, Any]) -> None:
        self.target = target

    def fma(self, a: Any, b: Any, c: Any) -> Any:
        """a * b + c, rounded once."""
        return float_intrinsic("fma", lanes_of(a), a, b, c)

    def dot_u4s8(self, acc: Any, lhs: Any, rhs: Any) -> Any:
        """Two products below 16 * 128 fit int16, so pmaddubsw does not saturate."""
        pairs = intrinsic("int16x8", "llvm.x86.ssse3.pmadd.ub.sw.128", lhs, rhs)
        ones = T.broadcast(T.int16(1), 8)
        return acc + intrinsic("int32x4", "llvm.x86.sse2.pmadd.wd", pairs, ones)

    def dot_u8s8(self, acc: Any, lhs: Any, rhs: Any) -> Any:
        """Split lhs into its low 7 bits and its top bit: neither half saturates pmaddubsw."""
        low = T.bitwise_and(lhs, T.broadcast(T.uint8(0x7F), 16))
        top = T.bitwise_and(lhs, T.broadcast(T.uint8(0x80), 16))
        return self.dot_u4s8(self.dot_u4s8(acc, low, rhs), top, rhs)
