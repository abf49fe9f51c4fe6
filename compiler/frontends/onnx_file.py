"""Read ONNX files from anybody: nodes, and tensors that stay on disk.

A file is one protobuf message. Tensors are in it, or in files beside it ("external data"), which it
names with offset and length. Nothing of that is trusted: a name may only be that of a file in the
same folder, and offset and length must lie in it. Those files are mapped.

Source: onnx.proto and docs/ExternalData.md of onnx/onnx.
"""

from __future__ import annotations

import math
import mmap
from collections.abc import Callable
from dataclasses import dataclass, field
from functools import cached_property
from pathlib import Path
from typing import Any

import numpy as np
import onnx
from numpy.typing import NDArray
from onnx import TensorProto, inliner, numpy_helper

from llamac.compiler.floats import from_bfloat16
from llamac.compiler.frontends.safetensors_file import SafeTensor
from llamac.runtime.errors import CheckpointMissing, CheckpointUnreadable, CheckpointUnsafe

Array = NDArray[Any]

# What elements are, and how NumPy holds them; what it has no type for is held as its bits.
_TYPES: dict[int, tuple[str, str]] = {
    TensorProto.FLOAT: ("F32", "<f4"),
    TensorProto.DOUBLE: ("F64", "<f8"),
    TensorProto.FLOAT16: ("F16", "<f2"),
    TensorProto.BFLOAT16: ("BF16", "<u2"),
    TensorProto.INT8: ("I8", "<i1"),
    TensorProto.UINT8: ("U8", "<u1"),
    TensorProto.INT16: ("I16", "<i2"),
    TensorProto.UINT16: ("U16", "<u2"),
    TensorProto.INT32: ("I32", "<i4"),
    TensorProto.UINT32: ("U32", "<u4"),
    TensorProto.INT64: ("I64", "<i8"),
    TensorProto.UINT64: ("U64", "<u8"),
    TensorProto.BOOL: ("BOOL", "?"),
}
_NIBBLES: dict[int, tuple[str, int]] = {TensorProto.INT4: ("I8", 8), TensorProto.UINT4: ("U8", 0)}
"""Types of two elements a byte: what they become, and what makes the highest bit a sign."""

_MOST_ELEMENTS = 1 << 40


@dataclass(frozen=True, eq=False)
class OnnxTensor:
    """A tensor; its elements are read when they are wanted.

    Attributes:
        name: in the file.
        kind: of elements, in the words of safetensors.
        shape: rows first.
        load: gives the elements, flat, as NumPy holds them.
    """

    name: str
    kind: str
    shape: tuple[int, ...]
    load: Callable[[], Array] = field(repr=False)

    @cached_property
    def _data(self) -> Array:
        return self.load().reshape(self.shape)

    def stored(self) -> SafeTensor:
        """The elements as they are."""
        return SafeTensor(self.name, self.kind, self._data)

    def array(self) -> Array:
        """The elements; floats in float64."""
        if self.kind == "BF16":
            return from_bfloat16(self._data).astype(np.float64)
        if self._data.dtype.kind != "f":
            return self._data.copy()
        with np.errstate(invalid="ignore"):  # of damaged values: whoever reads them checks them
            return self._data.astype(np.float64)


