"""The quantize kernel makes exactly the codes of the reference."""

from __future__ import annotations

import numpy as np
import pytest

from llamac.compiler import reference
from llamac.schedules import quantize

SHAPES = [(1, 32), (1, 64), (1, 2048), (8, 8192), (3, 96)]


def assert_quantized(outputs, x):
    """Codes, parameters and offsets all equal the reference's for the rows `x`."""
    codes, qparams, offsets = outputs
    expected = reference.quantize_per_token(x)
    np.testing.assert_array_equal(codes, expected.codes)
    np.testing.assert_array_equal(qparams[:, 0], expected.scale)
    np.testing.assert_array_equal(qparams[:, 1], expected.zero_point)
    np.testing.assert_array_equal(offsets, -8 * reference.group_sums(expected.codes, 32))


def make(x, isa):
    return quantize.make(quantize.QuantizeShape(*x.shape), isa)


@pytest.mark.parametrize("shape", SHAPES, ids=str)
@pytest.mark.parametrize("spread", [1e-9, 1.0, 1e4])
def test_codes_of_random_rows(run_kernel, isa, shape, spread):
    x = (np.random.default_rng(1).standard_t(3, shape) * spread).astype(np.float32)
    assert_quantized(run_kernel(make(x, isa), isa, x), x)


def test_rows_of_one_sign_zeros_and_ties(run_kernel, isa):
    """Rows whose range must be widened to 0, the all-zero row, and values halfway between codes."""
    ramp = np.arange(256, dtype=np.float32)
    halves = (ramp - 128) / 2 + 0.25
    halves[:2] = -64.0, 63.5  # the scale is then exactly 0.5 and every other value is a tie
    x = np.stack([ramp + 3, -ramp - 3, ramp * 0, -ramp * 0, halves])
    assert_quantized(run_kernel(make(x, isa), isa, x), x)
    assert (reference.quantize_per_token(x[2]).codes == -128).all()


def test_a_call_writes_only_its_rows(check_row_ranges, isa):
    x = np.random.default_rng(2).normal(size=(5, 64)).astype(np.float32)
    check_row_ranges(make(x, isa), isa, x)


def test_rows_must_be_whole_groups(any_isa):
    assert quantize.valid(quantize.QuantizeShape(1, 96), any_isa, {})
    assert not quantize.valid(quantize.QuantizeShape(1, 40), any_isa, {})
