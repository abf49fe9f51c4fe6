"""Write a network file: a graph for MediaTek's Neuron Adapter as data.

The format is that of `runtime/c/neuron/network_format.h`, whose reader trusts nothing of it. The
codes of types and operations are the adapter's (`neuron_api.h`, where their source is named).
Constants are views of what the caller has mapped; each is copied once, into the file.
"""

from __future__ import annotations

import hashlib
from collections.abc import Sequence
from dataclasses import dataclass
from enum import IntEnum
from pathlib import Path
from typing import Any, BinaryIO

import numpy as np
from numpy.typing import NDArray

MAGIC, VERSION = b"LLAMACNN", 1
MAX_RANK = 8
_DATA_ALIGNMENT, _PAGE = 64, 4096

_HEADER = np.dtype(
    [
        ("magic", "S8"),
        ("version", "<u4"),
        ("header_bytes", "<u4"),
        ("file_bytes", "<u8"),
        ("sha256", "V32"),
        ("num_operands", "<u4"),
        ("num_operations", "<u4"),
        ("num_inputs", "<u4"),
        ("num_outputs", "<u4"),
        ("first_input", "<u4"),
        ("num_words", "<u4"),
        ("num_scales", "<u4"),
        ("name_bytes", "<u4"),
        ("data_offset", "<u8"),
        ("min_major", "<u4"),
        ("options", "<u4"),
    ]
)
_OPERAND = np.dtype(
    [
        ("type", "<i4"),
        ("kind", "<u4"),
        ("rank", "<u4"),
        ("first_dim", "<u4"),
        ("scale", "<f4"),
        ("zero_point", "<i4"),
        ("channel_dim", "<u4"),
        ("num_scales", "<u4"),
        ("first_scale", "<u4"),
        ("name", "<u4"),
        ("offset", "<u8"),
        ("bytes", "<u8"),
    ]
)
_OPERATION = np.dtype(
    [
        ("code", "<i4"),
        ("num_inputs", "<u4"),
        ("num_outputs", "<u4"),
        ("first_operand", "<u4"),
        ("name", "<u4"),
        ("unused", "<u4"),
    ]
)


class OperandType(IntEnum):
    """The adapter's codes for types of operands; those without TENSOR are scalars."""

    FLOAT32 = 0
    INT32 = 1
    TENSOR_FLOAT32 = 3
    TENSOR_INT32 = 4
    TENSOR_QUANT8_ASYMM = 5
    BOOL = 6
    TENSOR_QUANT16_SYMM = 7
    TENSOR_FLOAT16 = 8
    TENSOR_QUANT8_SYMM_PER_CHANNEL = 11
    TENSOR_QUANT8_SYMM = 13
    TENSOR_QUANT8_ASYMM_SIGNED = 14
    TENSOR_QUANT4_SYMM_PER_CHANNEL = 9011
    """Packed in the file; the runner gives it to adapters before version 9 as 8 bits."""
    TENSOR_INT32_SYMM_PER_CHANNEL = 9014
    """A bias; adapters before version 9 get it as TENSOR_INT32."""


class Kind(IntEnum):
    """Where the values of an operand come from."""

    TEMPORARY = 0
    INPUT = 1
    OUTPUT = 2
    CONSTANT = 3


@dataclass(frozen=True)
class NetworkFile:
    """A file that was written.

    Attributes:
        path: the file.
        file_bytes: its size.
        sha256: of everything behind the header, hexadecimal, as the header has it.
    """

    path: Path
    file_bytes: int
    sha256: str


