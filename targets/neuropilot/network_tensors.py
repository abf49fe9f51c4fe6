"""The tensors of a .tflite as the Neuron Adapter has them: shape, type, scales, constant bytes."""

from __future__ import annotations

from types import ModuleType
from typing import Any

import numpy as np
from numpy.typing import NDArray

from llamac.runtime.errors import CoverageError
from llamac.targets.neuropilot.network_file import MAX_RANK, OperandType

_BITS = {"FLOAT32": 32, "FLOAT16": 16, "INT32": 32, "INT16": 16, "INT8": 8, "UINT8": 8, "INT4": 4}
_OPERAND_TYPES = {
    ("FLOAT32", "none"): OperandType.TENSOR_FLOAT32,
    ("FLOAT16", "none"): OperandType.TENSOR_FLOAT16,
    ("INT32", "none"): OperandType.TENSOR_INT32,
    ("INT32", "tensor"): OperandType.TENSOR_INT32,
    ("INT32", "channel"): OperandType.TENSOR_INT32_SYMM_PER_CHANNEL,
    ("INT16", "tensor"): OperandType.TENSOR_QUANT16_SYMM,
    ("INT8", "tensor"): OperandType.TENSOR_QUANT8_SYMM,
    ("INT8", "channel"): OperandType.TENSOR_QUANT8_SYMM_PER_CHANNEL,
    ("UINT8", "tensor"): OperandType.TENSOR_QUANT8_ASYMM,
    ("INT4", "channel"): OperandType.TENSOR_QUANT4_SYMM_PER_CHANNEL,
}
_INT32 = np.iinfo(np.int32)


def uncovered(message: str, cause: str) -> CoverageError:
    """What is raised for everything without a translation."""
    return CoverageError(
        message,
        cause=cause,
        fix="compile this part in another scheme (int16 activations, weights per channel), or for "
        "another processor",
    )


def words(enumeration: Any) -> dict[int, str]:
    """Give the words of an enumeration of the schema, by number."""
    return {v: k for k, v in vars(enumeration).items() if isinstance(v, int)}


class Tensors:
    """The tensors of a model's first graph, by their numbers.

    Args:
        schema: ai-edge-litert's.
        model: a ModelT.
        data: the whole file.

    `operation` is what messages call the operation that is being looked at. Every method raises
    CoverageError with it, the tensor's name and the reason.
    """

    def __init__(self, schema: ModuleType, model: Any, data: NDArray[np.uint8]) -> None:
        self._model, self._data = model, data
        self._tensors = model.subgraphs[0].tensors
        self._types = words(schema.TensorType)
        self._blockwise = schema.QuantizationDetails.BlockwiseQuantization
        self.operation = "the graph"

    def name(self, index: int) -> str:
        """The tensor's name."""
        name = self._tensors[index].name
        return name.decode("utf-8", "replace") if name else "unnamed"

    def dtype(self, index: int) -> str:
        """The schema's word for its elements, "INT16"."""
        return self._types[self._tensors[index].type]

    def channel_dim(self, index: int) -> int:
        """The dimension that its scales belong to, if it has several."""
        return int(self._tensors[index].quantization.quantizedDimension)

    def shape(self, index: int) -> tuple[int, ...]:
        """The shape; a tensor without dimensions has one of 1."""
        tensor = self._tensors[index]
        shape = tuple(map(int, tensor.shape)) if tensor.shape is not None else ()
        dynamic = tensor.shapeSignature is not None and min(tensor.shapeSignature, default=0) < 0
        if dynamic or min(shape, default=1) < 1 or len(shape) > MAX_RANK:
            raise self.refuse(index, f"its shape is {shape}: static, of at most 8 dimensions")
        return shape or (1,)

    def constant(self, index: int) -> NDArray[np.uint8] | None:
        """The bytes of a constant tensor; None: it is computed or an input."""
        buffer = self._model.buffers[self._tensors[index].buffer]
        if buffer.offset > 1:  # behind the flatbuffer, where files of more than 2 GiB have them
            return self._data[buffer.offset : buffer.offset + buffer.size]
        if buffer.data is None or len(buffer.data) == 0:
            return None
        return np.asarray(buffer.data, np.uint8)

    def quantization(self, index: int) -> tuple[list[float], int]:
        """Scales (none: not quantized) and the zero point of a tensor."""
        tensor = self._tensors[index]
        quantization = tensor.quantization
        if quantization is None:
            return [], 0
        if quantization.detailsType == self._blockwise:
            raise self.refuse(index, "its weights are quantized in groups, not per channel")
        scales = [] if quantization.scale is None else [float(s) for s in quantization.scale]
        points = [] if quantization.zeroPoint is None else [int(z) for z in quantization.zeroPoint]
        if not all(np.isfinite(scale) and scale > 0 for scale in scales):
            raise self.refuse(index, "a scale is not positive")
        if len(scales) > 1:
            shape, dim = self.shape(index), quantization.quantizedDimension
            if dim >= len(shape) or shape[dim] != len(scales):
                raise self.refuse(index, f"{len(scales)} scales for shape {shape}")
            if any(points):
                raise self.refuse(index, "its channels have zero points")
        return scales, points[0] if points else 0

    def typed(self, index: int) -> tuple[OperandType, NDArray[Any] | None]:
        """The operand's type, and a constant's values as that type has them (int4: packed)."""
        (listed, zero_point), word = self.quantization(index), self.dtype(index)
        data: NDArray[Any] | None = self.constant(index)
        scales = len(listed)
        if word == "INT64" and data is not None:
            word, data = "INT32", self._narrow(index, data)
        key = (word, "none" if not scales else "channel" if scales > 1 else "tensor")
        type_ = _OPERAND_TYPES.get(key)
        if word == "INT8" and scales == 1 and zero_point:
            type_ = OperandType.TENSOR_QUANT8_ASYMM_SIGNED
        elif word == "INT16" and zero_point:
            type_ = None
        if type_ is None:
            quantized = f", {scales} scales, zero point {zero_point}" if scales else ""
            raise self.refuse(index, f"it is {word}{quantized}, for which there is no type")
        if data is not None:
            elements = int(np.prod(self.shape(index), dtype=np.int64))
            expected = -(-elements * _BITS[word] // 8)
            if data.nbytes != expected:
                raise self.refuse(index, f"it has {data.nbytes} bytes of data, not {expected}")
        return type_, data

    def _narrow(self, index: int, data: NDArray[np.uint8]) -> NDArray[np.int32]:
        """64-bit constants (the biases of int16 activations) as 32 bits."""
        values = np.frombuffer(data.tobytes(), "<i8")
        if values.size and (values.min() < _INT32.min or values.max() > _INT32.max):
            raise self.refuse(index, "a 64-bit value does not fit into 32 bits")
        return values.astype("<i4")

    def refuse(self, index: int, why: str) -> CoverageError:
        """The error for a tensor that has no form."""
        return uncovered(
            f"tensor '{self.name(index)}' of {self.operation} has no form in a network file", why
        )
