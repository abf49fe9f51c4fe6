"""The form of a library that the loader of a Hexagon DSP takes, read and made.

lld writes what a Linux loader expects. The loader of a FastRPC process wants program headers of
loadable segments and of the dynamic section and no others, and the tag DT_HEXAGON_VER = 3. No
entry can be inserted into a linked file, so `link.py` has lld write two that nobody needs, and they
become the missing ones here:

    before                        after
    PHDR, GNU_STACK, ...          (left out)
    DT_FLAGS_1   (-z now)         DT_HEXAGON_VER 3
    DT_RUNPATH   (-rpath)         DT_SYMBOLIC

Sources: the example libraries of github.com/qualcomm/fastrpc, as readelf shows them. No DSP has
loaded a library of ours.
"""

from __future__ import annotations

import struct
from collections.abc import Collection
from dataclasses import dataclass

from llamac.runtime.errors import BuildFailed

EM_HEXAGON = 164
PAGE_BYTES = 4096
HEXAGON_VER = 3

PT_LOAD, PT_DYNAMIC = 1, 2
DT_NULL, DT_NEEDED, DT_HASH, DT_STRTAB, DT_SYMTAB, DT_STRSZ = 0, 1, 4, 5, 6, 10
DT_SONAME, DT_SYMBOLIC, DT_TEXTREL, DT_RUNPATH = 14, 16, 22, 29
DT_GNU_HASH, DT_FLAGS_1, DT_HEXAGON_VER = 0x6FFFFEF5, 0x6FFFFFFB, 0x70000001

_REPLACED = {DT_FLAGS_1: (DT_HEXAGON_VER, HEXAGON_VER), DT_RUNPATH: (DT_SYMBOLIC, 0)}

_HEADER = struct.Struct("<16sHHIIIIIHHHHHH")
_SEGMENT = struct.Struct("<8I")
_DYNAMIC = struct.Struct("<2I")
_SYMBOL = struct.Struct("<3I2BH")
_IDENT = b"\x7fELF\x01\x01\x01"
_ET_DYN = 3
_STB_LOCAL = 0


@dataclass(frozen=True)
class Segment:
    """A program header; sizes and addresses in bytes."""

    kind: int
    offset: int
    address: int
    physical: int
    file_bytes: int
    memory_bytes: int
    flags: int
    alignment: int


@dataclass(frozen=True)
class DspLibrary:
    """What a loader sees of a shared object for Hexagon.

    Attributes:
        version: of the DSP, 0x75; the lowest byte of the flags.
        segments: the program headers.
        dynamic: tags and values, in order, without the last DT_NULL.
        soname: "" if it has none.
        needed: names of libraries.
        undefined: symbols that the DSP's image must have.
        exported: symbols that it defines.
    """

    version: int
    segments: tuple[Segment, ...]
    dynamic: tuple[tuple[int, int], ...]
    soname: str
    needed: tuple[str, ...]
    undefined: tuple[str, ...]
    exported: tuple[str, ...]

    def value(self, tag: int) -> int | None:
        """Value of a tag's first entry; None without one."""
        return next((value for found, value in self.dynamic if found == tag), None)


def read_library(data: bytes) -> DspLibrary:
    """Read a shared object for Hexagon.

    Raises:
        BuildFailed: it is none, or an offset in it points elsewhere than it may.
    """
    header = _read_header(data)
    segments = _read_segments(data, header)
    dynamic = _read_dynamic(data, segments)
    library = DspLibrary(header[7] & 0xFF, segments, dynamic, "", (), (), ())
    strings = _strings(data, library)
    undefined, exported = _read_symbols(data, library, strings)
    soname = library.value(DT_SONAME)
    return DspLibrary(
        version=library.version,
        segments=segments,
        dynamic=dynamic,
        soname="" if soname is None else _text(strings, soname),
        needed=tuple(_text(strings, value) for tag, value in dynamic if tag == DT_NEEDED),
        undefined=undefined,
        exported=exported,
    )


