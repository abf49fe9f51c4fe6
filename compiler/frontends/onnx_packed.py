"""Matrices of onnxruntime's block quantization: MatMulNBits and GatherBlockQuantized.

A weight is (code - zero) * scale. N rows, K columns, G blocks of columns; two codes of 4 bits a
byte, the lower half first: codes uint8 [N, K/2] (or [N, G, K/G/2]), scales [N, G], zero points
uint8 [N, ceil(G/2)] packed the same way, or floats [N, G]. Without zero points they are 8.

Source: docs/ContribOperators.md of microsoft/onnxruntime.
"""

from __future__ import annotations

from typing import Any

import numpy as np
from numpy.typing import NDArray

from llamac.compiler.floats import from_bfloat16
from llamac.compiler.frontends.hf_packed import PackedWeights
from llamac.compiler.frontends.hf_tensors import RowOrder
from llamac.compiler.frontends.safetensors_file import SafeTensor
from llamac.runtime.errors import TensorInvalid

Indices = NDArray[np.intp]
_MIDDLE = {4: 8, 8: 128}


class BlockWeights(PackedWeights):
    """Some rows of such a matrix (a `Stored`).

    Args:
        name: for messages.
        codes: uint8, of any shape with that many bytes.
        scales: of blocks.
        zeros: zero points; None: the middle of the codes' range.
        shape: [N, K] of the whole matrix.
        bits: 4 or 8.
        block: columns of a scale.
        rows: of the matrix.
        order: of these rows.

    Raises:
        TensorInvalid: sizes do not go together.
    """

    def __init__(
        self,
        name: str,
        codes: SafeTensor,
        scales: SafeTensor,
        zeros: SafeTensor | None,
        *,
        shape: tuple[int, int],
        bits: int,
        block: int,
        rows: slice,
        order: RowOrder,
    ) -> None:
        (total, columns), groups = shape, -(-shape[1] // block)
        _check(name, codes, scales, shape, bits, block)
        part = (rows.stop - rows.start, columns)
        super().__init__(name, "onnxruntime", part, groups, order)
        self.bits_per_code, self.scale_dtype = bits, scales.dtype
        self._codes = codes.data.reshape(total, -1)[rows]
        self._scales = scales.data.reshape(total, groups)[rows]
        self._zeros = None if zeros is None else zeros.data.reshape(total, -1)[rows]

    def is_same(self, other: object) -> bool:
        """Whether another matrix has the same codes, scales and zero points."""
        if not isinstance(other, BlockWeights) or self.bits_per_code != other.bits_per_code:
            return False
        pairs = (
            (self._codes, other._codes),
            (self._scales, other._scales),
            (self._zeros, other._zeros),
        )
        return all(
            ours is theirs is None
            or (ours is not None and theirs is not None and np.array_equal(ours, theirs))
            for ours, theirs in pairs
        )

    def codes(self, rows: Indices) -> NDArray[np.int8]:
        """Codes, less the middle of their range, [n, K]."""
        packed = self._codes[rows]
        if self.bits_per_code == 4:
            packed = _halves(packed)
        return (packed.astype(np.int16) - _MIDDLE[self.bits_per_code]).astype(np.int8)

    def scales(self, rows: Indices) -> NDArray[np.float32]:
        """Scales, [n, G]."""
        return _floats(self._scales[rows], self.scale_dtype)

    def zeros(self, rows: Indices) -> NDArray[np.float32] | None:
        """Zero points, less the same, [n, G]; None if there are none."""
        if self._zeros is None:
            return None
        found, groups = self._zeros[rows], self._scales.shape[1]
        if found.dtype == np.uint8 and self.bits_per_code == 4:
            found = _halves(found)[:, :groups]
        is_float = found.shape[1] == groups and self._zeros.dtype.kind != "u"
        values = _floats(found, self.scale_dtype) if is_float else found.astype(np.float32)
        return values - np.float32(_MIDDLE[self.bits_per_code])


def _check(
    name: str,
    codes: SafeTensor,
    scales: SafeTensor,
    shape: tuple[int, int],
    bits: int,
    block: int,
) -> None:
    rows, columns = shape
    ok = bits in _MIDDLE and block > 0 and columns % block == 0 and codes.data.dtype == np.uint8
    if not (
        ok
        and codes.data.size * 8 == rows * columns * bits
        and scales.data.size == rows * (columns // block)
    ):
        raise TensorInvalid(
            f"{name}: {codes.data.size} bytes of codes and {scales.data.size} scales are no "
            f"{rows} x {columns} matrix of {bits} bits in blocks of {block}.",
            cause="The file is damaged, or of a form that llamac does not know.",
            fix="Build the model again with onnxruntime-genai's model builder.",
        )


def _halves(packed: NDArray[Any]) -> NDArray[np.uint8]:
    """Codes of 4 bits, the lower half of a byte first."""
    both = np.stack([packed & 15, packed >> 4], axis=-1)
    return both.reshape(len(packed), -1)


def _floats(values: NDArray[Any], dtype: str) -> NDArray[np.float32]:
    return from_bfloat16(values) if dtype == "BF16" else values.astype(np.float32)
