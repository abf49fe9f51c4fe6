"""The form of DSP libraries: what lld links, what becomes of it, and files that are damaged."""

from __future__ import annotations

import subprocess
from pathlib import Path

import pytest

from llamac.runtime.errors import BuildFailed
from llamac.targets.fastrpc.elf import (
    DT_HEXAGON_VER,
    DT_SYMBOLIC,
    PAGE_BYTES,
    PT_DYNAMIC,
    PT_LOAD,
    finish_library,
    read_library,
)
from llamac.targets.fastrpc.link import IMPORTS, SKEL, link_dsp_library
from llamac.targets.toolchain import Toolchain, find_toolchain

TABLE = '#include "program.h"\nconst llamac_program llamac_program_table = {0};\n'
E_MACHINE, E_PHOFF, E_PHENTSIZE, E_PHNUM = 18, 28, 42, 44


@pytest.fixture(scope="module")
def zig() -> Toolchain:
    """zig: nothing else links for Hexagon."""
    found = find_toolchain()
    if not found.is_zig:
        pytest.skip("missing program: ziglang")
    return found


def link(zig: Toolchain, folder: Path, source: str = TABLE) -> bytes:
    """Link a DSP library of one C file."""
    folder.mkdir(parents=True, exist_ok=True)
    entry, out = folder / "entry.c", folder / "library.so"
    entry.write_text(source)
    link_dsp_library(zig, entry=entry, objects=[], version="v62", out=out)
    assert sorted(path.name for path in folder.iterdir()) == ["entry.c", "library.so"]
    return out.read_bytes()


@pytest.fixture(scope="module")
def linked(zig: Toolchain, tmp_path_factory: pytest.TempPathFactory) -> bytes:
    """A library without a model in it."""
    return link(zig, tmp_path_factory.mktemp("linked"))


def test_only_what_the_loader_knows(linked: bytes) -> None:
    """Two segments on pages of 4 KiB and the dynamic section; nothing is needed but the image."""
    library = read_library(linked)
    assert [segment.kind for segment in library.segments] == [PT_LOAD, PT_LOAD, PT_DYNAMIC]
    assert [segment.flags for segment in library.segments] == [5, 6, 6]
    assert {s.alignment for s in library.segments if s.kind == PT_LOAD} == {PAGE_BYTES}
    assert library.value(DT_HEXAGON_VER) == 3
    assert library.value(DT_SYMBOLIC) is not None
    assert (library.soname, library.needed) == ("libllamac-v62.so", ())
    assert library.exported == (SKEL,)
    assert library.version == 0x62
    assert set(library.undefined) <= IMPORTS


@pytest.mark.needs("readelf")
def test_others_read_the_same(linked: bytes, tmp_path: Path) -> None:
    """binutils finds the tags, the segments and no fault."""
    path = tmp_path / "library.so"
    path.write_bytes(linked)
    done = subprocess.run(
        ["readelf", "-Wld", "--dyn-syms", str(path)], capture_output=True, text=True, check=True
    )
    assert done.stderr == ""
    assert "There are 3 program headers" in done.stdout
    for words in ("(SYMBOLIC)", "0x70000001", "(HASH)", "[libllamac-v62.so]", f" {SKEL}"):
        assert words in done.stdout, words
    for words in ("GNU_HASH", "NEEDED", "TEXTREL", "RUNPATH", "FLAGS_1", "GNU_STACK", "PHDR"):
        assert words not in done.stdout, words


def test_same_sources_give_the_same_bytes(zig: Toolchain, linked: bytes, tmp_path: Path) -> None:
    """Neither time nor folder can be seen in the output."""
    assert link(zig, tmp_path / "another" / "folder") == linked
    assert str(tmp_path).encode() not in linked


@pytest.mark.parametrize(
    ("source", "name"),
    [
        ('int printf(const char *, ...);\nint f(void) { return printf(""); }', "printf"),
        ("void *f(void);\nextern void *sbrk(int);\nvoid *f(void) { return sbrk(1); }", "sbrk"),
    ],
)
def test_symbols_that_no_dsp_has(source: str, name: str, zig: Toolchain, tmp_path: Path) -> None:
    """They would be found when a phone loads the library, so they are when it is linked."""
    used = source + "\nconst void *const used __attribute__((used, retain)) = f;\n"
    with pytest.raises(BuildFailed, match="would not be loaded") as caught:
        link(zig, tmp_path, TABLE + used)
    assert f"symbols that no DSP has: {name}" in caught.value.cause
    assert not (tmp_path / "library.so").exists()


def test_finished_libraries_stay_as_they_are(linked: bytes) -> None:
    assert finish_library(linked, imports=IMPORTS) == linked


# -- damaged files -------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("place", "value", "words"),
    [
        (0, b"\x7fELG", "not a 32-bit little-endian shared object for Hexagon"),
        (4, b"\x02", "not a 32-bit little-endian shared object for Hexagon"),
        (E_MACHINE, b"\xb7\x00", "not a 32-bit little-endian shared object for Hexagon"),
        (E_PHOFF, b"\xff\xff\xff\xff", "the program headers ends at"),
        (E_PHOFF, b"\x04\x00\x00\x00", "program headers of 32 bytes at offset 4"),
        (E_PHENTSIZE, b"\x38\x00", "program headers of 56 bytes"),
        (E_PHNUM, b"\x02\x00", "0 dynamic sections"),
    ],
)
def test_damaged_headers(place: int, value: bytes, words: str, linked: bytes) -> None:
    data = bytearray(linked)
    data[place : place + len(value)] = value
    with pytest.raises(BuildFailed, match="malformed") as caught:
        read_library(bytes(data))
    assert words in caught.value.cause


def test_every_cut_is_found(linked: bytes) -> None:
    """Up to the end of the last segment; behind it are sections that no loader reads."""
    end = max(s.offset + s.file_bytes for s in read_library(linked).segments)
    for length in [*range(0, 200), *range(200, end, 97), end - 1]:
        with pytest.raises(BuildFailed):
            read_library(linked[:length])


def test_no_byte_of_the_headers_breaks_the_reader(linked: bytes) -> None:
    """Any value in headers and dynamic section gives an answer or our error, nothing else."""
    dynamic = next(s for s in read_library(linked).segments if s.kind == PT_DYNAMIC)
    places = [*range(148), *range(dynamic.offset, dynamic.offset + dynamic.file_bytes)]
    refused = 0
    for place in places:
        for value in (0, 0x7F, 0xFF):
            data = bytearray(linked)
            data[place] = value
            try:
                finish_library(bytes(data), imports=IMPORTS)
            except BuildFailed:
                refused += 1
    assert refused > len(places) // 2
