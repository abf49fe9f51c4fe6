"""AArch64 levels: plain NEON (Armv8.0), dotprod, and i8mm.

A level may use only the features that it names, because these are what the library checks at load.
Naming a CPU (`mcpu`) tells LLVM much more than that, so a named CPU is used for its scheduling
model alone: whatever it could do beyond the level is switched off again (`ArmNeon.scheduled_for`).
"""

from __future__ import annotations

import copy
import functools
import re
from collections.abc import Sequence
from typing import Any

from tvm import tirx
from tvm.target import Target, codegen
from tvm.tirx.script.builder import ir as T

from llamac.schedules.intrin.isa import (
    Isa,
    float_intrinsic,
    intrinsic,
    lanes_of,
    pick,
)

TRIPLE = "aarch64-linux-gnu"


def target_of(*features: str) -> dict[str, Any]:
    """The features of the level and NEON, nothing else."""
    mattr = ["+neon", *(f"+{feature}" for feature in features)]
    return {"kind": "llvm", "mtriple": TRIPLE, "mcpu": "generic", "mattr": mattr}


class ArmNeon(Isa):
    """Any 64-bit Arm CPU; int8 products through widening multiplies."""

    name = "neon"
    lanes = 4
    registers = 32
    codes = "pairs"
    features: tuple[str, ...] = ()
    target = target_of()

    def scheduled_for(self, mcpu: str) -> ArmNeon:
        """The same level, scheduled by LLVM for a core; its instructions stay those of the level.

        Args:
            mcpu: LLVM's name of a core, "cortex-x4"; names that LLVM does not know change nothing.
        """
        if mcpu not in _known_cpus():
            return self
        allowed = _BASELINE | set(self.features)
        beyond = sorted(f for f in _cpu_features(mcpu) - allowed if not _TUNING.match(f))
        # Minus first: LLVM reads from left to right, and dropping a version drops what it implies.
        features = [f for f in self.target["mattr"] if f.startswith("+")]
        scheduled = copy.copy(self)
        scheduled.target = self.target | {
            "mcpu": mcpu,
            "mattr": [*(f"-{feature}" for feature in beyond), *features],
        }
        return scheduled

    def fma(self, a: Any, b: Any, c: Any) -> Any:
        """A * b + c, rounded once."""
        return float_intrinsic("fma", lanes_of(a), a, b, c)

    def rint(self, value: Any) -> Any:
        """Round half to even: frintn."""
        return float_intrinsic("roundeven", lanes_of(value), value)

    def fixed_to_float32(self, value: Any, fraction_bits: int) -> Any:
        """int32x4 / 2^fraction_bits as float32x4: one scvtf with the scaling in it."""
        if fraction_bits == 0:
            return self.to_float32(value)
        name = "llvm.aarch64.neon.vcvtfxs2fp.v4f32.v4i32"
        return intrinsic("float32x4", name, value, T.int32(fraction_bits))

    # How many bits too high `unpack` leaves the codes, and `dot_group` its sums.
    nibble_shift: int = 0

    def unpack(self, packed: Any) -> tuple[Any, Any]:
        """The signed low and high nibbles of an int8x16, times 2^nibble_shift."""
        four = T.broadcast(T.int8(4), 16)
        low = T.shift_right(T.Bind(T.shift_left(packed, four)), four)
        return T.Bind(low), T.Bind(T.shift_right(packed, four))

    def dot_group(self, zeros: Any, chunks: Sequence[Any], words: Sequence[tuple[Any, int]]) -> Any:
        """int32x4: four rows times a token's 32 codes, of nibbles as `unpack` leaves them.

        Sums of eight products of a nibble and a code fit int16.

        Args:
            zeros: int32x4 to start with, for instructions that add.
            chunks: eight int8x16, four codes of four rows each.
            words: for each chunk the int32x4 and the lane with the token's four codes.
        """
        sums: list[Any] = [None, None]
        for rows, (codes, lane) in zip(chunks, words, strict=True):
            word = T.Bind(broadcast_word(codes, lane))
            for half in (0, 1):
                products = T.Bind(self._products(rows, word, half))
                sums[half] = products if sums[half] is None else T.Bind(sums[half] + products)
        name = "llvm.aarch64.neon.saddlp.v4i32.v8i16"
        pairs = [T.Bind(intrinsic("int32x4", name, half)) for half in sums]
        return T.Bind(intrinsic("int32x4", "llvm.aarch64.neon.addp.v4i32", *pairs))

    def dot_lane(self, acc: Any, rows: Any, codes: Any, lane: int) -> Any:
        """acc[i] += sum of 4 products of int8 lanes 4i .. 4i+3 with word `lane` of `codes`, exact.

        Args:
            acc: int32x4.
            rows: int8x16, four bytes of four rows.
            codes: int32x4, four activation codes in each lane.
            lane: which word of `codes` all rows meet.
        """
        word = T.Bind(broadcast_word(codes, lane))
        sums = [self._pair_sums(rows, word, half) for half in (0, 1)]
        return acc + intrinsic("int32x4", "llvm.aarch64.neon.addp.v4i32", *sums)

    @staticmethod
    def _pair_sums(rows: Any, word: Any, half: int) -> Any:
        """int32x4 with the sums of neighbouring products of one half of two int8x16."""
        products = ArmNeon._products(rows, word, half)
        name = "llvm.aarch64.neon.saddlp.v4i32.v8i16"
        return T.Bind(intrinsic("int32x4", name, T.Bind(products)))

    @staticmethod
    def _products(rows: Any, word: Any, half: int) -> Any:
        """int16x8 with the products of one half of two int8x16."""
        lanes = range(8 * half, 8 * half + 8)
        name = "llvm.aarch64.neon.smull.v8i16"
        return intrinsic("int16x8", name, pick(rows, lanes), pick(word, lanes))


