"""From the angles of RoPE back to the rule that makes them."""

from __future__ import annotations

import numpy as np

from llamac.compiler.config import LlamaConfig, RopeScaling, rope_frequencies
from llamac.compiler.frontends.probes import NotRecognized, shortest
from llamac.compiler.reference import Float64

# Angles are constants of float32 in the graphs, and the base is a power of them.
_ANGLES, _BASE = 2e-6, 2e-5
# Llama 3.1's and 3.2's, which differ in the factor only (configuration files of both).
_LOW, _HIGH, _CONTEXTS = 1.0, 4.0, (8192, 4096, 2048)


def read_rule(angles: Float64) -> tuple[float, RopeScaling | None]:
    """Find base and scaling of the angles at position 1.

    Args:
        angles: highest first, [D/2].

    Raises:
        NotRecognized: no rule that a bundle computes has these angles.
    """
    if abs(angles[0] - 1) > _ANGLES:
        raise NotRecognized(f"turns the first pair by {angles[0]:.6g} per position, not by 1")
    if (angles <= 0).any():
        raise NotRecognized("turns some pairs backwards or not at all")
    if len(angles) == 1:
        raise NotRecognized("has one pair for each head, which does not tell the base")
    base = _base(angles)
    if _fits(angles, base, None):
        return base, None
    plain = base ** (-np.arange(len(angles)) / len(angles))
    factor = shortest(float(plain[-1] / angles[-1]), 1e-4)
    for context in _CONTEXTS:
        scaling = RopeScaling(factor, _LOW, _HIGH, context) if factor >= 1 else None
        if scaling and _fits(angles, base, scaling):
            return base, scaling
    worst = int(np.abs(angles / plain - 1).argmax())
    raise NotRecognized(
        f"turns pair {worst} by {angles[worst]:.6g} per position, which neither the base "
        f"{base:g} alone nor Llama 3's scaling of it explains (a model that was made bfloat16 "
        "after it was loaded has its frequencies rounded: load it with that dtype)"
    )


def _base(angles: Float64) -> float:
    """The base by the second angle, which no scaling of Llama 3's kind changes."""
    return shortest(float(angles[1] ** -float(len(angles))), _BASE)


def _fits(angles: Float64, base: float, scaling: RopeScaling | None) -> bool:
    sizes = {"dim": 2, "num_layers": 1, "num_heads": 1, "num_kv_heads": 1, "ffn_dim": 1}
    config = LlamaConfig(
        **sizes,
        head_dim=2 * len(angles),
        vocab_size=1,
        norm_eps=1e-5,
        rope_theta=base,
        rope_scaling=scaling,
    )
    return bool((np.abs(angles / rope_frequencies(config) - 1) < _BASE).all())
