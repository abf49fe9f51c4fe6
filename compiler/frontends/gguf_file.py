"""Read the container of a GGUF file from anybody: metadata and the table of tensors.

    "GGUF", version u32, number of tensors u64, number of metadata fields u64
    fields:   key string, type u32, value
    tensors:  name string, number of dimensions u32, dimensions u64 (columns first), type u32,
              offset u64 from the start of the data
    padding to `general.alignment` (32), then the data

A string is its length in bytes (u64) and UTF-8; an array is the type of its elements (u32), their
number (u64) and the elements. All numbers are little-endian. Versions 2 and 3 are the same but for
big-endian files, which exist since 3.

Nothing in the file is trusted: counts and lengths are compared with what is left of it before
anything is allocated. Data, arrays of numbers and strings of arrays stay in the mapped file; an
array of strings costs 8 bytes for each, as many as its length takes in the file. Types of tensors
that have no decoder here have no data, but are listed.

Source: docs/gguf.md of ggml-org/ggml.
"""

from __future__ import annotations

import itertools
import mmap
import struct
from array import array
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any, TypeAlias

import numpy as np
from numpy.typing import NDArray

from llamac.compiler.frontends.forms import Rows
from llamac.compiler.frontends.gguf_blocks import BLOCKS, decode, q4_0_parts, type_name
from llamac.runtime.errors import CheckpointMissing, CheckpointUnreadable, ModelUnsupported

MAGIC = b"GGUF"
_VERSIONS = (2, 3)
_LARGEST_COUNT = 1 << 16  # of fields and of tensors; a 405B model has 1,140 tensors
_LONGEST_NAME = 1 << 8
_LARGEST_ALIGNMENT = 1 << 16
_MOST_DIMENSIONS = 4

_STRING, _ARRAY = 8, 9
_NUMBERS = {
    0: "<u1",
    1: "<i1",
    2: "<u2",
    3: "<i2",
    4: "<u4",
    5: "<i4",
    6: "<f4",
    7: "|b1",
    10: "<u8",
    11: "<i8",
    12: "<f8",
}


class StringArray:
    """Strings of the mapped file as bytes, each made when it is asked for."""

    def __init__(self, data: mmap.mmap, starts: array[int]) -> None:
        self._data, self._starts = data, starts

    def __len__(self) -> int:
        return len(self._starts)

    def __iter__(self) -> Iterator[bytes]:
        for start in self._starts:
            (length,) = struct.unpack_from("<Q", self._data, start)
            yield self._data[start + 8 : start + 8 + length]


# bool, int, float, str, an array of numbers, or a StringArray.
Value: TypeAlias = Any


@dataclass(frozen=True)
class GgufTensor:
    """One tensor of the table.

    Attributes:
        name: in the file.
        shape: rows first.
        type_id: GGML's number of the type.
        data: uint8 [rows, bytes of a row], a view of the file; None without a decoder.
    """

    name: str
    shape: tuple[int, ...]
    type_id: int
    data: NDArray[np.uint8] | None

    @property
    def type(self) -> str:
        """The type's name, "Q4_0"."""
        return type_name(self.type_id)

    @property
    def is_float(self) -> bool:
        """Whether every value is stored for itself."""
        return BLOCKS[self.type_id].is_float

    def values(self, rows: Rows) -> NDArray[np.float32]:
        """Some rows, decoded: float32 [n, k]."""
        return decode(self.type_id, self._raw(rows))

    def bits(self, rows: Rows) -> NDArray[np.uint16]:
        """Some rows of BF16: uint16 [n, k], a view of the file if `rows` is a slice."""
        return np.ascontiguousarray(self._raw(rows)).view("<u2")

    def int4(self, rows: Rows) -> tuple[NDArray[np.int8], NDArray[np.float32]]:
        """Codes [n, k] and scales [n, k / 32] of some rows of Q4_0."""
        return q4_0_parts(self._raw(rows))

    def _raw(self, rows: Rows) -> NDArray[np.uint8]:
        if self.data is None:
            raise ValueError(f"{self.name} has no decoder")  # the front end has refused it
        return self.data[rows]


@dataclass(frozen=True)
class GgufFile:
    """What a file holds."""

    path: Path
    metadata: dict[str, Value]
    tensors: dict[str, GgufTensor]


