"""Weights of linear layers in the schemes of processors that cannot read group-wise int4.

Two schemes, both symmetric:

    per channel   int8 or int4 codes, one float32 scale per row
    LPBQ          int4 codes; the scale of 32 columns is an integer 1..16 times one float32 per row

Codes are -127..127 (int8) and -8..7 (int4). The source files use -8, so a scheme without it could
not hold their weights unchanged; for int8, -128 would buy 0.4 % of a step.

Scales come from a small search that makes the squared error of the weights small, or of the layer's
outputs as far as its inputs are independent of each other: then `importance` is their mean square.
Every code is the one nearest to its weight. `gptq.py` is for inputs that depend on each other.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any, NamedTuple

import numpy as np
from numpy.typing import NDArray

from llamac.compiler.floats import widen
from llamac.compiler.quantize import INT4, INT8, Codes, CodeSpan, nearest_codes
from llamac.runtime.errors import CoverageError, ValuesInvalid

Float32 = NDArray[np.float32]
Float64 = NDArray[np.float64]

LPBQ_GROUP = 32
LARGEST_MULTIPLIER = 16

# Steps that the largest magnitude of a row or group becomes. The first is the plain rule of
# `quantize_int4` and `quantize_int8`, so the search never ends above it. Whole numbers find the
# scale of weights that are codes already; those beyond the largest code clip.
_STEPS = {
    INT4: (7.5, 4.0, 5.0, 6.0, 7.0, 8.0, 8.5, 9.0, 9.5, 10.0, 11.0, 12.5),
    INT8: (127.0, 129.0, 132.0, 136.0, 141.0, 148.0, 158.0, 172.0, 192.0),
}
_NUM_REFITS = 2

# Row scales of LPBQ that are looked at: the largest group scale is this multiple of them. First
# the integers (its multiplier in weights that are LPBQ already), then the finest row scales.
_LARGEST_STEPS = np.concatenate(
    [np.arange(LARGEST_MULTIPLIER, 0, -1), LARGEST_MULTIPLIER * np.geomspace(0.5, 1.6, 48)]
)
# How many of them are tried out on the weights.
_NUM_TRIALS = 3

# Rows are searched in blocks of this many weights (0.5 MiB), which stay in a core's cache.
_BLOCK_ELEMENTS = 1 << 16
_SMALLEST_SCALE = float(np.finfo(np.float32).tiny)
_LARGEST_WEIGHT = float(np.finfo(np.float32).max)


@dataclass(frozen=True, eq=False)
class PerChannel:
    """Integer weights with one scale per row.

    Attributes:
        codes: [N, K] int8; -127..127, or -8..7 for int4.
        scales: [N] float32, above 0.
    """

    codes: NDArray[np.int8]
    scales: Float32

    def dequantize(self) -> Float64:
        """The weights that the codes stand for, [N, K], exact products."""
        return widen(self.codes) * widen(self.scales)[:, None]


@dataclass(frozen=True, eq=False)
class Lpbq:
    """int4 weights whose group scales are integers times one scale per row.

    Attributes:
        codes: [N, K] int8, -8..7.
        multipliers: [N, K / 32] uint8, 1..16.
        row_scales: [N] float32, above 0.
    """

    codes: NDArray[np.int8]
    multipliers: NDArray[np.uint8]
    row_scales: Float32

    def group_scales(self) -> Float64:
        """The scale of every group, [N, K / 32], exact products."""
        return widen(self.multipliers) * widen(self.row_scales)[:, None]

    def dequantize(self) -> Float64:
        """The weights that the codes stand for, [N, K], exact products."""
        return widen(self.codes) * np.repeat(self.group_scales(), LPBQ_GROUP, axis=1)


def quantize_per_channel(
    weight: NDArray[Any] | Codes, bits: int = 8, importance: Float64 | None = None
) -> PerChannel:
    """Give every row the scale, of those searched, with the smallest squared error.

    Args:
        weight: [N, K] float or bfloat16 bits, or codes with their scales.
        bits: 8 or 4.
        importance: [K] float64, at least 0: weight of each column's error; all 1 if not given.

    Returns:
        Codes and scales whose error is, in every row, at most that of the plain rule (the largest
        magnitude becomes the largest code). A row of zeros has scale 1.

    Raises:
        ValuesInvalid: weights that are not finite in float32.
        ValueError: other bits; `importance` of another shape or below 0.
    """
    values, span = weights_of(weight), code_span(bits)
    columns = _importance_of(importance, values)
    codes, scales = np.empty(values.shape, np.int8), np.empty(len(values), np.float32)
    for rows in _row_blocks(values):
        found = _as_stored(_search_scales(values[rows], columns, span))
        scales[rows] = np.where(values[rows].any(-1), found, 1)
        codes[rows] = nearest_codes(values[rows], found[:, None], span)
    return PerChannel(codes, scales)


def quantize_lpbq(weight: NDArray[Any] | Codes, importance: Float64 | None = None) -> Lpbq:
    """Choose row scales, multipliers and codes that make the squared error small.

    Weights that are LPBQ already keep their values. int4 codes with float group scales keep the
    codes wherever the new scale of a group is so near to the old one that they are still nearest.

    Args:
        weight: [N, K] float or bfloat16 bits, or codes with their scales. Group scales of 32
            columns, where there are any, are what the search starts from.
        importance: [K] float64, at least 0: weight of each column's error; all 1 if not given.

    Returns:
        A row of zeros has row scale 1; a group of zeros has multiplier 1.

    Raises:
        CoverageError: K is no multiple of 32.
        ValuesInvalid: weights that are not finite in float32.
        ValueError: `importance` of another shape or below 0.
    """
    values = weights_of(weight)
    num_rows, num_columns = values.shape
    check_groups(num_columns)
    shape = num_rows, num_columns // LPBQ_GROUP
    groups = values.reshape(*shape, LPBQ_GROUP)
    columns = _importance_of(importance, values).reshape(-1, LPBQ_GROUP)
    known = weight.scales if isinstance(weight, Codes) and weight.scales.shape == shape else None
    codes, multipliers = np.empty(groups.shape, np.int8), np.empty(shape, np.uint8)
    row_scales = np.empty(num_rows, np.float32)
    for rows in _row_blocks(values):
        block = groups[rows]
        ideal = _search_scales(block, columns, INT4) if known is None else widen(known[rows])
        fit = _fit_lpbq(_Rows(block, columns, np.where(block.any(-1), ideal, 0)))
        row_scales[rows], multipliers[rows] = fit.row_scales, fit.multipliers
        codes[rows] = nearest_codes(block, fit.group_scales()[..., None], INT4)
    return Lpbq(codes.reshape(values.shape), multipliers, row_scales)


def code_span(bits: int) -> CodeSpan:
    """The codes of `bits` bits.

    Raises:
        ValueError: neither 8 nor 4.
    """
    if bits not in (4, 8):
        raise ValueError(f"weights per channel have 8 or 4 bits, not {bits}")
    return INT8 if bits == 8 else INT4


def check_groups(num_columns: int) -> None:
    """Check that LPBQ can hold rows of this length.

    Raises:
        CoverageError: no multiple of 32.
    """
    if num_columns % LPBQ_GROUP:
        raise CoverageError(
            f"{num_columns} columns are no multiple of {LPBQ_GROUP}, so they have no LPBQ form.",
            cause=f"LPBQ has one scale per {LPBQ_GROUP} columns of a weight.",
            fix="Quantize this layer per channel, or leave it to the CPU.",
        )


def weights_of(weight: NDArray[Any] | Codes) -> Float64:
    """Weights of any form as float64 [N, K]; codes and scales are multiplied exactly.

    Raises:
        ValuesInvalid: weights that are not finite in float32.
    """
    if isinstance(weight, Codes):
        group = weight.codes.shape[1] // weight.scales.shape[1]
        values = widen(weight.codes) * np.repeat(widen(weight.scales), group, axis=1)
    else:
        values = widen(weight)
    largest = float(np.abs(values).max(initial=0))
    if not largest <= _LARGEST_WEIGHT:  # also for NaN
        raise ValuesInvalid(
            f"A weight is {largest:g}, which is no finite float32.",
            cause="The checkpoint is damaged, or an earlier step overflowed.",
            fix="Fetch the checkpoint again and compare its checksum with the publisher's.",
        )
    return values


def _importance_of(importance: Float64 | None, values: Float64) -> Float64:
    num_columns = values.shape[1]
    if importance is None:
        return np.ones(num_columns)
    if importance.shape != (num_columns,) or not (importance >= 0).all():
        raise ValueError(f"importance must be {num_columns} numbers of at least 0")
    return importance


def _row_blocks(values: Float64) -> Iterator[slice]:
    rows = max(1, _BLOCK_ELEMENTS // values.shape[1])
    for start in range(0, len(values), rows):
        yield slice(start, start + rows)


def _as_stored(scales: Float64) -> Float64:
    """Scales rounded to normal numbers of float32, of which the smallest stands for 0."""
    return np.maximum(scales, _SMALLEST_SCALE).astype(np.float32).astype(np.float64)


def _squared_error(
    values: Float64, scales: Float64, importance: Float64, span: CodeSpan
) -> Float64:
    """Weighted squared error of the nearest codes: [..., k] with scales [...] -> [...]."""
    error = nearest_codes(values, scales[..., None], span)
    error *= scales[..., None]
    error -= values
    np.square(error, out=error)
    error *= importance
    return np.asarray(error.sum(-1))


def _search_scales(values: Float64, importance: Float64, span: CodeSpan) -> Float64:
    """One scale for all of the last axis: [..., k] -> [...] float64, not rounded to float32."""
    largest = np.abs(values).max(-1)
    best = np.full(largest.shape, _SMALLEST_SCALE)
    smallest_error = np.full(largest.shape, np.inf)

    def offer(scales: Float64) -> None:
        error = _squared_error(values, scales, importance, span)
        is_better = error < smallest_error
        np.copyto(best, scales, where=is_better)
        np.copyto(smallest_error, error, where=is_better)

    for steps in _STEPS[span]:
        offer(np.maximum(largest / steps, _SMALLEST_SCALE))
    for _ in range(_NUM_REFITS):
        offer(_refit(values, nearest_codes(values, best[..., None], span), importance, best))
    return best


def _refit(values: Float64, codes: Float64, importance: Float64, scales: Float64) -> Float64:
    """The scales that fit given codes best (least squares); the old ones where none matters."""
    weighted = codes * importance
    power = (weighted * codes).sum(-1)
    fitted = (weighted * values).sum(-1) / np.where(power > 0, power, 1)
    return np.where(fitted > _SMALLEST_SCALE, fitted, scales)


class _Rows(NamedTuple):
    """Some rows of a weight: values [n, G, 32], importance [G, 32], ideal group scales [n, G]."""

    values: Float64
    importance: Float64
    ideal: Float64


class _Fit(NamedTuple):
    """Scales of some rows: row_scales [n], multipliers [n, G], squared errors [n]."""

    row_scales: Float64
    multipliers: Float64
    errors: Float64

    def group_scales(self) -> Float64:
        return self.multipliers * self.row_scales[:, None]

    def better_of(self, other: _Fit) -> _Fit:
        """Row by row the one with the smaller error, this one where they are equal."""
        take = other.errors < self.errors
        return _Fit(
            np.where(take, other.row_scales, self.row_scales),
            np.where(take[:, None], other.multipliers, self.multipliers),
            np.where(take, other.errors, self.errors),
        )


def _fit_lpbq(rows: _Rows) -> _Fit:
    """Try the likeliest row scales; then all multipliers and two refits on the best."""
    trials = [_choose_multipliers(rows, scales) for scales in _likely_row_scales(rows)]
    best = trials[0]
    for trial in trials[1:]:
        best = best.better_of(trial)
    best = _choose_multipliers(rows, best.row_scales, all_of_them=True)
    for _ in range(_NUM_REFITS):
        codes = nearest_codes(rows.values, best.group_scales()[..., None], INT4)
        steps = (codes * best.multipliers[..., None]).reshape(len(codes), -1)
        values, importance = rows.values.reshape(steps.shape), rows.importance.reshape(-1)
        refitted = _as_stored(_refit(values, steps, importance, best.row_scales))
        best = best.better_of(_choose_multipliers(rows, refitted))
    return best


def _likely_row_scales(rows: _Rows) -> Float64:
    """Candidates, [trials, n]: the plain rule, and those that meet the ideal group scales best.

    A group whose scale is off by a share of it is taken to err by that share of its own power,
    though never by more than all of it.
    """
    largest = rows.ideal.max(-1)
    largest[largest == 0] = LARGEST_MULTIPLIER  # a row of zeros gets the scale 1
    candidates = _as_stored(largest / _LARGEST_STEPS[:, None])
    power = (np.square(rows.values) * rows.importance).sum(-1)
    inverse = 1 / np.where(rows.ideal > 0, rows.ideal, 1)
    misfit = np.empty(candidates.shape)
    for number, row_scales in enumerate(candidates):
        met = _nearest_multipliers(rows, row_scales) * row_scales[:, None] * inverse
        misfit[number] = (np.minimum(np.square(1 - met), 1) * power).sum(-1)
    order = np.argsort(misfit, axis=0, kind="stable")[:_NUM_TRIALS]
    return np.concatenate([candidates[:1], np.take_along_axis(candidates, order, axis=0)])


def _nearest_multipliers(rows: _Rows, row_scales: Float64) -> Float64:
    return np.clip(np.rint(rows.ideal / row_scales[:, None]), 1, LARGEST_MULTIPLIER)


def _choose_multipliers(rows: _Rows, row_scales: Float64, *, all_of_them: bool = False) -> _Fit:
    """The best multiplier of each group: of the three nearest to the ideal scale, or of all."""
    nearest = _nearest_multipliers(rows, row_scales)
    best, smallest_error = nearest, np.full(nearest.shape, np.inf)
    for number in range(1, LARGEST_MULTIPLIER + 1) if all_of_them else (-1, 0, 1):
        offered = np.clip(number + (0 if all_of_them else nearest), 1, LARGEST_MULTIPLIER)
        offered = np.broadcast_to(offered, nearest.shape)
        scales = offered * row_scales[:, None]
        error = _squared_error(rows.values, scales, rows.importance, INT4)
        best = np.where(error < smallest_error, offered, best)
        smallest_error = np.minimum(error, smallest_error)
    return _Fit(row_scales, best, smallest_error.sum(-1))
