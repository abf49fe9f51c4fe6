"""Error compensation: codes that make the error of a layer's outputs small, not of its weights.

Let D be the error of a row of weights and H = X^T X, the sum over the inputs X that were seen. The
row's outputs err by D H D^T in all. With H = U U^T and U upper triangular this is a sum of squares,
one per column:

    D H D^T = sum over k of (U[k,k] * D[k] + sum over i < k of D[i] * U[i,k])^2

Column k is the last one that can change its square, by its own error D[k]. So columns are taken in
order, and each code is the nearest to the weight plus what earlier errors ask of it:

    target[k] = w[k] + (sum over i < k of D[i] * U[i,k]) / U[k,k]

The codes are those of GPTQ (Frantar et al. 2022, arXiv:2210.17323), which spreads each error over
the weights still to come, by the Cholesky factor of the inverse of H. In this form H is not
inverted, and a whole block of columns gets what earlier blocks ask of it by one matrix product.
A layer of 2048 x 8192 takes 20 to 30 s on one core, and 0.7 GB beside H and the weight.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any, NamedTuple

import numpy as np
from numpy.typing import NDArray

from llamac.compiler.blas import single_threaded_blas
from llamac.compiler.checkpoint import FLOAT16_RANGE
from llamac.compiler.floats import widen
from llamac.compiler.quantize import GROUP_SIZE, INT4, Codes, CodeSpan, nearest_codes, quantize_int4
from llamac.compiler.requantize import (
    LARGEST_MULTIPLIER,
    LPBQ_GROUP,
    Lpbq,
    PerChannel,
    code_span,
    quantize_lpbq,
    quantize_per_channel,
    weights_of,
)
from llamac.runtime.errors import ValuesInvalid

Float64 = NDArray[np.float64]

DAMPING = 0.01

# Columns that are factorized, summed or measured by one matrix product.
_FACTOR_BLOCK = 256
# Rows are independent of each other; as many are compensated at once, for little memory.
_ROWS = 512
# Multipliers beside the one that was chosen for the uncompensated weights of a group.
_NEAR = np.array([0, -1, 1, -2, 2])
# Scales that a group is tried with, as multiples of the plain rule's; smaller ones clip.
_SCALE_TRIALS = np.array([1.0, 0.95, 0.9, 0.85, 0.8, 0.7, 1.05])


class HessianSum:
    """The sum X^T X over all inputs of a layer.

    Args:
        num_columns: K, the inputs of the layer.
    """

    def __init__(self, num_columns: int) -> None:
        self.num_inputs = 0
        self._sum = np.zeros((num_columns, num_columns))

    def add(self, x: NDArray[Any]) -> None:
        """Add inputs [T, K], float32 or float64.

        Raises:
            ValuesInvalid: an input is infinite or NaN.
            ValueError: another number of columns.
        """
        inputs = np.asarray(x, np.float64)
        if inputs.ndim != 2 or inputs.shape[1] != len(self._sum):
            raise ValueError(f"inputs must be [T, {len(self._sum)}], not {inputs.shape}")
        if not np.isfinite(inputs).all():
            raise ValuesInvalid(
                "Inputs of a layer are infinite or NaN.",
                cause="The model overflowed on the calibration text, or its weights are damaged.",
                fix="Run the model on that text first, and leave the text out if it fails.",
            )
        for columns in _blocks(len(self._sum), _FACTOR_BLOCK):
            rest = slice(columns.start, None)
            self._sum[columns, rest] += inputs[:, columns].T @ inputs[:, rest]
        self.num_inputs += len(inputs)

    def matrix(self) -> Float64:
        """The sum, [K, K] float64, symmetric. It is the accumulator itself: do not write to it."""
        for columns in _blocks(len(self._sum), _FACTOR_BLOCK):
            below = slice(columns.stop, None)
            self._sum[below, columns] = self._sum[columns, below].T
            corner = np.triu(self._sum[columns, columns])
            self._sum[columns, columns] = corner + np.triu(corner, 1).T
        return self._sum


@single_threaded_blas()
def compensate_per_channel(
    weight: NDArray[Any] | Codes,
    hessian: Float64,
    bits: int = 8,
    *,
    damping: float = DAMPING,
    by_activation: bool = False,
) -> PerChannel:
    """Quantize a layer per channel so that its outputs err little on the inputs that were seen.

    Scales are those of `quantize_per_channel` with the diagonal of H as importance.

    Args:
        weight: [N, K] float or bfloat16 bits, or codes with their scales.
        hessian: H = X^T X of the layer's inputs, [K, K] float64, as `HessianSum` gives it.
        bits: 8 or 4.
        damping: times the mean of H's diagonal, added to the diagonal; above 0.
        by_activation: take the columns with the largest inputs first, and not in order.

    Returns:
        Codes with, in every row, at most the output error D H D^T of the nearest codes.

    Raises:
        ValuesInvalid: weights or H are not finite, or H is no sum of squares.
        ValueError: H of another shape; other bits or damping.
    """
    span = code_span(bits)
    added = _check_hessian(hessian, weight, damping)
    start = quantize_per_channel(weight, bits, np.diagonal(hessian) + added)
    factor = _factorize(hessian, added, by_activation)
    for rows in _blocks(len(start.codes), _ROWS):
        part = PerChannel(start.codes[rows], start.scales[rows])
        done = _Compensation(_values(weight, rows), factor, span)
        for columns in _blocks(part.codes.shape[1], LPBQ_GROUP):
            done.round(columns, widen(part.scales)[None, :, None])
        _replace(part.codes, done.codes(), done.beats(part.dequantize()))
    return start


@single_threaded_blas()
def compensate_lpbq(
    weight: NDArray[Any] | Codes,
    hessian: Float64,
    *,
    damping: float = DAMPING,
    by_activation: bool = False,
) -> Lpbq:
    """Quantize a layer as LPBQ so that its outputs err little on the inputs that were seen.

    Row scales are those of `quantize_lpbq` with the diagonal of H as importance. A group whose
    turn comes takes, of five multipliers near the one chosen there, the one with which its columns
    add least to the output error; by activation, groups are not in one piece and keep theirs.

    Args:
        weight: [N, K] float or bfloat16 bits, or codes with their scales.
        hessian: H = X^T X of the layer's inputs, [K, K] float64, as `HessianSum` gives it.
        damping: times the mean of H's diagonal, added to the diagonal; above 0.
        by_activation: take the columns with the largest inputs first, and not in order.

    Returns:
        In every row at most the output error D H D^T of what `quantize_lpbq` gives.

    Raises:
        CoverageError: K is no multiple of 32.
        ValuesInvalid: weights or H are not finite, or H is no sum of squares.
        ValueError: H of another shape; other damping.
    """
    added = _check_hessian(hessian, weight, damping)
    start = quantize_lpbq(weight, np.diagonal(hessian) + added)
    factor = _factorize(hessian, added, by_activation)
    for rows in _blocks(len(start.codes), _ROWS):
        part = Lpbq(start.codes[rows], start.multipliers[rows], start.row_scales[rows])
        done = _Compensation(_values(weight, rows), factor, INT4)
        multipliers = _round_groups(done, part, factor.order if by_activation else None)
        is_better = done.beats(part.dequantize())
        _replace(part.codes, done.codes(), is_better)
        _replace(part.multipliers, multipliers, is_better)
    return start


@single_threaded_blas()
def compensate_int4(weight: NDArray[Any], hessian: Float64, *, damping: float = DAMPING) -> Codes:
    """Quantize a layer as int4 group-32 so that its outputs err little on the inputs seen.

    A group whose turn comes takes, of a few scales near that of `quantize_int4`, the one with
    which its columns add least to the output error. Scales are numbers that float16 holds, as
    bundles store them, so that what was compensated here is what runs.

    Args:
        weight: [N, K] float or bfloat16 bits.
        hessian: H = X^T X of the layer's inputs, [K, K] float64, as `HessianSum` gives it.
        damping: times the mean of H's diagonal, added to the diagonal; above 0.

    Returns:
        In every row at most the output error D H D^T of the plain rule with such scales.

    Raises:
        ValuesInvalid: weights or H are not finite, or H is no sum of squares.
        ValueError: H of another shape; other damping; K is no multiple of 32.
    """
    factor = _factorize(hessian, _check_hessian(hessian, weight, damping), by_activation=False)
    shape = len(weight), weight.shape[1] // GROUP_SIZE
    result = Codes(np.empty(weight.shape, np.int8), np.empty(shape, np.float32))
    for rows in _blocks(len(weight), _ROWS):
        values = _values(weight, rows)
        plain = _float16_scales(widen(quantize_int4(values).scales))
        done, scales = _Compensation(values, factor, INT4), plain.copy()
        for columns in _blocks(values.shape[1], GROUP_SIZE):
            group = columns.start // GROUP_SIZE
            trials = _float16_scales(plain[:, group] * _SCALE_TRIALS[:, None])
            best = done.round(columns, trials[..., None])
            scales[:, group] = np.take_along_axis(trials, best[None], axis=0)[0]
        codes = nearest_codes(values, np.repeat(plain, GROUP_SIZE, axis=1), INT4).astype(np.int8)
        is_better = done.beats(Codes(codes, plain.astype(np.float32)).dequantize().astype(float))
        result.codes[rows] = np.where(is_better[:, None], done.codes(), codes)
        result.scales[rows] = np.where(is_better[:, None], scales, plain)
    return result


def _float16_scales(scales: Float64) -> Float64:
    """Scales rounded to normal numbers of float16; those beyond its range stay as they are."""
    low, high = FLOAT16_RANGE
    rounded = np.clip(scales, low, high).astype(np.float16).astype(np.float64)
    return np.where((scales >= low) & (scales <= high), rounded, scales.astype(np.float32))


def _round_groups(
    done: _Compensation, part: Lpbq, order: NDArray[np.intp] | None
) -> NDArray[np.uint8]:
    """Round all columns, in another order if one is given; return the multipliers."""
    multipliers = part.multipliers.copy()
    row_scales = widen(part.row_scales)
    for columns in _blocks(part.codes.shape[1], LPBQ_GROUP):
        if order is not None:
            steps = multipliers[:, order[columns] // LPBQ_GROUP] * row_scales[:, None]
            done.round(columns, steps[None])
            continue
        group = columns.start // LPBQ_GROUP
        near = part.multipliers[:, group].astype(np.int64) + _NEAR[:, None]
        near = np.clip(near, 1, LARGEST_MULTIPLIER)
        chosen = done.round(columns, (near * row_scales)[..., None])
        multipliers[:, group] = np.take_along_axis(near, chosen[None], axis=0)[0]
    return multipliers


def _values(weight: NDArray[Any] | Codes, rows: slice) -> Float64:
    """Some rows of a weight: all of them at once would be large beside H and its factor."""
    if isinstance(weight, Codes):
        return weights_of(Codes(weight.codes[rows], weight.scales[rows]))
    return weights_of(weight[rows])


def _blocks(size: int, block: int) -> Iterator[slice]:
    for start in range(0, size, block):
        yield slice(start, min(start + block, size))


def _replace(target: NDArray[Any], source: NDArray[Any], rows: NDArray[np.bool_]) -> None:
    target[rows] = source[rows]


class _Factor(NamedTuple):
    """U of the damped H = U U^T.

    Attributes:
        upper: [K, K], rows and columns in `order`. Squares of `_FACTOR_BLOCK` on the
            diagonal are zero below it; what lies under those squares means nothing.
        order: [K], the columns of the weight in the order in which they are taken.
        added: what damping added to the diagonal of H.
    """

    upper: Float64
    order: NDArray[np.intp]
    added: float


def _check_hessian(hessian: Float64, weight: NDArray[Any] | Codes, damping: float) -> float:
    """Check H beside the weight; return what damping adds to its diagonal."""
    size = (weight.codes if isinstance(weight, Codes) else weight).shape[1]
    if hessian.shape != (size, size):
        raise ValueError(f"H must be [{size}, {size}], not {list(hessian.shape)}")
    if not 0 < damping < np.inf:
        raise ValueError(f"damping must be above 0, not {damping}")
    diagonal = np.diagonal(hessian)
    if not ((diagonal >= 0) & np.isfinite(diagonal)).all():
        found = f"{diagonal.min():g} to {diagonal.max():g}"
        raise _no_sum_of_squares(f"its diagonal has {found}")
    # Inputs that are all zero say nothing: every error counts the same.
    return damping * float(diagonal.mean()) or 1.0


def _factorize(hessian: Float64, added: float, by_activation: bool) -> _Factor:
    """Factorize the damped H, from the last block of columns to the first, in one copy of it."""
    size = len(hessian)
    order = np.arange(size)
    if by_activation:
        order = np.argsort(-np.diagonal(hessian), kind="stable")
    upper = hessian[np.ix_(order, order)] if by_activation else hessian.copy()
    upper.flat[:: size + 1] += added
    for columns in reversed(list(_blocks(size, _FACTOR_BLOCK))):
        later = slice(columns.stop, None)
        panel = upper[: columns.stop, columns]
        panel -= upper[: columns.stop, later] @ upper[columns, later].T
        corner = _factorize_corner(panel[columns])
        panel[columns] = corner
        panel[: columns.start] = np.linalg.solve(corner, panel[: columns.start].T).T
    return _Factor(upper, order, added)


def _factorize_corner(corner: Float64) -> Float64:
    """The upper triangular U with U U^T = corner: Cholesky's factor, from the other end."""
    try:
        lower = np.linalg.cholesky(corner[::-1, ::-1])
    except np.linalg.LinAlgError as error:
        raise _no_sum_of_squares("it is not positive definite, even damped") from error
    if not np.isfinite(lower).all():
        raise _no_sum_of_squares("it has numbers that are not finite")
    return np.asarray(lower[::-1, ::-1])


