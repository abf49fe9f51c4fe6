"""A C compiler is found, links what it should, and its failures are told."""

from __future__ import annotations

import ctypes
import importlib.util
import platform
import re
import subprocess
from pathlib import Path

import pytest

from llamac.runtime.errors import BuildFailed, ToolchainMissing
from llamac.targets import toolchain as toolchain_module
from llamac.targets.toolchain import Toolchain, find_toolchain, link_executable, link_shared

HOST = f"{platform.machine()}-linux-gnu.2.34"
ADD = '#include "add.h"\nint add(int a, int b) { return a + b + hidden(__FILE__); }\n'
ADD_H = """__attribute__((visibility("default"))) int add(int a, int b);
int hidden(const char *text);
"""
HIDDEN = '#include "add.h"\nint hidden(const char *text) { return *text == 0; }\n'


@pytest.fixture
def without_zig(monkeypatch: pytest.MonkeyPatch) -> None:
    """Make Python believe that ziglang is not installed."""
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: None)


@pytest.fixture(params=["zig", "system"])
def toolchain(request: pytest.FixtureRequest) -> Toolchain:
    """Each kind of toolchain."""
    if request.param == "system":
        request.getfixturevalue("without_zig")
    try:
        found = find_toolchain()
    except ToolchainMissing:
        pytest.skip("missing program: a system compiler")
    if found.is_zig != (request.param == "zig"):
        pytest.skip("missing program: ziglang")
    return found


def _write_sources(folder: Path) -> list[Path]:
    folder.mkdir(parents=True)
    (folder / "add.h").write_text(ADD_H)
    (folder / "add.c").write_text(ADD)
    (folder / "hidden.c").write_text(HIDDEN)
    return [folder / "add.c", folder / "hidden.c"]


def _link(toolchain: Toolchain, folder: Path, out: Path, **options: object) -> Path:
    sources = _write_sources(folder)
    arguments: dict[str, object] = {"objects": [], "target": HOST, "soname": "libadd.so"} | options
    link_shared(toolchain, sources=sources, include_dirs=[folder], out=out, **arguments)  # type: ignore[arg-type]
    return out


def _dynamic(path: Path) -> str:
    return subprocess.run(
        ["readelf", "-Wd", "--dyn-syms", str(path)], capture_output=True, text=True, check=True
    ).stdout


def test_finds_a_toolchain_that_answers(toolchain: Toolchain) -> None:
    """It has a version and can be called."""
    assert re.search(r"\d+\.\d+", toolchain.version)
    assert subprocess.run([*toolchain.command, "--version"], check=False).returncode == 0


def test_no_toolchain(without_zig: None, monkeypatch: pytest.MonkeyPatch) -> None:
    """Without zig and compilers the error says what to install."""
    monkeypatch.setenv("PATH", "/nonexistent")
    with pytest.raises(ToolchainMissing) as caught:
        find_toolchain()
    assert caught.value.fix == "pip install ziglang"


