"""The narrow half of a LoRA branch equals the reference."""

from __future__ import annotations

import numpy as np
import pytest

from llamac.compiler import reference
from llamac.schedules import lora
from llamac.schedules.lora import LoraShape

# (tokens, rank, k)
CASES = [(1, 4, 32), (3, 5, 96), (8, 16, 2048)]


def inputs(case):
    """Activations, and a weight as bfloat16 bits."""
    tokens, rank, k = case
    rng = np.random.default_rng(k)
    x = rng.normal(size=(tokens, k)).astype(np.float32)
    a = rng.normal(size=(rank, k)).astype(np.float32)
    return x, (a.view(np.uint32) >> 16).astype(np.uint16)


def make(case, isa):
    shape = LoraShape(*case)
    return lora.make(shape, isa, **lora.default(shape, isa))


@pytest.mark.parametrize("case", CASES, ids=str)
def test_product(run_kernel, isa, case):
    x, a = inputs(case)
    (t,) = run_kernel(make(case, isa), isa, x, a)
    expected = reference.linear(x, a)
    scale = np.abs(expected).max(-1, keepdims=True)
    assert (np.abs(t - expected) <= 1e-5 * scale).all()


def test_items_are_columns(run_kernel, isa):
    case = (3, 4, 64)
    x, a = inputs(case)
    func = make(case, isa)
    (whole,) = run_kernel(func, isa, x, a)
    (part,) = run_kernel(func, isa, x, a, begin=1, end=3)
    np.testing.assert_array_equal(part[:, 1:3], whole[:, 1:3])
    assert (part[:, [0, 3]].copy().view(np.uint8) == 0x5A).all()


def test_rows_must_be_whole_steps(any_isa):
    assert lora.valid(LoraShape(1, 4, 32), any_isa, {"chains": 1})
    assert not lora.valid(LoraShape(1, 4, 40), any_isa, {"chains": 4})
