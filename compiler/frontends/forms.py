"""What stored weights are turned into: forms that kernels read, and what they lose by it."""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from typing import Any, ClassVar, Protocol, TypeAlias

import numpy as np
from numpy.typing import NDArray

from llamac.compiler.checkpoint import FLOAT16_RANGE, TensorInfo, check_finite
from llamac.compiler.floats import from_bfloat16, to_bfloat16
from llamac.compiler.quantize import Codes, quantize_int4, quantize_int8

Array = NDArray[Any]
Rows: TypeAlias = slice | NDArray[np.intp]

GROUP = 32  # columns of an int4 scale of kernels
_PIECE_VALUES = 1 << 20  # decoded at once: 4 MiB of float32
_SAMPLED_ROWS = 64

# Layers of which one kernel computes all.
_FUSED = (
    ("attention.wq", "attention.wk", "attention.wv"),
    ("attention.wo",),
    ("feed_forward.w1", "feed_forward.w3"),
    ("feed_forward.w2",),
)
# A table of int8 is as good as the types of GGUF from here on: Q6_K has about 36 dB.
_LEAST_TABLE_DB = 30.0


class Stored(Protocol):
    """The weights of one layer, as a file has them."""

    @property
    def name(self) -> str:
        """In the file, for errors."""

    @property
    def type(self) -> str:
        """How they are stored, for notes; "BF16" means that `bits` are the very weights."""

    @property
    def shape(self) -> tuple[int, ...]:
        """Rows first; a vector is one row."""

    @property
    def is_float(self) -> bool:
        """Whether every value is stored for itself."""

    def values(self, rows: Rows) -> NDArray[np.float32]:
        """Some rows, float32 [n, k]; infinities and NaN stay."""

    def bits(self, rows: Rows) -> NDArray[np.uint16]:
        """Some rows of BF16, uint16 [n, k]: a view of the file if it can be."""

    def int4(self, rows: Rows) -> tuple[NDArray[np.int8], NDArray[np.float32]]:
        """Some rows of a type that is int4 group-32: codes int8 [n, k], scales [n, k / 32]."""


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
    """

    title: ClassVar[str]
    parts: ClassVar[tuple[str, ...]] = ("weight",)
    is_int4: ClassVar[bool] = False
    signed: ClassVar[bool] = False

    def is_exact(self, stored: Stored) -> bool:
        """Whether such weights lose nothing, whatever their values are."""
        return False

    def info(self, stored: Stored, part: str) -> TensorInfo:
        """Shape and dtype of a part."""
        raise NotImplementedError

    def convert(self, stored: Stored, rows: Rows) -> dict[str, Array]:
        """All parts of some of a tensor's rows.

        Raises:
            ValuesInvalid: values that are to be quantized are not finite.
        """
        raise NotImplementedError

    def values(self, parts: dict[str, Array]) -> Array:
        """The float32 values that converted rows stand for."""
        codes, scales = parts["weight"], parts["scales"]
        return Codes(codes, scales.reshape(len(codes), -1)).dequantize()

    def read(self, stored: Stored, part: str) -> Array:
        """One part of a tensor, made in pieces so that little more than the result is held."""
        info = self.info(stored, part)
        result: Array = np.empty(info.shape, stored_dtype(info.dtype))
        for rows in _pieces(stored):
            result[rows] = self.convert(stored, rows)[part]
        return result


def stored_dtype(dtype: str) -> str:
    """NumPy's dtype for one of ours: bfloat16 is held as its bits."""
    return "uint16" if dtype == "bfloat16" else dtype


def _finite_values(stored: Stored, rows: Rows) -> NDArray[np.float32]:
    """Decoded rows; a scale could not be made of what is not finite."""
    values = stored.values(rows)
    check_finite(stored.name, values)
    return values