def _no_sum_of_squares(found: str) -> ValuesInvalid:
    return ValuesInvalid(
        f"The matrix H of a layer's inputs is no sum X^T X: {found}.",
        cause="Inputs overflowed while the model ran on the calibration text.",
        fix="Accumulate H in float64 from finite inputs (HessianSum), or raise the damping.",
    )


class _Compensation:
    """Rounds the columns of some rows, one after the other.

    Inside, arrays are [K, n] with the columns in the factor's order.

    Args:
        values: [n, K] weights, in their own order.
        factor: of the layer's H.
        span: the codes that there are.
    """

    def __init__(self, values: Float64, factor: _Factor, span: CodeSpan) -> None:
        self._factor, self._span = factor, span
        self._values = np.ascontiguousarray(values.T[factor.order])
        self._errors = np.zeros_like(self._values)
        self._codes = np.zeros(self._values.shape, np.int8)

    def codes(self) -> NDArray[np.int8]:
        """All codes, [n, K], in the order of the weight."""
        codes = np.empty_like(self._codes)
        codes[self._factor.order] = self._codes
        return codes.T

    def round(self, columns: slice, steps: Float64) -> NDArray[np.intp]:
        """Round the next columns with the best of some scales.

        Args:
            columns: places in the factor's order; all before them are done.
            steps: [trials, n, 1] or [trials, n, columns] scales.

        Returns:
            [n], the trial with the smallest output error, the first on ties.
        """
        upper = self._factor.upper[: columns.stop, columns]
        asked = upper[: columns.start].T @ self._errors[: columns.start]
        corner, values = upper[columns], self._values[columns]
        width = len(values)
        steps = np.broadcast_to(steps, (*steps.shape[:2], width))
        errors, codes = (np.empty((width, *steps.shape[:2])) for _ in range(2))
        cost = np.zeros(steps.shape[:2])
        for k in range(width):
            earlier = corner[:k, k] @ errors[:k].reshape(k, cost.size)
            pull = (asked[k] + earlier.reshape(cost.shape)) / corner[k, k]
            codes[k] = nearest_codes(values[k] + pull, steps[..., k], self._span)
            errors[k] = values[k] - codes[k] * steps[..., k]
            cost += np.square((errors[k] + pull) * corner[k, k])
        best = np.asarray(cost.argmin(0))
        self._errors[columns] = np.take_along_axis(errors, best[None, None], axis=1)[:, 0]
        self._codes[columns] = np.take_along_axis(codes, best[None, None], axis=1)[:, 0]
        return best

    def beats(self, other: Float64) -> NDArray[np.bool_]:
        """Tell, for each row, whether its outputs err less than with other weights [n, K]."""
        other_errors = self._values - other.T[self._factor.order]
        return self._output_error(self._errors) < self._output_error(other_errors)

    def _output_error(self, errors: Float64) -> Float64:
        """D H D^T of each row, without damping: [K, n] -> [n]."""
        upper = self._factor.upper
        total: Float64 = -self._factor.added * np.square(errors).sum(0)
        for columns in _blocks(len(errors), _FACTOR_BLOCK):
            before = slice(0, columns.start)
            term = upper[before, columns].T @ errors[before]
            term += upper[columns, columns].T @ errors[columns]
            total += np.square(term).sum(0)
        return total
