"""What assembly says of a kernel: equal code, instructions per product, on all architectures."""

from __future__ import annotations

from typing import Any

import pytest

from llamac.schedules.intrin.arm_levels import ARM_LEVELS
from llamac.schedules.intrin.hexagon import HexagonHvx
from llamac.schedules.intrin.isa import Isa
from llamac.schedules.intrin.x86 import X86_LEVELS
from llamac.schedules.kernel import compile_kernels
from llamac.schedules.matmul import MatmulShape
from llamac.schedules.qmatmul import QMatmulShape
from llamac.targets.cpu.kernels import KernelSpec
from llamac.targets.tuning.features import CodeFeatures, per_product, read_assembly

AVX512 = X86_LEVELS[0]
SHAPE = QMatmulShape(12, 64, 2048)


def features(isa: Isa, family: str, shape: Any, **knobs: Any) -> CodeFeatures:
    spec = KernelSpec("kernel", family, shape)
    func = spec.make_with(spec.points(isa)[0] | knobs, isa, "kernel")
    return read_assembly(compile_kernels({"kernel": func}, isa).inspect_source("asm"))


X86_LOOP = """
kernel:
	movq	%rdi, %rax          # before the loop
.LBB0_1:
	vmovdqa64	(%rbx), %zmm1
	vpbroadcastd	8(%rbx), %zmm2
	vpdpbusd	%zmm1, %zmm2, %zmm3
	vpdpbusd	64(%rbx){1to16}, %zmm2, %zmm4
	vmovups	-64(%rsp), %zmm5
	vmovaps	%zmm4, (%rcx)
	prefetcht0	512(%rbx)
	vaddps	%zmm4, %zmm5, %zmm4
	addq	$64, %rbx
	jne	.LBB0_1
	retq
.LCPI0_0:
	.long	17
"""
X86_KINDS = {
    "load": 1,
    "broadcast": 1,
    "product": 1,
    "product_memory": 1,
    "spill": 1,
    "store": 1,
    "prefetch": 1,
    "vector": 1,
    "scalar": 2,
}


def test_kinds_of_instructions_of_a_loop() -> None:
    """Each kind once; what is outside of the loop does not count."""
    [loop] = read_assembly(X86_LOOP).loops
    assert loop == X86_KINDS


@pytest.mark.parametrize(
    ("old", "new", "is_same"),
    [
        ("LBB0_1", "LBB7_3", True),
        ("# before the loop", "# something else", True),
        ("kernel:", "other:", True),
        ("%zmm5, %zmm4\n", "%zmm6, %zmm4\n", False),
        (".long	17", ".long	18", False),
        ("retq", "vzeroupper\n	retq", False),
    ],
)
def test_the_hash_is_that_of_the_code(old: str, new: str, is_same: bool) -> None:
    """Names of labels and comments are nothing, instructions and constants are everything."""
    assert old in X86_LOOP
    changed = read_assembly(X86_LOOP.replace(old, new))
    assert (changed.code == read_assembly(X86_LOOP).code) is is_same


CASES = [
    *((isa, "qmatmul", SHAPE) for isa in X86_LEVELS[:3]),
    *((isa, "qmatmul_quads", SHAPE) for isa in ARM_LEVELS[2:]),
    (ARM_LEVELS[3], "qmatmul_quads", QMatmulShape(1, 64, 128)),
    (AVX512, "matmul", MatmulShape(12, 64, 128)),
    (HexagonHvx(75, simulate=True), "qmatmul_hvx", QMatmulShape(1, 64, 64)),
]


@pytest.mark.parametrize(
    ("isa", "family", "shape"), CASES, ids=lambda value: getattr(value, "name", str(value))
)
def test_real_kernels_have_a_loop_of_products(isa: Isa, family: str, shape: Any) -> None:
    """Of each instruction set; products per product are one."""
    counts = per_product(features(isa, family, shape), shape.m, 1)
    assert counts["product"] + counts["product_memory"] == pytest.approx(1)
    assert counts["vector"] + counts["load"] + counts["spill"] > 0


def test_larger_tiles_load_less_for_each_product() -> None:
    """What a tile of tokens shares is divided by its tokens."""
    small, large = (
        per_product(features(AVX512, "qmatmul", SHAPE, mr=mr), SHAPE.m, mr) for mr in (2, 6)
    )
    assert large["load"] + large["spill"] < small["load"] + small["spill"]
    assert large["vector"] < small["vector"]


def test_left_over_tokens_count_by_their_share() -> None:
    """A tile of 8 leaves 4 of 12 tokens to a smaller loop: between the two tiles."""
    mixed, eight, four = (
        per_product(features(AVX512, "qmatmul", QMatmulShape(m, 64, 2048), mr=mr), m, mr)["vector"]
        for m, mr in ((12, 8), (8, 8), (8, 4))
    )
    assert eight < mixed < four
    assert mixed == pytest.approx(2 / 3 * eight + 1 / 3 * four, rel=0.1)


def test_prefetches_are_seen() -> None:
    one = QMatmulShape(1, 64, 2048)
    without, with_them = (features(AVX512, "qmatmul", one, prefetch=p) for p in (0, 8))
    assert per_product(without, 1, 1)["prefetch"] == 0 < per_product(with_them, 1, 1)["prefetch"]
    assert without.code != with_them.code


def test_code_without_products_has_no_features() -> None:
    assert per_product(read_assembly("f:\n\tretq\n"), 1, 1) == {}
