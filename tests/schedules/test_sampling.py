"""The argmax kernel chooses what numpy chooses, and never NaN."""

from __future__ import annotations

import numpy as np
import pytest

from llamac.compiler import reference
from llamac.schedules import sampling


def argmax(run_kernel, isa, logits):
    shape = sampling.ArgmaxShape(len(logits))
    func = sampling.make(shape, isa, **sampling.default(shape, isa))
    (index,) = run_kernel(func, isa, logits.astype(np.float32)[None])
    return int(index[0])


@pytest.mark.parametrize("vocab", [1, 5, 64, 515, 128256])
def test_random_logits(run_kernel, isa, vocab):
    logits = np.random.default_rng(vocab).normal(size=vocab).astype(np.float32)
    assert argmax(run_kernel, isa, logits) == reference.argmax(logits)


@pytest.mark.parametrize("where", [0, 1, 63, 64, 255, 256, 299])
def test_every_place_can_win(run_kernel, isa, where):
    logits = np.full(300, -1.0)
    logits[where] = 2.0
    assert argmax(run_kernel, isa, logits) == where


@pytest.mark.parametrize("places", [(3, 4), (17, 200), (30, 65, 299), (64, 65), (298, 299)])
def test_the_lowest_index_wins_a_tie(run_kernel, isa, places):
    logits = np.full(300, -np.inf)
    logits[list(places)] = -7.5
    assert argmax(run_kernel, isa, logits) == min(places)


def test_nan_is_never_chosen(run_kernel, isa):
    for offset in range(8):
        logits = np.full(300, np.nan)
        logits[offset::97] = -3.0
        assert argmax(run_kernel, isa, logits) == offset


def test_without_any_number_the_result_is_zero(run_kernel, isa):
    assert argmax(run_kernel, isa, np.full(300, -np.inf)) == 0
    assert argmax(run_kernel, isa, np.full(300, np.nan)) == 0