class _Reader:
    """Reads numbers and strings one after the other, and never past the end."""

    def __init__(self, path: Path, data: mmap.mmap) -> None:
        self.path, self.data, self.place = path, data, 0

    def damaged(self, what: str) -> CheckpointUnreadable:
        return CheckpointUnreadable(
            f"{self.path} is not a readable GGUF file: {what}.",
            cause="The file is truncated or damaged.",
            fix="Fetch the file again, and compare its size and checksum with the publisher's.",
        )

    @property
    def left(self) -> int:
        return len(self.data) - self.place

    def take(self, count: int, what: str) -> int:
        """Go past `count` bytes; return where they begin."""
        if count > self.left:
            raise self.damaged(f"{what} at byte {self.place} needs {count} bytes, {self.left} left")
        self.place += count
        return self.place - count

    def number(self, dtype: str, what: str) -> Any:
        kind = np.dtype(dtype)
        place = self.take(kind.itemsize, what)
        if dtype == "|b1":
            return self.data[place] != 0
        return np.frombuffer(self.data, kind, 1, place)[0].item()

    def count(self, what: str, smallest: int) -> int:
        """How many of something follow; each takes `smallest` bytes at least."""
        count = int(self.number("<u8", what))
        if count > self.left // smallest:
            raise self.damaged(f"{what} is {count}, more than the rest of the file can hold")
        return count

    def name(self, what: str) -> str:
        length = self.count(f"the length of {what}", 1)
        if length > _LONGEST_NAME:
            raise self.damaged(f"{what} at byte {self.place} is {length} bytes long")
        place = self.take(length, what)
        try:
            text = self.data[place : place + length].decode()
        except UnicodeDecodeError as error:
            raise self.damaged(f"{what} at byte {place} is not UTF-8") from error
        if not text.isprintable():
            raise self.damaged(f"{what} at byte {place} holds characters that cannot be printed")
        return text

    def value(self, key: str) -> Value:
        kind = self.number("<u4", f"the type of {key}")
        if kind == _ARRAY:
            return self._array(key)
        if kind == _STRING:
            length = self.count(f"the length of {key}", 1)
            place = self.take(length, key)
            return self.data[place : place + length].decode("utf-8", "replace")
        if kind not in _NUMBERS:
            raise self.damaged(f"{key} is of type {kind}, which does not exist")
        return self.number(_NUMBERS[kind], key)

    def _array(self, key: str) -> Value:
        kind = self.number("<u4", f"the type of the elements of {key}")
        if kind == _STRING:
            count = self.count(f"the length of {key}", 8)
            starts = array("Q", bytes(0))
            for _ in range(count):
                starts.append(self.place)
                (length,) = struct.unpack_from("<Q", self.data, self.take(8, key))
                self.take(length, key)
            return StringArray(self.data, starts)
        if kind not in _NUMBERS:
            raise self.damaged(f"the elements of {key} are of type {kind}")
        dtype = np.dtype(_NUMBERS[kind])
        count = self.count(f"the length of {key}", dtype.itemsize)
        place = self.take(count * dtype.itemsize, key)
        if kind == 7:  # any byte but 0 is true
            return np.frombuffer(self.data, np.uint8, count, place) != 0
        return np.frombuffer(self.data, dtype, count, place)


def is_gguf(path: Path) -> bool:
    """Whether a file begins like a GGUF file; False if it cannot be read."""
    try:
        with path.open("rb") as file:
            return file.read(len(MAGIC)) == MAGIC
    except OSError:
        return False


def open_gguf(path: Path) -> GgufFile:
    """Map a GGUF file and read its metadata and table of tensors.

    Raises:
        CheckpointMissing: no such file.
        CheckpointUnreadable: truncated, damaged, or of another format.
        ModelUnsupported: version 1, a version of the future, or big-endian.
    """
    if not path.is_file():
        raise CheckpointMissing(
            f"There is no file at {path}.",
            cause="The path is wrong, or names something else than a file.",
            fix="Name the .gguf file.",
        )
    try:
        with path.open("rb") as file:
            data = mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_READ)
    except (OSError, ValueError) as error:  # ValueError: an empty file
        raise CheckpointUnreadable(
            f"{path} cannot be read.",
            cause=f"The system said: {error}.",
            fix="Check the file's size and its permissions.",
        ) from error
    reader = _Reader(path, data)
    num_tensors, num_fields = _header(reader)
    metadata: dict[str, Value] = {}
    for _ in range(num_fields):
        key = reader.name("a key")
        if key in metadata:
            raise reader.damaged(f"the key {key} appears twice")
        metadata[key] = reader.value(key)
    entries = [_entry(reader) for _ in range(num_tensors)]
    return GgufFile(path, metadata, _locate(reader, entries, _alignment(reader, metadata)))


