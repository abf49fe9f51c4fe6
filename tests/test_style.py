"""Limits of size, and words that must not be committed; exceptions stand here with their reason."""

from __future__ import annotations

import ast
import re
from collections.abc import Iterator
from pathlib import Path

import pytest

LAYERS = ("runtime", "schedules", "targets", "compiler", "tools")
MAX_FILE_LINES = 400
MAX_FUNCTION_LINES = 40
MAX_SCHEDULE_LINES = 80

LONG_FILES: dict[str, str] = {}
"""Files that may be longer, each with the reason."""

LONG_FUNCTIONS = {
    "compiler/pipeline.py:compile_bundle": "shows the whole way of a model, top to bottom",
}
"""Functions ("file:name") that may be longer, each with the reason."""

FORBIDDEN = {
    "a path of one machine": r"(?<![\w.~$}])/(?:root|work|Users/\w+|home/\w+)/",
    "a registry's host": r"(?:pypi|npmjs|pythonhosted|anaconda|download\.pytorch)\.(?:org|com)",
    "an index of packages": r"--(?:extra-)?index-url|PIP_INDEX_URL",
}
TEXT_SUFFIXES = {"", ".py", ".md", ".toml", ".txt", ".c", ".h", ".json", ".cfg", ".yml", ".sh"}
SKIPPED_FOLDERS = {"build", "dist", "bundles", "__pycache__"}


def code_files(root: Path) -> Iterator[Path]:
    """Yield the Python and C files of the layers and of the tests."""
    for folder in (*LAYERS, "tests"):
        for suffix in ("*.py", "*.c", "*.h"):
            yield from sorted((root / folder).rglob(suffix))


def text_files(root: Path) -> Iterator[Path]:
    """Yield everything that is committed as text, this file excepted."""
    for path in sorted(root.iterdir()):
        is_hidden = path.name.startswith(".") and path.name not in (".ci", ".gitignore")
        if is_hidden or path.name in SKIPPED_FOLDERS:
            continue
        for file in sorted(path.rglob("*")) if path.is_dir() else [path]:
            if SKIPPED_FOLDERS & set(file.parts) or "egg-info" in str(file):
                continue
            if file.is_file() and file.suffix in TEXT_SUFFIXES and file != Path(__file__).resolve():
                yield file


def function_lengths(source: str) -> dict[str, int]:
    """Return the lines of every function, without its docstring and decorators."""
    lengths = {}
    for node in ast.walk(ast.parse(source)):
        if isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef):
            length = (node.end_lineno or node.lineno) - node.lineno + 1
            if ast.get_docstring(node) is not None:
                doc = node.body[0]
                length -= (doc.end_lineno or doc.lineno) - doc.lineno + 1
            lengths[node.name] = max(length, lengths.get(node.name, 0))
    return lengths


def forbidden_words(text: str) -> list[str]:
    """Return what kinds of forbidden words a text has."""
    return [kind for kind, pattern in FORBIDDEN.items() if re.search(pattern, text)]


def test_files_are_short(checkout: Path) -> None:
    """A file is read in one sitting: at most 400 lines."""
    lengths = {
        str(path.relative_to(checkout)): len(path.read_text("utf-8").splitlines())
        for path in code_files(checkout)
    }
    assert len(lengths) > 50
    too_long = {name for name, lines in lengths.items() if lines > MAX_FILE_LINES}
    assert too_long == set(LONG_FILES)


def test_functions_are_short(checkout: Path) -> None:
    """A function fits on a screen: 40 lines, generators of kernels 80, without docstring."""
    too_long = set()
    for path in code_files(checkout):
        if path.suffix != ".py":
            continue
        name = str(path.relative_to(checkout))
        limit = MAX_SCHEDULE_LINES if name.startswith("schedules/") else MAX_FUNCTION_LINES
        for function, lines in function_lengths(path.read_text("utf-8")).items():
            if lines > limit:
                too_long.add(f"{name}:{function}")
    assert too_long == set(LONG_FUNCTIONS)


def test_length_does_not_count_the_docstring() -> None:
    """Documentation is free."""
    assert function_lengths('def f():\n    """One.\n\n    Two.\n    """\n    return 1\n') == {
        "f": 2
    }


def test_no_machine_is_named(checkout: Path) -> None:
    """Nothing committed names the folders of one machine or where packages are downloaded from."""
    found = {}
    for path in text_files(checkout):
        try:
            kinds = forbidden_words(path.read_text("utf-8"))
        except UnicodeDecodeError:
            continue
        if kinds:
            found[str(path.relative_to(checkout))] = kinds
    assert not found


@pytest.mark.parametrize(
    ("text", "is_forbidden"),
    [
        ("see /root/model", True),
        ('open("/home/me/x")', True),
        ("pip install --index-url x", True),
        ("the package on https://pypi.org/project/x", True),
        ("compiler/work/x and ~/root", False),
        ("/proc/self/status", False),
    ],
)
def test_the_words_are_found(text: str, is_forbidden: bool) -> None:
    """The patterns catch what they are for and leave relative paths alone."""
    assert bool(forbidden_words(text)) is is_forbidden


def test_every_folder_with_modules_is_a_package(checkout: Path) -> None:
    """A folder without `__init__.py` would be missing from the wheel."""
    folders = {path.parent for layer in LAYERS for path in (checkout / layer).rglob("*.py")}
    assert not [folder for folder in folders if not (folder / "__init__.py").is_file()]
