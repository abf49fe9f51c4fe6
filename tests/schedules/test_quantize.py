"""The quantize kernel makes exactly the codes of the reference."""

from __future__ import annotations

import numpy as np
import pytest

from llamac.compiler import reference
from llamac.schedules import quantize
from llamac.targets.cpu import packing

CANARY = 0x5A  # what outputs hold before a call
SHAPES = [(1, 32), (1, 64), (1, 2048), (8, 8192), (3, 96)]


def assert_quantized(outputs, x):
    """Codes, parameters and offsets, if any, all equal the reference's for the rows `x`."""
    codes, qparams, *offsets = outputs
    expected = reference.quantize_per_token(x)
    codes = codes if offsets else packing.unpair_codes(codes, len(x))
    np.testing.assert_array_equal(codes, expected.codes)
    np.testing.assert_array_equal(qparams[:, 0], expected.scale)
    np.testing.assert_array_equal(qparams[:, 1], expected.zero_point)
    if offsets:
        np.testing.assert_array_equal(offsets[0], -8 * reference.group_sums(expected.codes, 32))


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


def test_a_call_writes_only_its_rows(check_row_ranges, x86_isa):
    x = np.random.default_rng(2).normal(size=(5, 64)).astype(np.float32)
    check_row_ranges(make(x, x86_isa), x86_isa, x)


def test_a_call_writes_only_its_tokens_of_a_panel(run_kernel, arm_isa):
    """Two tokens share each vector of 16 bytes; a call for one leaves the other's alone."""
    x = np.random.default_rng(2).normal(size=(19, 64)).astype(np.float32)
    whole = packing.unpair_codes(run_kernel(make(x, arm_isa), arm_isa, x)[0], 32)
    for begin, end in ((0, 0), (0, 1), (1, 18), (18, 19)):
        part = run_kernel(make(x, arm_isa), arm_isa, x, begin=begin, end=end)[0]
        rows = packing.unpair_codes(part, 32)
        np.testing.assert_array_equal(rows[begin:end], whole[begin:end])
        assert (np.delete(rows, np.s_[begin:end], axis=0) == CANARY).all()


def test_pairing_is_undone():
    codes = np.random.default_rng(3).integers(-128, 128, (37, 96)).astype(np.int8)
    np.testing.assert_array_equal(packing.unpair_codes(packing.pair_codes(codes), 37), codes)


def test_rows_must_be_whole_groups(any_isa):
    assert quantize.valid(quantize.QuantizeShape(1, 96), any_isa, {})
    assert not quantize.valid(quantize.QuantizeShape(1, 40), any_isa, {})
