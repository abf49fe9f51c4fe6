"""A small cost model, calibrated by what was measured: which candidate is worth measuring next.

    cost per product  =  sum over kinds of  w[kind] * instructions of the kind per product
                         * exp( sum over knobs of  r[knob = value] )

The weights w are never negative (least squares on relative errors): a core runs no instruction
for less than nothing. They are what carries over from one shape of a family to another. What counts
cannot tell, such as how far ahead a prefetch looks, is left to the second factor, a ridge
regression on what the first one missed. Without counts the first factor is a constant.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from llamac.targets.tuning.records import KnobValues

Float = NDArray[np.float64]

RIDGE = 1.0  # how many measurements of a knob's value it takes to believe half of its effect
# Measurements of other shapes say how costs differ, less surely than those of this one.
OTHER_SHAPE_WEIGHT = 0.3
_SWEEPS = 300
_FLOOR = 0.02  # of the mean: no candidate is predicted to cost nothing


@dataclass(frozen=True)
class Sample:
    """A measured candidate.

    Attributes:
        shape: text that tells shapes apart.
        features: instructions per product by kind, {} if that is not known.
        knobs: of the candidate.
        cost: of a product, or of a call of kernels without products.
    """

    shape: str
    features: Mapping[str, float]
    knobs: KnobValues
    cost: float


def non_negative_least_squares(a: Float, b: Float) -> Float:
    """Minimize |a x - b| over x >= 0, by coordinate descent.

    Args:
        a: [n, k].
        b: [n].

    Returns:
        x [k].
    """
    gram, target = a.T @ a, a.T @ b
    x = np.zeros(a.shape[1])
    for _ in range(_SWEEPS):
        for i in np.flatnonzero(np.diag(gram)):
            x[i] = max(0.0, x[i] + (target[i] - gram[i] @ x) / gram[i, i])
    return x


class CostModel:
    """Predicts costs of candidates of one kernel from samples of it, and of others of its family.

    Args:
        shape: of the kernel, as in its samples.
    """

    def __init__(self, shape: str) -> None:
        self._shape = shape
        self._kinds: list[str] = []
        self._values: list[tuple[str, int | str]] = []
        self._weights = np.zeros(0)
        self._effects = np.zeros(0)
        self.is_fitted = False

    def fit(self, samples: Sequence[Sample]) -> None:
        """Learn from samples; fewer than two teach nothing."""
        self.is_fitted = len(samples) > 1
        if not self.is_fitted:
            return
        costs = np.array([sample.cost for sample in samples])
        sure = np.array(
            [1.0 if sample.shape == self._shape else OTHER_SHAPE_WEIGHT for sample in samples]
        )
        self._kinds = sorted({kind for sample in samples for kind in sample.features})
        counts = self._counts([sample.features for sample in samples])
        rows = counts / costs[:, None] * sure[:, None]
        self._weights = non_negative_least_squares(rows, sure)
        missed = np.log(costs / self._first(counts))
        self._values = sorted({item for s in samples for item in s.knobs.items()}, key=repr)
        # Shapes differ by a factor that no knob is to blame for.
        shapes = sorted({sample.shape for sample in samples})
        own = np.array([[float(s.shape == shape) for shape in shapes] for s in samples])
        design = np.hstack([self._one_hot([s.knobs for s in samples]), own]) * sure[:, None]
        ridge = np.diag([*([RIDGE] * len(self._values)), *([1e-6] * len(shapes))])
        effects = np.linalg.solve(design.T @ design + ridge, design.T @ (missed * sure))
        self._effects = effects[: len(self._values)]
        shift = effects[len(self._values) :]
        self._shift = float(shift[shapes.index(self._shape)]) if self._shape in shapes else 0.0

    def predict(
        self, features: Sequence[Mapping[str, float]], knobs: Sequence[KnobValues]
    ) -> Float:
        """Costs of candidates, in the unit of the samples.

        Raises:
            ValueError: it was not fitted.
        """
        if not self.is_fitted:
            raise ValueError("the model has seen too few samples")
        first = self._first(self._counts(features))
        factor: Float = np.exp(self._one_hot(knobs) @ self._effects + self._shift)
        return first * factor

    def _counts(self, features: Sequence[Mapping[str, float]]) -> Float:
        """Instructions by kind, and a one for each candidate."""
        rows = [[*(f.get(kind, 0.0) for kind in self._kinds), 1.0] for f in features]
        return np.array(rows)

    def _first(self, counts: Float) -> Float:
        cost: Float = counts @ self._weights
        return np.maximum(cost, max(_FLOOR * float(cost.mean()), 1e-12))

    def _one_hot(self, knobs: Sequence[KnobValues]) -> Float:
        rows = [[float(k.get(name) == value) for name, value in self._values] for k in knobs]
        return np.array(rows).reshape(len(knobs), len(self._values))


def spread(knobs: Sequence[KnobValues], count: int, first: Sequence[int] = ()) -> list[int]:
    """Choose points that are far from each other and from those in `first`.

    The distance is the number of knobs that differ, and a little for how far apart values stand.

    Returns:
        Indices of at most `count` points that are not in `first`.
    """
    ranks = _ranks(knobs)
    chosen = list(first) or [0]
    found = [] if first else [0]
    nearest = np.full(len(knobs), np.inf)
    for index in chosen:
        nearest = np.minimum(nearest, _distance(ranks, index))
    while len(found) < count:
        nearest[chosen] = -1.0
        index = int(np.argmax(nearest))
        if nearest[index] < 0:
            break
        chosen.append(index)
        found.append(index)
        nearest = np.minimum(nearest, _distance(ranks, index))
    return found[:count]


def _ranks(knobs: Sequence[KnobValues]) -> Float:
    """Each knob's value as its place among all values, 0 to 1."""
    names = sorted({name for k in knobs for name in k})
    columns = []
    for name in names:
        values = sorted({k.get(name, "") for k in knobs}, key=lambda v: (isinstance(v, str), v))
        last = max(1, len(values) - 1)
        columns.append([values.index(k.get(name, "")) / last for k in knobs])
    return np.array(columns, dtype=np.float64).T.reshape(len(knobs), len(names))


def _distance(ranks: Float, index: int) -> Float:
    difference = np.abs(ranks - ranks[index])
    result: Float = ((difference > 0) + difference).sum(axis=1)
    return result
