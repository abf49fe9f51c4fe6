"""RMSNorm of int16 codes that keeps its bits, whatever the tokens' sizes.

    y = x / sqrt(mean(x^2) + eps) * gamma

Taken literally it loses most of them. LiteRT computes RSQRT of int16 by lines between 257 points,
128 codes apart: right to 2^-17 for codes above 4000, 2 % off at 256, useless below 128. And the
squares of two tokens that differ by 10 differ by 100. For tokens that differ by 3, 10 and 30 the
literal form reaches 62, 39 and 29 dB, and this one 82, 81 and 80 dB (K = 2048, beside the exact
result for the same codes of x).

Normalizing what is normalized already changes nothing. So tokens are first brought to one size,
roughly, and then normalized exactly:

    rough   s = sum(x^2), r = 1 / sqrt(s) but at most a cap, x = x * r
    exact   s = sum(x^2), which is about 1, y = x * (1 / sqrt(s) * gamma * sqrt(K))

With the cap where s has code 256, tokens whose squares are within a factor of 128 of the largest
come out with a length of 1 to 1.05, and smaller ones shorter. Where tokens differ by more the rough
part is done again. Whatever error it makes is in x when the exact part measures it.

Sums of squares are products of rows with themselves. They are rounded once, where MUL and MEAN
would round every square: of a token with one huge value all others would become 0.

eps counts only where squares are near it. What has been multiplied by r needs eps * r^2 instead.
"""

from __future__ import annotations

import math
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from llamac.schedules.quantized import Quantization, ValueRange
from llamac.targets.neuropilot.operations import Operations
from llamac.targets.neuropilot.tflite_file import Value

LARGEST = 32767
ROUGH_RATIO = 128.0
"""Of the squares of tokens that one rough step brings to one size: LARGEST over code 256."""
SMALLER = 4.0
"""Squares of tokens may be this much smaller than the smallest that were seen."""
OVERSHOOT = 1.06
"""A rough step makes tokens this much too long at most."""
HEADROOM = 1.5
"""Squares of tokens may be this much larger than the largest that were seen."""
EXACT_REACH = 1.15
"""Of squares in the exact step and of what they are divided by; both are about 1."""

_NEGLIGIBLE = 2.0**-14


@dataclass(frozen=True)
class NormRanges:
    """What must be known of a norm.

    Attributes:
        mean_square: of x, the smallest and largest of all tokens.
        largest: magnitude of x / sqrt(mean(x^2)).
    """

    mean_square: ValueRange
    largest: float


def rms_norm(
    ops: Operations,
    x: Value,
    gamma: NDArray[np.float32],
    eps: float,
    ranges: NormRanges,
    scale: float,
) -> Value:
    """Normalize x [T, K] by rows, and multiply by gamma [K]."""
    width = x.shape[1]
    high = max(ranges.mean_square.high * HEADROOM, eps)
    # Tokens below eps need not become longer: what they lack is in the sum with it.
    low = min(max(ranges.mean_square.low / SMALLER, eps), high)
    length_scale = min(1.0, ranges.largest / math.sqrt(width)) * OVERSHOOT / LARGEST
    reach, growth, factors = width * high, 1 / math.sqrt(width * low), []
    for _ in range(max(1, math.ceil(math.log(high / low, ROUGH_RATIO)))):
        square = _sum_of_squares(ops, x, reach)
        cap = min(growth, math.sqrt(ROUGH_RATIO / reach))
        factors.append(ops.rsqrt(square, cap / LARGEST))
        x = ops.multiply(x, factors[-1], length_scale)
        reach, growth = OVERSHOOT**2, growth / cap
    part = eps / low
    square = _sum_of_squares(ops, x, EXACT_REACH + part)
    if part > _NEGLIGIBLE:
        root = _turned_root(ops, factors, math.sqrt(width * eps), math.sqrt(part))
        turned = ops.multiply(root, root, (root.scale * LARGEST) ** 2 / LARGEST)
        square = ops.add(square, turned, square.scale)
    inverse = ops.rsqrt(square, EXACT_REACH / LARGEST)
    codes, gamma_scale = _codes(gamma * math.sqrt(width))
    gains = ops.multiply(
        inverse, ops.file.constant(codes[None], gamma_scale), gamma_scale * EXACT_REACH
    )
    return ops.multiply(x, gains, scale)


def _turned_root(ops: Operations, factors: list[Value], root: float, largest: float) -> Value:
    """sqrt(K * eps) times all rough factors: [T, 1]."""
    scale = largest * OVERSHOOT / LARGEST
    first, *others = factors
    result = ops.multiply(
        first, ops.file.constant(np.array([[LARGEST]], np.int16), root / LARGEST), scale
    )
    for factor in others:
        result = ops.multiply(result, factor, scale)
    return result


def _sum_of_squares(ops: Operations, x: Value, reach: float) -> Value:
    """Sums over rows, up to `reach`: [T, K] -> [T, 1]."""
    tokens, width = x.shape
    rows = ops.reshape(x, tokens, 1, width)
    return ops.reshape(ops.matmul(rows, rows, reach / LARGEST, transpose_y=True), tokens, 1)


def _codes(values: NDArray[np.float32]) -> tuple[NDArray[np.int16], float]:
    """Values as int16 codes, and their scale."""
    limit = float(np.abs(values).max())
    made = Quantization.symmetric(ValueRange(-limit, limit), "int16")
    return made.quantize(values), made.scale
