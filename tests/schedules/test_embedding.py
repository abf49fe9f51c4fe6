"""Embedding and row selection copy exactly the rows that they are told to."""

from __future__ import annotations

import numpy as np
import pytest

from llamac.compiler import reference
from llamac.schedules import embedding, select

CASES = [(1, 7, 64), (5, 300, 2048)]


def inputs(case, dtype):
    """Tokens (the first and last row among them), table, and scales for int8."""
    num_tokens, vocab, k = case
    rng = np.random.default_rng(0)
    tokens = rng.integers(0, vocab, num_tokens).astype(np.int32)
    tokens[0], tokens[-1] = 0, vocab - 1
    if dtype == "bfloat16":
        return tokens, rng.integers(0, 0x7F00, (vocab, k)).astype(np.uint16)
    table = rng.integers(-128, 128, (vocab, k)).astype(np.int8)
    return tokens, table, rng.uniform(1e-3, 1, vocab).astype(np.float32)


def make(case, dtype, isa):
    return embedding.make(embedding.EmbeddingShape(*case, dtype), isa)


@pytest.mark.parametrize("case", CASES, ids=str)
def test_int8_table(run_kernel, isa, case):
    tokens, table, scales = inputs(case, "int8")
    (x,) = run_kernel(make(case, "int8", isa), isa, tokens, table, scales)
    expected = reference.embedding(tokens, table, scales)
    np.testing.assert_array_equal(x, expected.astype(np.float32))


@pytest.mark.parametrize("case", CASES, ids=str)
def test_bfloat16_table(run_kernel, isa, case):
    tokens, table = inputs(case, "bfloat16")
    (x,) = run_kernel(make(case, "bfloat16", isa), isa, tokens, table)
    np.testing.assert_array_equal(x, reference.embedding_float(tokens, table))


def test_a_call_writes_only_its_rows(check_row_ranges, isa):
    case = (4, 9, 64)
    check_row_ranges(make(case, "int8", isa), isa, *inputs(case, "int8"))


@pytest.mark.parametrize("row", [0, 3, 7])
def test_take_row(run_kernel, isa, row):
    x = np.random.default_rng(1).normal(size=(8, 96)).astype(np.float32)
    func = select.make(select.TakeRowShape(8, 96), isa)
    (y,) = run_kernel(func, isa, x, np.array([1000, row], np.int32))
    np.testing.assert_array_equal(y, x[row : row + 1])


def test_unknown_types_and_broken_rows_are_not_valid(any_isa):
    shape = embedding.EmbeddingShape
    assert embedding.valid(shape(1, 9, 64), any_isa, {})
    assert not embedding.valid(shape(1, 9, 60), any_isa, {})
    assert not embedding.valid(shape(1, 9, 64, "float16"), any_isa, {})
    assert not select.valid(select.TakeRowShape(1, 60), any_isa, {})