def finish_library(data: bytes, *, imports: Collection[str]) -> bytes:
    """Give a library that lld linked the form that a DSP loads.

    Args:
        data: the file; linked as `link.py` does it.
        imports: symbols that the image of a DSP has.

    Returns:
        The file, of the same length; the same input gives the same bytes.

    Raises:
        BuildFailed: it is malformed, or in a form that no DSP would load.
    """
    before = read_library(data)
    out = bytearray(data)
    _keep_segments(out, before)
    _replace_tags(out, before)
    finished = bytes(out)
    check_library(read_library(finished), imports=imports)
    return finished


def check_library(library: DspLibrary, *, imports: Collection[str]) -> None:
    """Refuse a library that a DSP would not load.

    Raises:
        BuildFailed: see `finish_library`.
    """
    kinds = [segment.kind for segment in library.segments]
    loads = [segment for segment in library.segments if segment.kind == PT_LOAD]
    foreign = sorted(set(library.undefined) - set(imports))
    tags = [tag for tag, _ in library.dynamic]
    reasons = {
        "program headers of other kinds than PT_LOAD and PT_DYNAMIC": set(kinds)
        - {PT_LOAD, PT_DYNAMIC},
        f"a segment that is not aligned to {PAGE_BYTES} bytes": [
            s for s in loads if s.alignment != PAGE_BYTES
        ],
        "relocations in read-only segments": DT_TEXTREL in tags,
        "no DT_HASH": DT_HASH not in tags,
        "a GNU hash table": DT_GNU_HASH in tags,
        "no DT_SYMBOLIC": DT_SYMBOLIC not in tags,
        f"no DT_HEXAGON_VER of {HEXAGON_VER}": library.value(DT_HEXAGON_VER) != HEXAGON_VER,
        "no name": not library.soname,
        f"symbols that no DSP has: {', '.join(foreign)}": foreign,
    }
    found = [reason for reason, is_wrong in reasons.items() if is_wrong]
    if found:
        raise BuildFailed(
            f"the DSP library {library.soname or '(without a name)'} would not be loaded",
            cause=f"it has {'; '.join(found)}",
            fix="link it with targets/fastrpc/link.py; a symbol that the image of every DSP has "
            "is added to IMPORTS there",
        )


def _read_header(data: bytes) -> tuple[int, ...]:
    """The ELF header's fields, the identification left out as 0."""
    if len(data) < _HEADER.size:
        raise _malformed(f"it has {len(data)} bytes, an ELF header {_HEADER.size}")
    ident, *fields = _HEADER.unpack_from(data)
    kind, machine = fields[0], fields[1]
    if not ident.startswith(_IDENT) or kind != _ET_DYN or machine != EM_HEXAGON:
        raise _malformed("it is not a 32-bit little-endian shared object for Hexagon")
    return (0, *fields)


def _read_segments(data: bytes, header: tuple[int, ...]) -> tuple[Segment, ...]:
    """All program headers, which must lie in the file, as must what they describe."""
    start, size, count = header[5], header[9], header[10]
    if size != _SEGMENT.size or start < _HEADER.size:
        raise _malformed(f"program headers of {size} bytes at offset {start}")
    _slice(data, start, count * size, "the program headers")
    segments = tuple(
        Segment(*_SEGMENT.unpack_from(data, start + index * size)) for index in range(count)
    )
    for index, segment in enumerate(segments):
        if segment.kind in {PT_LOAD, PT_DYNAMIC}:
            _slice(data, segment.offset, segment.file_bytes, f"segment {index}")
        if segment.kind == PT_LOAD and segment.memory_bytes < segment.file_bytes:
            raise _malformed(f"segment {index} is smaller in memory than in the file")
        if segment.kind == PT_LOAD and (segment.offset - segment.address) % PAGE_BYTES:
            raise _malformed(f"segment {index} lies at another place of a page than in the file")
    return segments


def _read_dynamic(data: bytes, segments: tuple[Segment, ...]) -> tuple[tuple[int, int], ...]:
    """Entries of the dynamic section up to its end."""
    found = [segment for segment in segments if segment.kind == PT_DYNAMIC]
    if len(found) != 1:
        raise _malformed(f"{len(found)} dynamic sections")
    entries: list[tuple[int, int]] = []
    for place in _entry_places(found[0]):
        tag, value = _DYNAMIC.unpack_from(data, place)
        if tag == DT_NULL:
            return tuple(entries)
        entries.append((tag, value))
    raise _malformed("a dynamic section without end")


