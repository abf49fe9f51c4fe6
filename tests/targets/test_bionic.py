"""Libraries for Android: what is linked against, what is refused, and the NDK."""

from __future__ import annotations

import re
import subprocess
import sys
from pathlib import Path

import pytest

import llamac.runtime
from llamac.runtime.errors import BuildFailed, ToolchainMissing
from llamac.targets import bionic
from llamac.targets.arm_cpu import ArmCpu
from llamac.targets.bionic import (
    API_LEVEL,
    HEADER,
    NDK_VARIABLE,
    SYMBOLS,
    TARGET,
    find_ndk,
    link_for_bionic,
    make_stub,
)
from llamac.targets.soc import load_soc
from llamac.targets.toolchain import Toolchain, compile_object, find_toolchain

SUPPORT = Path(llamac.runtime.__file__).parent / "c"
CLANG = Path("toolchains/llvm/prebuilt/linux-x86_64/bin") / f"{TARGET}-clang"

# What Google's NDK r26 says, and zig behind it; zig's linker does not know -z text.
FAKE_CLANG = f"""#!{sys.executable}
import subprocess, sys
if sys.argv[1:] == ["--version"]:
    print("Android (10552028, +pgo) clang version 17.0.2")
    raise SystemExit
arguments = [x for x in sys.argv[1:] if x != "-Wl,-z,text"]
zig = [sys.executable, "-m", "ziglang", "cc", "-target", "aarch64-linux-musl", "-DFAKE_NDK"]
raise SystemExit(subprocess.run([*zig, *arguments]).returncode)
"""


@pytest.fixture
def zig(monkeypatch: pytest.MonkeyPatch) -> Toolchain:
    """zig, and no NDK."""
    monkeypatch.delenv(NDK_VARIABLE, raising=False)
    toolchain = find_toolchain()
    if not toolchain.is_zig:
        pytest.skip("missing program: ziglang")
    return toolchain


