"""What an installation contains, and what it must not make importable."""

from __future__ import annotations

import tarfile
import zipfile
from collections.abc import Callable
from pathlib import Path

import pytest

LAYERS = ("runtime", "schedules", "targets", "compiler", "tools")
DATA_SUFFIXES = {".py", ".typed", ".toml", ".json", ".jsonl", ".c", ".h"}


@pytest.mark.parametrize("name", [*LAYERS, "src"])
def test_no_generic_name_becomes_importable(
    name: str, python: Callable[..., str], tmp_path: Path
) -> None:
    """Installing llamac adds the name llamac and no other."""
    program = f"import importlib.util; print(importlib.util.find_spec({name!r}))"
    assert python("-c", program, cwd=tmp_path) == "None\n"


def test_llamac_is_importable_anywhere(python: Callable[..., str], tmp_path: Path) -> None:
    """The counterpart: the test above would also pass without any installation."""
    assert python("-c", "import llamac.runtime; print(1)", cwd=tmp_path) == "1\n"


def expected_files(checkout: Path) -> set[str]:
    """Return every file of ours that an installation must have."""
    names = {"llamac/__init__.py", "llamac/py.typed"}
    for layer in LAYERS:
        for path in (checkout / layer).rglob("*"):
            if path.suffix in DATA_SUFFIXES and path.is_file():
                names.add(f"llamac/{path.relative_to(checkout)}")
    return names


def wheel_files(wheel: Path) -> dict[str, int]:
    """Return the files of a wheel with their checksums, without its metadata."""
    with zipfile.ZipFile(wheel) as archive:
        return {f.filename: f.CRC for f in archive.infolist() if ".dist-info/" not in f.filename}


@pytest.mark.slow
def test_the_wheel_has_every_file(wheel: Path, checkout: Path) -> None:
    """Every module, SoC file and C file, and nothing else."""
    assert set(wheel_files(wheel)) == expected_files(checkout)


@pytest.mark.slow
def test_the_wheel_made_from_the_sdist_is_the_same(
    wheel: Path, sources: Path, build: Callable[[str, Path, Path], Path], tmp_path: Path
) -> None:
    """The links of the checkout became files in the sdist, and none was lost on the way."""
    sdist = build("sdist", sources, tmp_path / "sdist")
    with tarfile.open(sdist) as archive:
        archive.extractall(tmp_path / "unpacked", filter="data")
    [unpacked] = (tmp_path / "unpacked").iterdir()
    again = build("wheel", unpacked, tmp_path / "wheel")
    assert wheel_files(again) == wheel_files(wheel)


@pytest.mark.slow
def test_the_installed_wheel_works_alone(
    installed_wheel: Path, python: Callable[..., str], tmp_path: Path
) -> None:
    """Installed into an empty folder it is what Python imports, data and entry points included."""
    program = """
import llamac, llamac.compiler, llamac.runtime, llamac.schedules, llamac.targets, llamac.tools
from importlib.metadata import version
from llamac.targets import load_soc, soc_files, target_names
assert llamac.__version__ == version("llamac"), version("llamac")
assert load_soc("host").arch == "x86_64" and "sm8650" in soc_files()
assert "x86-cpu" in target_names()
print(llamac.__file__)
"""
    package = python("-c", program, cwd=tmp_path, path=[installed_wheel])
    assert package.startswith(str(installed_wheel))
    help_text = python("-m", "llamac.tools.cli", "--help", cwd=tmp_path, path=[installed_wheel])
    assert "usage: llamac" in help_text
    for name in LAYERS:
        spec = f"import importlib.util; print(importlib.util.find_spec({name!r}))"
        assert python("-c", spec, cwd=tmp_path, path=[installed_wheel]) == "None\n"
