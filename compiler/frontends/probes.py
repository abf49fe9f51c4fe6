"""Find out what a part of a graph computes, by computing it.

A Llama's weights cut its graph into pieces without matrices: what stands before a layer's first
products is a norm, between q, k, v and the output projection is attention, and so on. Each piece
is given numbers of our choice, in float64, and must answer like `reference.py`. Its constants
(epsilon, the size of a head, the angles of RoPE) are read off from answers. So it does not matter
how a model was written, or what an exporter made of it.

T tokens, K width of the residual stream, D size of a head.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass

import numpy as np

from llamac.compiler import reference
from llamac.compiler.config import LlamaConfig, rope_table
from llamac.compiler.frontends.graph import relative_error
from llamac.compiler.frontends.hf_tensors import interleaved_order
from llamac.compiler.reference import Float64

Piece = Callable[..., Float64]
"""A piece of a graph: arrays [T, ...] to an array [T, ...], or [1, ...] of the last token."""

EXACT = 1e-6
"""Largest relative error of what is computed from float64 alone."""

FROM_FLOAT32 = 1e-4
"""The same where the graph has constants of float32 in it: angles of RoPE, a table of cosines."""

FROM_BFLOAT16 = 0.01
"""The same where the scale of attention was rounded to bfloat16: half of it for q, half for k."""

LEAST_TOKENS = 4
_ROLES = 3


class NotRecognized(Exception):
    """A piece answers differently; the text says what was expected and what came."""


def random_rows(rows: int, columns: int, seed: int) -> Float64:
    """Normal numbers, [rows, columns]."""
    return np.random.default_rng(seed).standard_normal((rows, columns))


def same_rows(found: Float64, expected: Float64) -> float:
    """Relative error, of the last row if only that was computed."""
    return relative_error(found, expected[len(expected) - len(found) :])


# -- Norms ----------------------------------------------------------------------------------------


def probe_norm(piece: Piece, num_terms: int, gamma: Float64, tokens: int) -> float:
    """Prove that a piece is the RMSNorm of the sum of its arguments; return its epsilon.

    Args:
        piece: of `num_terms` arrays [T, K].
        num_terms: what was added to the residual stream so far.
        gamma: its weights, [K].
        tokens: T.

    Raises:
        NotRecognized: it is something else.
    """
    terms = [random_rows(tokens, len(gamma), seed) for seed in range(num_terms)]
    eps = _measure_eps(piece, terms, gamma)
    error = same_rows(piece(*terms), reference.rms_norm(np.sum(terms, axis=0), gamma, eps))
    if error > EXACT:
        raise NotRecognized(
            f"is no RMSNorm of the residual stream: it is off by {error:.1e} with eps {eps:g}"
        )
    return eps


def _measure_eps(piece: Piece, terms: Sequence[Float64], gamma: Float64) -> float:
    """What is added to the mean square: of small numbers it decides how large the answer is."""
    small = [1e-4 * term for term in terms]
    total = np.sum(small, axis=0)
    answer = piece(*small)
    total = total[len(total) - len(answer) :]
    place = np.abs(total * gamma).argmax(-1)[:, None]
    ratio = np.take_along_axis(answer, place, -1) / np.take_along_axis(total * gamma, place, -1)
    with np.errstate(all="ignore"):
        eps = float(np.mean(1 / ratio**2 - np.mean(total**2, axis=-1, keepdims=True)))
    if not (np.isfinite(eps) and 0 < eps < 1):
        raise NotRecognized(f"is no RMSNorm: its epsilon would be {eps:g}")
    return shortest(eps, 1e-6)


def shortest(value: float, tolerance: float) -> float:
    """The decimal number with the fewest digits that is as near as that, relatively."""
    for digits in range(1, 17):
        rounded = float(f"{value:.{digits}g}")
        if abs(rounded - value) <= tolerance * abs(value):
            return rounded
    return value


# -- Attention ------------------------------------------------------------------------------------


def sort_attention(piece: Piece, widths: Sequence[int], tokens: int) -> tuple[int, int, int]:
    """Tell which of three arguments is q, which k, which v.

    What the second token asks for (q) changes its own answer only; what it offers (k, v) changes
    those of later tokens, too; and doubling all v doubles the answers.

    Raises:
        NotRecognized: earlier tokens see later ones, or the roles are not clear.
    """
    given = [random_rows(tokens, width, 10 + i) for i, width in enumerate(widths)]
    before = piece(*given)
    asks, offers = list[int](), list[int]()
    for i in range(_ROLES):
        changed = [array.copy() for array in given]
        changed[i][1] = random_rows(1, widths[i], 20 + i)[0]
        rows = np.abs(piece(*changed) - before).max(-1) > 0
        if rows[0]:
            raise NotRecognized("is no causal attention: a token sees one behind it")
        (offers if rows[2:].any() else asks).append(i)
    doubled = [
        i for i in offers if relative_error(piece(*_scaled(given, i, 2.0)), 2 * before) < EXACT
    ]
    if len(asks) != 1 or len(doubled) != 1:
        raise NotRecognized(
            f"is no attention over three products: {len(asks)} ask, {len(doubled)} are summed up"
        )
    [query], [value] = asks, doubled
    [key] = set(range(_ROLES)) - {query, value}
    return query, key, value


def _scaled(given: Sequence[Float64], index: int, factor: float) -> list[Float64]:
    return [array * factor if i == index else array for i, array in enumerate(given)]


def probe_head_dim(piece: Piece, q_dim: int, kv_dim: int, tokens: int) -> int:
    """Count the answers that one value of the first query reaches: those of one head.

    Args:
        piece: attention, of q [T, q_dim], k and v [T, kv_dim].
        q_dim: all query heads together.
        kv_dim: all key heads together.
        tokens: T.
    """
    q, k, v = (random_rows(tokens, n, 30 + i) for i, n in enumerate((q_dim, kv_dim, kv_dim)))
    before, changed = piece(q, k, v), q.copy()
    changed[:, 0] += 1
    reached = np.abs(piece(changed, k, v) - before).max(0) > 0
    head_dim = int(reached.sum())
    if not reached[:head_dim].all() or head_dim < 2 or q_dim % head_dim or kv_dim % head_dim:
        raise NotRecognized(f"has no heads of equal size: one value of q reaches {head_dim}")
    return head_dim


@dataclass(frozen=True)
class Rotation:
    """How queries and keys are turned.

    Attributes:
        angles: of each pair at position 1, float64 [D/2].
        is_half: value i is turned with value i + D/2, as Hugging Face has it; else 2i with 2i + 1.
        limit: largest relative error that the graph's own constants explain.
    """

    angles: Float64
    is_half: bool
    limit: float = FROM_FLOAT32


def probe_rotation(piece: Piece, q_dim: int, kv_dim: int, head_dim: int, tokens: int) -> Rotation:
    """Read off the angles from scores of single values: position 1 asks, position 0 answers.

    Raises:
        NotRecognized: pairs are turned in another way, or scores are scaled otherwise.
    """

    def score(asked: int, offered: int) -> float:
        """What value `asked` of q gives with value `offered` of k, in units of their product."""
        q, k, v = (np.zeros((tokens, width)) for width in (q_dim, kv_dim, kv_dim))
        q[1, asked] = k[0, offered] = (4 * np.sqrt(head_dim)) ** 0.5
        v[0, 0] = v[1, 1] = 1.0  # so that the answers are the weights of both positions
        weights = piece(q, k, v)[1, :2]
        return float(np.log(weights[0] / weights[1])) / 4

    partners = [j for j in range(1, head_dim) if abs(score(0, j)) > 1e-3]
    half = head_dim // 2
    if partners not in ([1], [half]):
        raise NotRecognized(f"turns value 0 of a head together with {partners or 'none'}")
    is_half = partners == [half] and half != 1
    pairs = [(i, i + half) if is_half else (2 * i, 2 * i + 1) for i in range(half)]
    cosines = np.array([score(a, a) for a, _ in pairs])
    sines = np.array([score(a, b) for a, b in pairs])
    sizes = np.hypot(cosines, sines)
    error = np.abs(sizes - 1).max()
    if error > FROM_BFLOAT16 / 2:
        raise NotRecognized(
            f"has scores that are {sizes.mean():.4f} times those of softmax(q k / sqrt(D))"
        )
    limit = FROM_FLOAT32 if error <= FROM_FLOAT32 else FROM_BFLOAT16
    return Rotation(np.arctan2(sines, cosines), is_half, limit)


def probe_attention(piece: Piece, config: LlamaConfig, rotation: Rotation, tokens: int) -> None:
    """Prove that a piece is the attention of a configuration.

    Raises:
        NotRecognized: it is another one.
    """
    widths = (config.q_dim, config.kv_dim, config.kv_dim)
    given = [random_rows(tokens, width, 40 + i) for i, width in enumerate(widths)]
    if rotation.is_half:
        orders = [interleaved_order(width, config.head_dim) for width in widths[:2]]
        ours = [*(a[:, order] for a, order in zip(given, orders, strict=False)), given[2]]
    else:
        ours = given
    q, k, v = (array.reshape(tokens, -1, config.head_dim) for array in ours)
    table = rope_table(config, tokens)
    turned = (reference.rope(q, table), reference.rope(k, table))
    expected = reference.attention(*turned, v, 0).reshape(tokens, -1)
    error = same_rows(piece(*given), expected)
    if error > rotation.limit:
        raise NotRecognized(f"is off by {error:.1e} from attention over rotated keys")


# -- Feed-forward ---------------------------------------------------------------------------------


def sort_swiglu(piece: Piece, width: int, tokens: int) -> tuple[int, int]:
    """Tell which of two arguments is gate, which up.

    Raises:
        NotRecognized: the piece is not silu(gate) * up.
    """
    given = [random_rows(tokens, width, 50 + i) for i in range(2)]
    answer = piece(*given)
    errors = [
        same_rows(answer, reference.swiglu(given[gate], given[1 - gate])) for gate in range(2)
    ]
    gate = int(np.argmin(errors))
    if errors[gate] > EXACT:
        raise NotRecognized(f"is not silu(gate) * up: it is off by {errors[gate]:.1e}")
    return gate, 1 - gate


def probe_identity(piece: Piece, width: int, tokens: int) -> None:
    """Prove that a piece hands on what it gets.

    Raises:
        NotRecognized: it changes it.
    """
    given = random_rows(tokens, width, 60)
    error = same_rows(piece(given), given)
    if error > EXACT:
        raise NotRecognized(f"changes the logits: they are off by {error:.1e}")
