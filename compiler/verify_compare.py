"""How far a tensor is from its reference, and whether that is still right.

Three rules, one for each kind of result:

    equal      integers and copies: no difference at all
    close      float32 results: the difference, relative to the largest magnitude of the row
    rounded    results that were rounded to a coarse grid (codes, float16): some value that is close
               to the reference must round to them
"""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import Any

import numpy as np
from numpy.typing import ArrayLike, NDArray

from llamac.compiler import reference
from llamac.compiler.floats import to_float16
from llamac.compiler.reference import Float64

# Largest difference of a float result, relative to the largest magnitude of its row. Sums of 8192
# float32 products, four at a time (the worst that a kernel here does), stay below 5e-6.
TOLERANCE = 1e-5
# How far from a tie, in codes, a code may have been rounded the other way: values and a scale that
# are off by 2e-6 move a quotient of up to 255 by 0.001. How many codes do so is no measure: where a
# row of int8 codes with one scale is normed and quantized again, as by the first norm of a
# SpinQuant model, many quotients are exact ties.
CODE_SLACK = 1e-3
# A float32 sum of two terms may round by this much, relative to the sum.
SUM_ROUNDING = 2.0**-23
# Stands for equality (and, negated, for results that are no numbers), because JSON has no infinity.
EXACT_DB = 300.0
LARGEST = 1e30


@dataclass(frozen=True)
class Comparison:
    """One tensor beside its reference.

    Attributes:
        what: the tensor's part in the operation, "codes" or "result".
        sqnr_db: signal to noise in dB, EXACT_DB if equal.
        max_error: largest error, relative to the row's largest magnitude.
        limit: largest `max_error` that is right.
        worst: index of the element with the largest error.
        value: what is there.
        expected: what the reference has there.
        mismatched: integers that differ from the reference, those near ties included.
    """

    what: str
    sqnr_db: float
    max_error: float
    limit: float
    worst: tuple[int, ...]
    value: float
    expected: float
    mismatched: int = 0

    @property
    def passed(self) -> bool:
        """Whether the tensor is right."""
        return self.max_error <= self.limit

    def renamed(self, what: str) -> Comparison:
        """The same under another name."""
        return replace(self, what=what)

    def __str__(self) -> str:
        place = f"{self.what}{list(self.worst)}"
        text = f"{place} is {self.value:.9g}, expected {self.expected:.9g}"
        if self.mismatched:
            text += f", {self.mismatched} differ"
        error = f"error {self.max_error:.2g} of the row's largest magnitude"
        return f"{text} ({error}, allowed {self.limit:.2g}; SQNR {self.sqnr_db:.1f} dB)"


def sqnr(expected: ArrayLike, value: ArrayLike) -> float:
    """`reference.sqnr_db` within +-EXACT_DB."""
    return float(np.clip(reference.sqnr_db(expected, value), -EXACT_DB, EXACT_DB))


def compare_close(
    what: str,
    value: NDArray[Any],
    expected: Float64,
    *,
    scale: Float64 | None = None,
    slack: ArrayLike = 0.0,
    limit: float = TOLERANCE,
) -> Comparison:
    """Compare floats; the last axis is a row.

    Args:
        what: the tensor's part in the operation.
        value: the result, in the shape of `expected`.
        expected: the reference.
        scale: what errors are relative to, broadcast against `expected`; by default the largest
            magnitude of each row.
        slack: error that does not count, elementwise.
        limit: largest relative error that is right.
    """
    got = value.astype(np.float64)
    if scale is None:
        scale = np.abs(expected).max(-1, keepdims=True)
    error = np.maximum(np.abs(got - expected) - slack, 0.0)
    with np.errstate(divide="ignore", invalid="ignore"):
        relative = np.where(error == 0, 0.0, error / scale)
    relative = np.nan_to_num(relative, nan=LARGEST, posinf=LARGEST)
    worst = tuple(map(int, np.unravel_index(int(np.argmax(relative)), relative.shape)))
    return Comparison(
        what,
        sqnr(expected, got),
        float(relative[worst]),
        limit,
        worst,
        float(got[worst]),
        float(expected[worst]),
    )


