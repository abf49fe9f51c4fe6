"""What is still right and what is not: the comparisons and the thresholds of verification."""

from __future__ import annotations

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from llamac.compiler import reference
from llamac.compiler.verify_compare import (
    EXACT_DB,
    TOLERANCE,
    Comparison,
    compare_close,
    compare_codes,
    compare_equal,
    compare_float16,
)
from llamac.compiler.verify_text import TextResult, _Tally

RNG = np.random.default_rng(3)
ROWS = RNG.standard_normal((4, 64))


def codes_of(
    values: np.ndarray, *, exact: bool, change: dict[tuple[int, int], int] | None = None
) -> dict[str, Comparison]:
    """Compare the codes of float32 `values` with those of the float64 ones, after a change."""
    quantized = reference.quantize_per_token(values)
    codes = quantized.codes.copy()
    for place, by in (change or {}).items():
        codes[place] += by
    qparams = np.stack([quantized.scale, quantized.zero_point.astype(np.float32)], axis=-1)
    inputs = values.astype(np.float32) if exact else values
    return {c.what: c for c in compare_codes(codes, qparams, inputs, "torchao", exact=exact)}


def test_equal_floats_pass_with_the_highest_ratio() -> None:
    comparison = compare_close("y", ROWS.astype(np.float32), ROWS.astype(np.float32).astype(float))
    assert (comparison.passed, comparison.sqnr_db, comparison.max_error) == (True, EXACT_DB, 0.0)


@pytest.mark.parametrize(("factor", "passes"), [(0.9, True), (1.1, False)])
def test_errors_are_relative_to_the_row(factor: float, passes: bool) -> None:
    expected = np.array([[1.0, 0.0, 0.0], [0.0, 1000.0, 0.0]])
    value = expected.copy()
    value[0, 2] = factor * TOLERANCE
    comparison = compare_close("y", value, expected)
    assert comparison.passed is passes
    assert comparison.worst == (0, 2)
    value[0, 2], value[1, 2] = 0.0, factor * TOLERANCE * 1000
    assert compare_close("y", value, expected).passed is passes


@pytest.mark.parametrize("bad", [np.nan, np.inf, -np.inf])
def test_what_is_no_number_fails_where_it_stands(bad: float) -> None:
    value = ROWS.copy()
    value[2, 7] = bad
    comparison = compare_close("y", value, ROWS)
    assert not comparison.passed
    assert comparison.worst == (2, 7)
    assert comparison.sqnr_db == -EXACT_DB
    assert np.isfinite(comparison.max_error)
    assert "y[2, 7] is" in str(comparison)


def test_a_row_of_zeros_must_stay_zero() -> None:
    assert compare_close("y", np.zeros((1, 4)), np.zeros((1, 4))).passed
    assert not compare_close("y", np.full((1, 4), 1e-30), np.zeros((1, 4))).passed


def test_equality_counts_what_differs() -> None:
    comparison = compare_equal("codes", np.array([1, 2, 4, 5]), np.array([1, 2, 3, 4]))
    assert (comparison.passed, comparison.mismatched) == (False, 2)
    assert compare_equal("codes", np.array([-128]), np.array([-128])).passed


def test_codes_of_given_floats_must_be_equal() -> None:
    assert all(c.passed for c in codes_of(ROWS, exact=True).values())
    changed = codes_of(ROWS, exact=True, change={(1, 3): 1})
    assert [what for what, c in changed.items() if not c.passed] == ["codes"]
    assert (changed["codes"].worst, changed["codes"].mismatched) == ((1, 3), 1)


def test_codes_of_floats_that_are_almost_known_may_differ_only_near_ties() -> None:
    row = np.array([[-1.0, 1.0, 0.0, 0.0]])
    step = 2 / 255
    tie, no_tie = 20.5 * step, 20.48 * step
    row[0, 2:] = tie, no_tie
    assert all(c.passed for c in codes_of(row, exact=False).values())
    at_tie = [codes_of(row, exact=False, change={(0, 2): by})["codes"] for by in (1, -1)]
    assert sorted(c.passed for c in at_tie) == [False, True]  # one side is right, two off is not
    assert [c.mismatched for c in at_tie] == [1, 1]
    assert not codes_of(row, exact=False, change={(0, 3): 1})["codes"].passed


