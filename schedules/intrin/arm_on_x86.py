"""Arm's kernels on x86-64: the layouts and generators of AArch64, computed with AVX2.

A bundle for a phone has weights in Arm's layouts. With these kernels a computer reads the same
weights, so that it can stand in for the phone's CPU beside the part of a model that a vendor's
library executes here (`targets/emulation_library.py`). They are right, not fast.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from tvm.tirx.script.builder import ir as T

from llamac.schedules.intrin.arm import ArmNeon, broadcast_word, dot_by_lane
from llamac.schedules.intrin.isa import pick


class ArmOnX86(ArmNeon):
    """What plain NEON does, on an x86-64 with AVX2, FMA and F16C."""

    name = "neon-on-x86"
    registers = 16
    features: tuple[str, ...] = ("avx2", "fma", "f16c")
    target = {  # noqa: RUF012 (read only)
        "kind": "llvm",
        "mtriple": "x86_64-unknown-linux-gnu",
        "mcpu": "x86-64",
        "mattr": [f"+{feature}" for feature in features],
    }

    def scheduled_for(self, mcpu: str) -> ArmOnX86:
        """No Arm core schedules it."""
        return self

    def dot_group(self, zeros: Any, chunks: Sequence[Any], words: Sequence[tuple[Any, int]]) -> Any:
        """int32x4: four rows times a token's 32 codes."""
        return dot_by_lane(self, zeros, chunks, words)

    def dot_lane(self, acc: Any, rows: Any, codes: Any, lane: int) -> Any:
        """acc[i] += sum of 4 products of int8 lanes 4i .. 4i+3 with word `lane`, exact."""
        word = T.Bind(broadcast_word(codes, lane))
        products = T.Bind(T.Cast("int32x16", rows) * T.Cast("int32x16", word))
        for byte in range(4):
            acc = acc + pick(products, range(byte, 16, 4))
        return acc
