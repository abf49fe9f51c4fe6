"""Float formats as tensors are stored: float32, float16, and bfloat16 as its bits in uint16."""

from __future__ import annotations

from typing import Any

import numpy as np
from numpy.typing import ArrayLike, NDArray

_F32 = np.float32


def to_bfloat16(x: ArrayLike) -> NDArray[np.uint16]:
    """Bits of the nearest bfloat16 (ties to even) of float32 values; NaN stays NaN."""
    values = np.asarray(x, _F32)
    bits = values.view(np.uint32).astype(np.uint64)
    rounded = (bits + 0x7FFF + ((bits >> 16) & 1)) >> 16
    # The addition would carry a NaN with a full mantissa over into another number.
    quiet_nan = (bits >> 16) | 0x0040
    return np.where(np.isnan(values), quiet_nan, rounded).astype(np.uint16)


def from_bfloat16(bits: NDArray[np.uint16]) -> NDArray[np.float32]:
    """The float32 value of bfloat16 bits, exact."""
    return (bits.astype(np.uint32) << 16).view(_F32)


def to_float16(x: ArrayLike) -> NDArray[np.float16]:
    """float32 values as float16 (ties to even), as a KV cache stores them."""
    return np.asarray(x, _F32).astype(np.float16)


def widen(x: NDArray[Any]) -> NDArray[np.float64]:
    """A stored tensor as float64; uint16 means bfloat16 bits."""
    return (from_bfloat16(x) if x.dtype == np.uint16 else x).astype(np.float64)


def round_to(x: ArrayLike, dtype: str) -> NDArray[np.float32]:
    """What is read back, as float32, after storing `x` as "float32", "float16" or "bfloat16".

    Raises:
        ValueError: another dtype.
    """
    values = np.asarray(x, _F32)
    if dtype == "float32":
        return values
    if dtype == "float16":
        return to_float16(values).astype(_F32)
    if dtype == "bfloat16":
        return from_bfloat16(to_bfloat16(values))
    raise ValueError(f"cannot round to {dtype!r}: not one of float32, float16, bfloat16")
