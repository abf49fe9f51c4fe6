"""RMS normalization equals the reference; its codes equal the reference's of the same floats."""

from __future__ import annotations

import numpy as np
import pytest

from llamac.compiler import reference
from llamac.schedules import norm

EPS = 1e-5
SHAPES = [(1, 32), (1, 64), (8, 2048), (2, 3072)]


def inputs(shape, seed=0):
    rng = np.random.default_rng(seed)
    x = rng.standard_t(3, shape).astype(np.float32)
    gamma = rng.normal(1, 0.5, shape[1]).astype(np.float32)
    return x, gamma


def make(shape, isa, **options):
    return norm.make(norm.RmsNormShape(*shape, EPS, **options), isa)


def assert_close(y, x, gamma):
    expected = reference.rms_norm(x, gamma, EPS)
    scale = np.abs(expected).max(-1, keepdims=True)
    assert (np.abs(y - expected) <= 1e-5 * scale).all()


@pytest.mark.parametrize("shape", SHAPES, ids=str)
def test_norm(run_kernel, isa, shape):
    x, gamma = inputs(shape)
    (y,) = run_kernel(make(shape, isa, quantize=False), isa, x, gamma)
    assert_close(y, x, gamma)


@pytest.mark.parametrize("shape", SHAPES, ids=str)
def test_norm_and_quantize(run_kernel, assert_quantized, isa, shape):
    """The codes are those of the float output, whether or not that is stored."""
    x, gamma = inputs(shape, seed=1)
    *quantized, y = run_kernel(make(shape, isa, with_float=True), isa, x, gamma)
    assert_close(y, x, gamma)
    assert_quantized(isa, quantized, y)
    without = run_kernel(make(shape, isa), isa, x, gamma)
    for got, same in zip(without, quantized, strict=True):
        np.testing.assert_array_equal(got, same)


def test_zero_row(run_kernel, assert_quantized, isa):
    """A row of zeros gives zeros: eps keeps the root finite."""
    x, gamma = np.zeros((2, 64), np.float32), np.ones(64, np.float32)
    *quantized, y = run_kernel(make(x.shape, isa, with_float=True), isa, x, gamma)
    assert_quantized(isa, quantized, y)
    assert (y == 0).all() and (quantized[1][:, 1] == -128).all()


@pytest.mark.parametrize("quantize", [False, True])
def test_a_call_writes_only_its_rows(check_row_ranges, isa, quantize):
    x, gamma = inputs((4, 64))
    check_row_ranges(make(x.shape, isa, quantize=quantize), isa, x, gamma)