class ArmDotprod(ArmNeon):
    """Armv8.2 with the dot product extension (Cortex-A55, A75, A76 and later)."""

    name = "dotprod"
    features: tuple[str, ...] = ("dotprod",)
    target = target_of(*features)
    nibble_shift = 4

    def unpack(self, packed: Any) -> tuple[Any, Any]:
        """One shift and one mask: both nibbles stay in the upper half of their bytes."""
        low = T.shift_left(packed, T.broadcast(T.int8(4), 16))
        return T.Bind(low), T.Bind(T.bitwise_and(packed, T.broadcast(T.int8(-16), 16)))

    def dot_group(self, zeros: Any, chunks: Sequence[Any], words: Sequence[tuple[Any, int]]) -> Any:
        """Eight sdot by lane."""
        return dot_by_lane(self, zeros, chunks, words)

    def dot_lane(self, acc: Any, rows: Any, codes: Any, lane: int) -> Any:
        """One sdot by element: LLVM folds the broadcast into the instruction."""
        return intrinsic(
            "int32x4", "llvm.aarch64.neon.sdot.v4i32.v16i8", acc, rows, broadcast_word(codes, lane)
        )


class ArmI8mm(ArmDotprod):
    """Armv8.6 with int8 matrix products (Cortex-A510, A710, X2, Neoverse V1 and later)."""

    name = "i8mm"
    features: tuple[str, ...] = ("dotprod", "i8mm")
    target = target_of(*features)

    def matmul_2x2(self, acc: Any, lhs: Any, rhs: Any) -> Any:
        """acc[2i + j] += dot of the 8 bytes of half i of `lhs` with those of half j of `rhs`."""
        name = "llvm.aarch64.neon.smmla.v4i32.v16i8"
        return intrinsic("int32x4", name, acc, lhs, rhs)


# LLVM lists with a CPU's features also how to schedule for it; these words may stay.
_TUNING = re.compile(
    "fuse-|use-|enable-|disable-|predictable-|avoid-|balance-|no-|alu-|arith-|cmp-|zcm-|zcz-"
    "|max-interleave|cortex-|neoverse-"
)
_BASELINE = frozenset({"neon", "fp-armv8"})


# Models that differ in what they make of our kernels: spills, order of loads, paired loads. Their
# names are a knob of every kernel.
SCHEDULING_MODELS = ("generic", "cortex-a57", "cortex-x4", "neoverse-v1", "neoverse-v2", "apple-m4")

# Cores that issue in the order of the program: LLVM's generic model spreads loads for them, where
# the models of large cores keep values in registers and leave the order to the hardware.
IN_ORDER = frozenset({"cortex-a53", "cortex-a55", "cortex-a510", "cortex-a520"})


def scheduling_model(mcpu: str) -> str:
    """The model that gives the fastest int4 products on a core (docs/targets/arm-cpu.md).

    For every large core it is Neoverse V2's: fewest spills, and most products per cycle in the
    models of Neoverse N2, V1 and V2 alike.
    """
    return "generic" if mcpu in IN_ORDER else "neoverse-v2"


@functools.cache
def _known_cpus() -> frozenset[str]:
    plain = Target({"kind": "llvm", "mtriple": TRIPLE})
    return frozenset(map(str, codegen.llvm_get_cpu_archlist(plain)))


@functools.cache
def _cpu_features(mcpu: str) -> frozenset[str]:
    named = Target({"kind": "llvm", "mtriple": TRIPLE, "mcpu": mcpu})
    return frozenset(map(str, codegen.llvm_get_cpu_features(named)))


def dot_by_lane(
    isa: ArmNeon, zeros: Any, chunks: Sequence[Any], words: Sequence[tuple[Any, int]]
) -> Any:
    """`dot_group` with one `dot_lane` after the other."""
    total = zeros
    for rows, (codes, lane) in zip(chunks, words, strict=True):
        total = T.Bind(isa.dot_lane(total, rows, codes, lane))
    return total


def broadcast_word(words: Any, lane: int) -> Any:
    """Word `lane` of an int32x4 in all lanes, as int8x16."""
    return T.reinterpret("int8x16", T.broadcast(tirx.Shuffle([words], [T.int32(lane)]), 4))