def _pieces(stored: Stored) -> Iterator[slice]:
    step = max(1, _PIECE_VALUES // stored.shape[-1])
    for start in range(0, stored.shape[0], step):
        yield slice(start, start + step)


class _Norm(Form):
    title = "float32"

    def info(self, stored: Stored, part: str) -> TensorInfo:
        return TensorInfo(stored.shape, "float32")

    def read(self, stored: Stored, part: str) -> Array:
        values: Array = stored.values(slice(None))
        return values.reshape(stored.shape).copy()


class _Bfloat16(Form):
    title = "bfloat16"

    def is_exact(self, stored: Stored) -> bool:
        return stored.type == "BF16"

    def info(self, stored: Stored, part: str) -> TensorInfo:
        return TensorInfo(stored.shape, "bfloat16")

    def convert(self, stored: Stored, rows: Rows) -> dict[str, Array]:
        if self.is_exact(stored):
            return {"weight": stored.bits(rows)}
        return {"weight": to_bfloat16(stored.values(rows))}

    def values(self, parts: dict[str, Array]) -> Array:
        return from_bfloat16(parts["weight"])

    def read(self, stored: Stored, part: str) -> Array:
        if self.is_exact(stored):  # a view of the file
            return stored.bits(slice(None))
        return super().read(stored, part)


class _Int4(Form):
    """Codes and scales of our own quantizer, scales as the float16 that kernels read."""

    title = "int4 group-32, quantized anew"
    parts = ("weight", "scales")
    is_int4 = True

    def info(self, stored: Stored, part: str) -> TensorInfo:
        rows, columns = stored.shape
        if part == "weight":
            return TensorInfo(stored.shape, "int8")
        return TensorInfo((rows, columns // GROUP), "float32")

    def convert(self, stored: Stored, rows: Rows) -> dict[str, Array]:
        values = _finite_values(stored, rows)
        scales = np.clip(quantize_int4(values).scales, *FLOAT16_RANGE).astype(np.float16)
        scales = scales.astype(np.float32)
        steps = values.reshape(*scales.shape, GROUP) / scales[..., None]
        codes = np.clip(np.rint(steps), -8, 7).astype(np.int8)
        return {"weight": codes.reshape(values.shape), "scales": scales}


class _KeptInt4(_Int4):
    """The codes and scales of the file."""

    title = "int4 group-32"

    def is_exact(self, stored: Stored) -> bool:
        return True

    def convert(self, stored: Stored, rows: Rows) -> dict[str, Array]:
        return dict(zip(self.parts, stored.int4(rows), strict=True))


class _SignedInt4(_KeptInt4):
    signed = True


class _Int8(Form):
    title = "int8 with a scale per row"
    parts = ("weight", "scales")

    def info(self, stored: Stored, part: str) -> TensorInfo:
        if part == "weight":
            return TensorInfo(stored.shape, "int8")
        return TensorInfo(stored.shape[:1], "float32")

    def convert(self, stored: Stored, rows: Rows) -> dict[str, Array]:
        codes = quantize_int8(_finite_values(stored, rows))
        return {"weight": codes.codes, "scales": codes.scales[:, 0]}


FORMS: dict[str, Form] = {
    "norm": _Norm(),
    "bfloat16": _Bfloat16(),
    "kept int4": _KeptInt4(),
    "signed int4": _SignedInt4(),
    "int4": _Int4(),
    "int8": _Int8(),
}


def measure(stored: Stored, form: Form) -> Loss:
    """What some rows of a tensor, evenly spaced, lose when they are converted.

    Values that are not finite lose all here and are refused when they are read.
    """
    count = stored.shape[0]
    rows = np.linspace(0, count - 1, min(count, _SAMPLED_ROWS)).astype(np.intp)
    values: Array = stored.values(rows)
    if not np.isfinite(values).all():
        return Loss(math.nan, math.nan)
    values = values.astype(np.float64)
    with np.errstate(over="ignore"):
        error = form.values(form.convert(stored, rows)) - values
        return Loss(float(np.sum(values**2)), float(np.sum(error**2)))


def linear_forms(
    layers: Mapping[str, Stored], kept: Mapping[str, str], requantize: bool
) -> dict[str, Form]:
    """Forms of the linear layers of one block: those of one kernel are int4 only together.

    Args:
        layers: by name, as `LlamaConfig.linear_shapes` has them.
        kept: names of forms for the layers that need no conversion.
        requantize: make int4 of the others where that keeps or makes a kernel int4.
    """
    forms: dict[str, Form] = {}
    for group in _FUSED:
        is_int4 = all(
            name in kept or (requantize and layers[name].shape[1] % GROUP == 0) for name in group
        )
        for name in group:
            forms[name] = FORMS[kept.get(name, "int4") if is_int4 else "bfloat16"]
    return forms


def table_form(stored: Stored, requantize: bool) -> Form:
    """int8 for a table that was quantized already and loses little."""
    loses_little = not stored.is_float and (
        measure(stored, FORMS["int8"]).decibels >= _LEAST_TABLE_DB
    )
    return FORMS["int8" if requantize or loses_little else "bfloat16"]
