"""Choose the next token from a row of logits.

Every step is a function of one float32 row. The filters return the indices that they keep, so that
later steps work on few candidates and not on the 128 thousand entries of a vocabulary. Order, as in
most runtimes: repetition penalty, temperature, top-k, top-p, min-p, draw.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from llamac.runtime.errors import DeviceError, UsageError

__all__ = [
    "Sampling",
    "draw",
    "keep_min_p",
    "keep_top_k",
    "keep_top_p",
    "penalize_repetition",
    "sample",
    "softmax",
]

Row = NDArray[np.float32]
Indices = NDArray[np.intp]

_FIRST_NUCLEUS = 256


@dataclass(frozen=True)
class Sampling:
    """How tokens are chosen; the defaults choose the most likely one.

    Args:
        temperature: divides the logits; 0 takes the highest one and ignores the filters.
        top_k: keep the `top_k` highest logits; 0 keeps all.
        top_p: keep the smallest set of tokens whose probabilities sum to `top_p`; 1 keeps all.
        min_p: keep tokens at least `min_p` times as probable as the best one; 0 keeps all.
        repetition_penalty: make tokens of the context less likely by this factor; 1 does nothing.

    Raises:
        UsageError: a value is outside its range.
    """

    temperature: float = 0.0
    top_k: int = 0
    top_p: float = 1.0
    min_p: float = 0.0
    repetition_penalty: float = 1.0

    def __post_init__(self) -> None:
        _require(0 <= self.temperature < math.inf, "temperature", self.temperature, "0 or more")
        is_count = isinstance(self.top_k, int) and self.top_k >= 0
        _require(is_count, "top_k", self.top_k, "0 or a positive whole number")
        _require(0 < self.top_p <= 1, "top_p", self.top_p, "more than 0 and at most 1")
        _require(0 <= self.min_p <= 1, "min_p", self.min_p, "from 0 to 1")
        is_factor = 0 < self.repetition_penalty < math.inf
        _require(is_factor, "repetition_penalty", self.repetition_penalty, "more than 0")

    @property
    def is_greedy(self) -> bool:
        """Whether the token is always the one with the highest logit, unchanged."""
        return self.temperature == 0 and self.repetition_penalty == 1


def _require(holds: bool, name: str, value: object, allowed: str) -> None:
    if not holds:
        raise UsageError(
            f"{name} is {value!r}; it must be {allowed}",
            cause="a sampling parameter is outside its range",
            fix=f"give a {name} that is {allowed}",
        )


def sample(
    logits: Row, context: Sequence[int], sampling: Sampling, random: np.random.Generator
) -> int:
    """Return the next token id.

    Args:
        logits: (vocab) float32; not changed.
        context: token ids that the repetition penalty looks at.
        sampling: the rules.
        random: source of chance; one number is drawn unless the temperature is 0.

    Raises:
        DeviceError: the best logit is not a finite number.
    """
    row = penalize_repetition(logits, context, sampling.repetition_penalty)
    best = int(row.argmax())
    if not np.isfinite(row[best]):
        raise DeviceError(
            f"the model computed {row[best]} as its best logit",
            cause="the computation overflowed, or the weights are damaged",
            fix="check the bundle with `llamac verify`",
        )
    if sampling.temperature == 0:
        return best
    # Subtracting the best logit first keeps a tiny temperature from overflowing.
    row = (row - row[best]) / np.float32(max(sampling.temperature, 1e-6))
    tokens: Indices | None = None
    if 0 < sampling.top_k < len(row):
        tokens, row = _select(keep_top_k(row, sampling.top_k), tokens, row)
    if sampling.top_p < 1:
        tokens, row = _select(keep_top_p(row, sampling.top_p), tokens, row)
    if sampling.min_p > 0:
        tokens, row = _select(keep_min_p(row, sampling.min_p), tokens, row)
    index = draw(row, random)
    return index if tokens is None else int(tokens[index])


def _select(kept: Indices, tokens: Indices | None, row: Row) -> tuple[Indices, Row]:
    return kept if tokens is None else tokens[kept], row[kept]


def penalize_repetition(logits: Row, context: Sequence[int], penalty: float) -> Row:
    """Return the logits with those of tokens in `context` divided (negative: multiplied)."""
    if penalty == 1 or len(context) == 0:
        return logits
    seen = np.unique(np.asarray(context, dtype=np.intp))
    values = logits[seen]
    row = logits.copy()
    row[seen] = np.where(values > 0, values / penalty, values * penalty)
    return row


def keep_top_k(row: Row, k: int) -> Indices:
    """Return the indices of the `k` highest entries, in any order."""
    return np.argpartition(row, len(row) - k)[len(row) - k :]


def keep_top_p(row: Row, p: float) -> Indices:
    """Return the fewest indices whose probabilities sum to at least `p`, best first.

    Sorts only the best few hundred candidates, and more only if they do not reach `p`.
    """
    probabilities = softmax(row)
    count = min(_FIRST_NUCLEUS, len(row))
    while True:
        best = keep_top_k(row, count)
        best = best[np.argsort(-row[best])]
        mass = np.cumsum(probabilities[best])
        if mass[-1] >= p or count == len(row):
            return best[: int(np.searchsorted(mass, p)) + 1]
        count = min(8 * count, len(row))


def keep_min_p(row: Row, min_p: float) -> Indices:
    """Return the indices of entries at least `min_p` times as probable as the best one."""
    return np.flatnonzero(row >= row.max() + np.float32(math.log(min_p)))


def draw(row: Row, random: np.random.Generator) -> int:
    """Return an index, each with the probability that the softmax of the row gives it."""
    mass = np.cumsum(softmax(row))
    # `random()` is below 1, so that the product stays below the last sum and the index in range.
    return int(np.searchsorted(mass, random.random() * mass[-1], side="right"))


def softmax(row: Row) -> NDArray[np.float64]:
    """Return the probabilities of a row of logits, in float64."""
    # exp in float32 is several times faster and exact enough; the sum of 128 thousand is not.
    weights: NDArray[np.float64] = np.exp(row - row.max()).astype(np.float64)
    weights /= weights.sum()
    return weights
