"""How many layers go into one .tflite."""

from __future__ import annotations

import math
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from llamac.targets.base import WeightReader

MAX_LAYERS = 4
"""A layer is about 80 operations. MediaTek's compiler is reported to give up above 4500 in one
graph, and ExecuTorch ships Llama 3.2 1B as 4 graphs of 4 layers."""

MAX_WEIGHT_BYTES = 250_000_000
"""Of one file, for compilers that hold several copies of it."""


def layers_per_chunk(weight_bytes: int, num_layers: int) -> int:
    """How many layers go into one file, so that files are equal and none is too large.

    Args:
        weight_bytes: of one layer, see `layer_weight_bytes`.
        num_layers: of the model.
    """
    most = min(MAX_LAYERS, max(1, MAX_WEIGHT_BYTES // max(1, weight_bytes)))
    num_chunks = -(-num_layers // most)
    return -(-num_layers // num_chunks)


def layer_weight_bytes(weights: WeightReader, scheme: str, layer: int = 0) -> int:
    """Bytes of a layer's matrices in "a16w8" or "a16w4"; adaptors are int8 in both."""
    total = 0
    for name in weights.names():
        shape = weights.info(name).shape
        if name.startswith(f"layers.{layer}.") and name.endswith(".weight") and len(shape) == 2:
            is_half = scheme == "a16w4" and ".adaptor." not in name
            total += math.prod(shape) // (2 if is_half else 1)
    return total
