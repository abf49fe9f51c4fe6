"""What every front end hands to the pipeline: a configuration and a lazy source of tensors."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any, Protocol

import numpy as np
from numpy.typing import NDArray

from llamac.compiler.config import LlamaConfig, QuantConfig
from llamac.runtime.errors import ValuesInvalid

# Normal numbers of float16; below, a scale would lose bits.
FLOAT16_RANGE = (float(np.finfo(np.float16).smallest_normal), float(np.finfo(np.float16).max))

_BLOCK_BYTES = 4 << 20


@dataclass(frozen=True)
class TensorInfo:
    """Shape and dtype of a tensor as `WeightSource.read` returns it."""

    shape: tuple[int, ...]
    dtype: str


class WeightSource(Protocol):
    """Named tensors of a model on disk, one in memory at a time.

    Names are Meta's, q and k rows in interleaved-pair RoPE order, whatever the file's own layout.
    """

    def names(self) -> Sequence[str]:
        """All tensors, in the order of use: embedding, blocks, final norm, output."""

    def info(self, name: str) -> TensorInfo:
        """Shape and dtype, without touching the data.

        Raises:
            KeyError: no tensor of that name.
        """

    def read(self, name: str) -> NDArray[Any]:
        """One tensor, as a read-only view of the file where its layout allows that.

        bfloat16 comes as its bits in uint16; norm weights as float32; scales as float32, [V] for a
        table and [N, K/group] for a linear layer; int4 codes as int8, one per byte.

        Raises:
            KeyError: no tensor of that name.
            ValuesInvalid: codes or scales outside their range.
        """


@dataclass(frozen=True)
class Checkpoint:
    """A model on disk, ready for the pipeline.

    Attributes:
        name: short name of the model, fit for file names and C strings.
        config: sizes and constants.
        quant: how weights are stored and what the model must compute because of it.
        weights: the tensors.
        tokenizer: file in tiktoken form.
        notes: what was assumed or found at load; printed and written to the manifest.
        shared_embedding: the output table equals the embedding table, so one copy is enough.
    """

    name: str
    config: LlamaConfig
    quant: QuantConfig
    weights: WeightSource
    tokenizer: Path
    notes: tuple[str, ...] = ()
    shared_embedding: bool = False


def _damaged(name: str, found: str, expected: str) -> ValuesInvalid:
    return ValuesInvalid(
        f"{name} holds {found}, expected {expected}.",
        cause="The file is damaged, or it was written in another layout than its names say.",
        fix="Fetch the checkpoint again and compare its checksum with the publisher's.",
    )


def _row_blocks(array: NDArray[Any]) -> list[slice]:
    """Slices of the first axis of at most about 4 MiB each."""
    rows = max(1, _BLOCK_BYTES * len(array) // max(1, array.nbytes))
    return [slice(start, start + rows) for start in range(0, len(array), rows)]


def check_int4(name: str, codes: NDArray[np.int8]) -> None:
    """Check that codes are int4 values.

    Raises:
        ValuesInvalid: a code is outside -8..7.
    """
    low, high = int(codes.min(initial=0)), int(codes.max(initial=0))
    if low < -8 or high > 7:
        raise _damaged(name, f"codes from {low} to {high}", "int4 codes from -8 to 7")


def check_scales(name: str, scales: NDArray[np.float32], *, signed: bool = False) -> None:
    """Check that scales can be scales at all.

    Args:
        name: of the tensor.
        scales: float32 or float16.
        signed: whether they may be 0 or negative.

    Raises:
        ValuesInvalid: a scale is not finite, or not above 0 where it must be.
    """
    if signed:
        check_finite(name, scales)
        return
    low, high = float(scales.min(initial=1)), float(scales.max(initial=1))
    if not 0 < low <= high < np.inf:  # also false for NaN, which min and max hand through
        raise _damaged(name, f"scales from {low:g} to {high:g}", "finite scales above 0")


def check_scales_fit_float16(
    name: str, scales: NDArray[np.float32], *, signed: bool = False
) -> None:
    """Check that scales survive being stored as float16; the packer calls this before it rounds.

    Args:
        name: of the tensor.
        scales: to be stored.
        signed: whether they may be 0 or negative. Where a file has them as float16, its subnormal
            numbers are exact.

    Raises:
        ValuesInvalid: a scale is outside float16's normal numbers; bfloat16 would hold it.
    """
    check_scales(name, scales, signed=signed)
    if signed:
        with np.errstate(over="ignore"):
            scales = np.abs(scales[scales.astype(np.float16) != scales])
    low, high = float(scales.min(initial=1)), float(scales.max(initial=1))
    if low < FLOAT16_RANGE[0] or high > FLOAT16_RANGE[1]:
        raise ValuesInvalid(
            f"{name} holds scales from {low:g} to {high:g}, outside float16's range "
            f"{FLOAT16_RANGE[0]:.2g} to {FLOAT16_RANGE[1]:g}.",
            cause="Scales are packed as float16 by default, which would lose these values.",
            fix="Compile with bfloat16 scales: less exact (8 bits), but of float32's range.",
        )


def scale_check(quant: QuantConfig) -> Callable[[str, NDArray[np.float32]], None]:
    """The check of scales that a packer makes for a model of this form."""
    return partial(check_scales_fit_float16, signed=quant.signed_scales)


def check_finite(name: str, values: NDArray[Any]) -> None:
    """Check float weights; uint16 means bfloat16 bits.

    Raises:
        ValuesInvalid: an infinity or NaN.
    """
    for block in _row_blocks(values):
        part = values[block]
        # A bfloat16 is infinite or NaN when all its exponent bits are set.
        bad = (part & 0x7F80) == 0x7F80 if part.dtype == np.uint16 else ~np.isfinite(part)
        if bad.any():
            raise _damaged(name, f"{int(bad.sum())} infinite or NaN values", "finite numbers")


def same_values(left: NDArray[Any], right: NDArray[Any]) -> bool:
    """Compare two arrays block by block, stopping at the first difference."""
    if left.shape != right.shape or left.dtype != right.dtype:
        return False
    return all(np.array_equal(left[block], right[block]) for block in _row_blocks(left))
