"""Operations between integer codes, as QNN recognizes them in ONNX.

A value is a tensor of codes with one scale and zero point. An operation on it is written as
DequantizeLinear, the operation of floats, QuantizeLinear; QNN makes one integer operation of them.
"""

from __future__ import annotations

from typing import Any

import numpy as np
from numpy.typing import NDArray

from llamac.schedules.quantized import Quantization
from llamac.targets.qnn_htp.onnx_file import OnnxFile


class Qdq:
    """Adds operations to a file, and knows how each value is quantized."""

    def __init__(self, file: OnnxFile) -> None:
        self.file = file
        self.made: dict[str, Quantization] = {}
        self._zeros: set[str] = set()

    def input(self, name: str, shape: tuple[int, ...], quantization: Quantization) -> str:
        """Declare an input of codes."""
        self.made[name] = quantization
        return self.file.input(name, shape, quantization.dtype)

    def constant(self, name: str, values: NDArray[Any], quantization: Quantization) -> str:
        """Add a constant as codes."""
        name = self.file.weight(name, quantization.quantize(values))
        self.made[name] = quantization
        return name

    def add(self, op: str, *args: str, to: Quantization, result: str = "", **attrs: Any) -> str:
        """Add an operation on values; its result is quantized `to`."""
        floats = [self._floats(name) for name in args]
        return self._codes(self.file.add(op, floats, **attrs), to, result)

    def move(self, op: str, *args: str, result: str = "", **attrs: Any) -> str:
        """Add an operation that puts codes into other places; operands without codes are indices.

        Values must be quantized as the first one is.
        """
        to = self.made[args[0]]
        floats = [self._floats(name) if name in self.made else name for name in args]
        return self._codes(self.file.add(op, floats, **attrs), to, result)

    def convert(self, value: str, to: Quantization, result: str = "") -> str:
        """Quantize a value anew."""
        return self._codes(self._floats(value), to, result)

    def rows_product(
        self, value: str, weight: str, scales: NDArray[np.float32], to: Quantization
    ) -> str:
        """Multiply by an int8 weight [K, N] that was written, with a scale for each column."""
        wide = self.file.add("DequantizeLinear", [weight, self.file.constant(scales)], axis=1)
        return self._codes(self.file.add("MatMul", [self._floats(value), wide]), to)

    def groups_product(
        self,
        value: str,
        weight: str,
        multipliers: str,
        scales: NDArray[np.float32],
        columns: int,
        group: int,
        to: Quantization,
    ) -> str:
        """Multiply by an int4 weight [K, N]; multipliers uint8 [K/group, N], scales [N].

        The zero points of the weight are written out: without them QNN refuses the product.
        """
        add, scale = self.file.add, self.file.constant(scales)
        groups = add("DequantizeLinear", [multipliers, scale], axis=1)
        operands = [weight, groups, self._int4_zeros(columns // group, len(scales))]
        wide = add("DequantizeLinear", operands, axis=0, block_size=group)
        return self._codes(add("MatMul", [self._floats(value), wide]), to)

    def _int4_zeros(self, *shape: int) -> str:
        """Zeros, once for each shape."""
        name = "zeros_" + "x".join(map(str, shape))
        if name not in self._zeros:
            self._zeros.add(self.file.int4_weight(name, np.zeros(shape, np.int8)))
        return name

    def _parameters(self, made: Quantization) -> list[str]:
        scale = np.array(made.scale, np.float32)
        zero = np.array(made.zero_point, made.dtype)
        return [self.file.constant(scale), self.file.constant(zero)]

    def _floats(self, name: str) -> str:
        return self.file.add("DequantizeLinear", [name, *self._parameters(self.made[name])])

    def _codes(self, floats: str, to: Quantization, result: str = "") -> str:
        name = self.file.add("QuantizeLinear", [floats, *self._parameters(to)], result)
        self.made[name] = to
        return name
