"""Which library and which core models stand for a bundle; what is missing is said."""

from __future__ import annotations

from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest

from llamac.runtime.errors import ToolchainMissing
from llamac.targets import hot_loops
from llamac.targets.hot_loops import find_hot_loops, library_of, models_of
from llamac.targets.mca import MODELS

LIBRARIES = ("lib/android/libmodel.so", "lib/glibc/libmodel.so", "lib/musl/libmodel.so")


def manifest(soc: str = "sm8650", libraries: tuple[str, ...] = LIBRARIES) -> Any:
    """What is looked at of a manifest."""
    files = {name: SimpleNamespace(role="library") for name in libraries}
    files["weights.bin"] = SimpleNamespace(role="weights")
    return SimpleNamespace(files=files, target=SimpleNamespace(soc=soc))


@pytest.mark.parametrize("libraries", [LIBRARIES, LIBRARIES[:1], ("lib/libmodel.so",)])
def test_the_library_for_glibc_is_preferred(libraries: tuple[str, ...]) -> None:
    """All have the same kernels; one is enough."""
    expected = LIBRARIES[1] if LIBRARIES[1] in libraries else libraries[0]
    assert library_of(Path("b"), manifest(libraries=libraries)) == Path("b") / expected


def test_each_kind_of_core_has_its_model() -> None:
    """Two clusters of one core are one column."""
    expected = [("cortex-x4", "N2"), ("cortex-a720", "N2"), ("cortex-a520", "A510")]
    assert models_of(manifest("sm8650")) == expected


@pytest.mark.parametrize("soc", ["of-a-file-that-is-not-here", "sm8750"])
def test_without_a_known_core_all_models_are_shown(soc: str) -> None:
    """A SoC file of the user's, or cores that LLVM has no use for (Oryon)."""
    assert models_of(manifest(soc)) == [(name, name) for name in MODELS]


@pytest.mark.parametrize("tool", ["find_mca", "find_llvm_tool"])
def test_a_missing_tool_is_named_with_its_package(
    tool: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Before the library is read."""
    monkeypatch.setattr(hot_loops, tool, lambda *_name: None)
    with pytest.raises(ToolchainMissing, match="no llvm-mca") as caught:
        find_hot_loops(Path("none"), manifest(), ["k"], "neon", progress=lambda *_: None)
    assert caught.value.fix == "apt-get install llvm-19"
