"""Operations on tensors of int16 codes, in the versions and with the options that they need.

Those that MediaTek's compiler plug-in for LiteRT takes, and no others. Each gives a new value,
with the scale that is asked for: what leaves the range of int16 is clamped.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any

import numpy as np
from ai_edge_litert import schema_py_generated as schema
from numpy.typing import NDArray

from llamac.targets.neuropilot.tflite_file import TfliteFile, Value

UNIT_SCALE = 2.0**-15
"""Of what SOFTMAX and LOGISTIC give; they know no other."""

_OP = schema.BuiltinOperator


class Operations:
    """Adds operations to a file."""

    def __init__(self, file: TfliteFile) -> None:
        self.file = file
        self._signs: dict[tuple[Any, ...], int] = {}

    def fully_connected(self, x: Value, weight: int, rows: int, scale: float) -> Value:
        """Multiply x [T, K] by the transpose of a weight [rows, K]: [T, rows]."""
        options = schema.FullyConnectedOptionsT(quantizedBiasType=schema.TensorType.INT64)
        result = self.file.value((x.shape[0], rows), scale)
        return self.file.operation(_OP.FULLY_CONNECTED, 12, [x.index, weight], result, options)

    def signs(self, x: Value, signs: NDArray[np.int8], factor: float, scale: float) -> Value:
        """Multiply x [T, K] by the transpose of a matrix of 1, 0 and -1, and by a factor."""
        key = (signs.shape, signs.tobytes(), factor)
        if key not in self._signs:
            scales = np.full(len(signs), factor, np.float32)
            name = f"signs_{len(self._signs)}"
            self._signs[key] = self.file.weight(name, signs, scales, "int8")
        return self.fully_connected(x, self._signs[key], len(signs), scale)

    def matmul(self, x: Value, y: Value, scale: float, *, transpose_y: bool = False) -> Value:
        """Multiply x [B, M, K] by y [B, K, N], or by y [B, N, K] transposed: [B, M, N]."""
        columns = y.shape[1 if transpose_y else 2]
        options = schema.BatchMatMulOptionsT(adjY=transpose_y)
        result = self.file.value((*x.shape[:2], columns), scale)
        return self.file.operation(_OP.BATCH_MATMUL, 3, [x.index, y.index], result, options)

    def add(self, x: Value, y: Value, scale: float) -> Value:
        """Add; sizes of 1 are repeated."""
        options = schema.AddOptionsT(potScaleInt16=False)
        return self._elementwise(_OP.ADD, 4, x, y, scale, options)

    def multiply(self, x: Value, y: Value, scale: float) -> Value:
        """Multiply; sizes of 1 are repeated."""
        return self._elementwise(_OP.MUL, 4, x, y, scale, schema.MulOptionsT())

    def _elementwise(
        self, code: int, version: int, x: Value, y: Value, scale: float, options: object
    ) -> Value:
        result = self.file.value(np.broadcast_shapes(x.shape, y.shape), scale)
        return self.file.operation(code, version, [x.index, y.index], result, options)

    def rsqrt(self, x: Value, scale: float) -> Value:
        """1 / sqrt(x)."""
        return self.file.operation(_OP.RSQRT, 3, [x.index], self.file.value(x.shape, scale))

    def logistic(self, x: Value) -> Value:
        """1 / (1 + exp(-x))."""
        result = self.file.value(x.shape, UNIT_SCALE)
        return self.file.operation(_OP.LOGISTIC, 3, [x.index], result)

    def softmax(self, x: Value) -> Value:
        """Softmax over the last axis."""
        result = self.file.value(x.shape, UNIT_SCALE)
        options = schema.SoftmaxOptionsT(beta=1.0)
        return self.file.operation(_OP.SOFTMAX, 3, [x.index], result, options)

    def concatenate(self, values: Sequence[Value], axis: int) -> Value:
        """Join values of one scale."""
        first = values[0]
        assert all(value.scale == first.scale for value in values)
        shape = list(first.shape)
        shape[axis] = sum(value.shape[axis] for value in values)
        options = schema.ConcatenationOptionsT(axis=axis)
        inputs = [value.index for value in values]
        result = self.file.value(shape, first.scale)
        return self.file.operation(_OP.CONCATENATION, 3, inputs, result, options)

    def reshape(self, x: Value, *shape: int) -> Value:
        """The same codes in another shape; nothing if it has that one."""
        assert math.prod(shape) == math.prod(x.shape)
        if shape == x.shape:
            return x
        result = self.file.value(shape, x.scale)
        options = schema.ReshapeOptionsT(newShape=list(shape))
        inputs = [x.index, self.file.integers(*shape)]
        return self.file.operation(_OP.RESHAPE, 1, inputs, result, options)

    def transpose(self, x: Value, *axes: int) -> Value:
        """Axes in another order; a reshape if only axes of 1 change places."""
        shape = tuple(x.shape[axis] for axis in axes)
        long = [axis for axis in axes if x.shape[axis] > 1]
        if long == sorted(long):
            return self.reshape(x, *shape)
        inputs = [x.index, self.file.integers(*axes)]
        return self.file.operation(_OP.TRANSPOSE, 4, inputs, self.file.value(shape, x.scale))
