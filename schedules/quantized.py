"""Values as integers by a scale and a zero point that are fixed when a model is compiled."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray

_LEAST_SCALE = 2.0**-40


@dataclass(frozen=True)
class ValueRange:
    """Smallest and largest value that was seen."""

    low: float
    high: float

    def union(self, other: ValueRange) -> ValueRange:
        """The range of both."""
        return ValueRange(min(self.low, other.low), max(self.high, other.high))

    @property
    def largest(self) -> float:
        """The largest magnitude."""
        return max(abs(self.low), abs(self.high))


@dataclass(frozen=True)
class Quantization:
    """A value is scale * (code - zero_point).

    Attributes:
        dtype: of the codes: "uint8", "int8", "uint16", "int16".
        scale: float32, above 0.
        zero_point: the code of 0.
    """

    dtype: str
    scale: float
    zero_point: int = 0

    @classmethod
    def symmetric(cls, seen: ValueRange, dtype: str) -> Quantization:
        """Both signs reach equally far; 0 is code 0, or the middle code of an unsigned dtype."""
        bits = np.iinfo(dtype).bits
        middle = 0 if dtype.startswith("int") else 1 << (bits - 1)
        scale = max(seen.largest / ((1 << (bits - 1)) - 1), _LEAST_SCALE)
        return cls(dtype, float(np.float32(scale)), middle)

    @classmethod
    def asymmetric(cls, seen: ValueRange, dtype: str) -> Quantization:
        """The ends of the range, widened to hold 0, are the first and the last code."""
        low, high = min(seen.low, 0.0), max(seen.high, 0.0)
        codes = np.iinfo(dtype)
        scale = float(np.float32(max((high - low) / (codes.max - codes.min), _LEAST_SCALE)))
        zero = int(np.clip(round(codes.min - low / scale), codes.min, codes.max))
        return cls(dtype, scale, zero)

    @property
    def limits(self) -> tuple[int, int]:
        """The first and the last code."""
        limits = np.iinfo(self.dtype)
        return int(limits.min), int(limits.max)

    def quantize(self, values: NDArray[Any]) -> NDArray[Any]:
        """Codes of values: nearest, ties to even, clamped."""
        codes = np.rint(np.asarray(values, np.float64) / self.scale) + self.zero_point
        return np.asarray(np.clip(codes, *self.limits).astype(self.dtype))

    def dequantize(self, codes: NDArray[Any]) -> NDArray[np.float64]:
        """Values of codes."""
        return np.asarray((codes.astype(np.float64) - self.zero_point) * self.scale)
