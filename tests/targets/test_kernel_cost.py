"""Instructions by kernel: regions to steps, products from shapes."""

from __future__ import annotations

from typing import Any

import pytest

from llamac.targets.count import Counts
from llamac.targets.kernel_cost import function_cost, macs_of
from llamac.targets.program import Function, Program, ProgramKernel, Step

CACHE = {"kv_heads": 2, "head_dim": 16, "capacity": 64, "dtype": "float16"}


def kernel(family: str, **shape: Any) -> ProgramKernel:
    """A kernel that is named after its family."""
    return ProgramKernel(f"{family}_kernel", family, shape, work=1)


KERNELS = (kernel("norm", tokens=4, k=64), kernel("qmatmul_quads", m=4, n=32, k=64, lora_rank=0))
FUNCTION = Function("prefill_4", 4, (Step(0, ()), Step(1, ()), Step(0, ())), 0, 0, 0, 0, 0)
PROGRAM = Program((), KERNELS, (FUNCTION,), 0, 0, 0)


@pytest.mark.parametrize(
    ("family", "shape", "macs"),
    [
        ("qmatmul_quads", {"m": 4, "n": 32, "k": 64, "lora_rank": 0}, 4 * 32 * 64),
        ("qmatmul_quads", {"m": 4, "n": 32, "k": 64, "lora_rank": 8}, 4 * 32 * (64 + 8)),
        ("qmatmul_int8", {"m": 1, "n": 32, "k": 64}, 32 * 64),
        ("matmul", {"m": 2, "n": 32, "k": 64, "epilogue": "none"}, 2 * 32 * 64),
        ("lora", {"tokens": 3, "rank": 8, "k": 64}, 3 * 8 * 64),
        ("attention", {"tokens": 1, "heads": 4, "cache": CACHE}, 2 * 4 * 16 * 11),
        ("attention", {"tokens": 3, "heads": 4, "cache": CACHE}, 2 * 4 * 16 * (11 + 12 + 13)),
        ("norm", {"tokens": 3, "k": 64}, 0),
        ("hadamard", {"tokens": 3, "k": 64}, 0),
    ],
)
def test_products_follow_from_the_shape(family: str, shape: dict[str, Any], macs: int) -> None:
    """At position 10: attention sees the token itself and all before it."""
    assert macs_of(kernel(family, **shape), position=10) == macs


def test_regions_add_up_by_kernel() -> None:
    """The dearest kernel first; what is per token divides by the tokens that are no padding."""
    regions = [Counts(load=1), Counts(dot=90, load=10), Counts(load=2, scalar=3)]
    cost = function_cost(PROGRAM, FUNCTION, 8, 3, regions)
    assert [k.name for k in cost.kernels] == ["qmatmul_quads_kernel", "norm_kernel"]
    product, norm = cost.kernels
    assert (norm.calls, norm.counts, norm.per_mac) == (2, Counts(load=3, scalar=3), None)
    assert product.per_mac == 100 / (4 * 32 * 64)
    assert cost.total == 106
    document = cost.to_json()
    assert document["function"] == "prefill_4"
    assert document["instructions_per_token"] == 106 / 3
    first, second = document["kernels"]
    assert first["macs_per_token"] == 4 * 32 * 64 / 3
    assert first["by_class"]["dot"] == 90
    assert first["share"] + second["share"] == pytest.approx(1)
    assert second["instructions_per_mac"] is None


def test_every_step_has_a_region() -> None:
    """Another number of regions belongs to another function."""
    with pytest.raises(ValueError, match="zip"):
        function_cost(PROGRAM, FUNCTION, 0, 4, [Counts()])
