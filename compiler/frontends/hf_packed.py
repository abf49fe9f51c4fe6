"""4-bit weights of GPTQ, AWQ, compressed-tensors and torchao: codes, scales and zero points.

A weight is (code - zero) * scale. N rows, K columns, G groups of columns; nibbles are counted from
the lowest of a 32-bit word:

    GPTQ                 qweight [K/8, N]: 8 columns of a row; qzeros [G, N/8]: 8 rows, version 1
                         with 1 subtracted; scales [G, N]; g_idx [K]: group of each column
    AWQ                  qweight [K, N/8], qzeros [G, N/8]: rows 0 2 4 6 1 3 5 7; scales [G, N]
    compressed-tensors   weight_packed [N, K/8]: 8 columns; weight_zero_point [N/8, G]: 8 rows;
                         weight_scale [N, G]; weight_g_idx [K]
    torchao              qdata int8 [N, K]; scale, zero_point [N, G]

All but torchao's are unsigned; here codes and zeros are less by 8, so that a zero of 0 is what our
kernels have. Every product has at most 16 bits for scales of 16 bits, so float32 is exact.

Source: the packing in auto_gptq/nn_modules/qlinear, awq/modules/linear/gemm.py,
compressed_tensors/compressors and torchao/quantization/quantize_/workflows/intx.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from functools import cached_property
from typing import Any

import numpy as np
from numpy.typing import NDArray

from llamac.compiler.checkpoint import FLOAT16_RANGE, check_int4
from llamac.compiler.floats import from_bfloat16
from llamac.compiler.frontends.forms import GROUP, Rows
from llamac.compiler.frontends.hf_tensors import RowOrder
from llamac.compiler.frontends.safetensors_file import SafeTensor
from llamac.runtime.errors import ValuesInvalid

Indices = NDArray[np.intp]
Float32 = NDArray[np.float32]
Int8 = NDArray[np.int8]

_SHIFTS = np.arange(0, 32, 4, dtype=np.uint32)
_AWQ_SHIFTS = _SHIFTS[[0, 4, 1, 5, 2, 6, 3, 7]]  # nibble i holds row 0 2 4 6 1 3 5 7


def _unpack_columns(words: NDArray[np.uint32]) -> Int8:
    """Nibbles of words [n, k / 8] as codes -8..7 [n, k]."""
    nibbles = (words[..., None] >> _SHIFTS & 15).astype(np.int8)
    return nibbles.reshape(len(words), -1) - np.int8(8)


def _unpack_rows(
    words: NDArray[np.uint32], rows: Indices, shifts: NDArray[np.uint32] = _SHIFTS
) -> Int8:
    """Nibbles of some rows of words [m, n / 8] as codes -8..7 [rows, m]."""
    nibbles = words[:, rows // 8] >> shifts[rows % 8] & 15
    return nibbles.T.astype(np.int8) - np.int8(8)


def _words(tensor: SafeTensor) -> NDArray[np.uint32]:
    words: NDArray[np.uint32] = tensor.data.view(np.uint32)
    return words


def _floats(tensor: SafeTensor) -> Float32:
    data: NDArray[Any] = tensor.data
    return from_bfloat16(data) if tensor.dtype == "BF16" else data.astype(np.float32)


class PackedWeights(ABC):
    """A quantized layer (a `Stored`).

    Args:
        name: of the module.
        scheme: that made it, for notes.
        shape: [N, K].
        num_groups: G.
        order: of the rows.
        columns: group of each column, int32 [K]; None for groups of equal size in order.

    Attributes:
        bits_per_code: 4, or 8 of torchao.
        scale_dtype: the format's name of it.
    """

    bits_per_code = 4
    scale_dtype: str

    def __init__(
        self,
        name: str,
        scheme: str,
        shape: tuple[int, int],
        num_groups: int,
        order: RowOrder,
        columns: SafeTensor | None = None,
    ) -> None:
        self.name, self.shape, self.order = name, shape, order
        in_order = np.arange(shape[1]) // (shape[1] // num_groups)
        self._groups = in_order if columns is None else columns.data.astype(np.intp)
        if self._groups.min() < 0 or self._groups.max() >= num_groups:
            raise ValuesInvalid(
                f"{name}: columns are in the groups {self._groups.min()} to {self._groups.max()}, "
                f"but there are {num_groups}.",
                cause="The file is damaged.",
                fix="Fetch the file again, and compare its checksum with the publisher's.",
            )
        self._scheme = scheme
        self._is_in_order = bool((self._groups == in_order).all())
        self._group_size = shape[1] // num_groups

    @abstractmethod
    def codes(self, rows: Indices) -> Int8:
        """Codes of rows of the file, [n, K]."""

    @abstractmethod
    def scales(self, rows: Indices) -> Float32:
        """Scales of rows of the file, [n, G]."""

    @abstractmethod
    def zeros(self, rows: Indices) -> Float32 | None:
        """Zero points of rows of the file, [n, G]; None if all are 0."""

    @cached_property
    def type(self) -> str:
        """Scheme, group size, and what makes it no int4 of ours."""
        groups = "" if self._group_size == self.shape[1] else f" group-{self._group_size}"
        zeros = " with zero points" if self._has_zeros else ""
        order = "" if self._is_in_order else " in act-order"
        return f"{self._scheme} int{self.bits_per_code}{groups}{zeros}{order}"

    @property
    def is_float(self) -> bool:
        """Never."""
        return False

    def values(self, rows: Rows) -> Float32:
        """Some rows, float32 [n, K]."""
        indices = self.order.indices(rows)
        codes, scales = self.codes(indices).astype(np.float32), self.scales(indices)
        zeros = self.zeros(indices)
        if zeros is not None:
            codes -= zeros[:, self._groups]
        with np.errstate(all="ignore"):  # of damaged scales: whoever reads the values checks them
            values: Float32 = codes * scales[:, self._groups]
        return values

    def bits(self, rows: Rows) -> NDArray[np.uint16]:
        """Never: there are no bfloat16 bits."""
        raise NotImplementedError

    def int4(self, rows: Rows) -> tuple[Int8, Float32]:
        """Codes [n, K] and scales [n, K / 32]; a scale of a larger group is repeated."""
        indices = self.order.indices(rows)
        codes = self.codes(indices)
        check_int4(self.name, codes)
        return codes, self.scales(indices)[:, self._groups[::GROUP]]

    def kept_form(self) -> str | None:
        """Name of the form that keeps codes and scales, if one does."""
        columns = self.shape[1]
        if self.bits_per_code != 4 or columns % GROUP or self._has_zeros:
            return None
        groups = self._groups.reshape(-1, GROUP)
        if (groups != groups[:, :1]).any():
            return None
        # Kernels for positive scales lose float16's subnormal numbers, too.
        scales = self.scales(np.arange(self.shape[0]))
        return "signed int4" if (scales < FLOAT16_RANGE[0]).any() else "kept int4"

    @cached_property
    def _has_zeros(self) -> bool:
        zeros = self.zeros(np.arange(self.shape[0]))
        return zeros is not None and bool(zeros.any())


class GptqWeights(PackedWeights):
    """A layer of GPTQ; `tensors` are qweight, qzeros and scales."""

    def __init__(self, tensors: tuple[SafeTensor, ...], version: int, *args: Any) -> None:
        super().__init__(*args)
        self._codes, self._zeros, self._scales = tensors
        self.scale_dtype = self._scales.dtype
        self._less = 1 if version == 1 else 0
        if self._less and (_words(self._zeros)[..., None] >> _SHIFTS & 15 == 15).any():
            raise ValuesInvalid(
                f"{self.name}.qzeros holds zero points of 0, which version 1 of GPTQ's format "
                "cannot store.",
                cause="1 is subtracted from them; readers disagree on what is left.",
                fix="Quantize the model anew, in the format gptq_v2 or symmetrically.",
            )

    def codes(self, rows: Indices) -> Int8:
        """Codes, [n, K]."""
        return _unpack_columns(np.ascontiguousarray(_words(self._codes)[:, rows].T))

    def scales(self, rows: Indices) -> Float32:
        """Scales, [n, G]."""
        return _floats(self._scales)[:, rows].T

    def zeros(self, rows: Indices) -> Float32:
        """Zero points, [n, G]."""
        return _unpack_rows(_words(self._zeros), rows).astype(np.float32) + self._less


class AwqWeights(PackedWeights):
    """A layer of AWQ; `tensors` are qweight, qzeros and scales."""

    def __init__(self, tensors: tuple[SafeTensor, ...], *args: Any) -> None:
        super().__init__(*args)
        self._codes, self._zeros, self._scales = tensors
        self.scale_dtype = self._scales.dtype

    def codes(self, rows: Indices) -> Int8:
        """Codes, [n, K]."""
        return _unpack_rows(_words(self._codes), rows, _AWQ_SHIFTS)

    def scales(self, rows: Indices) -> Float32:
        """Scales, [n, G]."""
        return _floats(self._scales)[:, rows].T

    def zeros(self, rows: Indices) -> Float32:
        """Zero points, [n, G]."""
        return _unpack_rows(_words(self._zeros), rows, _AWQ_SHIFTS).astype(np.float32)


class CompressedWeights(PackedWeights):
    """A layer of compressed-tensors; `tensors` are weight_packed and weight_scale."""

    def __init__(
        self, tensors: tuple[SafeTensor, ...], zeros: SafeTensor | None, *args: Any
    ) -> None:
        super().__init__(*args)
        self._codes, self._scales = tensors
        self.scale_dtype = self._scales.dtype
        self._zeros = zeros

    def codes(self, rows: Indices) -> Int8:
        """Codes, [n, K]."""
        return _unpack_columns(_words(self._codes)[rows])

    def scales(self, rows: Indices) -> Float32:
        """Scales, [n, G]."""
        return _floats(self._scales)[rows]

    def zeros(self, rows: Indices) -> Float32 | None:
        """Zero points, [n, G], or None."""
        if self._zeros is None:
            return None
        return _unpack_rows(_words(self._zeros).T, rows).astype(np.float32)


class TorchaoWeights(PackedWeights):
    """A layer of torchao's IntxUnpackedToInt8Tensor; `tensors` are qdata, scale and zero_point."""

    def __init__(self, tensors: tuple[SafeTensor, ...], bits: int, *args: Any) -> None:
        super().__init__(*args)
        self.bits_per_code = bits
        self._codes, self._scales, self._zeros = tensors
        self.scale_dtype = self._scales.dtype

    def codes(self, rows: Indices) -> Int8:
        """Codes, [n, K]."""
        codes: Int8 = self._codes.data[rows]
        return codes

    def scales(self, rows: Indices) -> Float32:
        """Scales, [n, G]."""
        return _floats(self._scales)[rows]

    def zeros(self, rows: Indices) -> Float32:
        """Zero points, [n, G]."""
        return _floats(self._zeros)[rows]
