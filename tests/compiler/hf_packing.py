"""Encoders of 4-bit layers in the forms of Hugging Face, written from their formats' descriptions.

Each packs nibble by nibble, as the quantizers do; the reader unpacks whole arrays.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

import numpy as np

from llamac.compiler.floats import from_bfloat16, to_bfloat16

AWQ_ORDER = (0, 2, 4, 6, 1, 3, 5, 7)


@dataclass
class Quantized:
    """A layer: codes 0..15 [N, K], scales [N, G], zero points 0..15 [N, G], groups [K]."""

    codes: np.ndarray
    scales: np.ndarray
    zeros: np.ndarray
    groups: np.ndarray

    def values(self) -> np.ndarray:
        """float64 [N, K]."""
        zeros, scales = self.zeros[:, self.groups], self.scales[:, self.groups]
        return (self.codes.astype(np.float64) - zeros) * scales.astype(np.float64)


def quantize(
    values: np.ndarray,
    group: int,
    symmetric: bool = True,
    order: np.ndarray | None = None,
    coarse: bool = False,
) -> Quantized:
    """Round to the nearest.

    Args:
        values: float32 [N, K].
        group: columns of a scale, or -1 for all.
        symmetric: zero points are 8.
        order: sorts columns into groups, as act-order does.
        coarse: scales are numbers that bfloat16 has, too.
    """
    n, k = values.shape
    group = k if group == -1 else group
    order = np.arange(k) if order is None else order
    groups = np.empty(k, np.int32)
    groups[order] = np.arange(k) // group
    blocks = values[:, order].reshape(n, -1, group)
    if symmetric:
        scales = np.abs(blocks).max(-1) / 7.5
        zeros = np.full(scales.shape, 8)
    else:
        low, high = np.minimum(blocks.min(-1), 0), np.maximum(blocks.max(-1), 0)
        scales = (high - low) / 15
        zeros = np.rint(-low / np.maximum(scales, 1e-8)).astype(int)
    scales = np.maximum(scales, 1e-3)
    scales = (from_bfloat16(as_bfloat16(scales)) if coarse else scales).astype(np.float16)
    steps = values / scales[:, groups].astype(np.float32) + zeros[:, groups]
    return Quantized(np.clip(np.rint(steps), 0, 15).astype(np.uint8), scales, zeros, groups)


def pack(nibbles: np.ndarray, axis: int, order: tuple[int, ...] = tuple(range(8))) -> np.ndarray:
    """int32 words of 8 nibbles each along an axis; nibble i of a word is value order[i]."""
    moved = np.moveaxis(nibbles.astype(np.uint32), axis, 0)
    words = np.zeros((len(moved) // 8, *moved.shape[1:]), np.uint32)
    for word in range(len(words)):
        for i, place in enumerate(order):
            words[word] |= (moved[8 * word + place] & 15) << np.uint32(4 * i)
    return np.ascontiguousarray(np.moveaxis(words, 0, axis)).view(np.int32)


Encode = Callable[[np.ndarray], Mapping[str, np.ndarray]]


def gptq(group: int, version: int = 1, **how: Any) -> Encode:
    def encode(values: np.ndarray) -> Mapping[str, np.ndarray]:
        q = quantize(values, group, **how)
        zeros = (q.zeros - (version == 1)).T
        return {
            "qweight": pack(q.codes.T, 0),
            "qzeros": pack(zeros, 1),
            "scales": q.scales.T,
            "g_idx": q.groups,
        }

    return encode


def awq(group: int, **how: Any) -> Encode:
    def encode(values: np.ndarray) -> Mapping[str, np.ndarray]:
        q = quantize(values, group, **how)
        return {
            "qweight": pack(q.codes.T, 1, AWQ_ORDER),
            "qzeros": pack(q.zeros.T, 1, AWQ_ORDER),
            "scales": q.scales.T,
        }

    return encode


def compressed(group: int, symmetric: bool = True, **how: Any) -> Encode:
    def encode(values: np.ndarray) -> Mapping[str, np.ndarray]:
        q = quantize(values, group, symmetric, **how)
        parts = {
            "weight_packed": pack(q.codes, 1),
            "weight_scale": as_bfloat16(q.scales),
            "weight_shape": np.array(values.shape, np.int64),
        }
        if not symmetric:
            parts["weight_zero_point"] = pack(q.zeros, 0)
        if how.get("order") is not None:
            parts["weight_g_idx"] = q.groups
        return parts

    return encode


def as_bfloat16(scales: np.ndarray) -> np.ndarray:
    return to_bfloat16(scales.astype(np.float32))


def torchao(group: int, **how: Any) -> Encode:
    def encode(values: np.ndarray) -> Mapping[str, np.ndarray]:
        q = quantize(values, group, **how)
        return {
            "_weight_qdata": q.codes.astype(np.int8) - np.int8(8),
            "_weight_scale": as_bfloat16(q.scales),
            "_weight_zero_point": (q.zeros - 8).astype(np.int8),
        }

    return encode


def rounded_scales(q: Quantized) -> Quantized:
    """The same with scales as bfloat16 has them."""
    scales = from_bfloat16(as_bfloat16(q.scales))
    return Quantized(q.codes, scales, q.zeros, q.groups)


CONFIGS: dict[str, dict[str, Any]] = {
    "gptq": {"quant_method": "gptq", "bits": 4, "group_size": 128, "desc_act": False, "sym": True},
    "awq": {
        "quant_method": "awq",
        "bits": 4,
        "group_size": 128,
        "zero_point": True,
        "version": "gemm",
    },
    "compressed-tensors": {
        "quant_method": "compressed-tensors",
        "format": "pack-quantized",
        "ignore": ["lm_head"],
        "kv_cache_scheme": None,
        "quantization_status": "compressed",
        "config_groups": {
            "group_0": {
                "targets": ["Linear"],
                "input_activations": None,
                "output_activations": None,
                "weights": {
                    "num_bits": 4,
                    "type": "int",
                    "symmetric": True,
                    "strategy": "group",
                    "group_size": 128,
                    "actorder": None,
                },
            }
        },
    },
    "torchao": {"quant_method": "torchao", "quant_type": {"default": {}}},
}
METADATA = (
    '{"_type": "IntxUnpackedToInt8Tensor", "_data": {"target_dtype": {"_type": "torch.dtype", '
    '"_data": "int4"}}, "_tensor_data_names": ["qdata", "scale", "zero_point"]}'
)
