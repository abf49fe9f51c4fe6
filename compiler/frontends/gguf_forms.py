"""What GGUF's tensors are turned into: forms of weights that kernels read, and what they lose."""

from __future__ import annotations

import math
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any, ClassVar

import numpy as np
from numpy.typing import NDArray

from llamac.compiler.checkpoint import FLOAT16_RANGE, TensorInfo, check_finite
from llamac.compiler.floats import from_bfloat16, to_bfloat16
from llamac.compiler.frontends.gguf_blocks import BF16, GROUP, decode, q4_0_parts
from llamac.compiler.frontends.gguf_file import GgufTensor
from llamac.compiler.quantize import Codes, quantize_int4, quantize_int8

Array = NDArray[Any]

_PIECE_VALUES = 1 << 20  # decoded at once: 4 MiB of float32
_SAMPLED_ROWS = 64


@dataclass(frozen=True)
class Loss:
    """Sums of squares of some weights and of their errors."""

    signal: float
    noise: float

    def __add__(self, other: Loss) -> Loss:
        return Loss(self.signal + other.signal, self.noise + other.noise)

    @property
    def decibels(self) -> float:
        """Signal to noise; 300 for no noise at all, 0 for what is not finite."""
        if not (math.isfinite(self.signal) and math.isfinite(self.noise)):
            return 0.0
        return 10 * math.log10(self.signal / self.noise) if self.signal and self.noise else 300.0


class Form:
    """How a layer's weights are given to the pipeline.

    Attributes:
        title: for notes.
        parts: "weight", and "scales" if there are any.
        is_int4: weights are int4 group-32.
        signed: its scales may be negative or 0.
        exact_for: types of the file that never lose anything.
    """

    title: ClassVar[str]
    parts: ClassVar[tuple[str, ...]] = ("weight",)
    is_int4: ClassVar[bool] = False
    signed: ClassVar[bool] = False
    exact_for: ClassVar[tuple[str, ...]] = ()

    def info(self, tensor: GgufTensor, part: str) -> TensorInfo:
        """Shape and dtype of a part."""
        raise NotImplementedError

    def convert(self, tensor: GgufTensor, rows: NDArray[np.uint8]) -> dict[str, Array]:
        """All parts of some of a tensor's rows.

        Raises:
            ValuesInvalid: values that are to be quantized are not finite.
        """
        raise NotImplementedError

    def values(self, parts: dict[str, Array]) -> Array:
        """The float32 values that converted rows stand for."""
        codes, scales = parts["weight"], parts["scales"]
        return Codes(codes, scales.reshape(len(codes), -1)).dequantize()

    def read(self, tensor: GgufTensor, part: str) -> Array:
        """One part of a tensor, made in pieces so that little more than the result is held."""
        info = self.info(tensor, part)
        result: Array = np.empty(info.shape, stored_dtype(info.dtype))
        for rows in _pieces(tensor):
            result[rows] = self.convert(tensor, _data(tensor)[rows])[part]
        return result


def stored_dtype(dtype: str) -> str:
    """NumPy's dtype for one of ours: bfloat16 is held as its bits."""
    return "uint16" if dtype == "bfloat16" else dtype


def _data(tensor: GgufTensor) -> NDArray[np.uint8]:
    if tensor.data is None:
        raise ValueError(f"{tensor.name} has no decoder")  # the front end has refused it
    return tensor.data


def _finite_values(tensor: GgufTensor, rows: NDArray[np.uint8]) -> NDArray[np.float32]:
    """Decoded rows; a scale could not be made of what is not finite."""
    values = decode(tensor.type_id, rows)
    check_finite(tensor.name, values)
    return values


