"""The cost model learns weights that carry over, what knobs add, and spreads first points."""

from __future__ import annotations

import itertools
from typing import Any

import numpy as np
import pytest

from llamac.compiler.tuning.cost_model import (
    CostModel,
    Sample,
    non_negative_least_squares,
    spread,
)


def test_least_squares_are_exact_where_they_can_be() -> None:
    rng = np.random.default_rng(0)
    a, x = rng.uniform(size=(30, 4)), np.array([2.0, 0.0, 0.5, 1.0])
    np.testing.assert_allclose(non_negative_least_squares(a, a @ x), x, atol=1e-3)


def test_weights_are_never_negative() -> None:
    """A count that goes with lower costs gets no weight, and the others are fitted without it."""
    a = np.array([[1.0, 0.0], [1.0, 1.0], [1.0, 2.0]])
    x = non_negative_least_squares(a, np.array([3.0, 2.0, 1.0]))
    np.testing.assert_allclose(x, [2.0, 0.0], atol=1e-6)


def space() -> list[tuple[dict[str, float], dict[str, Any]]]:
    """Tiles as those of a product: loads are shared by the tokens of a tile, spills cost."""
    points = []
    for mr, unroll in itertools.product((1, 2, 4, 6, 8, 12), (1, 2, 4)):
        spill = max(0, mr - 8) / 8
        points.append(({"load": 1 / mr, "spill": spill}, {"mr": mr, "unroll": unroll}))
    return points


def true_cost(features: dict[str, float], knobs: dict[str, Any]) -> float:
    extra = {1: 1.0, 2: 0.9, 4: 1.1}[knobs["unroll"]]
    return (1 + 3 * features["load"] + 2 * features["spill"]) * extra


def sample(shape: str, point: Any, factor: float = 1.0) -> Sample:
    return Sample(shape, *point, true_cost(*point) * factor)


def errors(model: CostModel) -> Any:
    predicted = model.predict([f for f, _ in space()], [k for _, k in space()])
    actual = np.array([true_cost(*point) for point in space()])
    return np.abs(predicted / actual - 1), predicted, actual


def test_some_samples_tell_the_rest() -> None:
    """Eight of eighteen points: the best one is predicted to be among the best three."""
    model = CostModel("a")
    knobs = [k for _, k in space()]
    model.fit([sample("a", space()[i]) for i in spread(knobs, 8)])
    found, predicted, actual = errors(model)
    assert np.median(found) < 0.1
    assert np.argmin(actual) in np.argsort(predicted)[:3]


def test_another_shape_calibrates() -> None:
    """Samples of another shape that is slower altogether rank the points of this one."""
    model = CostModel("b")
    model.fit([sample("a", point, 1.7) for point in space()])
    _, predicted, actual = errors(model)
    ranks = np.corrcoef(np.argsort(np.argsort(predicted)), np.argsort(np.argsort(actual)))[0, 1]
    assert ranks > 0.95


def test_own_samples_outweigh_those_of_others() -> None:
    """Where the two disagree about a knob, this shape is believed."""
    other = [Sample("a", {}, {"mr": mr}, cost) for mr, cost in ((1, 1.0), (2, 2.0)) for _ in "123"]
    own = [Sample("b", {}, {"mr": mr}, cost) for mr, cost in ((1, 2.0), (2, 1.0)) for _ in "123"]
    model = CostModel("b")
    model.fit([*other, *own])
    one, two = model.predict([{}, {}], [{"mr": 1}, {"mr": 2}])
    assert two < one


def test_without_counts_knobs_alone_decide() -> None:
    model = CostModel("a")
    points = [(1, 4.0), (2, 2.0), (4, 3.0)] * 3
    model.fit([Sample("a", {}, {"radix": radix}, cost) for radix, cost in points])
    costs = model.predict([{}] * 3, [{"radix": r} for r in (1, 2, 4)])
    assert np.argsort(costs).tolist() == [1, 2, 0]


def test_one_sample_teaches_nothing() -> None:
    model = CostModel("a")
    model.fit([sample("a", space()[0])])
    assert not model.is_fitted
    with pytest.raises(ValueError, match="too few"):
        model.predict([{}], [{}])


def test_predictions_are_positive() -> None:
    """Even far from what was seen."""
    model = CostModel("a")
    model.fit([sample("a", point) for point in space()[:6]])
    assert (model.predict([{}, {"load": 100.0}], [{}, {"mr": 99}]) > 0).all()


def test_first_points_are_spread() -> None:
    """The default, then its opposite; every value of a knob comes before many come twice."""
    knobs = [k for _, k in space()]
    chosen = spread(knobs, 6)
    assert chosen[0] == 0
    assert len(set(chosen)) == 6
    assert knobs[chosen[1]] == {"mr": 12, "unroll": 4}
    assert {knobs[i]["unroll"] for i in chosen} == {1, 2, 4}


def test_points_that_are_known_are_not_chosen_again() -> None:
    knobs = [{"mr": mr} for mr in (1, 2, 4)]
    assert sorted(spread(knobs, 5, [1])) == [0, 2]
    assert spread(knobs, 5, [0, 1, 2]) == []
    assert sorted(spread(knobs, 9)) == [0, 1, 2]
