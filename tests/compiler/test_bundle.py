"""A bundle appears whole or not at all, whatever happens while it is written."""

from __future__ import annotations

import errno
import hashlib
import os
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path

import numpy as np
import pytest

from llamac.compiler import pipeline
from llamac.compiler.bundle import (
    WEIGHTS,
    bundle_folder,
    check_space,
    file_entry,
    remove_build_files,
    sync_folder,
    write_header,
    write_weights,
)
from llamac.compiler.compile_config import CompileConfig
from llamac.compiler.pipeline import compile_bundle
from llamac.compiler.progress import SilentProgress
from llamac.runtime.checks import WeightsHeader
from llamac.runtime.digest import sample_sha256
from llamac.runtime.errors import OutputError
from llamac.runtime.manifest import MANIFEST_NAME
from llamac.targets.program import Pack, ProgramTensor

BUILD_ID = "ab" * 32


@pytest.fixture
def out(tmp_path: Path) -> Path:
    """Where the bundle goes; its parent has to be made."""
    return tmp_path / "bundles" / "tiny"


@pytest.fixture
def old(out: Path) -> Path:
    """A bundle that is there already."""
    (out / "lib").mkdir(parents=True)
    (out / MANIFEST_NAME).write_text("old")
    return out


def left(out: Path) -> list[str]:
    """Names beside the bundle, hidden ones too."""
    return sorted(path.name for path in out.parent.iterdir())


def is_old(bundle: Path) -> bool:
    return (bundle / MANIFEST_NAME).read_text() == "old"


# -- the folder ------------------------------------------------------------------------------------


def test_the_folder_appears_when_it_is_complete(out: Path) -> None:
    """Until then it has another, hidden name beside it, on the same disk."""
    with bundle_folder(out, overwrite=False) as folder:
        (folder / MANIFEST_NAME).write_text("new")
        assert not out.exists()
        assert folder.parent == out.parent
        assert folder.name.startswith(".")
    assert left(out) == ["tiny"]
    assert (out / MANIFEST_NAME).read_text() == "new"
    assert out.stat().st_mode & 0o777 == 0o755


@pytest.mark.parametrize("error", [ValueError, KeyboardInterrupt, SystemExit])
@pytest.mark.parametrize("overwrite", [False, True])
def test_nothing_is_left_after_an_error(
    out: Path, error: type[BaseException], overwrite: bool
) -> None:
    with pytest.raises(error), bundle_folder(out, overwrite) as folder:
        (folder / "lib").mkdir()
        (folder / "lib" / "libmodel.so").write_text("half")
        raise error
    assert left(out) == []


@pytest.mark.parametrize("error", [ValueError, KeyboardInterrupt])
def test_the_old_bundle_survives_an_error(old: Path, error: type[BaseException]) -> None:
    with pytest.raises(error), bundle_folder(old, overwrite=True) as folder:
        (folder / MANIFEST_NAME).write_text("new")
        raise error
    assert left(old) == ["tiny"]
    assert is_old(old)


def test_the_old_bundle_is_there_until_the_new_one_is(old: Path) -> None:
    with bundle_folder(old, overwrite=True) as folder:
        (folder / MANIFEST_NAME).write_text("new")
        assert is_old(old)
    assert left(old) == ["tiny"]
    assert (old / MANIFEST_NAME).read_text() == "new"
    assert not (old / "lib").exists()


