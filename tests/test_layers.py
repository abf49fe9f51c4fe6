"""The layer rule: runtime < schedules < targets < compiler < tools; nothing imports upwards."""

from __future__ import annotations

import ast
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest

LAYERS = ("runtime", "schedules", "targets", "compiler", "tools")
RUNTIME_MAY_IMPORT = {"numpy", "tiktoken", "llamac"}
HEAVY = ("tvm", "tvm_ffi", "torch", "onnx", "llamac.compiler", "llamac.schedules", "llamac.targets")


def imported_modules(source: str) -> Iterator[tuple[str, bool]]:
    """Yield the full name of every imported module, and whether only type checkers import it."""
    tree = ast.parse(source)
    typing_only = {
        inner
        for node in ast.walk(tree)
        if isinstance(node, ast.If) and ast.unparse(node.test) == "TYPE_CHECKING"
        for statement in node.body
        for inner in ast.walk(statement)
    }
    for node in ast.walk(tree):
        if isinstance(node, ast.Import):
            names = [alias.name for alias in node.names]
        elif isinstance(node, ast.ImportFrom):
            assert node.level == 0, "relative import"
            assert node.module is not None
            names = [node.module, *(f"{node.module}.{alias.name}" for alias in node.names)]
        else:
            continue
        yield from ((name, node in typing_only) for name in names)


def violations(layer: str, source: str) -> list[str]:
    """Name the imports of one module of `layer` that break the layer rule."""
    allowed = LAYERS[: LAYERS.index(layer) + 1]
    found = []
    for name, is_typing_only in imported_modules(source):
        parts = name.split(".")
        if parts[0] == "llamac" and len(parts) > 1 and parts[1] in LAYERS:
            if parts[1] not in allowed:
                found.append(name)
        elif parts[0] in LAYERS:
            found.append(f"{name} (write llamac.{name})")
        elif layer == "runtime" and parts[0] not in RUNTIME_MAY_IMPORT | sys.stdlib_module_names:
            # What only a type checker reads need not be installed.
            found += [] if is_typing_only else [name]
    return found


def modules(checkout: Path) -> Iterator[tuple[str, Path]]:
    """Yield (layer, file) of all our modules."""
    for layer in LAYERS:
        for path in sorted((checkout / layer).rglob("*.py")):
            yield layer, path


def test_no_module_imports_a_higher_layer(checkout: Path) -> None:
    """Lower layers import only lower ones; the runtime adds numpy and tiktoken at most."""
    broken = {
        str(path.relative_to(checkout)): found
        for layer, path in modules(checkout)
        if (found := violations(layer, path.read_text("utf-8")))
    }
    assert not broken


def test_the_walk_sees_every_layer(checkout: Path) -> None:
    """A moved folder must not make the layer test pass by finding nothing."""
    assert {layer for layer, _ in modules(checkout)} == set(LAYERS)


@pytest.mark.parametrize(
    ("layer", "source"),
    [
        ("runtime", "import llamac.schedules.kernel"),
        ("runtime", "from llamac import compiler"),
        ("runtime", "def f():\n    import torch"),
        ("runtime", "if TYPE_CHECKING:\n    from llamac.schedules.kernel import Knobs"),
        ("schedules", "from llamac.targets.soc import SoC"),
        ("targets", "from llamac.compiler import pipeline"),
        ("compiler", "import llamac.tools.cli"),
        ("tools", "import compiler"),
    ],
)
def test_a_forbidden_import_is_found(layer: str, source: str) -> None:
    """The rule catches upward, lazy, bare and third-party imports."""
    assert violations(layer, source)


@pytest.mark.parametrize(
    ("layer", "source"),
    [
        ("runtime", "import json, numpy\nfrom llamac.runtime.errors import LlamacError"),
        ("runtime", "if TYPE_CHECKING:\n    from typing_extensions import Unpack"),
        ("compiler", "from llamac.targets.base import Target\nimport torch"),
        ("tools", "from llamac import __version__"),
    ],
)
def test_a_proper_import_passes(layer: str, source: str) -> None:
    """The rule lets downward imports through."""
    assert not violations(layer, source)


@pytest.mark.parametrize("module", ["llamac", "llamac.runtime", "llamac.tools.cli"])
def test_importing_it_loads_no_compiler(module: str) -> None:
    """The runtime and the start of the command line load neither TVM nor torch nor the compiler."""
    heavy = [name for name in HEAVY if not (module.endswith("cli") and name.startswith("llamac."))]
    program = f"import sys, {module}; print([n for n in {heavy!r} if n in sys.modules])"
    result = subprocess.run(
        [sys.executable, "-c", program], capture_output=True, text=True, check=True
    )
    assert result.stdout.strip() == "[]"
