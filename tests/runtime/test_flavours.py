"""Bundles with a library for each C library: which one is loaded, and what is refused."""

from __future__ import annotations

import os
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from llamac.runtime import BundleInvalid, CpuUnsupported, load, system
from llamac.runtime.checks import library_name
from llamac.runtime.library import Library
from llamac.runtime.manifest import read_manifest
from llamac.targets.toolchain import find_toolchain, link_shared

LIBRARY = "lib/libmodel.so"
FLAVOURS = ("android", "glibc", "musl")


@pytest.fixture
def flavoured(make_bundle: Callable[..., Path]) -> Callable[..., Path]:
    """Make a bundle with a library for each flavour, of which only this process's is one."""

    def make(*flavours: str, **target: str) -> Path:
        bundle = make_bundle()

        def change(document: dict[str, Any]) -> None:
            document["target"].update(target)
            entry = document["files"].pop(LIBRARY)
            for flavour in flavours:
                is_ours = flavour == system.c_library()
                data = (bundle / LIBRARY).read_bytes() if is_ours else b""
                (bundle / "lib" / flavour).mkdir()
                (bundle / "lib" / flavour / "libmodel.so").write_bytes(data)
                named = entry if is_ours else {**entry, "bytes": 0, "sha256": EMPTY}
                document["files"][f"lib/{flavour}/libmodel.so"] = {**named, "flavour": flavour}

        make_bundle.write_manifest(bundle, change)  # type: ignore[attr-defined]
        (bundle / LIBRARY).unlink()
        return bundle

    return make


EMPTY = "e3b0c44298fc1c149afbf4c8996fb92427ae41e4649b934ca495991b7852b855"


@pytest.mark.parametrize("name", ["linux", "android"])
def test_the_library_for_this_process_is_loaded(flavoured: Callable[..., Path], name: str) -> None:
    """Whatever system the SoC is known for: an Android phone's bundle runs under any Linux."""
    bundle = flavoured(*FLAVOURS, os=name)
    assert library_name(read_manifest(bundle)) == f"lib/{system.c_library()}/libmodel.so"
    with load(bundle, threads=1) as model:
        assert model.info.model_name == "chain"


@pytest.mark.parametrize("missing", FLAVOURS)
def test_a_c_library_without_a_library_is_named(
    flavoured: Callable[..., Path], monkeypatch: pytest.MonkeyPatch, missing: str
) -> None:
    """And so are those that the bundle has one for."""
    others = [flavour for flavour in FLAVOURS if flavour != missing]
    bundle = flavoured(*others)
    monkeypatch.setattr(system, "c_library", lambda: missing)
    with pytest.raises(CpuUnsupported, match=f"no library for {missing}, it has") as caught:
        load(bundle)
    assert ", ".join(others) in caught.value.message
    assert "C library" in caught.value.cause
    assert caught.value.fix.endswith(f"built for {', '.join(others)}")


def test_the_choice_follows_the_process(
    flavoured: Callable[..., Path], monkeypatch: pytest.MonkeyPatch
) -> None:
    manifest = read_manifest(flavoured(*FLAVOURS))
    for flavour in FLAVOURS:
        monkeypatch.setattr(system, "c_library", lambda flavour=flavour: flavour)
        assert library_name(manifest) == f"lib/{flavour}/libmodel.so"


@pytest.mark.parametrize(("arch", "name"), [("riscv64", "linux"), (None, "darwin")])
def test_another_machine_is_refused_whatever_flavours_there_are(
    flavoured: Callable[..., Path],
    monkeypatch: pytest.MonkeyPatch,
    arch: str | None,
    name: str,
) -> None:
    bundle = flavoured(*FLAVOURS)
    monkeypatch.setattr(system, "operating_system", lambda: name)
    if arch is not None:
        monkeypatch.setattr(system, "machine", lambda: arch)
    with pytest.raises(CpuUnsupported, match=f"this machine is .*{name}"):
        load(bundle)


# -- which C library ------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("answer", "expected"),
    [("glibc 2.36", "glibc"), (None, "musl"), (ValueError("unrecognized"), "musl")],
)
def test_c_libraries_of_linux_are_told_apart(
    monkeypatch: pytest.MonkeyPatch, answer: object, expected: str
) -> None:
    """musl does not know the name of glibc's version."""

    def confstr(name: str) -> object:
        assert name == "CS_GNU_LIBC_VERSION"
        if isinstance(answer, Exception):
            raise answer
        return answer

    monkeypatch.setattr(os, "confstr", confstr)
    monkeypatch.setattr(system, "operating_system", lambda: "linux")
    assert system.c_library() == expected


def test_android_has_bionic_and_other_systems_have_none_of_them(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(sys, "getandroidapilevel", lambda: 28, raising=False)
    assert system.c_library() == "android"
    monkeypatch.setattr(system, "operating_system", lambda: "darwin")
    assert system.c_library() == ""


# -- a library that is not what the manifest says -------------------------------------------------


def test_a_library_for_another_processor_is_named(tmp_path: Path) -> None:
    """The system's loader would say that there is no such file."""
    toolchain = find_toolchain()
    if not toolchain.is_zig:
        pytest.skip("missing program: ziglang")
    source, out = tmp_path / "x.c", tmp_path / "libmodel.so"
    source.write_text("int nothing;\n")
    foreign = "aarch64" if system.machine() == "x86_64" else "x86_64"
    link_shared(
        toolchain,
        sources=[source],
        objects=[],
        include_dirs=[],
        out=out,
        target=f"{foreign}-linux-musl",
    )
    with pytest.raises(BundleInvalid, match=f"it holds code for {foreign}, this process") as caught:
        Library(out)
    assert "compile for this system" in caught.value.fix
    data = bytearray(out.read_bytes())
    data[18:20] = (243).to_bytes(2, "little")
    out.write_bytes(data)
    with pytest.raises(BundleInvalid, match="it holds code for ELF machine 243"):
        Library(out)
