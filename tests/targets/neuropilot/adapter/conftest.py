"""Modules in the folder above; test folders are no packages."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest

NEEDED = "optional extra: pip install 'llamac[apu]'"


@pytest.fixture(scope="session")
def small_tflite(helper: Callable[[str], ModuleType]) -> ModuleType:
    """The module `small_tflite.py`."""
    pytest.importorskip("ai_edge_litert", reason=NEEDED)
    return helper("targets/neuropilot/small_tflite")


@pytest.fixture(scope="session")
def official_plugin(helper: Callable[[str], ModuleType]) -> ModuleType:
    """The module `official_plugin.py`."""
    return helper("targets/neuropilot/official_plugin")


@pytest.fixture(scope="session")
def adapter_double(official_plugin: ModuleType, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The recording test double, as the library libneuron_adapter.so."""
    library: Path = official_plugin.build_double(tmp_path_factory.mktemp("double"))
    return library


@pytest.fixture
def run_official_plugin(
    official_plugin: ModuleType, adapter_double: Path, tmp_path: Path
) -> Callable[..., Any]:
    """Run LiteRT's plug-in for MediaTek: run(tflite, soc, **variables) -> PluginRun."""
    pytest.importorskip("ai_edge_litert", reason=NEEDED)

    def run(tflite: Path, soc: str, **variables: str) -> Any:
        folder = tmp_path / f"{tflite.stem}-{soc}"
        folder.mkdir()
        return official_plugin.run_official_plugin(
            tflite, soc, folder, double=adapter_double, **variables
        )

    return run
