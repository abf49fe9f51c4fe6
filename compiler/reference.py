"""The arithmetic of every composite, once, in NumPy.

Kernels of all processors are tested against these functions. Everything is float64, with one
exception: the rules that make int8 codes from activations run in float32 step by step, because a
kernel runs them so and its codes must come out equal, not merely close. See `docs/numerics.md`.

Letters in shapes: T tokens, K input features, N output features, G groups of columns per row,
H heads, Hkv key/value heads, D head size, P positions, V vocabulary.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from typing import Any, NamedTuple

import numpy as np
from numpy.typing import ArrayLike, NDArray

from llamac.compiler.floats import widen

Float64 = NDArray[np.float64]

# Rows of a weight are widened to float64 in blocks of this many elements (8 MiB), so that the
# largest weight of a model costs no more memory than a small one.
BLOCK_ELEMENTS = 1 << 20

_F32 = np.float32
_MIN_SCALE = _F32(2.0**-23)


class Quantized(NamedTuple):
    """Activations as int8 codes: value = scale * (code - zero_point).

    Attributes:
        codes: [..., K] int8.
        scale: [...] float32, positive.
        zero_point: [...] int32 in [-128, 127].
    """

    codes: NDArray[np.int8]
    scale: NDArray[np.float32]
    zero_point: NDArray[np.int32]

    def dequantize(self) -> Float64:
        """The values the codes stand for, [..., K] float64, exact products."""
        return self.centred() * self.scale.astype(np.float64)[..., None]

    def centred(self) -> Float64:
        """The codes minus their zero point, [..., K] float64 (integers in [-255, 255])."""
        return self.codes.astype(np.float64) - self.zero_point[..., None]


class Lora(NamedTuple):
    """A low-rank branch: scale * (x @ a.T) @ b.T.

    Attributes:
        a: [rank, K] float.
        b: [N, rank] float.
        scale: factor of the branch (Meta's `lora_args.scale`).
    """

    a: NDArray[Any]
    b: NDArray[Any]
    scale: float


def _range_with_zero(x: ArrayLike) -> tuple[NDArray[np.float32], ...]:
    """`x` as float32 with its smallest and largest value per row, widened to contain 0."""
    values = np.asarray(x, _F32)
    low = np.minimum(values.min(-1, keepdims=True), _F32(0))
    high = np.maximum(values.max(-1, keepdims=True), _F32(0))
    return values, low, high


def quantize_per_token(x: ArrayLike) -> Quantized:
    """Make int8 codes by the rule "torchao", the default on every CPU.

    All steps are float32; ties round to even; the scale is at least 2^-23, so an all-zero row has
    scale 2^-23, zero point -128 and codes -128.

    Args:
        x: [..., K], finite, cast to float32.

    Returns:
        codes [..., K] int8, scale [...] float32, zero_point [...] int32.

    Source: equal to torchao 0.18's `choose_qparams_affine` and `quantize_affine`.
    """
    values, low, high = _range_with_zero(x)
    scale = np.maximum((high - low) / _F32(255), _MIN_SCALE)
    zero = np.clip(_F32(-128) - np.rint(low / scale), _F32(-128), _F32(127))
    codes = np.clip(np.rint(values * (_F32(1) / scale)) + zero, _F32(-128), _F32(127))
    return Quantized(codes.astype(np.int8), scale[..., 0], zero[..., 0].astype(np.int32))


def quantize_per_token_xnnpack(x: ArrayLike) -> Quantized:
    """Make int8 codes by the rule "xnnpack": what ExecuTorch's CPU back end does.

    The zero point comes from the end of the range with the smaller error, there is no smallest
    scale, and values are clamped before they are rounded (to even).

    Args:
        x: [..., K], finite, cast to float32; the range of a row is 0 or at least 1e-36.

    Returns:
        codes [..., K] int8, scale [...] float32, zero_point [...] int32.

    Source: XNNPACK's `qd8` operators.
    """
    values, low, high = _range_with_zero(x)
    span = high - low
    inverse = _F32(255) / np.where(span == 0, _F32(255), span)
    scaled_low, scaled_high = low * inverse, high * inverse
    low_error, high_error = _F32(-128) + scaled_low, _F32(127) + scaled_high
    zero = np.where(low_error + high_error > 0, _F32(-128) - scaled_low, _F32(127) - scaled_high)
    zero = np.rint(np.clip(zero, _F32(-128), _F32(127)))
    codes = np.rint(np.clip(values * inverse, _F32(-128) - zero, _F32(127) - zero)) + zero
    scale = np.asarray(_F32(1) / inverse, _F32)
    return Quantized(codes.astype(np.int8), scale[..., 0], zero[..., 0].astype(np.int32))


# The names that `QuantConfig.activation_rule` and the manifest use.
RULES: dict[str, Callable[[ArrayLike], Quantized]] = {
    "torchao": quantize_per_token,
    "xnnpack": quantize_per_token_xnnpack,
}


def group_sums(codes: NDArray[np.int8], group: int) -> NDArray[np.int32]:
    """Sum int8 codes over groups of `group` columns: [..., K] int8 -> [..., K/group] int32."""
    grouped = codes.reshape(*codes.shape[:-1], -1, group)
    return np.asarray(grouped.sum(-1, dtype=np.int32))


def embedding(tokens: ArrayLike, table: NDArray[np.int8], scales: NDArray[np.float32]) -> Float64:
    """Rows of an int8 table: tokens [T], table [V, K] int8, scales [V] float32 -> [T, K]."""
    rows = np.asarray(tokens)
    return widen(table[rows]) * widen(scales[rows])[:, None]


def embedding_float(tokens: ArrayLike, table: NDArray[Any]) -> Float64:
    """Rows of a float table: tokens [T], table [V, K] float or bfloat16 bits -> [T, K]."""
    return widen(table[np.asarray(tokens)])


def rms_norm(x: ArrayLike, gamma: ArrayLike, eps: float) -> Float64:
    """`x / sqrt(mean(x^2) + eps) * gamma` over the last axis; gamma [K]."""
    values = np.asarray(x, np.float64)
    mean_square = np.mean(values * values, axis=-1, keepdims=True)
    return np.asarray(values / np.sqrt(mean_square + eps) * np.asarray(gamma, np.float64))


def _row_blocks(weight: NDArray[Any]) -> Iterator[slice]:
    """Cut the rows of a [N, K] weight into blocks of about BLOCK_ELEMENTS elements."""
    step = max(1, BLOCK_ELEMENTS // weight.shape[1])
    for start in range(0, weight.shape[0], step):
        yield slice(start, start + step)


def _codes_of(x: ArrayLike | Quantized, rule: str) -> Quantized:
    return x if isinstance(x, Quantized) else RULES[rule](x)


def qlinear_int4(
    x: ArrayLike | Quantized,
    weight: NDArray[np.int8],
    scales: NDArray[Any],
    lora: Lora | None = None,
    *,
    rule: str = "torchao",
) -> Float64:
    """Multiply int8 activations by int4 weights with one scale per group of columns.

    The value is `s * sum_k (q[k] - zp) * ws[k / group] * qw[k]`. A kernel computes the same as
    `s * (sum_g ws[g] * dot_g - zp * sum_g ws[g] * sum(qw_g))` with an exact int32 dot per group.
    Here each product (9 bits x 24 bits x 4 bits) is exact in float64, and the sum of K of them
    is off by at most K * 2^-53 of the sum of their magnitudes: nothing, beside float32.

    Args:
        x: [T, K] float (quantized here by `rule`) or codes.
        weight: [N, K] int8, values -8..7.
        scales: [N, G] float; K / G columns share one.
        lora: branch on the unquantized input, added to the result.
        rule: a key of RULES; unused when `x` is already codes.

    Returns:
        [T, N] float64.

    Raises:
        ValueError: `lora` is given with codes: it needs the unquantized input.
    """
    if lora is not None and isinstance(x, Quantized):
        raise ValueError("the LoRA branch needs the unquantized input, not codes")
    codes = _codes_of(x, rule)
    centred = codes.centred()
    num_rows, num_groups = scales.shape
    result = np.empty((len(centred), num_rows))
    for rows in _row_blocks(weight):
        block = (
            weight[rows].astype(np.float64).reshape(-1, num_groups, weight.shape[1] // num_groups)
        )
        block *= scales[rows].astype(np.float64)[:, :, None]
        np.matmul(centred, block.reshape(len(block), -1).T, out=result[:, rows])
    result *= codes.scale.astype(np.float64)[:, None]
    return result if lora is None else result + lora_branch(x, lora)


def qlinear_int8(
    x: ArrayLike | Quantized,
    weight: NDArray[np.int8],
    scales: NDArray[Any],
    *,
    rule: str = "torchao",
) -> Float64:
    """Multiply int8 activations by int8 weights with one scale per row (the output layer).

    The integer dot is exact: |sum| <= 255 * 128 * K stays far below 2^53.

    Args:
        x: [T, K] float (quantized here by `rule`) or codes.
        weight: [N, K] int8.
        scales: [N] float.
        rule: a key of RULES; unused when `x` is already codes.

    Returns:
        [T, N] float64.
    """
    codes = _codes_of(x, rule)
    result = linear(codes.centred(), weight)
    result *= scales.astype(np.float64)
    result *= codes.scale.astype(np.float64)[:, None]
    return result


def linear(x: ArrayLike, weight: NDArray[Any]) -> Float64:
    """`x @ weight.T`: x [T, K], weight [N, K] of any dtype `widen` knows -> [T, N]."""
    values = np.asarray(x, np.float64)
    result = np.empty((len(values), len(weight)))
    for rows in _row_blocks(weight):
        np.matmul(values, widen(weight[rows]).T, out=result[:, rows])
    return result


def lora_branch(x: ArrayLike, lora: Lora) -> Float64:
    """`scale * (x @ a.T) @ b.T` on the unquantized input: [T, K] -> [T, N]."""
    return lora.scale * linear(linear(x, lora.a), lora.b)


def hadamard(x: ArrayLike) -> Float64:
    """Orthonormal Walsh-Hadamard transform of the last axis, natural (Sylvester) order.

    Equal to `x @ H / sqrt(n)` with `H = [[1, 1], [1, -1]] (x) ...`; its own inverse.

    Raises:
        ValueError: the length is not a power of two.
    """
    values = np.array(x, np.float64)
    length = values.shape[-1]
    if length < 1 or length & (length - 1):
        raise ValueError(f"the Hadamard transform needs a power of two, not {length}")
    half = 1
    while half < length:
        pairs = values.reshape(*values.shape[:-1], length // (2 * half), 2, half)
        first, second = pairs[..., 0, :], pairs[..., 1, :]
        values = np.stack([first + second, first - second], axis=-2).reshape(values.shape)
        half *= 2
    return np.asarray(values / np.sqrt(length))


def rope(x: ArrayLike, table: ArrayLike) -> Float64:
    """Rotate interleaved pairs (2i, 2i+1).

    Args:
        x: [T, H, D].
        table: [T, D/2, 2] (cos, sin): rows of `config.rope_table` for the tokens' positions.

    Returns:
        [T, H, D] float64.
    """
    values = np.asarray(x, np.float64)
    rows = np.asarray(table, np.float64)[:, None]
    cos, sin = rows[..., 0], rows[..., 1]
    even, odd = values[..., 0::2], values[..., 1::2]
    rotated = np.stack([even * cos - odd * sin, even * sin + odd * cos], axis=-1)
    return rotated.reshape(values.shape)


def attention(q: ArrayLike, k: ArrayLike, v: ArrayLike, position: int) -> Float64:
    """Causal attention with grouped queries over a cache.

    Query t stands at `position + t` and sees the keys 0 .. position + t; query head h reads
    key/value head h // (H / Hkv). Scores are divided by sqrt(D).

    Args:
        q: [T, H, D] after RoPE.
        k: [P, Hkv, D] after RoPE, P >= position + T (later rows are ignored).
        v: [P, Hkv, D].
        position: of the first query.

    Returns:
        [T, H, D] float64.
    """
    queries, values = np.asarray(q, np.float64), np.asarray(v)
    heads_per_kv = queries.shape[1] // values.shape[1]
    end = position + len(queries)
    result = np.empty_like(queries)
    for head, scores in enumerate(attention_scores(q, k, position)):
        weights = np.exp(scores - scores.max(-1, keepdims=True))
        weights /= weights.sum(-1, keepdims=True)
        result[:, head] = weights @ values[:end, head // heads_per_kv].astype(np.float64)
    return result


def attention_scores(q: ArrayLike, k: ArrayLike, position: int) -> Iterator[Float64]:
    """Scores of `attention`, head by head: [T, position + T], -inf where a key is not seen."""
    queries = np.asarray(q, np.float64)
    num_tokens, num_heads, head_dim = queries.shape
    end = position + num_tokens
    keys = np.asarray(k)[:end].astype(np.float64)
    hidden = np.arange(end) > position + np.arange(num_tokens)[:, None]
    heads_per_kv = num_heads // keys.shape[1]
    for head in range(num_heads):
        scores = queries[:, head] @ keys[:, head // heads_per_kv].T / np.sqrt(head_dim)
        scores[hidden] = -np.inf
        yield scores


def quantize_kv(x: ArrayLike) -> Quantized:
    """Codes of an int8 KV cache, per (position, head), by the rule "torchao".

    Args:
        x: [P, Hkv, D].

    Returns:
        codes [P, Hkv, D] int8, scale [P, Hkv] float32, zero_point [P, Hkv] int32 (fits int8).
    """
    return quantize_per_token(x)


def dequantize_kv(cache: Quantized) -> Float64:
    """The keys or values of an int8 KV cache: [P, Hkv, D] float64."""
    return cache.dequantize()


def swiglu(gate: ArrayLike, up: ArrayLike) -> Float64:
    """`gate * sigmoid(gate) * up`, elementwise, with no overflow for any finite gate."""
    g = np.asarray(gate, np.float64)
    decay = np.exp(-np.abs(g))
    sigmoid = np.where(g >= 0, 1.0, decay) / (1.0 + decay)
    return g * sigmoid * np.asarray(up, np.float64)


def argmax(logits: ArrayLike) -> NDArray[np.int32]:
    """The index of the largest logit, the lowest one on ties: [..., V] -> [...] int32."""
    return np.asarray(np.argmax(np.asarray(logits), axis=-1), np.int32)


def sqnr_db(reference: ArrayLike, value: ArrayLike) -> float:
    """Signal to quantization noise in dB: 10 log10(sum(r^2) / sum((r - v)^2)).

    Returns:
        +inf when both are equal, -inf when they are not and the reference is all zero or the
        value is not finite.
    """
    signal = np.asarray(reference, np.float64)
    noise = signal - np.asarray(value, np.float64)
    signal_power, noise_power = float(np.sum(signal * signal)), float(np.sum(noise * noise))
    if noise_power == 0.0:
        return float("inf")
    if signal_power == 0.0 or not np.isfinite(noise_power):
        return float("-inf")
    return float(10.0 * np.log10(signal_power / noise_power))