class OnnxFile:
    """A model and the files beside it.

    Args:
        path: of the model.

    Attributes:
        model: the message, without what is in other files; local functions are put in place.

    Raises:
        CheckpointUnreadable: it is damaged.
    """

    def __init__(self, path: Path) -> None:
        self.path = path
        self._mapped: dict[Path, mmap.mmap] = {}
        try:
            model = onnx.load(path, load_external_data=False)
            if model.functions:
                model = inliner.inline_local_functions(model)
        except OSError as error:
            raise self.damaged(f"{error.strerror}") from error
        except Exception as error:
            raise self.damaged(f"{error!s:.120}") from error
        if not model.graph.node:
            raise self.damaged("it holds no graph")
        self.model = model

    def damaged(self, what: str) -> CheckpointUnreadable:
        """The error for a file that cannot be read."""
        return CheckpointUnreadable(
            f"{self.path} is not readable: {what}.",
            cause="The file is truncated or damaged, or no ONNX model.",
            fix="Export the model again, or fetch the file and the data beside it again.",
        )

    def tensor(self, proto: TensorProto) -> OnnxTensor:
        """A tensor of the model, after comparing sizes.

        Raises:
            CheckpointUnreadable, CheckpointUnsafe, CheckpointMissing: its elements are not where
                it says.
        """
        name, shape = proto.name, tuple(proto.dims)
        count = math.prod(shape)
        if min(shape, default=0) < 0 or count > _MOST_ELEMENTS:
            raise self.damaged(f"the tensor {name!r:.80} has the shape {list(shape)}")
        if proto.data_type in _NIBBLES:
            kind, sign = _NIBBLES[proto.data_type]
            size = -(-count // 2)
        elif proto.data_type in _TYPES:
            (kind, dtype), sign = _TYPES[proto.data_type], -1
            size = count * np.dtype(dtype).itemsize
        else:
            raise self.damaged(f"the tensor {name!r:.80} is of type {proto.data_type}")
        raw: bytes | memoryview
        if proto.data_location == TensorProto.EXTERNAL:
            raw = self._external(proto, size)
        elif proto.HasField("raw_data"):
            raw = proto.raw_data
            if len(raw) != size:
                raise self.damaged(f"the tensor {name!r:.80} has {len(raw)} bytes, not {size}")
        else:
            return OnnxTensor(name, kind, shape, lambda: self._listed(proto))
        if sign >= 0:
            return OnnxTensor(name, kind, shape, lambda: _unpack(raw, count, sign))
        return OnnxTensor(name, kind, shape, lambda: np.frombuffer(raw, dtype, count))

    def _listed(self, proto: TensorProto) -> Array:
        """Elements that are a list in the message."""
        try:
            found: Array = numpy_helper.to_array(proto)
        except Exception as error:
            raise self.damaged(f"the tensor {proto.name!r:.80}: {error!s:.100}") from error
        if found.dtype.kind not in "fiub":  # bfloat16 and 4-bit types, which NumPy does not have
            wide = np.uint16 if found.dtype.itemsize == np.dtype(np.uint16).itemsize else np.int8
            found = found.view(np.uint16) if wide is np.uint16 else found.astype(wide)
        return found.reshape(-1)

    def _external(self, proto: TensorProto, size: int) -> memoryview:
        """The bytes of a tensor in another file."""
        entries = {entry.key: entry.value for entry in proto.external_data}
        location = entries.get("location", "")
        file = self.path.parent / location
        if not location or Path(location).name != location or file.is_symlink():
            raise CheckpointUnsafe(
                f"{self.path}: the tensor {proto.name!r:.80} is said to be in {location!r:.80}.",
                cause="Data may only be in plain files in the model's own folder.",
                fix="Save the model again with its data beside it.",
            )
        if not file.is_file():
            raise CheckpointMissing(
                f"{self.path} needs {file.name}, which is not there.",
                cause="The tensors of large models are in files of their own.",
                fix="Fetch that file, too, into the same folder.",
            )
        try:
            offset, length = int(entries.get("offset", 0)), int(entries.get("length", size))
        except ValueError as error:
            raise self.damaged(f"offset or length of {proto.name!r:.80}") from error
        data = self._map(file)
        if length != size or offset < 0 or offset + size > len(data):
            raise self.damaged(
                f"{proto.name!r:.80} is {length} bytes at {offset} of {file.name}, expected {size} "
                f"within {len(data)}"
            )
        return memoryview(data)[offset : offset + size]

    def _map(self, file: Path) -> mmap.mmap:
        if file not in self._mapped:
            try:
                with file.open("rb") as opened:
                    self._mapped[file] = mmap.mmap(opened.fileno(), 0, access=mmap.ACCESS_READ)
            except (OSError, ValueError) as error:
                raise self.damaged(f"{file.name}: {error!s:.80}") from error
        return self._mapped[file]


def _unpack(raw: bytes | memoryview, count: int, sign: int) -> Array:
    """Elements of 4 bits, the lower half of a byte first."""
    packed = np.frombuffer(raw, np.uint8)
    halves = np.stack([packed & 15, packed >> 4], axis=-1).reshape(-1)[:count]
    return ((halves ^ sign).astype(np.int8) - np.int8(sign)) if sign else halves
