"""Checks of values that every front end shares."""

from __future__ import annotations

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from llamac.compiler.checkpoint import (
    check_finite,
    check_int4,
    check_scales,
    check_scales_fit_float16,
    same_values,
)
from llamac.compiler.floats import from_bfloat16
from llamac.runtime.errors import (
    ValuesInvalid,
)


@pytest.mark.parametrize("value", [6.0e-5, 65505.0, 1e-30, 1e30])
def test_scales_outside_float16_advise_bfloat16(value: float) -> None:
    scales = np.array([0.01, value], np.float32)
    check_scales("w.scales", scales)
    with pytest.raises(ValuesInvalid, match=r"w\.scales") as caught:
        check_scales_fit_float16("w.scales", scales)
    assert "bfloat16" in caught.value.fix


def test_scales_at_the_ends_of_float16_pass() -> None:
    check_scales_fit_float16("w", np.array([2.0**-14, 65504.0], np.float32))


@given(st.lists(st.floats(width=32), min_size=1))
def test_scales_pass_exactly_when_finite_and_positive(values: list[float]) -> None:
    good = all(0 < value < float("inf") for value in values)
    try:
        check_scales("w", np.array(values, np.float32))
    except ValuesInvalid:
        assert not good
    else:
        assert good


@given(st.lists(st.integers(-128, 127)))
def test_int4_codes_pass_exactly_when_in_range(values: list[int]) -> None:
    good = all(-8 <= value <= 7 for value in values)
    try:
        check_int4("w", np.array(values, np.int8))
    except ValuesInvalid:
        assert not good
    else:
        assert good


def test_finite_check_knows_every_bfloat16() -> None:
    bits = np.arange(1 << 16, dtype=np.uint16)
    finite = np.isfinite(from_bfloat16(bits))
    check_finite("w", bits[finite])
    with pytest.raises(ValuesInvalid, match="256 infinite or NaN"):
        check_finite("w", bits)
    assert (~finite).sum() == 256


def test_comparison_goes_past_the_first_block() -> None:
    left = np.zeros((3 << 20, 4), np.int8)
    right = left.copy()
    assert same_values(left, right)
    right[-1, -1] = 1
    assert not same_values(left, right)
    assert not same_values(left, left[:-1])
    assert not same_values(left, left.view(np.uint8))