class NetworkWriter:
    """A network that is being described; `write` makes the file.

    Args:
        min_major: first number of the oldest adapter version that may build it.
        options: for the adapter's compiler; "" are its defaults.
    """

    def __init__(self, min_major: int, options: str = "") -> None:
        self._min_major = min_major
        self._words: list[int] = []
        self._scales: list[float] = []
        self._names, self._places = bytearray(), dict[str, int]()
        self._operands: list[tuple[Any, ...]] = []
        self._operations: list[tuple[int, ...]] = []
        self._data: list[NDArray[Any]] = []
        self._data_bytes = 0
        self._options = self._name(options)

    def operand(
        self,
        type_: OperandType,
        dims: Sequence[int],
        *,
        kind: Kind = Kind.TEMPORARY,
        name: str = "",
        scale: float = 0.0,
        zero_point: int = 0,
        scales: Sequence[float] = (),
        channel_dim: int = 0,
        data: NDArray[Any] | None = None,
    ) -> int:
        """Add an operand, return its number.

        Args:
            type_: its type.
            dims: its shape, () for a scalar.
            kind: CONSTANT if `data` is given.
            name: for messages, and of an input or output.
            scale: of the whole tensor.
            zero_point: of the whole tensor.
            scales: one for each index of dimension `channel_dim`, or none.
            channel_dim: see `scales`.
            data: the values as they lie in memory.
        """
        offset = size = 0
        if data is not None:
            kind, offset, size = Kind.CONSTANT, self._data_bytes, data.nbytes
            self._data.append(data)
            self._data_bytes += -(-size // _DATA_ALIGNMENT) * _DATA_ALIGNMENT
        first_dim, first_scale = len(self._words), len(self._scales)
        self._words += dims
        self._scales += scales
        quantization = (scale, zero_point, channel_dim, len(scales), first_scale)
        place = (self._name(name), offset, size)
        self._operands.append((type_, kind, len(dims), first_dim, *quantization, *place))
        return len(self._operands) - 1

    def operation(
        self, code: int, inputs: Sequence[int], outputs: Sequence[int], name: str
    ) -> None:
        """Add an operation; `inputs` and `outputs` are numbers of operands."""
        first = len(self._words)
        self._words += [*inputs, *outputs]
        sides = (len(inputs), len(outputs))
        self._operations.append((code, *sides, first, self._name(name), 0))

    def write(self, path: Path, inputs: Sequence[int], outputs: Sequence[int]) -> NetworkFile:
        """Write the file, under another name until it is complete.

        Args:
            path: of the file.
            inputs: numbers of operands, in the order of the graph's.
            outputs: the same.
        """
        first_input = len(self._words)
        self._words += [*inputs, *outputs]
        tables = self._tables()
        data_offset = -(-(_HEADER.itemsize + len(tables)) // _PAGE) * _PAGE
        tables += bytes(data_offset - _HEADER.itemsize - len(tables))
        file_bytes = data_offset + self._data_bytes
        counts = (len(self._operands), len(self._operations), len(inputs), len(outputs))
        pools = (first_input, len(self._words), len(self._scales), len(self._names))
        partial = path.with_name(path.name + ".partial")
        try:
            with partial.open("wb") as file:
                file.write(bytes(_HEADER.itemsize))
                digest = hashlib.sha256(tables)
                file.write(tables)
                self._write_data(file, digest)
                start = (MAGIC, VERSION, _HEADER.itemsize, file_bytes, digest.digest())
                end = (data_offset, self._min_major, self._options)
                file.seek(0)
                file.write(np.array((*start, *counts, *pools, *end), _HEADER).tobytes())
            partial.replace(path)
        finally:
            partial.unlink(missing_ok=True)
        return NetworkFile(path, file_bytes, digest.hexdigest())

    def _tables(self) -> bytes:
        """Everything between the header and the constants."""
        parts = [
            np.array(self._operands, _OPERAND).tobytes(),
            np.array(self._operations, _OPERATION).tobytes(),
            np.array(self._words, "<u4").tobytes(),
            np.array(self._scales, "<f4").tobytes(),
            bytes(self._names),
        ]
        return b"".join(part + bytes(-len(part) % 8) for part in parts)

    def _write_data(self, file: BinaryIO, digest: Any) -> None:
        for array in self._data:
            raw = np.ascontiguousarray(array).reshape(-1).view(np.uint8)
            padding = bytes(-raw.nbytes % _DATA_ALIGNMENT)
            for part in (raw.data, padding):
                file.write(part)
                digest.update(part)

    def _name(self, name: str) -> int:
        """Place of a name among the names, where each stands once."""
        if name not in self._places:
            self._places[name] = len(self._names)
            self._names += name.encode() + b"\0"
        return self._places[name]
