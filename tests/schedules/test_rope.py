"""RoPE and the append to the cache equal the reference, and touch nothing but their positions."""

from __future__ import annotations

import numpy as np
import pytest

from llamac.compiler import reference
from llamac.schedules.rope import CacheShape, RopeShape, make, valid

POSITIONS = 256

# (tokens, heads, kv heads, head size, first position)
CASES = [
    (1, 4, 2, 8, 0),
    (8, 8, 4, 8, 13),
    (1, 32, 8, 64, 200),
    (8, 24, 8, 128, 16),
    (2, 3, 3, 32, 5),
]


def kernel_table(table):
    """The (cos, sin) table [P, D/2, 2] as the kernel's rows [P, 2, D]."""
    cos, sin = np.repeat(table[..., 0], 2, -1), np.repeat(table[..., 1], 2, -1)
    sin[:, 0::2] *= -1
    return np.stack([cos, sin], 1).astype(np.float32)


class Case:
    """One chunk: inputs, an empty cache, and the rows that the reference expects."""

    def __init__(self, case, dtype):
        tokens, heads, kv_heads, head_dim, self.first = case
        self.tokens, self.head_dim = tokens, head_dim
        self.shape = RopeShape(
            tokens, heads, POSITIONS, CacheShape(kv_heads, head_dim, POSITIONS, dtype)
        )
        self.qkv = np.random.default_rng(0).normal(size=(tokens, self.shape.width)).astype("f4")
        angles = np.random.default_rng(1).uniform(0, 6.3, (POSITIONS, head_dim // 2))
        table = np.stack([np.cos(angles), np.sin(angles)], -1)
        self.table = kernel_table(table)
        self.meta = np.array([self.first, tokens - 1], np.int32)
        cache = self.shape.cache
        self.state = [np.full(cache.k_shape, 77, dtype), np.full(cache.v_shape, 77, dtype)]
        if dtype == "int8":
            self.state += [np.full(cache.params_shape, 77, "f4") for _ in range(2)]
        rows = self.qkv.reshape(tokens, heads + 2 * kv_heads, head_dim)
        here = table[self.first : self.first + tokens]
        self.q = reference.rope(rows[:, :heads], here)
        self.k = reference.rope(rows[:, heads : heads + kv_heads], here)
        self.v = rows[:, heads + kv_heads :]

    def run(self, run_kernel, isa, **bounds):
        func = make(self.shape, isa)
        (q,) = run_kernel(func, isa, self.qkv, self.table, self.meta, *self.state, **bounds)
        return q.reshape(self.q.shape)

    def rows(self, index):
        """Cache tensor `index` as [P, Hkv, ...], keys transposed back."""
        tensor = self.state[index]
        if index == 0:
            tensor = tensor.swapaxes(2, 3).reshape(tensor.shape[0], POSITIONS, self.head_dim)
        return tensor.swapaxes(0, 1)

    def written(self, index):
        """The rows of this chunk; checks that all others still hold what they held."""
        rows = self.rows(index)
        stop = self.first + self.tokens
        assert (rows[: self.first] == 77).all() and (rows[stop:] == 77).all()
        return rows[self.first : stop]


@pytest.mark.parametrize("case", CASES, ids=str)
def test_float16_cache(run_kernel, isa, case):
    c = Case(case, "float16")
    q = c.run(run_kernel, isa)
    np.testing.assert_allclose(q, c.q, atol=2e-6)
    np.testing.assert_allclose(c.written(0), c.k, atol=2e-6, rtol=2**-11)
    np.testing.assert_array_equal(c.written(1), c.v.astype(np.float16))


@pytest.mark.parametrize("case", CASES, ids=str)
def test_int8_cache(run_kernel, isa, case):
    """Values are exactly the reference's codes; keys, rotated in float32, at most one step away."""
    c = Case(case, "int8")
    np.testing.assert_allclose(c.run(run_kernel, isa), c.q, atol=2e-6)
    expected = reference.quantize_kv(c.v)
    np.testing.assert_array_equal(c.written(1), expected.codes)
    np.testing.assert_array_equal(c.written(3)[..., 0], expected.scale)
    np.testing.assert_array_equal(c.written(3)[..., 1], expected.zero_point)
    keys, params = c.written(0).astype(np.float64), c.written(2).astype(np.float64)
    restored = (keys - params[..., 1:]) * params[..., :1]
    assert (np.abs(restored - c.k) <= 0.51 * params[..., :1]).all()
    np.testing.assert_allclose(params[..., 0], reference.quantize_kv(c.k).scale, rtol=1e-5)


@pytest.mark.parametrize("dtype", ["float16", "int8"])
def test_items_add_up_to_the_whole(run_kernel, isa, dtype):
    whole, parts = (Case((4, 4, 2, 8, 30), dtype) for _ in range(2))
    q = whole.run(run_kernel, isa)
    for begin, end in ((0, 3), (3, 4), (4, 8)):
        part = parts.run(run_kernel, isa, begin=begin, end=end)
        mine = part.view(np.uint32) != 0x5A5A5A5A
        assert mine.sum() == (end - begin) * 2 * 8
        np.testing.assert_array_equal(part[mine], q[mine])
    for left, right in zip(whole.state, parts.state, strict=True):
        np.testing.assert_array_equal(left, right)


def test_only_shapes_that_can_be_made_are_valid(any_isa):
    assert valid(RopeShape(1, 4, 64, CacheShape(2, 16, 64)), any_isa, {})
    assert not valid(RopeShape(1, 5, 64, CacheShape(2, 16, 64)), any_isa, {})
    assert not valid(RopeShape(1, 4, 64, CacheShape(2, 16, 72)), any_isa, {})
    assert not valid(RopeShape(1, 4, 64, CacheShape(2, 24, 64)), any_isa, {})
    assert not valid(RopeShape(1, 4, 64, CacheShape(2, 16, 64, "float32")), any_isa, {})