@pytest.mark.parametrize("error", [KeyboardInterrupt(), OSError(errno.EIO, "no disk")])
def test_the_old_bundle_comes_back_if_it_cannot_be_replaced(
    old: Path, error: BaseException, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The old one was moved away, and then the new one could not take its place."""
    rename = Path.rename

    def fail_second(self: Path, target: Path) -> Path:
        if (self / "is-new").exists():
            raise error
        return rename(self, target)

    monkeypatch.setattr(Path, "rename", fail_second)
    expected = KeyboardInterrupt if isinstance(error, KeyboardInterrupt) else OutputError
    with pytest.raises(expected), bundle_folder(old, overwrite=True) as folder:
        (folder / "is-new").touch()
    assert left(old) == ["tiny"]
    assert is_old(old)


def test_a_bundle_is_not_replaced_unasked(old: Path) -> None:
    """Refused before anything is made."""
    with pytest.raises(OutputError, match="exists already") as caught, bundle_folder(old, False):
        pytest.fail("the block must not run")
    assert "--force" in caught.value.fix
    assert left(old) == ["tiny"]


@pytest.mark.parametrize("is_file", [True, False])
def test_only_bundles_are_replaced(out: Path, is_file: bool) -> None:
    """A wrong path with --force must not cost a folder of something else."""
    precious = out if is_file else out / "precious.txt"
    precious.parent.mkdir(parents=True)
    precious.write_text("mine")
    with pytest.raises(OutputError, match="is not a bundle"), bundle_folder(out, True):
        pytest.fail("the block must not run")
    assert precious.read_text() == "mine"


def test_an_empty_folder_and_a_link_are_replaced(old: Path) -> None:
    """Behind a link, the old bundle stays where it is."""
    link, empty = old.with_name("link"), old.with_name("empty")
    link.symlink_to(old)
    empty.mkdir()
    for path in (link, empty):
        with bundle_folder(path, overwrite=True) as folder:
            (folder / MANIFEST_NAME).write_text("new")
        assert not path.is_symlink()
        assert not is_old(path)
    assert left(old) == ["empty", "link", "tiny"]
    assert is_old(old)


def test_a_place_that_cannot_be_written(tmp_path: Path) -> None:
    """The parent is a file."""
    (tmp_path / "file").touch()
    with (
        pytest.raises(OutputError, match="cannot be written") as caught,
        bundle_folder(tmp_path / "file" / "out", False),
    ):
        pytest.fail("the block must not run")
    assert "refused" in caught.value.cause


# -- a full disk -----------------------------------------------------------------------------------


def test_too_little_space_is_found_before_writing(tmp_path: Path) -> None:
    check_space(tmp_path, 1)
    with pytest.raises(OutputError, match=r"needs \d+ MB and the disk has \d+ MB"):
        check_space(tmp_path, 1 << 62)


@pytest.fixture
def full_disk(monkeypatch: pytest.MonkeyPatch) -> None:
    """weights.bin lies on a device that is always full: the system itself refuses each write."""

    @contextmanager
    def folder_with_full_file(out: Path, overwrite: bool) -> Iterator[Path]:
        with bundle_folder(out, overwrite) as folder:
            (folder / WEIGHTS).symlink_to("/dev/full")
            yield folder

    monkeypatch.setattr(pipeline, "bundle_folder", folder_with_full_file)


@pytest.mark.usefixtures("full_disk")
@pytest.mark.parametrize("form", ["spinquant", "float"])
def test_a_disk_that_gets_full_while_compiling(
    old: Path, form: str, write_meta: Callable[..., Path]
) -> None:
    """The error says so, nothing half written is left, and the old bundle is still there."""
    config = CompileConfig(
        model=write_meta(form),
        target="host",
        out=old,
        chunks=(8,),
        context_length=32,
        overwrite=True,
    )
    with pytest.raises(OutputError, match="No space left on device") as caught:
        compile_bundle(config, SilentProgress())
    assert caught.value.cause == "the disk is full"
    assert left(old) == ["tiny"]
    assert is_old(old)


# -- weights.bin -----------------------------------------------------------------------------------


def tensor(name: str, offset: int, count: int) -> ProgramTensor:
    return ProgramTensor(name, "weights", offset, "int32", (count,), Pack("int32", (name,)))


DATA = {"a": np.arange(40, dtype=np.int32), "b": np.arange(1024, dtype=np.int32)}
TENSORS = [tensor("a", 4096, 40), tensor("b", 8192, 1024)]


def pieces(pack: Pack) -> Iterator[np.ndarray]:
    """Three pieces of a tensor."""
    yield from np.array_split(DATA[pack.sources[0]], 3)


def test_weights_are_where_they_were_planned(tmp_path: Path) -> None:
    """Zeros between tensors and to the end; the digest is of everything after the header."""
    path, progress = tmp_path / WEIGHTS, []
    digest = write_weights(path, TENSORS, 16384, pieces, lambda *step: progress.append(step))
    assert path.read_bytes()[:4096] == bytes(4096)
    write_header(path, BUILD_ID, 16384)
    data = path.read_bytes()
    assert len(data) == 16384
    assert WeightsHeader.read(path) == WeightsHeader(BUILD_ID, 16384)
    assert digest == hashlib.sha256(data[4096:]).hexdigest()
    for item in TENSORS:
        found = np.frombuffer(data, np.int32, item.shape[0], item.offset)
        np.testing.assert_array_equal(found, DATA[item.name])
    assert data[4096 + 160 : 8192] == bytes(8192 - 4256)
    assert data[8192 + 4096 :] == bytes(4096)
    assert sum(count for count, _ in progress) == 160 + 4096
    assert [name for _, name in progress] == ["a"] * 3 + ["b"] * 3


def test_a_tensor_of_another_size_than_planned_is_a_fault(tmp_path: Path) -> None:
    wrong = [tensor("a", 4096, 41), TENSORS[1]]
    with pytest.raises(RuntimeError, match="a: 160 bytes, planned 164"):
        write_weights(tmp_path / WEIGHTS, wrong, 16384, pieces, lambda *step: None)


# -- the other files -------------------------------------------------------------------------------


def test_entries_have_sizes_and_hashes(tmp_path: Path) -> None:
    """Of the weights a sample is hashed too."""
    path = tmp_path / WEIGHTS
    path.write_bytes(os.urandom(10000))
    weights = file_entry(tmp_path, WEIGHTS, "weights")
    assert (weights.role, weights.bytes) == ("weights", 10000)
    assert weights.sha256 == hashlib.sha256(path.read_bytes()).hexdigest()
    assert weights.sample_sha256 == sample_sha256(path)
    assert file_entry(tmp_path, WEIGHTS, "tokenizer").sample_sha256 is None


def test_everyone_may_read_a_bundle(tmp_path: Path) -> None:
    """And what was needed only to build is gone."""
    for name in ("lib/libmodel.so", "manifest.json", "build/entry.c"):
        path = tmp_path / name
        path.parent.mkdir(exist_ok=True, mode=0o700)
        path.touch(mode=0o600)
    remove_build_files(tmp_path)
    remove_build_files(tmp_path)
    sync_folder(tmp_path)
    modes = {
        str(p.relative_to(tmp_path)): p.stat().st_mode & 0o777 for p in sorted(tmp_path.rglob("*"))
    }
    assert modes == {"lib": 0o755, "lib/libmodel.so": 0o755, "manifest.json": 0o644}