def test_a_compiler_that_does_not_run_is_passed_over(
    without_zig: None, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    """A broken cc does not hide a working gcc."""
    for name, text in (("cc", "exit 1"), ("gcc", "echo gcc 99.1")):
        (tmp_path / name).write_text(f"#!/bin/sh\n{text}\n")
        (tmp_path / name).chmod(0o755)
    monkeypatch.setenv("PATH", str(tmp_path))
    found = find_toolchain()
    assert (found.name, found.version) == ("gcc", "gcc 99.1")


def test_shared_library_works(toolchain: Toolchain, tmp_path: Path) -> None:
    """The library can be loaded and called."""
    library = _link(toolchain, tmp_path / "src", tmp_path / "libadd.so")
    assert ctypes.CDLL(str(library)).add(2, 3) == 5
    assert sorted(path.name for path in tmp_path.iterdir()) == ["libadd.so", "src"]


@pytest.mark.needs("readelf")
def test_shared_library_is_lean(toolchain: Toolchain, tmp_path: Path) -> None:
    """It exports what the sources want, needs libc at most, and has the given name."""
    dynamic = _dynamic(_link(toolchain, tmp_path / "src", tmp_path / "libadd.so"))
    assert "soname: [libadd.so]" in dynamic
    assert set(re.findall(r"NEEDED.*\[(.*)\]", dynamic)) <= {"libc.so.6"}
    assert re.search(r" add$", dynamic, re.MULTILINE)
    assert not re.search(r" hidden$", dynamic, re.MULTILINE)


@pytest.mark.needs("readelf")
def test_exports_narrow_what_is_visible(toolchain: Toolchain, tmp_path: Path) -> None:
    """Only the listed patterns stay visible."""
    folder = tmp_path / "src"
    everything = _link(toolchain, folder, tmp_path / "a.so", cflags=["-fvisibility=default"])
    assert re.search(r" hidden$", _dynamic(everything), re.MULTILINE)
    narrow = tmp_path / "b.so"
    link_shared(
        toolchain,
        sources=[folder / "add.c", folder / "hidden.c"],
        objects=[],
        include_dirs=[folder],
        out=narrow,
        target=HOST,
        cflags=["-fvisibility=default"],
        exports=["a*"],
    )
    assert not re.search(r" hidden$", _dynamic(narrow), re.MULTILINE)
    assert ctypes.CDLL(str(narrow)).add(2, 3) == 5


@pytest.mark.needs("readelf")
def test_libm_is_needed_only_when_called(toolchain: Toolchain, tmp_path: Path) -> None:
    """A library that calls expf gets libm."""
    source = tmp_path / "e.c"
    source.write_text(
        "#include <math.h>\n"
        '__attribute__((visibility("default"))) float e(float x) { return expf(x); }\n'
    )
    out = tmp_path / "e.so"
    link_shared(
        toolchain, sources=[source], objects=[], include_dirs=[], out=out, target=HOST, soname=None
    )
    assert "libm.so.6" in re.findall(r"NEEDED.*\[(.*)\]", _dynamic(out))
    assert "SONAME" not in _dynamic(out)


def test_same_sources_give_the_same_bytes(toolchain: Toolchain, tmp_path: Path) -> None:
    """Neither time nor folder can be seen in the output."""
    first = _link(toolchain, tmp_path / "a" / "src", tmp_path / "a" / "one.so")
    second = _link(toolchain, tmp_path / "other" / "folder", tmp_path / "two.so")
    assert first.read_bytes() == second.read_bytes()
    assert str(tmp_path).encode() not in first.read_bytes()


def test_compile_error_is_shown(toolchain: Toolchain, tmp_path: Path) -> None:
    """The compiler's words are the cause, and an older output survives."""
    source, out = tmp_path / "bad.c", tmp_path / "bad.so"
    source.write_text("int f(void) { return missing_name; }\n")
    out.write_bytes(b"old")
    with pytest.raises(BuildFailed, match=r"could not build bad\.so") as caught:
        link_shared(toolchain, sources=[source], objects=[], include_dirs=[], out=out, target=HOST)
    assert "missing_name" in caught.value.cause
    assert out.read_bytes() == b"old"
    assert sorted(path.name for path in tmp_path.iterdir()) == ["bad.c", "bad.so"]


def test_the_first_of_many_errors_is_shown(toolchain: Toolchain, tmp_path: Path) -> None:
    """And the last lines too."""
    source = tmp_path / "bad.c"
    names = [f"missing_{i}" for i in range(9)]
    source.write_text("".join(f"int f{i}(void) {{ return {n}; }}\n" for i, n in enumerate(names)))
    with pytest.raises(BuildFailed) as caught:
        link_shared(
            toolchain,
            sources=[source],
            objects=[],
            include_dirs=[],
            out=tmp_path / "bad.so",
            target=HOST,
        )
    assert all(name in caught.value.cause for name in names)
    assert len(caught.value.cause.splitlines()) <= 24


def test_undefined_symbols_are_refused(toolchain: Toolchain, tmp_path: Path) -> None:
    """A library that would fail at load fails at link."""
    source = tmp_path / "bad.c"
    source.write_text("int absent(void);\nint f(void) { return absent(); }\n")
    with pytest.raises(BuildFailed) as caught:
        link_shared(
            toolchain,
            sources=[source],
            objects=[],
            include_dirs=[],
            out=tmp_path / "bad.so",
            target=HOST,
            cflags=["-fvisibility=default"],
        )
    assert "absent" in caught.value.cause


def test_executable_runs(toolchain: Toolchain, tmp_path: Path) -> None:
    """A program linked against a library finds it beside itself."""
    library = _link(toolchain, tmp_path / "src", tmp_path / "libadd.so")
    source, out = tmp_path / "main.c", tmp_path / "main"
    source.write_text('#include "add.h"\nint main(void) { return add(20, 22); }\n')
    link_executable(
        toolchain,
        sources=[source],
        objects=[library],
        include_dirs=[tmp_path / "src"],
        out=out,
        target=HOST,
        cflags=["-Wl,-rpath,$ORIGIN"],
    )
    assert subprocess.run([str(out)], check=False).returncode == 42


@pytest.mark.needs("readelf")
@pytest.mark.parametrize("target", ["aarch64-linux-gnu.2.34", "aarch64-linux-musl"])
def test_zig_links_for_other_systems(tmp_path: Path, target: str) -> None:
    """The support library itself builds for AArch64, glibc and musl."""
    toolchain = find_toolchain()
    if not toolchain.is_zig:
        pytest.skip("missing program: ziglang")
    sources = Path(toolchain_module.__file__).resolve().parents[1] / "runtime" / "c"
    table = tmp_path / "entry.c"
    table.write_text('#include "program.h"\nconst llamac_program llamac_program_table = {0};\n')
    out = tmp_path / "arm.so"
    link_shared(
        toolchain,
        sources=[table, *sorted(sources.glob("*.c"))],
        objects=[],
        include_dirs=[sources],
        out=out,
        target=target,
        cflags=["-Wall", "-Wextra", "-Werror"],
    )
    header = subprocess.run(
        ["readelf", "-h", str(out)], capture_output=True, text=True, check=True
    ).stdout
    assert "AArch64" in header
    assert " llamac_session_eval" in _dynamic(out)


def test_system_compiler_refuses_other_systems(without_zig: None, tmp_path: Path) -> None:
    """A system compiler links for this machine only, and says so."""
    toolchain = Toolchain(("cc",), "cc", "cc 1.0")
    with pytest.raises(ToolchainMissing, match="cannot link for riscv64-linux-gnu") as caught:
        _link(toolchain, tmp_path / "src", tmp_path / "x.so", target="riscv64-linux-gnu")
    assert caught.value.fix == "pip install ziglang"


def test_zig_caches_below_the_user_s_cache_folder(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    """XDG_CACHE_HOME is respected, and so is a choice by the user."""
    monkeypatch.delenv("ZIG_GLOBAL_CACHE_DIR", raising=False)
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    environment = toolchain_module._environment()
    assert environment["ZIG_GLOBAL_CACHE_DIR"] == str(tmp_path / "llamac" / "zig")
    monkeypatch.delenv("XDG_CACHE_HOME")
    monkeypatch.setenv("HOME", str(tmp_path))
    environment = toolchain_module._environment()
    assert environment["ZIG_GLOBAL_CACHE_DIR"] == str(tmp_path / ".cache" / "llamac" / "zig")
    monkeypatch.setenv("ZIG_GLOBAL_CACHE_DIR", "/elsewhere")
    assert toolchain_module._environment()["ZIG_GLOBAL_CACHE_DIR"] == "/elsewhere"