def _pieces(tensor: GgufTensor) -> Iterator[slice]:
    step = max(1, _PIECE_VALUES // tensor.shape[-1])
    for start in range(0, len(_data(tensor)), step):
        yield slice(start, start + step)


class _Norm(Form):
    title = "float32"

    def info(self, tensor: GgufTensor, part: str) -> TensorInfo:
        return TensorInfo(tensor.shape, "float32")

    def read(self, tensor: GgufTensor, part: str) -> Array:
        values: Array = decode(tensor.type_id, _data(tensor))[0]
        return values.copy()


class _Bfloat16(Form):
    title = "bfloat16"
    exact_for = ("BF16",)

    def info(self, tensor: GgufTensor, part: str) -> TensorInfo:
        return TensorInfo(tensor.shape, "bfloat16")

    def convert(self, tensor: GgufTensor, rows: NDArray[np.uint8]) -> dict[str, Array]:
        if tensor.type_id == BF16:
            return {"weight": np.ascontiguousarray(rows).view("<u2")}
        return {"weight": to_bfloat16(decode(tensor.type_id, rows))}

    def values(self, parts: dict[str, Array]) -> Array:
        return from_bfloat16(parts["weight"])

    def read(self, tensor: GgufTensor, part: str) -> Array:
        if tensor.type_id == BF16:  # a view of the file
            return self.convert(tensor, _data(tensor))["weight"]
        return super().read(tensor, part)


class _Int4(Form):
    """Codes and scales of our own quantizer, scales as the float16 that kernels read."""

    title = "int4 group-32, quantized anew"
    parts = ("weight", "scales")
    is_int4 = True

    def info(self, tensor: GgufTensor, part: str) -> TensorInfo:
        rows, columns = tensor.shape
        if part == "weight":
            return TensorInfo(tensor.shape, "int8")
        return TensorInfo((rows, columns // GROUP), "float32")

    def convert(self, tensor: GgufTensor, rows: NDArray[np.uint8]) -> dict[str, Array]:
        values = _finite_values(tensor, rows)
        scales = np.clip(quantize_int4(values).scales, *FLOAT16_RANGE).astype(np.float16)
        scales = scales.astype(np.float32)
        steps = values.reshape(*scales.shape, GROUP) / scales[..., None]
        codes = np.clip(np.rint(steps), -8, 7).astype(np.int8)
        return {"weight": codes.reshape(values.shape), "scales": scales}


class _Q40(_Int4):
    title = "int4 group-32"
    signed = True
    exact_for = ("Q4_0",)

    def convert(self, tensor: GgufTensor, rows: NDArray[np.uint8]) -> dict[str, Array]:
        return dict(zip(self.parts, q4_0_parts(rows), strict=True))


class _Int8(Form):
    title = "int8 with a scale per row"
    parts = ("weight", "scales")

    def info(self, tensor: GgufTensor, part: str) -> TensorInfo:
        if part == "weight":
            return TensorInfo(tensor.shape, "int8")
        return TensorInfo(tensor.shape[:1], "float32")

    def convert(self, tensor: GgufTensor, rows: NDArray[np.uint8]) -> dict[str, Array]:
        codes = quantize_int8(_finite_values(tensor, rows))
        return {"weight": codes.codes, "scales": codes.scales[:, 0]}


FORMS: dict[str, Form] = {
    "norm": _Norm(),
    "bfloat16": _Bfloat16(),
    "q4_0": _Q40(),
    "int4": _Int4(),
    "int8": _Int8(),
}


def measure(tensor: GgufTensor, form: Form) -> Loss:
    """What some rows of a tensor, evenly spaced, lose when they are converted.

    Values that are not finite lose all here and are refused when they are read.
    """
    data = _data(tensor)
    rows = data[np.linspace(0, len(data) - 1, min(len(data), _SAMPLED_ROWS)).astype(int)]
    stored: Array = decode(tensor.type_id, rows)
    if not np.isfinite(stored).all():
        return Loss(math.nan, math.nan)
    stored = stored.astype(np.float64)
    with np.errstate(over="ignore"):
        error = form.values(form.convert(tensor, rows)) - stored
        return Loss(float(np.sum(stored**2)), float(np.sum(error**2)))
