"""Write a .tflite file tensor by tensor, its weights streamed through a file beside it.

flatbuffers builds a file in memory, and doubles its buffer as it grows. So only the description of
the graph is built there; weights go to disk as soon as they are added, and are put behind the
description at the end. Each weight's place in the description is then corrected: a reference in a
flatbuffer is the distance from itself to what it means, forwards, and may well leave the part that
was built first. Memory holds one weight at a time, and the result is an ordinary file.

The file format is the public schema of LiteRT, in the package ai-edge-litert (Apache-2.0).
"""

from __future__ import annotations

import os
import shutil
import struct
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from types import TracebackType
from typing import Any, BinaryIO

import flatbuffers
import numpy as np
from ai_edge_litert import schema_py_generated as schema
from numpy.typing import NDArray

from llamac.runtime.errors import CoverageError

SCHEMA_VERSION = 3
IDENTIFIER = b"TFL3"
MAX_BYTES = 1 << 31
"""References in a flatbuffer have 32 bits, and some readers take them as signed."""

_ALIGNMENT = 16  # of data, by the schema
_TYPES = {
    "int4": schema.TensorType.INT4,
    "int8": schema.TensorType.INT8,
    "int16": schema.TensorType.INT16,
    "int32": schema.TensorType.INT32,
}


@dataclass(frozen=True)
class Value:
    """A tensor of int16 codes: a value is scale * code.

    Attributes:
        index: of the tensor in the file.
        shape: of it.
        scale: above 0, exactly a float32.
    """

    index: int
    shape: tuple[int, ...]
    scale: float


