"""RoPE and attention of int16 codes, over caches whose unused places hold anything.

LiteRT's SOFTMAX of int16 takes exp() from a table of [-10, 0], so that whatever is masked, however
low, keeps 2^-14 of the largest weight: 512 such places take 3 % of the attention, 2048 take 11 %,
and what they hold gets into the result. So weights are also multiplied by 0 where nothing is to be
seen, and the result is divided by the sum of those that are left. This makes up for the table's
other errors as well. A processor whose exp() is right loses nothing by it.
"""

from __future__ import annotations

import numpy as np

from llamac.targets.neuropilot.operations import UNIT_SCALE, Operations
from llamac.targets.neuropilot.tflite_file import Value

BELOW = 12.0
"""How far masked scores are below all others at least; SOFTMAX takes 10 for infinite."""

LEAST_SUM = 0.4
"""Of the weights that are seen: 1, less 2^-14 for each place of a cache."""

_LARGEST = 32767


class Positions:
    """What depends on the places of tokens, made once for all layers.

    Args:
        ops: where operations go.
        cos: [T, 1, D/2, 1], a row of the RoPE table for each token.
        sin: the same.
        mask: [T, C + T], 0 or `masked` of the scores' range.
    """

    def __init__(self, ops: Operations, cos: Value, sin: Value, mask: Value) -> None:
        self._ops = ops
        self._turns = {1.0: self._rotations(cos, sin)}
        self.mask = ops.reshape(mask, 1, *mask.shape)
        # 1 where a key is seen, 0 where not; exact.
        seen = ops.add(self.mask, self._number(-_lowest(mask)), mask.scale)
        self.seen = self._times(seen, -1 / _lowest(mask))

    @staticmethod
    def masked(largest_score: float) -> float:
        """The mask where nothing is to be seen, for scores of at most that magnitude."""
        return -(2 * largest_score + BELOW)

    def turn(self, x: Value, size: int, factor: float, scale: float) -> Value:
        """Rotate the pairs of x [T, H * D] by the tokens' angles, times a factor: [T, H, D]."""
        if factor not in self._turns:
            self._turns[factor] = self._times(self._turns[1.0], factor)
        tokens, width = x.shape
        heads = self._ops.reshape(x, tokens, width // size, size)
        return self._ops.matmul(heads, self._turns[factor], scale)

    def _rotations(self, cos: Value, sin: Value) -> Value:
        """Matrices that turn rows [D] when multiplied from the right: [T, D, D].

        One product is rounded once, where two products and a sum are rounded three times.
        """
        ops, (tokens, _, half, _) = self._ops, cos.shape
        size = 2 * half
        places = np.zeros((2, size, size, half), np.int8)
        for i in range(half):
            even, odd = 2 * i, 2 * i + 1
            places[0, even, even, i] = places[0, odd, odd, i] = 1
            places[1, even, odd, i], places[1, odd, even, i] = 1, -1
        parts = (
            ops.signs(ops.reshape(x, tokens, half), where.reshape(-1, half), 1.0, x.scale)
            for x, where in zip((cos, sin), places, strict=True)
        )
        along, across = parts
        return ops.reshape(ops.add(along, across, cos.scale), tokens, size, size)

    def _times(self, x: Value, factor: float) -> Value:
        """The same codes for values that are a factor larger."""
        return self._ops.multiply(x, self._number(factor), x.scale * factor)

    def _number(self, value: float) -> Value:
        """A number [1, 1, 1], exactly."""
        codes = np.array([[[_LARGEST]]], np.int16)
        return self._ops.file.constant(codes, value / _LARGEST)


def _lowest(mask: Value) -> float:
    """The value of the code of a mask where nothing is seen."""
    return -mask.scale * _LARGEST


class Attention:
    """Attention of one layer.

    Args:
        ops: where operations go.
        positions: of the tokens.
        largest_score: magnitude of what queries (already divided by sqrt(D)) times keys may be.
        scale: of the result.
    """

    def __init__(
        self, ops: Operations, positions: Positions, largest_score: float, scale: float
    ) -> None:
        self._ops, self._positions = ops, positions
        self._largest, self._scale = largest_score, scale

    def rows(self, x: Value, heads: int) -> Value:
        """New keys or values as the caches have them: [T, ...] -> [Hkv, T, D]."""
        tokens = x.shape[0]
        size = int(np.prod(x.shape[1:])) // heads
        return self._ops.transpose(self._ops.reshape(x, tokens, heads, size), 1, 0, 2)

    def attend(self, q: Value, caches: list[Value], new: list[Value]) -> Value:
        """Attend over the caches and then over the new rows.

        Args:
            q: [T, H, D].
            caches: keys [Hkv, C/16, D, 16] and values [Hkv, C, D].
            new: keys and values [Hkv, T, D].

        Returns:
            [T, H * D].
        """
        ops, (tokens, heads, size), (groups, capacity, _) = self._ops, q.shape, caches[1].shape
        per = heads // groups
        past = ops.transpose(caches[0], 0, 2, 1, 3)
        past = ops.reshape(past, groups, size, capacity)
        keys = ops.concatenate([past, ops.transpose(new[0], 0, 2, 1)], axis=2)
        values = ops.concatenate([caches[1], new[1]], axis=1)
        rows = ops.transpose(ops.reshape(q, tokens, groups, per, size), 1, 2, 0, 3)
        rows = ops.reshape(rows, groups, per * tokens, size)
        scores = ops.matmul(rows, keys, self._largest / _LARGEST)
        mixed, inverse = self._weights(ops.reshape(scores, heads, tokens, capacity + tokens))
        mixed = ops.reshape(mixed, groups, per * tokens, capacity + tokens)
        out = ops.matmul(mixed, values, self._scale)
        out = ops.multiply(out, ops.reshape(inverse, groups, per * tokens, 1), self._scale)
        out = ops.transpose(ops.reshape(out, groups, per, tokens, size), 2, 0, 1, 3)
        return ops.reshape(out, tokens, heads * size)

    def _weights(self, scores: Value) -> tuple[Value, Value]:
        """Weights of all places [H, T, C + T], and what they must be multiplied by [H * T, 1]."""
        ops, (heads, tokens, places) = self._ops, scores.shape
        # Whatever unused places hold, their scores are clamped to the largest before the mask.
        low = ops.add(scores, self._positions.mask, (self._largest + BELOW) / _LARGEST)
        weights = ops.multiply(ops.softmax(low), self._positions.seen, UNIT_SCALE)
        ones = np.ones((1, places), np.int8)
        flat = ops.reshape(weights, heads * tokens, places)
        # 1 is code 16384: RSQRT is right to 2^-17 there.
        total = ops.signs(flat, ones, 1.0, 2 * UNIT_SCALE)
        root = ops.rsqrt(total, LEAST_SUM**-0.5 / _LARGEST)
        return weights, ops.multiply(root, root, 1 / LEAST_SUM / _LARGEST)