def _header(reader: _Reader) -> tuple[int, int]:
    if reader.data[: len(MAGIC)] != MAGIC:
        raise reader.damaged("it does not begin with GGUF")
    reader.take(len(MAGIC), "the magic")
    version = reader.number("<u4", "the version")
    if version not in _VERSIONS:
        is_swapped = 0 < int.from_bytes(version.to_bytes(4, "little"), "big") < 1 << 16
        raise ModelUnsupported(
            f"{reader.path} is {'big-endian' if is_swapped else f'of GGUF version {version}'}.",
            cause="llamac reads little-endian GGUF files of versions 2 and 3.",
            fix="Convert the model again with a llama.cpp of 2024 or later.",
        )
    num_tensors = reader.count("the number of tensors", 24)
    num_fields = reader.count("the number of metadata fields", 13)
    for count, what in ((num_tensors, "tensors"), (num_fields, "metadata fields")):
        if count > _LARGEST_COUNT:
            raise reader.damaged(f"it claims {count} {what}, more than {_LARGEST_COUNT}")
    return num_tensors, num_fields


def _entry(reader: _Reader) -> tuple[str, tuple[int, ...], int, int]:
    """Name, shape with rows first, type and offset of a tensor."""
    name = reader.name("a tensor's name")
    num_dimensions = reader.number("<u4", f"the number of dimensions of {name}")
    if not 1 <= num_dimensions <= _MOST_DIMENSIONS:
        raise reader.damaged(f"{name} has {num_dimensions} dimensions")
    dimensions = [reader.number("<u8", f"a dimension of {name}") for _ in range(num_dimensions)]
    if 0 in dimensions:
        raise reader.damaged(f"{name} has the dimensions {dimensions}")
    type_id = reader.number("<u4", f"the type of {name}")
    return name, tuple(dimensions[::-1]), type_id, reader.number("<u8", f"the offset of {name}")


def _alignment(reader: _Reader, metadata: dict[str, Value]) -> int:
    value = metadata.get("general.alignment", 32)
    is_integer = isinstance(value, int) and not isinstance(value, bool)
    if not is_integer or not 8 <= value <= _LARGEST_ALIGNMENT or value & (value - 1):
        raise reader.damaged(f"general.alignment is {value!r:.40}, expected a power of two")
    return int(value)


def _locate(
    reader: _Reader, entries: list[tuple[str, tuple[int, ...], int, int]], alignment: int
) -> dict[str, GgufTensor]:
    """Find the data of every tensor; none may lie outside the file or in another."""
    start = -(-reader.place // alignment) * alignment
    tensors: dict[str, GgufTensor] = {}
    places: list[tuple[int, int, str]] = []
    for name, shape, type_id, offset in entries:
        if name in tensors:
            raise reader.damaged(f"the tensor {name} appears twice")
        if type_id not in BLOCKS:
            tensors[name] = GgufTensor(name, shape, type_id, None)
            continue
        block, columns, rows = BLOCKS[type_id], shape[-1], 1
        for size in shape[:-1]:
            rows *= size
        if columns % block.values:
            raise reader.damaged(
                f"{name} has {columns} columns, no multiple of the {block.values} of {block.name}"
            )
        row_bytes = columns // block.values * block.bytes
        end = offset + rows * row_bytes
        if offset % alignment or start + end > len(reader.data):
            raise reader.damaged(
                f"{name} ({block.name} {list(shape)}) at offset {offset} lies outside the file "
                f"or is not aligned to {alignment} bytes"
            )
        places.append((offset, end, name))
        raw = np.frombuffer(reader.data, np.uint8, end - offset, start + offset)
        tensors[name] = GgufTensor(name, shape, type_id, raw.reshape(rows, row_bytes))
    places.sort()
    for (_, end, first), (begin, _, second) in itertools.pairwise(places):
        if begin < end:
            raise reader.damaged(f"the data of {first} and {second} overlap")
    return tensors
