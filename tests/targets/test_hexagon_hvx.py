"""The plug-in of Hexagon DSPs: versions and levels."""

from __future__ import annotations

from dataclasses import replace

import pytest

from llamac.runtime.errors import SocInvalid
from llamac.schedules.intrin.hexagon import VERSIONS
from llamac.targets.hexagon_hvx import HexagonHvx
from llamac.targets.soc import SoC, load_soc


def with_version(version: str) -> SoC:
    soc = load_soc("sm8650")
    assert soc.hexagon is not None
    return replace(soc, hexagon=replace(soc.hexagon, version=version))


@pytest.mark.parametrize("version", HexagonHvx.known_versions)
def test_a_level_is_named_by_the_version(version: str) -> None:
    """There are kernels for it, whose tensors lie where HVX loads them."""
    target = HexagonHvx(with_version(version))
    assert [level.name for level in target.levels()] == [f"{version}-hvx-simulated"]
    assert target.alignment == 128
    assert target.tvm_target()["mcpu"] == f"hexagon{version}"


def test_versions_are_those_of_the_kernels() -> None:
    assert HexagonHvx.known_versions == tuple(f"v{version}" for version in VERSIONS)


def test_a_version_without_kernels_is_refused() -> None:
    with pytest.raises(SocInvalid) as caught:
        HexagonHvx(with_version("v67"))
    assert "expected one of v66, v68" in caught.value.message and "'v67'" in caught.value.message
    assert "hvx" in caught.value.fix
