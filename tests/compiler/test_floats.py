"""Float formats against torch's conversions."""

from __future__ import annotations

import numpy as np
import pytest
import torch

from llamac.compiler import floats


def test_every_bfloat16_number_survives_the_round_trip() -> None:
    bits = np.arange(1 << 16, dtype=np.uint16)
    numbers = bits[~np.isnan(floats.from_bfloat16(bits))]
    assert np.array_equal(floats.to_bfloat16(floats.from_bfloat16(numbers)), numbers)


def test_rounding_to_bfloat16_equals_torch_on_random_bits_and_on_ties() -> None:
    random_bits = np.random.default_rng(0).integers(0, 1 << 32, 200_000, dtype=np.uint32)
    ties = (np.arange(1 << 16, dtype=np.uint32) << 16) | 0x8000
    values = np.concatenate([random_bits, ties]).view(np.float32)
    values = values[~np.isnan(values)]
    expected = torch.from_numpy(values).to(torch.bfloat16).view(torch.uint16).numpy()
    assert np.array_equal(floats.to_bfloat16(values), expected)


def test_nan_stays_nan_even_with_a_full_mantissa() -> None:
    values = np.array([0x7FFFFFFF, 0xFFFFFFFF, 0x7F800001], np.uint32).view(np.float32)
    assert np.isnan(floats.from_bfloat16(floats.to_bfloat16(values))).all()


def test_widen_reads_uint16_as_bfloat16_and_keeps_other_numbers() -> None:
    assert floats.widen(np.array([0x3FC0], np.uint16))[0] == 1.5
    assert floats.widen(np.array([-7], np.int8))[0] == -7.0
    assert floats.widen(np.array([0.1], np.float16)).dtype == np.float64


@pytest.mark.parametrize("dtype", ["float32", "float16", "bfloat16"])
def test_round_to_equals_storing_in_torch(dtype: str) -> None:
    values = np.random.default_rng(1).standard_normal(4096).astype(np.float32)
    stored = torch.from_numpy(values).to(getattr(torch, dtype)).to(torch.float32).numpy()
    assert np.array_equal(floats.round_to(values, dtype), stored)


def test_round_to_refuses_formats_that_hold_no_floats() -> None:
    with pytest.raises(ValueError, match="int8"):
        floats.round_to(np.zeros(1), "int8")
