"""x86-64 levels: AVX-512 VNNI, AVX-VNNI, AVX2, and a portable level for everything else."""

from __future__ import annotations

from typing import Any

from tvm.tirx.script.builder import ir as T

from llamac.schedules.intrin.isa import Isa, float_intrinsic, intrinsic, lanes_of

TRIPLE = "x86_64-unknown-linux-gnu"


class X86Portable(Isa):
    """Any x86-64 (SSE2): plain TIR, so that a bundle is right everywhere."""

    name = "x86-64"
    target = {"kind": "llvm", "mtriple": TRIPLE, "mcpu": "x86-64"}  # noqa: RUF012


class Avx2(Isa):
    """AVX2, FMA and F16C; int8 products through pmaddubsw."""

    name = "avx2"
    lanes = 8
    features = ("avx2", "fma", "f16c")
    target = {"kind": "llvm", "mtriple": TRIPLE, "mcpu": "haswell"}  # noqa: RUF012

    def fma(self, a: Any, b: Any, c: Any) -> Any:
        """a * b + c, rounded once."""
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
    target = {"kind": "llvm", "mtriple": TRIPLE, "mcpu": "alderlake"}  # noqa: RUF012

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
    target = {  # noqa: RUF012
        "kind": "llvm",
        "mtriple": TRIPLE,
        "mcpu": "cascadelake",
        "mattr": ["-prefer-256-bit"],
    }

    def dot_u4s8(self, acc: Any, lhs: Any, rhs: Any) -> Any:
        """One vpdpbusd."""
        return self.dot_u8s8(acc, lhs, rhs)

    def dot_u8s8(self, acc: Any, lhs: Any, rhs: Any) -> Any:
        """One vpdpbusd (LLVM 22 wants the byte operands as 64 x i8)."""
        return intrinsic("int32x16", "llvm.x86.avx512.vpdpbusd.512", acc, lhs, rhs)


# Best first: the order in which a library tries them at load.
X86_LEVELS: tuple[Isa, ...] = (Avx512Vnni(), AvxVnni(), Avx2(), X86Portable())