def compare_noise(what: str, value: NDArray[Any], expected: Float64, least_db: float) -> Comparison:
    """Compare a whole tensor: its noise against its signal, which must be at least `least_db`."""
    got = value.astype(np.float64)
    decibels = sqnr(expected, got)
    difference = np.nan_to_num(np.abs(got - expected), nan=LARGEST)
    worst = np.unravel_index(int(np.argmax(difference)), difference.shape)
    return Comparison(
        what=what,
        sqnr_db=decibels,
        max_error=float(10 ** (-decibels / 20)),
        limit=float(10 ** (-least_db / 20)),
        worst=tuple(int(i) for i in worst),
        value=float(got[worst]),
        expected=float(expected[worst]),
    )


def compare_equal(what: str, value: NDArray[Any], expected: NDArray[Any]) -> Comparison:
    """Compare what must be equal bit for bit: integers, copies, exact products."""
    result = compare_close(what, value, expected.astype(np.float64), limit=0.0)
    return replace(result, mismatched=int(np.count_nonzero(value != expected)))


def compare_float16(what: str, value: NDArray[np.float16], expected: Float64) -> Comparison:
    """Compare float16 with values that are known to TOLERANCE of their row."""
    margin = TOLERANCE * np.abs(expected).max(-1, keepdims=True)
    low, high = to_float16(expected - margin), to_float16(expected + margin)
    is_right = (low <= value) & (value <= high)
    nearest = np.where(is_right, value, to_float16(expected)).astype(np.float64)
    result = compare_close(what, value, nearest, limit=0.0)
    return replace(result, sqnr_db=sqnr(expected, value))


def compare_codes(
    codes: NDArray[np.int8],
    qparams: NDArray[np.float32],
    values: ArrayLike,
    rule: str,
    *,
    exact: bool,
) -> list[Comparison]:
    """Compare quantized activations with what a rule makes of `values`.

    Args:
        codes: [..., K] int8.
        qparams: [..., 2] float32, scale and zero point.
        values: [..., K]; float32 if `exact`, else known to TOLERANCE of the row.
        rule: a key of `reference.RULES`.
        exact: everything must be equal bit for bit; otherwise codes and zero points may be rounded
            the other way near ties.
    """
    expected = reference.RULES[rule](values)
    scale, zero = qparams[..., 0], qparams[..., 1]
    if exact:
        return [
            compare_equal("scale", scale, expected.scale),
            compare_equal("zero point", zero, expected.zero_point),
            compare_equal("codes", codes, expected.codes),
        ]
    zero_error = np.abs(zero - expected.zero_point)
    nearest_zero = np.where(zero_error <= 1, zero, expected.zero_point).astype(np.float64)
    return [
        compare_close("scale", scale[..., None], expected.scale[..., None].astype(np.float64)),
        compare_close("zero point", zero, nearest_zero, limit=0.0),
        _compare_near_ties(codes, zero, np.asarray(values, np.float64), expected),
    ]


def _compare_near_ties(
    codes: NDArray[np.int8], zero: NDArray[Any], values: Float64, expected: reference.Quantized
) -> Comparison:
    """Compare codes without their zero point; max_error is the distance beyond half a code."""
    zeros = zero.astype(np.float64)[..., None]
    got = codes - zeros
    quotients = values / expected.scale.astype(np.float64)[..., None]
    distance = np.abs(got - np.clip(quotients, -128 - zeros, 127 - zeros))
    beyond = np.nan_to_num(np.maximum(distance - 0.5, 0.0), nan=LARGEST) / 255
    worst = tuple(map(int, np.unravel_index(int(np.argmax(beyond)), beyond.shape)))
    nearest = expected.centred()
    # A zero point that was rounded the other way moves the end at which codes are clipped.
    flipped = int(np.count_nonzero(got != np.clip(nearest, -128 - zeros, 127 - zeros)))
    return Comparison(
        "codes",
        sqnr(nearest, got),
        float(beyond[worst]),
        CODE_SLACK / 255,
        worst,
        float(got[worst]),
        float(quotients[worst]),
        flipped,
    )
