"""The quantize kernel makes exactly the codes of the reference."""

from __future__ import annotations

import numpy as np
import pytest

from llamac.compiler import reference
from llamac.schedules import quantize
from llamac.targets.cpu import packing

CANARY = 0x5A  # what outputs hold before a call
SHAPES = [(1, 32), (1, 64), (1, 2048), (8, 8192), (3, 96)]


def make(x, isa):
    return quantize.make(quantize.QuantizeShape(*x.shape), isa)


@pytest.mark.parametrize("shape", SHAPES, ids=str)
@pytest.mark.parametrize("spread", [1e-9, 1.0, 1e4])
def test_codes_of_random_rows(run_kernel, assert_quantized, each_isa, shape, spread):
    x = (np.random.default_rng(1).standard_t(3, shape) * spread).astype(np.float32)
    assert_quantized(each_isa, run_kernel(make(x, each_isa), each_isa, x), x)


def test_rows_of_one_sign_zeros_and_ties(run_kernel, assert_quantized, isa):
    """Rows whose range must be widened to 0, the all-zero row, and values halfway between codes."""
    ramp = np.arange(256, dtype=np.float32)
    halves = (ramp - 128) / 2 + 0.25
    halves[:2] = -64.0, 63.5  # the scale is then exactly 0.5 and every other value is a tie
    x = np.stack([ramp + 3, -ramp - 3, ramp * 0, -ramp * 0, halves])
    assert_quantized(isa, run_kernel(make(x, isa), isa, x), x)
    assert (reference.quantize_per_token(x[2]).codes == -128).all()


def test_a_call_writes_only_its_rows(check_row_ranges, x86_isa):
    x = np.random.default_rng(2).normal(size=(5, 64)).astype(np.float32)
    check_row_ranges(make(x, x86_isa), x86_isa, x)


def test_a_call_writes_only_its_tokens_of_a_panel(run_kernel, arm_isa):
    """Tokens share vectors; a call for one leaves the others' codes alone."""
    x = np.random.default_rng(2).normal(size=(19, 64)).astype(np.float32)
    func = make(x, arm_isa)
    whole = packing.restore_codes(run_kernel(func, arm_isa, x)[0], 32, arm_isa.codes)
    for begin, end in ((0, 0), (0, 1), (1, 18), (18, 19)):
        part = run_kernel(func, arm_isa, x, begin=begin, end=end)[0]
        rows = packing.restore_codes(part, 32, arm_isa.codes)
        np.testing.assert_array_equal(rows[begin:end], whole[begin:end])
        assert (np.delete(rows, np.s_[begin:end], axis=0) == CANARY).all()


@pytest.mark.parametrize("arrangement", ["pairs", "panels"])
def test_arrangements_are_undone(arrangement):
    codes = np.random.default_rng(3).integers(-128, 128, (37, 96)).astype(np.int8)
    stored = packing.arrange_codes(codes, arrangement)
    assert stored.shape == (3, 3, 512)
    np.testing.assert_array_equal(packing.restore_codes(stored, 37, arrangement), codes)


def test_rows_must_be_whole_groups(any_isa):
    assert quantize.valid(quantize.QuantizeShape(1, 96), any_isa, {})
    assert not quantize.valid(quantize.QuantizeShape(1, 40), any_isa, {})