@pytest.fixture
def ndk(zig: Toolchain, monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> Path:
    """The compiler of a fake NDK, which $ANDROID_NDK_HOME names."""
    clang = tmp_path / "ndk" / CLANG
    clang.parent.mkdir(parents=True)
    clang.write_text(FAKE_CLANG)
    clang.chmod(0o755)
    monkeypatch.setenv(NDK_VARIABLE, str(tmp_path / "ndk"))
    monkeypatch.setattr(bionic.platform, "system", lambda: "Linux")
    return clang


def link(zig: Toolchain, folder: Path, source: str) -> str:
    """Link one C file and the support library; returns the note."""
    table = folder / "entry.c"
    table.write_text(source)
    return link_for_bionic(
        zig,
        sources=[table, *sorted(SUPPORT.glob("*.c"))],
        objects=[],
        include_dirs=[SUPPORT],
        out=folder / "libmodel.so",
        soname="libmodel.so",
        exports=["llamac_*"],
    )


TABLE = '#include "program.h"\nconst llamac_program llamac_program_table = {0};\n'


def readelf(option: str, library: Path) -> str:
    return subprocess.run(
        ["readelf", "-W", option, str(library)], capture_output=True, text=True, check=True
    ).stdout


@pytest.mark.needs("readelf")
def test_support_library_links_for_bionic(zig: Toolchain, tmp_path: Path) -> None:
    """It needs bionic's libc, has no versions, and nothing is left beside it."""
    note = link(zig, tmp_path, TABLE)
    assert note.startswith(f"linked for Android API 28 by zig {zig.version} with stubs of bionic")
    assert note.endswith("not loaded on bionic, which needs a phone")
    dynamic = readelf("-d", tmp_path / "libmodel.so")
    assert re.findall(r"NEEDED.*\[(.*)\]", dynamic) == ["libc.so"]
    assert "VER" not in dynamic
    assert " llamac_session_eval" in readelf("--dyn-syms", tmp_path / "libmodel.so")
    assert sorted(path.name for path in tmp_path.iterdir()) == ["entry.c", "libmodel.so"]


def test_same_sources_give_the_same_bytes(zig: Toolchain, tmp_path: Path) -> None:
    """Neither time nor folder can be seen in the output."""
    folders = tmp_path / "a", tmp_path / "another" / "folder"
    for folder in folders:
        folder.mkdir(parents=True)
        link(zig, folder, TABLE)
    first, second = ((folder / "libmodel.so").read_bytes() for folder in folders)
    assert first == second
    assert str(tmp_path).encode() not in first


@pytest.mark.parametrize(
    ("name", "source"),
    [
        # Introduced at API 29 and 30; musl and glibc have them for long.
        ("getloadavg", "#include <stdlib.h>\nint use(double *x) { return getloadavg(x, 1); }"),
        ("memfd_create", '#include <sys/mman.h>\nint use(void) { return memfd_create("", 0); }'),
        # musl's name of a variable of another kind.
        ("stderr", "#include <stdio.h>\nvoid use(void) { fclose(stderr); }"),
    ],
)
def test_what_bionic_lacks_is_refused_by_the_linker(
    zig: Toolchain, tmp_path: Path, name: str, source: str
) -> None:
    """A library that no phone could load is not built."""
    source = source.replace("use(", "llamac_use(")
    visible = "#pragma GCC visibility push(default)\n"
    with pytest.raises(BuildFailed, match=r"could not build libmodel\.so") as caught:
        link(zig, tmp_path, visible + source + "\n#pragma GCC visibility pop\n" + TABLE)
    assert f"undefined symbol: {name}" in caught.value.cause
    assert not (tmp_path / "libmodel.so").exists()


def test_symbols_are_those_of_the_api_level() -> None:
    """In order, and none newer than what is promised."""
    for names in SYMBOLS.values():
        assert list(names) == sorted(names)
        assert all(21 <= introduced <= API_LEVEL for introduced in names.values())


@pytest.mark.needs("readelf")
def test_stubs_have_names_and_nothing_else(zig: Toolchain, tmp_path: Path) -> None:
    stub = make_stub(zig, "libc.so", tmp_path)
    symbols = readelf("--dyn-syms", stub)
    assert set(re.findall(r"FUNC +GLOBAL DEFAULT +\d+ (\w+)$", symbols, re.MULTILINE)) == set(
        SYMBOLS["libc.so"]
    )
    assert "soname: [libc.so]" in readelf("-d", stub)
    assert "NEEDED" not in readelf("-d", stub)


def test_the_header_refuses_types_of_another_size(zig: Toolchain, tmp_path: Path) -> None:
    """Its checks can fail: for another processor, and for a C library with another mutex."""
    source = tmp_path / "x.c"
    source.write_text("int nothing;\n")
    for target, problem in (
        ("x86_64-linux-musl", "struct stat"),
        ("aarch64-linux-gnu.2.28", "pthread_mutex_t"),
    ):
        with pytest.raises(BuildFailed) as caught:
            compile_object(
                zig,
                sources=[source],
                include_dirs=(),
                out=tmp_path / "x.o",
                target=target,
                cflags=["-include", str(HEADER)],
            )
        assert problem in caught.value.cause


# -- the NDK --------------------------------------------------------------------------------------


def test_no_ndk_unless_it_is_named(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv(NDK_VARIABLE, raising=False)
    assert find_ndk() is None
    monkeypatch.setenv(NDK_VARIABLE, "")
    assert find_ndk() is None


@pytest.mark.needs("readelf")
def test_the_ndk_is_used_and_the_note_says_so(zig: Toolchain, ndk: Path, tmp_path: Path) -> None:
    """With its own headers: our header for musl's is not given to it."""
    condition = "#if !defined(FAKE_NDK) || defined(LLAMAC_BIONIC_H)\n#error\n#endif\n"
    note = link(zig, tmp_path, condition + TABLE)
    assert "by the Android NDK's clang, Android (10552028, +pgo) clang version 17.0.2" in note
    assert note.endswith("not loaded on bionic, which needs a phone")
    segments = readelf("-l", tmp_path / "libmodel.so")
    relro = re.search(r"GNU_RELRO +\S+ (0x\w+) \S+ \S+ (0x\w+)", segments)
    assert relro is not None and sum(int(x, 16) for x in relro.groups()) % 16384 == 0


def test_the_ndk_links_for_android_only(zig: Toolchain, ndk: Path, tmp_path: Path) -> None:
    found = find_ndk()
    assert found is not None and found.target == TARGET and not found.is_zig
    with pytest.raises(ToolchainMissing, match="cannot link for aarch64-linux-musl") as caught:
        compile_object(
            found, sources=[], include_dirs=(), out=tmp_path / "x.o", target="aarch64-linux-musl"
        )
    assert caught.value.cause == f"it links for {TARGET} only"


@pytest.mark.parametrize(
    ("spoil", "cause"),
    [
        (lambda clang: clang.unlink(), "does not exist"),
        (lambda clang: clang.chmod(0o644), "does not run"),
        (lambda clang: clang.write_text("#!/bin/sh\nexit 1\n"), "does not run"),
    ],
)
def test_a_wrong_ndk_is_an_error(ndk: Path, tmp_path: Path, spoil: object, cause: str) -> None:
    """Never passed over in silence: the user wants the NDK."""
    assert callable(spoil)
    spoil(ndk)
    with pytest.raises(ToolchainMissing, match=f"no usable Android NDK at {tmp_path}") as caught:
        find_ndk()
    assert caught.value.cause == f"{ndk} {cause}"
    assert NDK_VARIABLE in caught.value.fix


def test_a_wrong_ndk_is_found_before_anything_is_compiled(
    zig: Toolchain, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    """`check` names it."""
    target = ArmCpu(load_soc("sm8650"))
    assert target.check() == []
    monkeypatch.setenv(NDK_VARIABLE, str(tmp_path / "nowhere"))
    [missing] = target.check()
    assert missing.what == "a usable Android NDK"
    assert "does not exist" in missing.why
