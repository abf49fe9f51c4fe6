"""The cache of compiled kernels."""

from __future__ import annotations

from pathlib import Path

import pytest

from llamac.schedules.intrin.x86 import Avx2, X86Portable
from llamac.schedules.select import TakeRowShape
from llamac.targets.cpu import object_cache
from llamac.targets.cpu.kernels import KernelSpec
from llamac.targets.cpu.object_cache import SWITCH, compile_object

SPEC = KernelSpec("take_row", "select", TakeRowShape(2, 32))


@pytest.fixture(autouse=True)
def cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """An empty cache of this test's own."""
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    monkeypatch.delenv(SWITCH, raising=False)
    return tmp_path / "cache" / "llamac" / "kernels"


def objects(cache: Path) -> list[Path]:
    return sorted(cache.rglob("*.o"))


def test_the_second_time_an_object_comes_from_the_cache(cache: Path, tmp_path: Path) -> None:
    """Its bytes are the same, and they are those of a compilation without a cache."""
    first, second, without = (tmp_path / f"{name}.o" for name in ("first", "second", "without"))
    assert not compile_object(SPEC, Avx2(), "k", first)
    assert compile_object(SPEC, Avx2(), "k", second)
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv(SWITCH, "0")
        assert not compile_object(SPEC, Avx2(), "k", without)
    assert first.read_bytes() == second.read_bytes() == without.read_bytes()
    assert len(objects(cache)) == 1


def test_whatever_changes_the_code_misses(
    cache: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Shape, symbol, instruction set and the generators' source are all part of the key."""
    other = KernelSpec("take_row", "select", TakeRowShape(3, 32))
    out = tmp_path / "k.o"
    assert not compile_object(SPEC, Avx2(), "k", out)
    assert not compile_object(other, Avx2(), "k", out)
    assert not compile_object(SPEC, Avx2(), "k2", out)
    assert not compile_object(SPEC, X86Portable(), "k", out)
    monkeypatch.setattr(object_cache, "generators_hash", lambda: "changed")
    assert not compile_object(SPEC, Avx2(), "k", out)
    assert len(objects(cache)) == 5


def test_switched_off_nothing_is_kept(
    cache: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """LLAMAC_KERNEL_CACHE=0 neither reads nor writes."""
    monkeypatch.setenv(SWITCH, "0")
    assert not compile_object(SPEC, Avx2(), "k", tmp_path / "k.o")
    assert not objects(cache)


def test_a_cache_that_cannot_be_written_is_no_error(cache: Path, tmp_path: Path) -> None:
    """A file where the folder should be: the object is made all the same."""
    cache.parent.mkdir(parents=True)
    cache.write_text("not a folder")
    out = tmp_path / "k.o"
    assert not compile_object(SPEC, Avx2(), "k", out)
    assert out.stat().st_size > 0
