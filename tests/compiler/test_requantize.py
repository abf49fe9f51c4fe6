"""Weights per channel and as LPBQ: never worse than the plain rules, lossless where they can be."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from hypothesis.extra import numpy as hnp
from numpy.typing import NDArray

from llamac.compiler.floats import from_bfloat16, to_bfloat16
from llamac.compiler.quantize import Codes, quantize_int4, quantize_int8
from llamac.compiler.reference import sqnr_db
from llamac.compiler.requantize import (
    Lpbq,
    PerChannel,
    quantize_lpbq,
    quantize_per_channel,
    weights_of,
)
from llamac.runtime.errors import CoverageError, LlamacError, ValuesInvalid

Quantize = Callable[..., PerChannel | Lpbq]
Float64 = NDArray[np.float64]

SPANS = {4: (-8, 7), 8: (-127, 127)}
RULES: list[Quantize] = [
    lambda w, **more: quantize_per_channel(w, 8, **more),
    lambda w, **more: quantize_per_channel(w, 4, **more),
    quantize_lpbq,
]


def normal(*shape: int, seed: int = 0) -> Float64:
    return np.random.default_rng(seed).standard_normal(shape)


def row_errors(weight: Float64, found: Float64, importance: Float64 | float = 1.0) -> Float64:
    error: Float64 = (np.square(weight - found) * importance).sum(-1)
    return error


def plain_per_channel(weight: Float64, bits: int) -> Float64:
    """What rounding to nearest gives when the largest magnitude becomes the largest code."""
    if bits == 8:
        return quantize_int8(weight).dequantize().astype(np.float64)
    return quantize_int4(weight, weight.shape[1]).dequantize().astype(np.float64)


def plain_lpbq(weight: Float64) -> Float64:
    """The same for LPBQ: the largest group of a row has multiplier 16, others the next above."""
    groups = weight.reshape(len(weight), -1, 32)
    wanted = np.abs(groups).max(-1) / 7.5
    row_scales = wanted.max(-1, keepdims=True) / 16
    scales = (np.clip(np.ceil(wanted / row_scales), 1, 16) * row_scales)[..., None]
    codes = np.clip(np.rint(groups / scales), -8, 7)
    return np.asarray((codes * scales).reshape(weight.shape))


def lpbq_weights(seed: int, rows: int = 24, groups: int = 6) -> Lpbq:
    """Random weights in the scheme; every row has a group with a code of -8."""
    rng = np.random.default_rng(seed)
    codes = rng.integers(-8, 8, (rows, groups * 32)).astype(np.int8)
    codes[:, ::32] = -8
    multipliers = rng.integers(1, 17, (rows, groups)).astype(np.uint8)
    return Lpbq(codes, multipliers, rng.uniform(1e-4, 1e-2, rows).astype(np.float32))


@pytest.mark.parametrize("bits", [4, 8])
def test_per_channel_has_the_promised_form(bits: int) -> None:
    weight = normal(40, 96)
    found = quantize_per_channel(weight, bits)
    low, high = SPANS[bits]
    assert found.codes.dtype == np.int8 and found.codes.shape == weight.shape
    assert found.scales.dtype == np.float32 and found.scales.shape == (40,)
    assert low <= found.codes.min() and found.codes.max() == high
    values = found.dequantize()
    assert values.dtype == np.float64
    np.testing.assert_array_equal(values[3], found.codes[3] * np.float64(found.scales[3]))
    inside = (found.codes > low) & (found.codes < high)
    error = np.abs(values - weight) / found.scales[:, None]
    assert error[inside].max() <= 0.5 + 1e-6


def test_lpbq_has_the_promised_form() -> None:
    weight = normal(40, 96) * np.repeat(np.random.default_rng(1).uniform(0.05, 1, (40, 3)), 32, 1)
    found = quantize_lpbq(weight)
    assert found.codes.dtype == np.int8 and found.codes.shape == weight.shape
    assert found.multipliers.dtype == np.uint8 and found.multipliers.shape == (40, 3)
    assert found.row_scales.dtype == np.float32 and found.row_scales.shape == (40,)
    assert found.codes.min() == -8 and found.codes.max() == 7
    assert found.multipliers.min() >= 1 and found.multipliers.max() == 16
    values = found.dequantize()
    assert values.dtype == np.float64
    scale = found.multipliers[7, 1] * np.float64(found.row_scales[7])
    np.testing.assert_array_equal(values[7, 32:64], found.codes[7, 32:64] * scale)
    np.testing.assert_array_equal(found.group_scales()[7, 1], scale)


rows_2d = hnp.arrays(
    np.float32,
    st.tuples(st.integers(1, 3), st.sampled_from([32, 96])),
    elements=st.floats(-1e4, 1e4, width=32),
)


@given(rows_2d)
def test_per_channel_is_never_worse_than_the_plain_rule(weight: NDArray[np.float32]) -> None:
    values = weight.astype(np.float64)
    for bits in (4, 8):
        found = row_errors(values, quantize_per_channel(weight, bits).dequantize())
        plain = row_errors(values, plain_per_channel(values, bits))
        # Both round scales to float32, one before and one after it chose the codes.
        slack = 1e-6 * np.square(values).sum(-1)
        assert (found <= plain * (1 + 1e-5) + slack).all()


@pytest.mark.parametrize("seed", [0, 1])
def test_the_searched_scales_are_better_than_the_plain_ones(seed: int) -> None:
    weight = normal(64, 256, seed=seed)
    for bits, gain_db in ((4, 1.0), (8, 0.05)):
        plain = sqnr_db(weight, plain_per_channel(weight, bits))
        assert sqnr_db(weight, quantize_per_channel(weight, bits).dequantize()) > plain + gain_db
    found = quantize_lpbq(weight)
    assert sqnr_db(weight, found.dequantize()) > sqnr_db(weight, plain_lpbq(weight)) + 0.5
    assert (row_errors(weight, found.dequantize()) < row_errors(weight, plain_lpbq(weight))).all()


@pytest.mark.parametrize("quantize", RULES)
def test_importance_moves_the_error_to_columns_that_matter_less(quantize: Quantize) -> None:
    weight = np.random.default_rng(2).standard_t(3, (64, 128))
    importance = np.exp(normal(128, seed=3) * 2)
    aware = row_errors(weight, quantize(weight, importance=importance).dequantize(), importance)
    blind = row_errors(weight, quantize(weight).dequantize(), importance)
    assert aware.sum() < 0.97 * blind.sum()


@pytest.mark.parametrize("bits", [4, 8])
def test_without_any_importance_the_plain_rule_is_left(bits: int) -> None:
    weight = normal(8, 64)
    found = quantize_per_channel(weight, bits, importance=np.zeros(64))
    plain = np.abs(weight).max(-1) / (7.5 if bits == 4 else 127)
    np.testing.assert_allclose(found.scales, plain, rtol=1e-6)


@pytest.mark.parametrize("seed", range(4))
def test_weights_that_are_lpbq_already_keep_their_values(seed: int) -> None:
    known = lpbq_weights(seed)
    weight = known.dequantize()
    np.testing.assert_array_equal(quantize_lpbq(weight).dequantize(), weight)
    scales = known.group_scales().astype(np.float32)
    stored = Codes(known.codes, scales)
    found = quantize_lpbq(stored)
    np.testing.assert_array_equal(found.codes, known.codes)
    np.testing.assert_allclose(found.dequantize(), weights_of(stored), rtol=1e-6)


def test_lpbq_of_given_scales_finds_groups_without_large_codes() -> None:
    # From the weights alone nobody can see that the scale of codes -1..1 is not their magnitude.
    known = lpbq_weights(7)
    small = Codes(np.clip(known.codes, -1, 1), known.group_scales().astype(np.float32))
    np.testing.assert_allclose(quantize_lpbq(small).dequantize(), weights_of(small), rtol=1e-6)


@pytest.mark.parametrize("bits", [4, 8])
def test_weights_that_are_codes_per_row_already_keep_their_values(bits: int) -> None:
    rng = np.random.default_rng(4)
    low, high = SPANS[bits]
    codes = rng.integers(low, high + 1, (16, 64))
    codes[:, 9] = high if bits == 8 else low
    scales = rng.uniform(1e-4, 1e-2, 16).astype(np.float32)
    weight = codes * scales.astype(np.float64)[:, None]
    found = quantize_per_channel(weight, bits)
    np.testing.assert_array_equal(found.dequantize(), weight)
    np.testing.assert_array_equal(found.scales, scales)


def test_int4_weights_keep_nearly_all_codes() -> None:
    stored = quantize_int4(normal(64, 512))
    found = quantize_lpbq(stored)
    assert (found.codes == stored.codes).mean() > 0.99
    assert np.abs(found.codes.astype(int) - stored.codes).max() <= 1
    weight = weights_of(stored)
    assert sqnr_db(weight, found.dequantize()) > 30 > sqnr_db(weight, plain_lpbq(weight)) + 3


def test_all_forms_of_a_weight_mean_the_same() -> None:
    stored = quantize_int4(normal(8, 128), group=64)
    dense = weights_of(stored)
    second = stored.scales[:, 1:].astype(np.float64)
    np.testing.assert_array_equal(dense[:, 64:], stored.codes[:, 64:] * second)
    np.testing.assert_array_equal(quantize_lpbq(stored).codes, quantize_lpbq(dense).codes)
    bits = to_bfloat16(normal(8, 128).astype(np.float32))
    np.testing.assert_array_equal(weights_of(bits), from_bfloat16(bits))
    per_row = quantize_per_channel(bits)
    np.testing.assert_array_equal(per_row.codes, quantize_per_channel(from_bfloat16(bits)).codes)


@pytest.mark.parametrize("quantize", RULES)
def test_rows_and_groups_of_zeros_stay_zero(quantize: Quantize) -> None:
    weight = normal(5, 96)
    weight[2], weight[3, 32:64], weight[4, 1:] = 0, 0, 0
    found = quantize(weight)
    values = found.dequantize()
    assert not values[2].any() and not values[3, 32:64].any()
    assert not values[4, 1:].any() and values[4, 0] == pytest.approx(weight[4, 0], rel=1e-6)
    if isinstance(found, Lpbq):
        assert found.row_scales[2] == 1
        assert (found.multipliers[2] == 1).all() and found.multipliers[3, 1] == 1
    else:
        assert found.scales[2] == 1


@pytest.mark.parametrize("quantize", RULES)
@pytest.mark.parametrize("huge", [1e4, -1e4, 3.0e38, -3.0e38])
def test_one_huge_value_is_kept_and_harms_its_own_row_only(quantize: Quantize, huge: float) -> None:
    weight = normal(3, 64)
    alone = quantize(weight).dequantize()
    weight[1, 40] = huge
    values = quantize(weight).dequantize()
    assert values[1, 40] == pytest.approx(huge, rel=1e-3)
    np.testing.assert_array_equal(values[[0, 2]], alone[[0, 2]])


def test_lpbq_spares_the_groups_beside_one_huge_value() -> None:
    weight = normal(1, 64)
    weight[0, 40] = 30.0
    error = np.abs(quantize_lpbq(weight).dequantize() - weight)
    assert error[0, :32].max() < 0.35 < error[0, 32:].max()


@pytest.mark.parametrize("quantize", RULES)
def test_numbers_below_float32_become_zero_or_stay_finite(quantize: Quantize) -> None:
    weight = normal(2, 32) * 1e-42
    values = quantize(weight).dequantize()
    assert np.isfinite(values).all() and np.abs(values).max() < 1e-38


@pytest.mark.parametrize("quantize", RULES)
def test_blocks_of_rows_are_independent(quantize: Quantize) -> None:
    weight = normal(700, 128)
    whole = quantize(weight).dequantize()
    np.testing.assert_array_equal(quantize(weight[511:515]).dequantize(), whole[511:515])


@pytest.mark.parametrize("columns", [1, 31, 33, 176])
def test_lpbq_refuses_widths_without_whole_groups(
    columns: int, check_advice: Callable[[LlamacError], None]
) -> None:
    with pytest.raises(CoverageError, match=f"{columns} columns") as caught:
        quantize_lpbq(normal(2, columns))
    check_advice(caught.value)
    assert quantize_per_channel(normal(2, columns)).codes.shape == (2, columns)


@pytest.mark.parametrize("quantize", RULES)
@pytest.mark.parametrize("bad", [np.nan, np.inf, -np.inf, 1e39])
def test_weights_that_float32_cannot_hold_are_refused(
    quantize: Quantize, bad: float, check_advice: Callable[[LlamacError], None]
) -> None:
    weight = normal(4, 32)
    weight[3, 30] = bad
    with pytest.raises(ValuesInvalid, match=r"nan|inf|1e\+39") as caught:
        quantize(weight)
    check_advice(caught.value)


@pytest.mark.parametrize(
    "importance", [np.ones(31), np.ones((1, 32)), -np.ones(32), np.full(32, np.nan)]
)
@pytest.mark.parametrize("quantize", RULES)
def test_wrong_importance_is_refused(quantize: Quantize, importance: NDArray[Any]) -> None:
    with pytest.raises(ValueError, match="32 numbers"):
        quantize(normal(2, 32), importance=importance)


@pytest.mark.parametrize("bits", [2, 3, 16])
def test_other_widths_of_codes_are_refused(bits: int) -> None:
    with pytest.raises(ValueError, match=f"not {bits}"):
        quantize_per_channel(normal(2, 32), bits)
