"""Read safetensors files from anybody: one, or several that an index names.

    length of the header u64, the header: JSON, the data
    header:  {"name": {"dtype": "BF16", "shape": [...], "data_offsets": [begin, end]}, ...,
              "__metadata__": {text: text}}

Offsets count from the end of the header; tensors fill the rest of the file without gaps. Nothing in
the file is trusted: lengths and offsets are compared with the file before anything is made of them,
and an index may only name files beside itself. Data stay in the mapped file.

Source: README.md of huggingface/safetensors. A reader of our own, because the package gives no
views of bfloat16 to NumPy, and checks less of an index than we do.
"""

from __future__ import annotations

import json
import math
import mmap
import re
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from llamac.compiler.frontends.meta_params import shown
from llamac.runtime.errors import CheckpointMissing, CheckpointUnreadable

INDEX = "model.safetensors.index.json"
_LARGEST_JSON_BYTES = 100_000_000  # the limit of the format's own library
_LARGEST_SIZE = 1 << 40
_METADATA = "__metadata__"

# How NumPy holds each type; what it has no type for is held as its bits.
_DTYPES = {
    "BOOL": "|b1",
    "U8": "|u1",
    "I8": "|i1",
    "F8_E4M3": "|u1",
    "F8_E5M2": "|u1",
    "F8_E8M0": "|u1",
    "U16": "<u2",
    "I16": "<i2",
    "F16": "<f2",
    "BF16": "<u2",
    "U32": "<u4",
    "I32": "<i4",
    "F32": "<f4",
    "U64": "<u8",
    "I64": "<i8",
    "F64": "<f8",
}


@dataclass(frozen=True)
class SafeTensor:
    """One tensor.

    Attributes:
        name: in the file.
        dtype: the format's name of it.
        data: a view of the file; bfloat16 and 8-bit floats as their bits.
    """

    name: str
    dtype: str
    data: NDArray[Any]

    @property
    def shape(self) -> tuple[int, ...]:
        """Rows first."""
        return self.data.shape


@dataclass(frozen=True)
class SafeTensors:
    """What the files of a folder hold together."""

    path: Path
    tensors: dict[str, SafeTensor]
    metadata: dict[str, str]


def _damaged(path: Path, what: str) -> CheckpointUnreadable:
    return CheckpointUnreadable(
        f"{path} is not readable: {what}.",
        cause="The file is truncated or damaged.",
        fix="Fetch the file again, and compare its size and checksum with the publisher's.",
    )


def _missing(path: Path, what: str, fix: str) -> CheckpointMissing:
    return CheckpointMissing(
        f"{path}: {what}.", cause="The download is not complete, or the path is wrong.", fix=fix
    )


def open_safetensors(folder: Path) -> SafeTensors:
    """Map the weights of a folder: `model.safetensors`, or the files that the index names.

    Raises:
        CheckpointMissing: no weights, or not all files of the index.
        CheckpointUnreadable: a damaged file, or an index that does not fit its files.
    """
    files, expected = _files(folder)
    tensors: dict[str, SafeTensor] = {}
    metadata: dict[str, str] = {}
    for path in files:
        found, texts = read_safetensors(path)
        for name in tensors.keys() & found.keys():
            raise _damaged(path, f"{name!r:.80} is also in another file of the model")
        for name, file in expected.items():
            if file == path.name and name not in found:
                raise _damaged(path, f"it lacks {name!r:.80}, which {INDEX} says it has")
        tensors |= found
        metadata |= texts
    return SafeTensors(folder, tensors, metadata)


def _files(folder: Path) -> tuple[list[Path], dict[str, str]]:
    """The files of a folder, and which file the index says to hold each tensor."""
    single, index = folder / "model.safetensors", folder / INDEX
    if single.is_file():
        return [single], {}
    if not index.is_file():
        others = sorted(folder.glob("*.safetensors"))
        if len(others) == 1:
            return others, {}
        what = f"{len(others)} files but no {INDEX}" if others else "no *.safetensors in it"
        fix = "Fetch all files again; save a model of .bin files anew with safe_serialization=True."
        raise _missing(folder, what, fix)
    content = parse_json(index, _read(index))
    expected = content.get("weight_map") if isinstance(content, dict) else None
    if not isinstance(expected, dict) or not expected:
        raise _damaged(index, "it has no weight_map")
    for name in expected.values():
        if not isinstance(name, str) or not re.fullmatch(r"\w[\w.-]*\.safetensors", name, re.ASCII):
            raise _damaged(index, f"it names {shown(name)}, which is no file beside it")
    files = [folder / name for name in sorted(set(expected.values()))]
    for path in files:
        if not path.is_file():
            raise _missing(path, f"no such file, but {INDEX} names it", "Fetch this file as well.")
    return files, expected