def _entry_places(dynamic: Segment) -> range:
    """Offsets of the whole entries of a dynamic section."""
    end = dynamic.offset + dynamic.file_bytes // _DYNAMIC.size * _DYNAMIC.size
    return range(dynamic.offset, end, _DYNAMIC.size)


def _strings(data: bytes, library: DspLibrary) -> bytes:
    """The string table of the dynamic section."""
    address, size = library.value(DT_STRTAB), library.value(DT_STRSZ)
    if address is None or not size:
        raise _malformed("no table of strings")
    return _at_address(data, library, address, size, "the table of strings")


def _read_symbols(
    data: bytes, library: DspLibrary, strings: bytes
) -> tuple[tuple[str, ...], tuple[str, ...]]:
    """Names of undefined and of defined symbols, sorted; DT_HASH says how many there are."""
    hashes, symbols = library.value(DT_HASH), library.value(DT_SYMTAB)
    if hashes is None or symbols is None:
        raise _malformed("no DT_HASH or no table of symbols")
    head = _at_address(data, library, hashes, 8, "the hash table")
    count = struct.unpack_from("<I", head, 4)[0]
    size = count * _SYMBOL.size
    table = _at_address(data, library, symbols, size, "the table of symbols")
    undefined: list[str] = []
    exported: list[str] = []
    for index in range(1, count):
        name, _, _, info, _, section = _SYMBOL.unpack_from(table, index * _SYMBOL.size)
        if info >> 4 != _STB_LOCAL:
            (exported if section else undefined).append(_text(strings, name))
    return tuple(sorted(undefined)), tuple(sorted(exported))


def _at_address(data: bytes, library: DspLibrary, address: int, size: int, what: str) -> bytes:
    """The bytes that a loader would see at an address."""
    for segment in library.segments:
        place = address - segment.address
        if segment.kind == PT_LOAD and 0 <= place and place + size <= segment.file_bytes:
            return _slice(data, segment.offset + place, size, what)
    raise _malformed(f"{what} at {address:#x} lies in no segment")


def _slice(data: bytes, start: int, size: int, what: str) -> bytes:
    if start + size > len(data):
        raise _malformed(f"{what} ends at {start + size}, the file at {len(data)}")
    return data[start : start + size]


def _text(strings: bytes, start: int) -> str:
    end = strings.find(b"\0", start)
    if start >= len(strings) or end < 0:
        raise _malformed(f"a name at {start} of a table of {len(strings)} bytes")
    return strings[start:end].decode("ascii", "replace")


def _keep_segments(out: bytearray, before: DspLibrary) -> None:
    """Leave the program headers that the loader takes; zeros follow them."""
    start = int.from_bytes(out[28:32], "little")
    kept = [s for s in before.segments if s.kind in {PT_LOAD, PT_DYNAMIC}]
    for index in range(len(before.segments)):
        fields = (0,) * 8
        if index < len(kept):
            s = kept[index]
            sizes = (s.file_bytes, s.memory_bytes)
            fields = (s.kind, s.offset, s.address, s.physical, *sizes, s.flags, s.alignment)
        _SEGMENT.pack_into(out, start + index * _SEGMENT.size, *fields)
    struct.pack_into("<H", out, 44, len(kept))


def _replace_tags(out: bytearray, before: DspLibrary) -> None:
    """Turn the entries that nobody needs into those that the loader wants."""
    dynamic = next(s for s in before.segments if s.kind == PT_DYNAMIC)
    for place, (tag, _) in zip(_entry_places(dynamic), before.dynamic, strict=False):
        if tag in _REPLACED:
            _DYNAMIC.pack_into(out, place, *_REPLACED[tag])


def _malformed(cause: str) -> BuildFailed:
    return BuildFailed(
        "the DSP library is malformed",
        cause=cause,
        fix="link it again with the pinned tools (`llamac doctor`)",
    )
