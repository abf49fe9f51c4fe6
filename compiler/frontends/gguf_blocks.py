"""The types of GGUF's tensors: blocks of bytes that decode to float32.

A row is cut into blocks of 32 values, or of 256 for the "K" types. d and m are float16:

    Q4_0  18 bytes   d, 16 bytes            d * (q - 8)         byte j: value j low, j + 16 high
    Q4_1  20         d, m, 16 bytes         d * q + m
    Q5_0  22         d, 32 bits, 16 bytes   d * (q - 16)        bit j: the fifth bit of value j
    Q5_1  24         d, m, 32 bits, 16      d * q + m
    Q8_0  34         d, 32 int8             d * q
    Q4_K  144        d, m, scales 12, 128   (d * sc) * q - (m * mn)   sc, mn: 6 bits, for each 32
    Q5_K  176        d, m, scales 12, 32 fifth bits, 128
    Q6_K  210        128 low nibbles, 64 high pairs, 16 int8 scales, d
                                            (d * sc) * (q - 32)       sc for each 16

Every product is rounded to float32 in this order. Tests compare all of them bit for bit with the
`gguf` package.

Source of the layouts: ggml-common.h of ggml-org/ggml.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import TypeAlias

import numpy as np
from numpy.typing import NDArray

Bytes: TypeAlias = NDArray[np.uint8]
Float32: TypeAlias = NDArray[np.float32]

_F32 = np.float32
Q4_0 = 2
BF16 = 30
GROUP = 32  # values of a block of the small types
SUPER = 256  # values of a block of the K types


@dataclass(frozen=True)
class BlockType:
    """One type.

    Attributes:
        name: GGML's.
        values: of a block.
        bytes: of a block.
        decode: uint8 [n, bytes] -> float32 [n, values].
        is_float: every value is stored for itself.
    """

    name: str
    values: int
    bytes: int
    decode: Callable[[Bytes], Float32]
    is_float: bool = False


def decode(type_id: int, rows: Bytes) -> Float32:
    """Rows of a tensor, uint8 [n, bytes], as float32 [n, values]; infinities and NaN stay."""
    block = BLOCKS[type_id]
    with np.errstate(all="ignore"):  # of damaged scales: whoever reads the values checks them
        return block.decode(rows.reshape(-1, block.bytes)).reshape(len(rows), -1)


def q4_0_parts(rows: Bytes) -> tuple[NDArray[np.int8], Float32]:
    """Codes -8..7 [n, k] and scales [n, k / 32] of rows of Q4_0; scales may be negative or 0."""
    blocks = rows.reshape(-1, 18)
    codes: NDArray[np.int8] = _nibbles(blocks[:, 2:]).view(np.int8) - np.int8(8)
    return codes.reshape(len(rows), -1), _halves(blocks, 0).reshape(len(rows), -1)


def _halves(blocks: Bytes, place: int) -> Float32:
    """The float16 at a place of each block, [n, 1]."""
    return np.ascontiguousarray(blocks[:, place : place + 2]).view("<f2").astype(_F32)


def _nibbles(packed: Bytes) -> Bytes:
    """[n, 16] -> [n, 32]: the low nibbles, then the high ones."""
    return np.concatenate([packed & 0x0F, packed >> 4], axis=1)


def _with_fifth_bits(packed: Bytes, bits: Bytes) -> Bytes:
    """Values of 5 bits [n, 32] from their nibbles [n, 16] and top bits [n, 4]."""
    top = np.unpackbits(np.ascontiguousarray(bits), axis=1, bitorder="little")
    return _nibbles(packed) | (top << np.uint8(4))


def _float32(blocks: Bytes) -> Float32:
    return np.ascontiguousarray(blocks).view("<f4")


def _float16(blocks: Bytes) -> Float32:
    return _halves(blocks, 0)


def _bfloat16(blocks: Bytes) -> Float32:
    bits = np.ascontiguousarray(blocks).view("<u2").astype(np.uint32)
    return (bits << 16).view(_F32)


def _q4_0(blocks: Bytes) -> Float32:
    codes, scales = q4_0_parts(blocks)
    return scales * codes.astype(_F32)


def _q4_1(blocks: Bytes) -> Float32:
    return _halves(blocks, 0) * _nibbles(blocks[:, 4:]).astype(_F32) + _halves(blocks, 2)


def _q5_0(blocks: Bytes) -> Float32:
    codes = _with_fifth_bits(blocks[:, 6:], blocks[:, 2:6]).view(np.int8) - np.int8(16)
    return _halves(blocks, 0) * codes.astype(_F32)


def _q5_1(blocks: Bytes) -> Float32:
    codes = _with_fifth_bits(blocks[:, 8:], blocks[:, 4:8])
    return _halves(blocks, 0) * codes.astype(_F32) + _halves(blocks, 2)


def _q8_0(blocks: Bytes) -> Float32:
    return blocks[:, 2:].view(np.int8).astype(_F32) * _halves(blocks, 0)


def _k_scales(blocks: Bytes) -> tuple[Float32, Float32]:
    """Scale and minimum of each 32 values of Q4_K and Q5_K, [n, 8, 1]: 8 pairs of 6 bits.

    The first four have a byte for the scale (0..3) and one for the minimum (4..7), whose upper two
    bits belong to the other four; these have their lower nibbles in bytes 8..11.
    """
    packed = blocks[:, 4:16]
    low, high, rest = packed[:, :4], packed[:, 4:8], packed[:, 8:]
    scales = np.concatenate([low & 63, (rest & 15) | (low >> 6 << 4)], axis=1)
    minima = np.concatenate([high & 63, (rest >> 4) | (high >> 6 << 4)], axis=1)
    return (
        (_halves(blocks, 0) * scales.astype(_F32))[..., None],
        (_halves(blocks, 2) * minima.astype(_F32))[..., None],
    )


def _k_nibbles(packed: Bytes) -> Bytes:
    """[n, 128] -> [n, 8, 32]: 32 bytes hold 32 values in their low nibbles, then 32 more."""
    quarters = packed.reshape(-1, 4, 32)
    return np.stack([quarters & 0x0F, quarters >> 4], axis=2).reshape(-1, 8, 32)


def _q4_k(blocks: Bytes) -> Float32:
    scales, minima = _k_scales(blocks)
    codes = _k_nibbles(blocks[:, 16:]).astype(_F32)
    return (scales * codes - minima).reshape(-1, SUPER)


def _q5_k(blocks: Bytes) -> Float32:
    scales, minima = _k_scales(blocks)
    top = blocks[:, None, 16:48] >> np.arange(8, dtype=np.uint8)[:, None] & 1
    codes = (_k_nibbles(blocks[:, 48:]) | top << 4).astype(_F32)
    return (scales * codes - minima).reshape(-1, SUPER)


def _q6_k(blocks: Bytes) -> Float32:
    """128 values at a time: 64 bytes with the lower four bits, 32 with four pairs of upper ones."""
    lower, upper = blocks[:, :128].reshape(-1, 2, 2, 32), blocks[:, 128:192].reshape(-1, 2, 1, 32)
    low = np.concatenate([lower & 0x0F, lower >> 4], axis=2)
    high = upper >> np.array([0, 2, 4, 6], np.uint8)[:, None] & 3
    codes = (low | high << 4).view(np.int8) - np.int8(32)
    scales = _halves(blocks, 208) * blocks[:, 192:208].view(np.int8).astype(_F32)
    values: Float32 = scales[..., None] * codes.reshape(-1, 16, 16).astype(_F32)
    return values.reshape(-1, SUPER)


BLOCKS = {
    0: BlockType("F32", 1, 4, _float32, is_float=True),
    1: BlockType("F16", 1, 2, _float16, is_float=True),
    Q4_0: BlockType("Q4_0", GROUP, 18, _q4_0),
    3: BlockType("Q4_1", GROUP, 20, _q4_1),
    6: BlockType("Q5_0", GROUP, 22, _q5_0),
    7: BlockType("Q5_1", GROUP, 24, _q5_1),
    8: BlockType("Q8_0", GROUP, 34, _q8_0),
    12: BlockType("Q4_K", SUPER, 144, _q4_k),
    13: BlockType("Q5_K", SUPER, 176, _q5_k),
    14: BlockType("Q6_K", SUPER, 210, _q6_k),
    BF16: BlockType("BF16", 1, 2, _bfloat16, is_float=True),
}
"""Types with a decoder, by GGML's numbers."""

_OTHERS = {
    9: "Q8_1",
    10: "Q2_K",
    11: "Q3_K",
    15: "Q8_K",
    16: "IQ2_XXS",
    17: "IQ2_XS",
    18: "IQ3_XXS",
    19: "IQ1_S",
    20: "IQ4_NL",
    21: "IQ3_S",
    22: "IQ2_S",
    23: "IQ4_XS",
    28: "F64",
    29: "IQ1_M",
    34: "TQ1_0",
    35: "TQ2_0",
    39: "MXFP4",
}


def type_name(type_id: int) -> str:
    """Name of a type, with or without a decoder."""
    block = BLOCKS.get(type_id)
    return block.name if block else _OTHERS.get(type_id, f"type {type_id}")