def _read(path: Path) -> bytes:
    try:
        if path.stat().st_size > _LARGEST_JSON_BYTES:
            raise _damaged(path, f"it has {path.stat().st_size} bytes")
        return path.read_bytes()
    except OSError as error:
        raise _damaged(path, f"the system said {error.strerror}") from error


def _no_duplicates(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    fields = dict(pairs)
    if len(fields) != len(pairs):
        raise ValueError("a name appears twice")
    return fields


def parse_json(path: Path, content: bytes) -> Any:
    """Parse JSON of a file.

    Raises:
        CheckpointUnreadable: it is none, or a name appears twice in an object.
    """
    try:
        return json.loads(content.decode("utf-8"), object_pairs_hook=_no_duplicates)
    except (ValueError, RecursionError) as error:
        raise _damaged(path, f"its JSON is invalid ({str(error)[:100]!a})") from error


def read_safetensors(path: Path) -> tuple[dict[str, SafeTensor], dict[str, str]]:
    """Tensors and metadata of one file.

    Raises:
        CheckpointUnreadable: it is damaged.
    """
    try:
        with path.open("rb") as file:
            data = mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_READ)
    except (OSError, ValueError) as error:  # an empty file cannot be mapped
        raise _damaged(path, str(error)) from error
    start = 8 + int.from_bytes(data[:8], "little")
    if len(data) < 8 or start > len(data) or start > _LARGEST_JSON_BYTES:
        raise _damaged(path, f"its header has {start - 8} bytes, but the file {len(data)}")
    header = parse_json(path, data[8:start])
    if not isinstance(header, dict):
        raise _damaged(path, "its header is no object")
    metadata = header.pop(_METADATA, {})
    if not isinstance(metadata, dict) or not all(isinstance(v, str) for v in metadata.values()):
        raise _damaged(path, "its metadata are no texts")
    places, tensors = [], {}
    for name, entry in header.items():
        dtype, shape, begin, end = _entry(path, name, entry)
        if end > len(data) - start:
            raise _damaged(path, f"{name!r:.80} ends {end - len(data) + start} bytes behind it")
        places.append((begin, end, name))
        kind = np.dtype(_DTYPES[dtype])
        count = math.prod(shape)  # frombuffer refuses to make empty arrays
        values = np.frombuffer(data, kind, count, start + begin) if count else np.empty(0, kind)
        tensors[name] = SafeTensor(name, dtype, values.reshape(shape))
    _check_places(path, places, len(data) - start)
    return tensors, metadata


def _entry(path: Path, name: str, entry: Any) -> tuple[str, tuple[int, ...], int, int]:
    """Type, shape and offsets of a tensor, checked against each other."""
    fields: dict[str, Any] = entry if isinstance(entry, dict) else {}
    dtype: Any = fields.get("dtype")
    shape: Any = fields.get("shape")
    offsets: Any = fields.get("data_offsets")
    if not isinstance(dtype, str) or dtype not in _DTYPES:
        raise _damaged(path, f"{name!r:.80} has the dtype {shown(dtype)}")
    for numbers, what in ((shape, "shape"), (offsets, "data_offsets")):
        is_list = isinstance(numbers, list) and len(numbers) <= 8
        if not is_list or not all(type(n) is int and 0 <= n < _LARGEST_SIZE for n in numbers):
            raise _damaged(path, f"{name!r:.80} has an impossible {what}")
    size = math.prod(shape) * np.dtype(_DTYPES[dtype]).itemsize
    if len(offsets) != 2 or offsets[1] - offsets[0] != size:
        raise _damaged(
            path, f"{name!r:.80} ({dtype} {shape}) takes {size} bytes, its offsets are {offsets}"
        )
    return dtype, tuple(shape), offsets[0], offsets[1]


def _check_places(path: Path, places: list[tuple[int, int, str]], size: int) -> None:
    """Demand that tensors lie one after the other and fill the file."""
    place, before = 0, "the header"
    for begin, end, name in sorted(places):
        if begin != place:
            what = "overlap" if begin < place else f"are {begin - place} bytes apart"
            raise _damaged(path, f"{before!r:.80} and {name!r:.80} {what}")
        place, before = end, name
    if place != size:
        raise _damaged(path, f"{size - place} bytes at its end belong to no tensor")
