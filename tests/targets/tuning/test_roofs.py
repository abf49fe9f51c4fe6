"""What this machine multiplies and reads at most."""

from __future__ import annotations

import pytest

from llamac.runtime.errors import TuningImpossible
from llamac.schedules.intrin.x86 import X86Portable
from llamac.targets.tuning.host import check_level
from llamac.targets.tuning.roofs import Roofs, has_roof, measure_roofs


def test_a_call_takes_as_long_as_what_limits_it() -> None:
    roofs = Roofs({"u4s8": 100.0, "u8s8": 50.0, "float32": 10.0}, 20.0)
    assert roofs.of_call("qmatmul", 1000, 100) == 10.0
    assert roofs.of_call("qmatmul", 1000, 400) == 20.0
    assert roofs.of_call("qmatmul_int8", 1000, 0) == 20.0
    assert roofs.of_call("matmul", 1000, 0) == 100.0
    assert not has_roof("hadamard")


def test_the_highest_of_several_measurements_counts() -> None:
    first, second = Roofs({"u4s8": 100.0}, 20.0), Roofs({"u4s8": 90.0}, 21.0)
    assert second.at_least(first) == Roofs({"u4s8": 100.0}, 21.0)
    assert first.at_least(Roofs()) == first


def test_they_are_measured() -> None:
    try:
        check_level(X86Portable())
    except TuningImpossible as error:
        pytest.skip(f"this CPU is no x86-64: {error}")
    roofs = measure_roofs(X86Portable(), 1 << 20)
    # A core does between a product in 100 ns and a thousand a ns, and reads no faster than caches.
    assert all(1e1 < rate < 1e6 for rate in roofs.products.values())
    assert 1e1 < roofs.bytes < 1e6
