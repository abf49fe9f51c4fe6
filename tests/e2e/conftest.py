"""Fixtures of the end-to-end tests: tiny random checkpoints."""

from __future__ import annotations

import importlib.util
import sys
from pathlib import Path
from types import ModuleType

import pytest


@pytest.fixture(scope="session")
def meta_layout() -> ModuleType:
    """The module that writes random checkpoints for the compiler's tests."""
    name = "llamac_tests_meta_layout"
    path = Path(__file__).parents[1] / "compiler" / "meta_layout.py"
    spec = importlib.util.spec_from_file_location(name, path)
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    sys.modules[name] = module
    spec.loader.exec_module(module)
    return module
