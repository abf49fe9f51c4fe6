"""Each operation of an instruction set does what its description says, on every level."""

from __future__ import annotations

import numpy as np
import pytest

from llamac.schedules.intrin.isa import pick
from llamac.schedules.kernel import KernelBuilder, store


def elementwise(isa, operation, src, dst, lanes=None):
    """A kernel that applies `operation` to the rows of x [n, lanes]."""
    lanes = lanes or isa.lanes

    def make(rows):
        with KernelBuilder(f"op_{dst}_{src}_{isa.suffix}", rows) as b:
            x = b.input("x", (rows, lanes), src)
            y = b.output("y", (rows, lanes), dst)
            with b.items() as row:
                isa.store(y, operation(isa.load(x, row, 0, lanes=lanes)), row, 0, lanes=lanes)
        return b.func

    return make


def apply(run_kernel, isa, operation, values, dst):
    """Run an elementwise operation over a flat array whose size is a multiple of 16."""
    rows = values.reshape(-1, isa.lanes)
    func = elementwise(isa, operation, str(values.dtype), dst)(len(rows))
    return run_kernel(func, isa, rows)[0].reshape(values.shape)


def test_float16_to_float32_is_exact_for_all_bit_patterns(run_kernel, isa):
    half = np.arange(65536, dtype=np.uint16).view(np.float16)
    got = apply(run_kernel, isa, isa.to_float32, half, "float32")
    np.testing.assert_array_equal(got, half.astype(np.float32))


def test_float32_to_float16_rounds_half_to_even(run_kernel, isa):
    """All float16 values, the midpoints between them and their float32 neighbours, and specials."""
    finite = np.arange(0x7C00, dtype=np.uint16).view(np.float16).astype(np.float32)
    middle = (finite[:-1] + finite[1:]) / 2
    some = np.concatenate([finite, middle, np.nextafter(middle, 0), np.nextafter(middle, 1e9)])
    special = np.float32([65519.9, 65520, 65536, 1e38, np.inf, 1e-38, 1e-45, 2.0**-25])
    values = np.concatenate([some, -some, special, -special]).astype(np.float32)
    values = np.resize(values, -(-len(values) // 16) * 16)
    got = apply(run_kernel, isa, isa.to_float16, values, "float16")
    with np.errstate(over="ignore"):
        np.testing.assert_array_equal(got, values.astype(np.float16))
    nan = apply(run_kernel, isa, isa.to_float16, np.full(16, np.nan, np.float32), "float16")
    assert np.isnan(nan).all()


def test_bfloat16_to_float32(run_kernel, isa):
    bits = np.arange(65536, dtype=np.uint16)
    got = apply(run_kernel, isa, isa.bfloat16_to_float32, bits, "float32")
    np.testing.assert_array_equal(got.view(np.uint32), bits.astype(np.uint32) << 16)


def test_rint_rounds_half_to_even(run_kernel, isa):
    values = (np.arange(-4096, 4096) / 4).astype(np.float32)
    got = apply(run_kernel, isa, isa.rint, values, "float32")
    np.testing.assert_array_equal(got, np.rint(values))


def test_exp(run_kernel, isa):
    values = np.linspace(-86.9, 87.9, 16384).astype(np.float32)
    got = apply(run_kernel, isa, isa.exp, values, "float32")
    np.testing.assert_allclose(got, np.exp(values.astype(np.float64)), rtol=3e-7)


def test_silu(run_kernel, isa):
    values = np.linspace(-200, 200, 4096).astype(np.float32)
    wide = values.astype(np.float64)
    got = apply(run_kernel, isa, isa.silu, values, "float32")
    np.testing.assert_allclose(got, wide / (1 + np.exp(-wide)), rtol=1e-6, atol=1e-30)


@pytest.mark.parametrize("bound", [16, 256])
def test_dot_is_exact_at_the_ends_of_the_range(run_kernel, isa, bound):
    """Products of the largest codes do not saturate (int4 codes below 16, int8 codes below 256)."""
    rng = np.random.default_rng(0)
    rows, lanes = 8, isa.lanes
    lhs = rng.integers(0, bound, (rows, 4 * lanes)).astype(np.uint8)
    rhs = rng.integers(-128, 128, (rows, 4 * lanes)).astype(np.int8)
    lhs[0], rhs[0] = bound - 1, -128
    lhs[1], rhs[1] = bound - 1, 127
    start = rng.integers(-1000, 1000, (rows, lanes)).astype(np.int32)
    with KernelBuilder(f"dot{bound}_{isa.suffix}", rows) as b:
        a = b.input("a", lhs.shape, "uint8")
        w = b.input("w", rhs.shape, "int8")
        c = b.input("c", start.shape, "int32")
        y = b.output("y", start.shape, "int32")
        with b.items() as row:
            dot = isa.dot_u4s8 if bound == 16 else isa.dot_u8s8
            vectors = (isa.load(t, row, 0, lanes=4 * lanes) for t in (a, w))
            isa.store(y, dot(isa.load(c, row, 0), *vectors), row, 0)
    (got,) = run_kernel(b.func, isa, lhs, rhs, start)
    products = lhs.astype(np.int32) * rhs
    np.testing.assert_array_equal(got, start + products.reshape(rows, lanes, 4).sum(-1))


def test_reductions_and_pick(run_kernel, isa):
    x = np.random.default_rng(1).integers(-99, 99, (4, isa.lanes)).astype(np.float32)
    with KernelBuilder(f"reduce_{isa.suffix}", 4) as b:
        source = b.input("x", x.shape, "float32")
        y = b.output("y", (4, 4), "float32")
        with b.items() as row:
            value = isa.load(source, row, 0)
            for i, reduce in enumerate((isa.reduce_add, isa.reduce_max, isa.reduce_min)):
                store(y, reduce(value), row, i)
            store(y, pick(value, [isa.lanes - 1]), row, 3)
    (got,) = run_kernel(b.func, isa, x)
    np.testing.assert_array_equal(got.T, [x.sum(1), x.max(1), x.min(1), x[:, -1]])
