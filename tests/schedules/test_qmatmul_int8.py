"""int8 x int8 products are exact up to their last two float factors."""

from __future__ import annotations

import numpy as np
import pytest

from llamac.compiler import reference
from llamac.schedules import qmatmul_int8
from llamac.schedules.intrin.x86 import X86_LEVELS
from llamac.schedules.qmatmul_int8 import ROWS, QMatmulInt8Shape
from llamac.targets.cpu import packing

SHAPES = [
    QMatmulInt8Shape(1, 48, 96),
    QMatmulInt8Shape(3, 32, 64),
    QMatmulInt8Shape(8, 16, 2048),
    QMatmulInt8Shape(1, 16, 8192),
]


def make(shape, isa, **knobs):
    return qmatmul_int8.make(shape, isa, **(knobs or qmatmul_int8.default(shape, isa)))


def problem(shape, fill=None):
    """Activations, codes and scales; `fill` = (activation, weight, zero point) everywhere."""
    rng = np.random.default_rng(shape.k)
    codes = rng.integers(-128, 128, (shape.n, shape.k)).astype(np.int8)
    x = rng.integers(-128, 128, (shape.m, shape.k)).astype(np.int8)
    zero = rng.integers(-128, 128, shape.m).astype(np.int32)
    if fill is not None:
        x[...], codes[...], zero[...] = fill
    scale = rng.uniform(0.001, 0.1, shape.m).astype(np.float32)
    scales = rng.uniform(0.001, 0.1, shape.n).astype(np.float32)
    return reference.Quantized(x, scale, zero), codes, scales


def operands(isa, x, codes, scales):
    """What the kernel reads."""
    return [
        packing.arrange_codes(x.codes, isa.codes),
        np.stack([x.scale, x.zero_point.astype(np.float32)], axis=1),
        packing.int8_codes(codes),
        scales,
        codes.sum(axis=1, dtype=np.int32),
    ]


def expected_bits(x, codes, scales):
    """The exact integer, converted and multiplied in float32 as the kernel does it."""
    dot = x.centred().astype(np.int64) @ codes.T.astype(np.int64)
    assert np.abs(dot).max() < 2**31
    return (x.scale[:, None] * scales) * dot.astype(np.int32).astype(np.float32)


def check(run_kernel, isa, shape, fill=None, **knobs):
    x, codes, scales = problem(shape, fill)
    (y,) = run_kernel(make(shape, isa, **knobs), isa, *operands(isa, x, codes, scales))
    np.testing.assert_array_equal(y, expected_bits(x, codes, scales))
    return y


@pytest.mark.parametrize("shape", SHAPES, ids=str)
def test_product(run_kernel, each_isa, shape):
    y = check(run_kernel, each_isa, shape)
    expected = reference.qlinear_int8(*problem(shape))
    assert (np.abs(y - expected) <= 1e-6 * np.abs(expected).max(-1, keepdims=True)).all()


@pytest.mark.parametrize("zero", [-128, 0, 127])
@pytest.mark.parametrize("weight", [-128, 127])
@pytest.mark.parametrize("code", [-128, 127])
def test_extreme_codes(run_kernel, isa, code, weight, zero):
    """Sums of 2048 products at the ends of int8: a 16-bit step that saturates would show."""
    check(run_kernel, isa, SHAPES[2], (code, weight, zero))


@pytest.mark.parametrize("knobs", [(1, 8), (2, 2), (2, 1), (4, 1), (6, 2), (8, 1)], ids=str)
def test_knobs(run_kernel, each_isa, knobs):
    shape, knobs = QMatmulInt8Shape(21, 32, 128), dict(zip(("mr", "chains"), knobs, strict=True))
    if qmatmul_int8.valid(shape, each_isa, knobs):
        check(run_kernel, each_isa, shape, **knobs)


def test_a_call_writes_only_its_columns(run_kernel, isa):
    shape = QMatmulInt8Shape(3, 64, 32)
    inputs = operands(isa, *problem(shape))
    func = make(shape, isa)
    (whole,) = run_kernel(func, isa, *inputs)
    for begin, end in ((0, 0), (0, 1), (1, 4)):
        (part,) = run_kernel(func, isa, *inputs, begin=begin, end=end)
        columns = np.s_[begin * ROWS : end * ROWS]
        np.testing.assert_array_equal(part[:, columns], whole[:, columns])
        others = np.ascontiguousarray(np.delete(part, columns, axis=1))
        assert (others.view(np.uint8) == 0x5A).all()


@pytest.mark.parametrize("m", [1, 2, 7, 128])
def test_defaults_are_valid(any_isa, m):
    for k in (2048, 3072):
        shape = QMatmulInt8Shape(m, 128256, k)
        assert qmatmul_int8.valid(shape, any_isa, qmatmul_int8.default(shape, any_isa))


def test_tiles_that_spill_or_do_not_divide_are_not_valid():
    avx512, _, avx2, _ = X86_LEVELS
    shape = QMatmulInt8Shape(8, 32, 96)
    assert qmatmul_int8.valid(shape, avx512, {"mr": 8, "chains": 2})
    assert not qmatmul_int8.valid(shape, avx2, {"mr": 8, "chains": 2})
    assert not qmatmul_int8.valid(QMatmulInt8Shape(8, 32, 36), avx512, {"mr": 1, "chains": 2})
    assert not qmatmul_int8.valid(QMatmulInt8Shape(2, 32, 96), avx512, {"mr": 4, "chains": 1})