class TfliteFile:
    """A .tflite file that is being written; a context manager. Nothing is left after an error.

    Args:
        path: of the file.
        name: of the graph.
    """

    def __init__(self, path: Path, name: str) -> None:
        self.path = path
        self._weights_path = path.with_name(path.name + ".weights")
        self._graph = schema.SubGraphT(tensors=[], inputs=[], outputs=[], operators=[], name=name)
        self._codes: dict[tuple[int, int], int] = {}
        # Buffer 0 is the one of tensors that have no data.
        self._buffers: list[NDArray[np.uint8] | None] = [None]
        self._constants: dict[tuple[Any, ...], int] = {}
        self._places: dict[int, tuple[int, int]] = {}  # buffer -> offset and length among weights
        self._weights: BinaryIO | None = None

    def __enter__(self) -> TfliteFile:
        self._weights = self._weights_path.open("wb")
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        assert self._weights is not None
        self._weights.close()
        try:
            if kind is None:
                self._save()
        finally:
            self._weights_path.unlink()

    def value(self, shape: Sequence[int], scale: float, name: str = "") -> Value:
        """Declare a tensor of int16 codes that an operation will make."""
        scale = float(np.float32(scale))
        index = self._tensor(shape, "int16", 0, name, _quantization([scale]))
        return Value(index, tuple(shape), scale)

    def input(self, name: str, shape: Sequence[int], scale: float) -> Value:
        """Declare an input."""
        value = self.value(shape, scale, name)
        self._graph.inputs.append(value.index)
        return value

    def rename(self, value: Value, name: str) -> None:
        """Name a value, unless it is an input or output, whose names stay."""
        if value.index not in (*self._graph.inputs, *self._graph.outputs):
            self._graph.tensors[value.index].name = name

    def output(self, value: Value, name: str) -> None:
        """Make a value an output of that name."""
        self._graph.tensors[value.index].name = name
        self._graph.outputs.append(value.index)

    def operation(
        self, code: int, version: int, inputs: Sequence[int], output: Value, options: Any = None
    ) -> Value:
        """Add an operation with one result, which is returned.

        Args:
            code: of `schema.BuiltinOperator`.
            version: of the operation, which says what types it is used with.
            inputs: indices of tensors.
            output: the result.
            options: an object of the schema named like the operation, with "OptionsT" added.
        """
        number = self._codes.setdefault((code, version), len(self._codes))
        kind = type(options).__name__.removesuffix("T") if options else "NONE"
        self._graph.operators.append(
            schema.OperatorT(
                opcodeIndex=number,
                inputs=list(inputs),
                outputs=[output.index],
                builtinOptionsType=getattr(schema.BuiltinOptions, kind),
                builtinOptions=options,
            )
        )
        return output

    def integers(self, *numbers: int) -> int:
        """Add a vector of int32 (a shape, axes), once for each; return the tensor's index."""
        return self._constant("int32", np.array(numbers, np.int32), None)

    def constant(self, codes: NDArray[np.int16], scale: float) -> Value:
        """Add a small constant of int16 codes, once for each."""
        scale = float(np.float32(scale))
        return Value(self._constant("int16", codes, scale), codes.shape, scale)

    def weight(
        self, name: str, codes: NDArray[np.int8], scales: NDArray[np.float32], dtype: str
    ) -> int:
        """Write a matrix to disk, as int8 or as int4; return the tensor's index.

        Args:
            name: of the tensor.
            codes: [N, K].
            scales: [N], one for each row.
            dtype: "int8" or "int4".
        """
        data = codes if dtype == "int8" else pack_int4(codes)
        assert self._weights is not None
        # A vector is its length and then its data, which is aligned.
        self._weights.write(b"\0" * ((-self._weights.tell() - 4) % _ALIGNMENT))
        self._weights.write(struct.pack("<I", data.nbytes))
        self._places[len(self._buffers)] = (self._weights.tell(), data.nbytes)
        np.ascontiguousarray(data).tofile(self._weights)
        self._buffers.append(np.zeros(1, np.uint8))  # stands for it while the description is built
        quantization = _quantization(scales.tolist())
        return self._tensor(codes.shape, dtype, len(self._buffers) - 1, name, quantization)

    def num_operations(self) -> int:
        """Operations so far."""
        return len(self._graph.operators)

    def _constant(self, dtype: str, numbers: NDArray[Any], scale: float | None) -> int:
        key = (dtype, numbers.shape, scale, numbers.tobytes())
        if key not in self._constants:
            little = numbers.astype(numbers.dtype.newbyteorder("<"))
            self._buffers.append(np.frombuffer(little.tobytes(), np.uint8))
            quantization = None if scale is None else _quantization([scale])
            buffer = len(self._buffers) - 1
            self._constants[key] = self._tensor(numbers.shape, dtype, buffer, "", quantization)
        return self._constants[key]

    def _tensor(
        self, shape: Sequence[int], dtype: str, buffer: int, name: str, quantization: Any
    ) -> int:
        index = len(self._graph.tensors)
        self._graph.tensors.append(
            schema.TensorT(
                shape=list(shape),
                type=_TYPES[dtype],
                buffer=buffer,
                name=name or f"t{index}",
                quantization=quantization,
                hasRank=True,
            )
        )
        return index

    def _save(self) -> None:
        description = self._description()
        start = len(description) + -len(description) % _ALIGNMENT
        with self._weights_path.open("rb") as weights, self.path.open("wb") as file:
            if start + os.fstat(weights.fileno()).st_size >= MAX_BYTES:
                file.close()
                self.path.unlink()
                raise CoverageError(
                    f"{self.path.name} would be larger than {MAX_BYTES} bytes",
                    cause="a .tflite has references of 32 bits",
                    fix="put fewer layers into a chunk",
                )
            model = schema.Model.GetRootAs(description, 0)
            for buffer, (offset, _) in self._places.items():
                table = model.Buffers(buffer)._tab
                field = table.Pos + table.Offset(4)  # its first field is its data
                struct.pack_into("<I", description, field, start + offset - 4 - field)
            file.write(description)
            file.write(b"\0" * (start - len(description)))
            shutil.copyfileobj(weights, file, 1 << 20)

    def _description(self) -> bytearray:
        """Everything but the weights, each of which has a buffer of one byte in their place."""
        codes = [
            schema.OperatorCodeT(
                deprecatedBuiltinCode=min(code, 127), builtinCode=code, version=version
            )
            for code, version in self._codes
        ]
        model = schema.ModelT(
            version=SCHEMA_VERSION,
            operatorCodes=codes,
            subgraphs=[self._graph],
            description="llamac",
            buffers=[schema.BufferT(data=data) for data in self._buffers],
        )
        builder = flatbuffers.Builder(1 << 16)
        builder.Finish(model.Pack(builder), IDENTIFIER)
        return bytearray(builder.Output())


def read_names(path: Path) -> tuple[dict[str, tuple[int, ...]], set[str]]:
    """Read the inputs of a file with their shapes, and the names of all its tensors."""
    graph = schema.Model.GetRootAs(path.read_bytes(), 0).Subgraphs(0)
    tensors = [graph.Tensors(i) for i in range(graph.TensorsLength())]
    inputs = [tensors[graph.Inputs(i)] for i in range(graph.InputsLength())]
    shapes = {t.Name().decode(): tuple(int(n) for n in t.ShapeAsNumpy()) for t in inputs}
    return shapes, {t.Name().decode() for t in tensors}


def pack_int4(codes: NDArray[np.int8]) -> NDArray[np.uint8]:
    """Two codes of -8..7 in a byte, the first one in its lower half; a last one alone."""
    flat = codes.reshape(-1).view(np.uint8) & np.uint8(15)
    if len(flat) % 2:
        flat = np.append(flat, np.uint8(0))
    return np.asarray(flat[0::2] | (flat[1::2] << np.uint8(4)))


def _quantization(scales: list[float]) -> Any:
    """Parameters of a tensor with one scale, or with one for each row."""
    return schema.QuantizationParametersT(scale=scales, zeroPoint=[0] * len(scales))
