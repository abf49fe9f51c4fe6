"""bfloat16 x float32 products equal the reference: epilogues, odd row counts, knobs, ranges."""

from __future__ import annotations

import numpy as np
import pytest

from llamac.compiler import reference
from llamac.compiler.floats import to_bfloat16
from llamac.schedules import matmul
from llamac.schedules.intrin.x86 import X86_LEVELS
from llamac.schedules.matmul import ROWS, MatmulShape
from llamac.targets.cpu import packing

SHAPES = [
    MatmulShape(1, 48, 96),
    MatmulShape(1, 32, 64, "residual"),
    MatmulShape(1, 64, 32, "swiglu"),
    MatmulShape(3, 32, 96, "residual"),
    MatmulShape(3, 64, 64, "swiglu"),
    MatmulShape(8, 16, 2048),
]


def make(shape, isa, **knobs):
    return matmul.make(shape, isa, **(knobs or matmul.default(shape, isa)))


def problem(shape):
    """Inputs of the kernel, and its result in float64."""
    rng = np.random.default_rng(shape.n)
    x = rng.normal(size=(shape.m, shape.k)).astype(np.float32)
    weight = to_bfloat16(rng.normal(size=(shape.n, shape.k)))
    expected = reference.linear(x, weight)
    order = np.arange(shape.n)
    if shape.epilogue == "swiglu":
        order = order.reshape(2, -1, ROWS).transpose(1, 0, 2).reshape(-1)
        expected = reference.swiglu(*np.split(expected, 2, axis=1))
    inputs = [x, packing.block_columns(weight[order])]
    if shape.epilogue == "residual":
        inputs.append(rng.normal(size=(shape.m, shape.n)).astype(np.float32))
        expected = expected + inputs[-1]
    return inputs, expected


def check(run_kernel, isa, shape, **knobs):
    inputs, expected = problem(shape)
    (y,) = run_kernel(make(shape, isa, **knobs), isa, *inputs)
    scale = np.abs(expected).max(-1, keepdims=True)
    assert (np.abs(y - expected) <= 1e-5 * scale).all()


@pytest.mark.parametrize("shape", SHAPES, ids=str)
def test_product(run_kernel, isa, shape):
    check(run_kernel, isa, shape)


@pytest.mark.parametrize("knobs", [(1, 8), (2, 2), (4, 1), (6, 2), (12, 1)], ids=str)
def test_knobs(run_kernel, isa, knobs):
    shape, knobs = MatmulShape(13, 32, 64), dict(zip(("mr", "chains"), knobs, strict=True))
    if matmul.valid(shape, isa, knobs):
        check(run_kernel, isa, shape, **knobs)


def test_small_integers_are_exact(run_kernel, isa):
    """Every column has its own weight, and sums stay below 2^24: any mixed-up column is seen."""
    shape = MatmulShape(3, 32, 64)
    rng = np.random.default_rng(0)
    x = rng.integers(-100, 100, (shape.m, shape.k)).astype(np.float32)
    weight = rng.integers(-128, 128, (shape.n, shape.k)).astype(np.float32)
    packed = packing.block_columns(to_bfloat16(weight))
    (y,) = run_kernel(make(shape, isa), isa, x, packed)
    np.testing.assert_array_equal(y, x @ weight.T)


@pytest.mark.parametrize("epilogue", ["none", "residual", "swiglu"])
def test_a_call_writes_only_its_columns(run_kernel, isa, epilogue):
    shape = MatmulShape(3, 128 if epilogue == "swiglu" else 64, 32, epilogue)
    inputs, _ = problem(shape)
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
    for n, k in ((2048, 2048), (2048, 8192), (128256, 3072)):
        shape = MatmulShape(m, n, k)
        assert matmul.valid(shape, any_isa, matmul.default(shape, any_isa))


def test_tiles_that_spill_or_do_not_divide_are_not_valid():
    avx512, _, avx2, _ = X86_LEVELS
    shape = MatmulShape(12, 32, 96)
    assert matmul.valid(shape, avx512, {"mr": 12, "chains": 2})
    assert not matmul.valid(shape, avx2, {"mr": 12, "chains": 2})
    assert not matmul.valid(MatmulShape(1, 32, 99), avx512, {"mr": 1, "chains": 2})
    assert not matmul.valid(MatmulShape(2, 32, 96), avx512, {"mr": 4, "chains": 1})
