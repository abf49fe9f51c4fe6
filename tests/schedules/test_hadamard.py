"""The Walsh-Hadamard transform equals the reference; its codes are those of its float output."""

from __future__ import annotations

import numpy as np
import pytest

from llamac.compiler import reference
from llamac.schedules import hadamard
from llamac.schedules.hadamard import HadamardShape


def make(shape, isa, quantize, **knobs):
    shape = HadamardShape(*shape, quantize=quantize)
    return hadamard.make(shape, isa, **(knobs or hadamard.default(shape, isa)))


def rows(shape):
    return np.random.default_rng(shape[1]).standard_t(3, shape).astype(np.float32)


def assert_close(y, x):
    expected = reference.hadamard(x)
    scale = np.abs(expected).max(-1, keepdims=True)
    assert (np.abs(y - expected) <= 1e-5 * scale).all()


@pytest.mark.parametrize("shape", [(1, 32), (1, 128), (2, 8192)], ids=str)
def test_transform(run_kernel, isa, shape):
    x = rows(shape)
    (y,) = run_kernel(make(shape, isa, quantize=False), isa, x)
    assert_close(y, x)


@pytest.mark.parametrize("shape", [(2, 64), (3, 1024)], ids=str)
def test_transform_and_quantize(run_kernel, assert_quantized, isa, shape):
    x = rows(shape)
    *quantized, y = run_kernel(make(shape, isa, quantize=True), isa, x)
    assert_close(y, x)
    assert_quantized(isa, quantized, y)


def test_one_spike_spreads_evenly(run_kernel, isa):
    """A row with one element other than 0 becomes a row of one magnitude, exactly."""
    x = np.zeros((1, 256), np.float32)
    x[0, 77] = 16.0
    (y,) = run_kernel(make(x.shape, isa, quantize=False), isa, x)
    assert (np.abs(y) == 1.0).all()


@pytest.mark.parametrize("radix", hadamard.KNOBS["radix"])
def test_every_radix(run_kernel, isa, radix):
    if not hadamard.valid(HadamardShape(1, 512), isa, {"radix": radix}):
        return
    x = rows((1, 512))
    (y,) = run_kernel(make(x.shape, isa, quantize=False, radix=radix), isa, x)
    assert_close(y, x)


def test_a_call_writes_only_its_rows(check_row_ranges, isa):
    x = rows((4, 64))
    check_row_ranges(make(x.shape, isa, quantize=True), isa, x)


@pytest.mark.parametrize("k", [16, 48, 8190])
def test_only_powers_of_two_are_valid(any_isa, k):
    assert not hadamard.valid(HadamardShape(1, k), any_isa, {"radix": 8})
