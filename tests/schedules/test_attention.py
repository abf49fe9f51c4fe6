"""Attention equals the reference at every kind of position, and never looks beyond it."""

from __future__ import annotations

import numpy as np
import pytest

from llamac.compiler import reference
from llamac.schedules import attention
from llamac.schedules.attention import AttentionShape
from llamac.schedules.rope import CacheShape

# (tokens, heads, kv heads, head size, capacity)
TINY = (1, 4, 2, 8, 144)
CASES = [
    (TINY, 0),
    (TINY, 5),
    (TINY, 15),
    (TINY, 16),
    (TINY, 127),
    ((8, 8, 4, 8, 320), 0),
    ((8, 8, 4, 8, 320), 300),
    ((1, 32, 8, 64, 2048), 2000),
    ((8, 24, 8, 128, 512), 300),
    ((32, 6, 6, 32, 64), 0),
    ((8, 16, 2, 16, 64), 5),
]


class Case:
    """Random q, k, v, and a cache that holds them and NaN after the last position."""

    def __init__(self, case, position, dtype):
        tokens, heads, kv_heads, head_dim, capacity = case
        self.shape = AttentionShape(tokens, heads, CacheShape(kv_heads, head_dim, capacity, dtype))
        self.meta = np.array([position, tokens - 1], np.int32)
        rng = np.random.default_rng(position)
        q = rng.normal(size=(tokens, heads, head_dim)).astype(np.float32) * 2
        end = position + tokens
        k, v = rng.normal(size=(2, end, kv_heads, head_dim)).astype(np.float32)
        self.cache, used = (_int8_cache if dtype == "int8" else _float16_cache)(k, v, capacity)
        self.q = q.reshape(tokens, -1)
        self.expected = reference.attention(q, *used, position).reshape(tokens, -1)

    def run(self, run_kernel, isa, **bounds):
        func = attention.make(self.shape, isa, **attention.default(self.shape, isa))
        return run_kernel(func, isa, self.q, *self.cache, self.meta, **bounds)[0]

    def assert_close(self, out):
        scale = np.abs(self.expected).max(-1, keepdims=True)
        assert (np.abs(out - self.expected) <= 1e-5 * scale).all()


def transpose_keys(keys):
    """[Hkv, C, D] -> [Hkv, C/16, D, 16]."""
    kv_heads, capacity, head_dim = keys.shape
    return np.ascontiguousarray(keys.reshape(kv_heads, capacity // 16, 16, head_dim).swapaxes(2, 3))


def _padded(rows, capacity, fill):
    """[P, Hkv, ...] -> [Hkv, C, ...] with `fill` after the last position."""
    full = np.full((rows.shape[1], capacity, *rows.shape[2:]), fill, rows.dtype)
    full[:, : len(rows)] = rows.swapaxes(0, 1)
    return full


def _float16_cache(k, v, capacity):
    k, v = k.astype(np.float16), v.astype(np.float16)
    keys, values = (_padded(x, capacity, np.nan) for x in (k, v))
    return (transpose_keys(keys), values), (k, v)


def _int8_cache(k, v, capacity):
    sides = [reference.quantize_kv(x) for x in (k, v)]
    keys, values = (_padded(side.codes, capacity, 99) for side in sides)
    params = [
        _padded(np.stack([s.scale, s.zero_point.astype(np.float32)], -1), capacity, np.nan)
        for s in sides
    ]
    used = tuple(reference.dequantize_kv(side) for side in sides)
    return (transpose_keys(keys), values, *params), used


@pytest.mark.parametrize("dtype", ["float16", "int8"])
@pytest.mark.parametrize(("case", "position"), CASES, ids=str)
def test_attention(run_kernel, isa, case, position, dtype):
    c = Case(case, position, dtype)
    c.assert_close(c.run(run_kernel, isa))


@pytest.mark.parametrize("dtype", ["float16", "int8"])
def test_padding_does_not_reach_valid_tokens(run_kernel, isa, dtype):
    """Whatever keys and values the padded tokens of a chunk have, the rows before are right."""
    c = Case((8, 4, 2, 8, 64), 13, dtype)
    valid, end = 3, 13 + 3
    for tensor in c.cache:
        garbage = 55 if tensor.dtype == np.int8 else np.nan
        if tensor.ndim == 4:
            tensor[:, end // 16 :, :, :] = garbage
        else:
            tensor[:, end:] = garbage
    out = c.run(run_kernel, isa)
    c.expected = c.expected[:valid]
    c.assert_close(out[:valid])


def test_items_write_their_own_heads_and_tokens(run_kernel, isa):
    """Items are (kv head, tile of tokens): parts equal the whole and leave the rest alone."""
    c = Case((16, 4, 2, 8, 64), 20, "float16")
    whole = c.run(run_kernel, isa)
    c.assert_close(whole)
    for begin, end in ((0, 1), (1, 3), (3, 4)):
        part = c.run(run_kernel, isa, begin=begin, end=end)
        mine = part.view(np.uint32) != 0x5A5A5A5A
        assert mine.sum() == (end - begin) * 8 * 2 * 8
        np.testing.assert_array_equal(part[mine], whole[mine])


def test_large_scores_do_not_overflow(run_kernel, isa):
    """One position whose score towers over the others takes all the weight."""
    c = Case(TINY, 40, "float16")
    c.q *= 1000
    keys = c.cache[0].swapaxes(2, 3).reshape(2, 144, 8)[:, :41].swapaxes(0, 1)
    values = c.cache[1][:, :41].swapaxes(0, 1)
    c.expected = reference.attention(c.q.reshape(1, 4, 8), keys, values, 40).reshape(1, -1)
    c.assert_close(c.run(run_kernel, isa))
