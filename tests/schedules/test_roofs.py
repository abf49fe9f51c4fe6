"""The kernels that measure roofs do the work that they are counted for."""

from __future__ import annotations

import numpy as np
import pytest

from llamac.schedules.roofs import READ_BYTES, STEPS, ProductsRoof, make_products, make_reads


@pytest.mark.parametrize("kind", ["u4s8", "u8s8", "float32"])
def test_all_products_are_computed(run_kernel, isa, kind):
    roof = ProductsRoof(kind, repeats=3 * STEPS)
    func = make_products(roof, isa)
    left, right = (tuple(int(n) for n in p.shape) for p in func.params[:2])
    rng = np.random.default_rng(3)
    if kind == "float32":
        x, w = (rng.normal(size=shape).astype(np.float32) for shape in (left, right))
    else:
        x = rng.integers(0, 16 if kind == "u4s8" else 256, left).astype(np.uint8)
        w = rng.integers(-128, 128, right).astype(np.int8)
    (got,) = run_kernel(func, isa, x, w)
    # Every row times every column, four bytes a lane, and all of it three times.
    lanes = np.float64(x).sum(1) * np.float64(w).sum(1)
    if kind != "float32":
        wide_x, wide_w = (np.int64(v).reshape(*v.shape[:2], -1, 4) for v in (x, w))
        lanes = np.einsum("srlb,sclb->sl", wide_x, wide_w)
    expected = 3 * lanes.sum(0)
    if kind == "float32":
        np.testing.assert_allclose(got[0], expected, atol=1e-3)
    else:
        np.testing.assert_array_equal(got[0], expected)
    assert roof.products(isa) % (isa.lanes * STEPS) == 0


@pytest.mark.parametrize("prefetch", [0, 2048])
def test_all_bytes_are_read(run_kernel, isa, prefetch):
    func = make_reads(3 * READ_BYTES, isa, prefetch=prefetch)
    values = np.random.default_rng(4).integers(-9, 9, (3, READ_BYTES // 4)).astype(np.int32)
    (got,) = run_kernel(func, isa, values)
    np.testing.assert_array_equal(got, values.reshape(3, -1, isa.lanes).sum(1))
