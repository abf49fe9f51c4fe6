"""Sampling: each step alone against its definition, then all of them together."""

from __future__ import annotations

import math
from typing import Any

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from numpy.testing import assert_allclose, assert_array_equal
from numpy.typing import NDArray

from llamac.runtime import DeviceError, Sampling, UsageError
from llamac.runtime.sampler import (
    draw,
    keep_min_p,
    keep_top_k,
    keep_top_p,
    penalize_repetition,
    sample,
    softmax,
)

Row = NDArray[np.float32]


def row_of(*values: float) -> Row:
    return np.array(values, np.float32)


def random_row(size: int, seed: int = 0) -> Row:
    return np.random.default_rng(seed).normal(0, 3, size).astype(np.float32)


rows = st.builds(random_row, st.integers(1, 1000), st.integers(0, 10**6))


def test_softmax_is_the_definition_and_does_not_overflow() -> None:
    assert_allclose(softmax(row_of(0, math.log(3))), [0.25, 0.75], rtol=1e-6)
    assert_allclose(softmax(row_of(-np.inf, 1e30, 1e30)), [0, 0.5, 0.5])


@given(rows, st.integers(1, 1000))
def test_top_k_keeps_the_highest(row: Row, k: int) -> None:
    k = min(k, len(row))
    kept = keep_top_k(row, k)
    assert_array_equal(np.sort(row[kept]), np.sort(row)[len(row) - k :])


@given(rows, st.floats(1e-6, 1))
@settings(deadline=None)
def test_top_p_keeps_the_fewest_that_reach_the_mass(row: Row, p: float) -> None:
    """Without its last member, the set must fall short of p."""
    probabilities = softmax(row)
    kept = keep_top_p(row, p)
    assert len(set(kept)) == len(kept)
    mass = probabilities[kept].sum()
    assert mass >= p * (1 - 1e-9) or len(kept) == len(row)
    assert mass - probabilities[kept[-1]] < p
    assert probabilities[kept].min() >= np.delete(probabilities, kept).max(initial=0)


def test_top_p_of_a_flat_row_needs_more_than_the_first_candidates() -> None:
    """128 thousand equal logits: half of the mass is half of them."""
    assert len(keep_top_p(np.zeros(128_256, np.float32), 0.5)) == 64_128


@given(rows, st.floats(1e-6, 1))
def test_min_p_keeps_what_is_probable_beside_the_best(row: Row, min_p: float) -> None:
    ratio = np.exp(row.astype(np.float64) - row.max())
    kept = set(keep_min_p(row, min_p))
    assert kept >= set(np.flatnonzero(ratio > min_p * 1.001))
    assert kept.isdisjoint(np.flatnonzero(ratio < min_p * 0.999))


def test_repetition_penalty_divides_positive_and_multiplies_negative_logits() -> None:
    row = row_of(4, -4, 4, 0)
    assert_array_equal(penalize_repetition(row, [0, 1, 1, 3], 2.0), [2, -8, 4, 0])
    assert_array_equal(row, [4, -4, 4, 0])


@pytest.mark.parametrize(("context", "penalty"), [([], 2.0), ([1], 1.0)])
def test_repetition_penalty_may_have_nothing_to_do(context: list[int], penalty: float) -> None:
    row = row_of(1, 2)
    assert penalize_repetition(row, context, penalty) is row


def test_draw_follows_the_probabilities() -> None:
    """40,000 draws: each frequency within four standard deviations."""
    row = row_of(1, 0, -1, 2)
    random = np.random.default_rng(1)
    counts = np.bincount([draw(row, random) for _ in range(40_000)], minlength=4)
    expected = softmax(row)
    assert (abs(counts / 40_000 - expected) < 4 * np.sqrt(expected / 40_000)).all()


def test_draw_never_takes_the_impossible() -> None:
    """A token of probability 0 stays out at both ends of the interval."""

    class Edge:
        def __init__(self, value: float) -> None:
            self.value = value

        def random(self) -> float:
            return self.value

    row = row_of(-np.inf, 0, 0, -np.inf)
    low: Any = Edge(0.0)
    high: Any = Edge(np.nextafter(1, 0))
    assert draw(row, low) == 1
    assert draw(row, high) == 2


def choose(row: Row, seed: int = 0, context: tuple[int, ...] = (), **rules: Any) -> int:
    return sample(row, context, Sampling(**rules), np.random.default_rng(seed))


def test_temperature_zero_takes_the_best_and_needs_no_chance() -> None:
    random = np.random.default_rng(0)
    assert sample(row_of(1, 3, 2), (), Sampling(top_k=2, top_p=0.1), random) == 1
    assert random.random() == np.random.default_rng(0).random()


def test_penalty_can_change_the_greedy_choice() -> None:
    assert choose(row_of(1, 3, 2), context=(1,), repetition_penalty=2.0) == 2


def test_temperature_sharpens_and_flattens() -> None:
    row = row_of(0, 1)
    cold = sum(choose(row, seed, temperature=0.2) for seed in range(500))
    hot = sum(choose(row, seed, temperature=5.0) for seed in range(500))
    assert cold > 480
    assert 220 < hot < 320


def test_tiny_temperature_is_greedy() -> None:
    assert {choose(row_of(1e4, 1, 1e4 + 1), seed, temperature=1e-300) for seed in range(20)} == {2}


@pytest.mark.parametrize(
    ("rules", "allowed"),
    [
        ({"top_k": 2}, {1, 3}),
        ({"top_k": 99}, {0, 1, 2, 3}),
        ({"top_p": 0.6}, {1, 3}),
        ({"min_p": 0.5}, {1, 3}),
        ({"top_k": 3, "top_p": 0.99, "min_p": 0.9}, {1}),
        ({"top_k": 1}, {1}),
    ],
)
def test_filters_limit_what_is_drawn(rules: dict[str, Any], allowed: set[int]) -> None:
    """Probabilities 0.2, 0.4, 0.1, 0.3; all that is allowed comes up, and nothing else."""
    row = np.log(row_of(0.2, 0.4, 0.1, 0.3))
    assert {choose(row, seed, temperature=1.0, **rules) for seed in range(200)} == allowed


def test_a_seed_repeats_the_choice_at_full_vocabulary() -> None:
    row = random_row(128_256)
    rules = {"temperature": 1.0, "top_k": 50, "top_p": 0.9, "min_p": 0.01}
    first = [choose(row, seed, **rules) for seed in range(20)]
    assert first == [choose(row, seed, **rules) for seed in range(20)]
    assert len(set(first)) > 1


@pytest.mark.parametrize("bad", [math.nan, math.inf])
@pytest.mark.parametrize("temperature", [0.0, 1.0])
def test_damaged_logits_are_an_error_and_not_a_token(bad: float, temperature: float) -> None:
    """Sampling from NaN would silently give token 0."""
    with pytest.raises(DeviceError, match="as its best logit"):
        choose(row_of(1, bad, 2), temperature=temperature, repetition_penalty=1.1)


@pytest.mark.parametrize(
    "rules",
    [
        {"temperature": -0.1},
        {"temperature": math.nan},
        {"temperature": math.inf},
        {"top_k": -1},
        {"top_k": 1.5},
        {"top_p": 0.0},
        {"top_p": 1.1},
        {"min_p": -0.1},
        {"min_p": 2.0},
        {"repetition_penalty": 0.0},
        {"repetition_penalty": math.inf},
    ],
)
def test_values_outside_their_range_are_refused(rules: dict[str, Any]) -> None:
    (name,) = rules
    with pytest.raises(UsageError, match=f"{name} is"):
        Sampling(**rules)
