"""Dumps of the IR."""

from __future__ import annotations

from pathlib import Path

import pytest

from llamac.compiler.compile_config import CompileConfig
from llamac.compiler.dump import Dump
from llamac.compiler.pipeline import compile_bundle
from llamac.compiler.progress import SilentProgress
from llamac.runtime.errors import OutputError, UsageError


class Module:
    """Something that prints itself, as an IRModule does."""

    def script(self) -> str:
        return "# IR"


def test_files_are_numbered_in_the_order_of_stages(tmp_path: Path) -> None:
    dump = Dump(tmp_path / "ir")
    dump("composites", Module())
    dump.text("program.json", "{}")
    files = {path.name: path.read_text() for path in (tmp_path / "ir").iterdir()}
    assert files == {"1-composites.py": "# IR", "2-program.json": "{}"}


def test_without_a_folder_nothing_is_written(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    Dump(None)("composites", Module())
    assert not list(tmp_path.iterdir())


def test_a_folder_that_cannot_be_made_is_named(tmp_path: Path) -> None:
    """The error is about the dump, not about the bundle, and has cause and fix."""
    (tmp_path / "file").write_text("not a folder")
    with pytest.raises(OutputError, match=r"dumped into .*file/ir") as info:
        Dump(tmp_path / "file" / "ir")
    assert info.value.cause and "--dump" in info.value.fix


def test_bad_options_leave_no_dump_folder(tmp_path: Path) -> None:
    config = CompileConfig(
        tmp_path, "host", tmp_path / "out", context_length=0, dump=tmp_path / "ir"
    )
    with pytest.raises(UsageError):
        compile_bundle(config, SilentProgress())
    assert not list(tmp_path.iterdir())