@given(st.integers(0, 2**32 - 1), st.sampled_from([1e-6, 1.0, 1e4]))
def test_codes_of_float32_roundings_always_pass(seed: int, size: float) -> None:
    """A kernel that rounds its floats once more than the reference is right."""
    values = size * np.random.default_rng(seed).standard_normal((2, 32))
    noisy = values * (1 + 2e-7 * np.random.default_rng(seed + 1).choice([-1, 1], values.shape))
    quantized = reference.quantize_per_token(noisy)
    qparams = np.stack([quantized.scale, quantized.zero_point.astype(np.float32)], axis=-1)
    assert all(
        c.passed for c in compare_codes(quantized.codes, qparams, values, "torchao", exact=False)
    )


def test_a_scale_or_zero_point_that_is_off_fails() -> None:
    quantized = reference.quantize_per_token(ROWS)
    zero = quantized.zero_point.astype(np.float32)
    for scale, zeros, guilty in (
        (quantized.scale * np.float32(1.001), zero, "scale"),
        (quantized.scale, zero + 2, "zero point"),
        (quantized.scale, zero + 1, "codes"),  # every code is off by one then
    ):
        qparams = np.stack([scale, zeros], axis=-1)
        parts = compare_codes(quantized.codes, qparams, ROWS, "torchao", exact=False)
        assert guilty in [c.what for c in parts if not c.passed]


def test_float16_must_be_the_rounding_of_something_close() -> None:
    stored = ROWS.astype(np.float16)
    assert compare_float16("k", stored, ROWS).passed
    assert compare_float16("k", (ROWS * (1 + 1e-7)).astype(np.float16), ROWS).passed
    above = np.nextafter(stored, np.float16(np.inf))
    comparison = compare_float16("k", above, ROWS)
    assert not comparison.passed
    assert 60 < comparison.sqnr_db < 75


# -- whole texts ---------------------------------------------------------------------------------


def tally(difference: np.ndarray, *, is_float: bool = False) -> TextResult:
    """The result for logits that differ by `difference` from 20 rows of random ones."""
    expected = np.random.default_rng(8).standard_normal(difference.shape) * 3
    sums = _Tally()
    for i, row in enumerate(expected):
        likely = int(np.argmax(row))
        sums.add(row, (row + difference[i]).astype(np.float32), likely)
    return sums.result(len(expected), is_float)


def noise(deviation: float) -> np.ndarray:
    return deviation * np.random.default_rng(9).standard_normal((20, 100))


def test_the_drift_of_two_right_implementations_passes() -> None:
    result = tally(noise(0.1))
    assert result.failure == ""
    assert 25 < result.sqnr_db < 35
    assert 0.2 < result.largest_difference < 1


def test_a_float_model_may_drift_less() -> None:
    assert "15.0 dB" not in tally(noise(0.1)).failure
    assert "at least 40 dB" in tally(noise(0.1), is_float=True).failure
    assert tally(noise(1e-3), is_float=True).failure == ""


def test_logits_of_another_model_fail() -> None:
    result = tally(noise(3.0))
    assert result.failure
    assert result.agreement < 0.9


def test_a_constant_added_to_all_logits_changes_nothing() -> None:
    result = tally(np.full((20, 100), 5.0))
    assert result.failure == ""
    assert result.sqnr_db > 100


def test_likelihoods_that_differ_fail_and_say_both() -> None:
    right = tally(noise(0.0))
    wrong = TextResult(**(right.to_json() | {"nll_library": right.nll_reference + 0.3}))
    assert "negative log likelihood of 20 tokens" in wrong.failure
    nan = TextResult(**(right.to_json() | {"nll_library": float("nan")}))
    assert nan.failure


def test_disagreements_count_unless_they_are_near_ties() -> None:
    base = tally(noise(0.0)).to_json() | {"agreement": 0.6}
    assert TextResult(**(base | {"widest_disagreement": 0.2})).failure == ""
    far = TextResult(**(base | {"widest_disagreement": 2.0}))
    assert "60 % of the next tokens agree" in far.failure
