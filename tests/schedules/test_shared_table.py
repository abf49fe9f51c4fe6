"""Embedding out of the output layer's blocks gives what the plain table gives."""

from __future__ import annotations

import numpy as np
import pytest

from llamac.compiler import reference
from llamac.compiler.floats import to_bfloat16
from llamac.schedules import embedding
from llamac.schedules.embedding import EmbeddingShape
from llamac.targets.cpu import packing

VOCAB, WIDTH = 48, 64
TOKENS = np.array([0, 47, 15, 16, 31, 3], np.int32)


@pytest.fixture(scope="module")
def rng():
    return np.random.default_rng(0)


def make(dtype, isa):
    return embedding.make(EmbeddingShape(len(TOKENS), VOCAB, WIDTH, dtype, blocks=True), isa)


def test_int8_blocks(run_kernel, isa, rng):
    table = rng.integers(-128, 128, (VOCAB, WIDTH)).astype(np.int8)
    scales = rng.uniform(1e-3, 1, VOCAB).astype(np.float32)
    (x,) = run_kernel(make("int8", isa), isa, TOKENS, packing.int8_codes(table), scales)
    np.testing.assert_array_equal(x, reference.embedding(TOKENS, table, scales).astype(np.float32))


def test_int8_blocks_of_hvx(run_kernel, isa, rng):
    table = rng.integers(-128, 128, (64, WIDTH)).astype(np.int8)
    scales = rng.uniform(1e-3, 1, 64).astype(np.float32)
    shape = EmbeddingShape(len(TOKENS), 64, WIDTH, blocks=True, hvx=True)
    func = embedding.make(shape, isa)
    (x,) = run_kernel(func, isa, TOKENS, packing.int8_hvx(table), scales)
    np.testing.assert_array_equal(x, reference.embedding(TOKENS, table, scales).astype(np.float32))


def test_bfloat16_blocks(run_kernel, isa, rng):
    table = to_bfloat16(rng.normal(size=(VOCAB, WIDTH)))
    (x,) = run_kernel(make("bfloat16", isa), isa, TOKENS, packing.block_columns(table))
    np.testing.assert_array_equal(x, reference.embedding_float(TOKENS, table))


def test_blocks_need_whole_blocks(any_isa):
    assert embedding.valid(EmbeddingShape(1, 48, 64, blocks=True), any_isa, {})
    assert not embedding.valid(EmbeddingShape(1, 47, 64, blocks=True), any_isa, {})
    assert not embedding.valid(EmbeddingShape(1, 48, 64, blocks=True, hvx=True), any_isa, {})


def test_a_call_writes_only_its_rows(check_row_ranges, isa, rng):
    table = to_bfloat16(rng.normal(size=(VOCAB, WIDTH)))
    check_row_ranges(make("bfloat16", isa), isa, TOKENS, packing.block_columns(table))
