"""Decoders of GGUF's types: bit for bit the `gguf` package's, and by hand for one block each."""

from __future__ import annotations

import warnings

import numpy as np
import pytest

from llamac.compiler.frontends.gguf_blocks import BLOCKS, Q4_0, decode, q4_0_parts, type_name

ROWS, BLOCKS_PER_ROW = 37, 5
NEEDS_GGUF = "optional extra: the package gguf is not installed"


def random_rows(type_id: int, seed: int = 0) -> np.ndarray:
    """Any bytes are a block; float16 fields of all kinds come up, infinities and NaN too."""
    rng = np.random.default_rng(seed)
    shape = (ROWS, BLOCKS_PER_ROW * BLOCKS[type_id].bytes)
    return rng.integers(0, 256, shape).astype(np.uint8)


def bits_without_nan(values: np.ndarray) -> np.ndarray:
    """Bits of float32 values; the payload of a NaN is nobody's business."""
    return np.where(np.isnan(values), np.float32(0), values).view(np.uint32)


@pytest.mark.parametrize("type_id", BLOCKS, ids=type_name)
def test_decoders_equal_the_gguf_package(type_id: int) -> None:
    gguf = pytest.importorskip("gguf", reason=NEEDS_GGUF)
    rows = random_rows(type_id)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        theirs = gguf.quants.dequantize(rows, gguf.GGMLQuantizationType(type_id))
    ours = decode(type_id, rows)
    assert ours.dtype == np.float32
    assert ours.shape == (ROWS, BLOCKS_PER_ROW * BLOCKS[type_id].values)
    np.testing.assert_array_equal(np.isnan(ours), np.isnan(theirs))
    np.testing.assert_array_equal(bits_without_nan(ours), bits_without_nan(theirs))
    assert np.isfinite(ours).mean() > 0.5


def test_sizes_equal_those_of_the_gguf_package() -> None:
    gguf = pytest.importorskip("gguf", reason=NEEDS_GGUF)
    for type_id, block in BLOCKS.items():
        kind = gguf.GGMLQuantizationType(type_id)
        assert (kind.name, gguf.GGML_QUANT_SIZES[kind]) == (block.name, (block.values, block.bytes))


def half(value: float) -> bytes:
    return np.float16(value).tobytes()


def test_q4_0_by_hand() -> None:
    """Low nibbles are the first 16 values, high ones the others; 8 is 0."""
    row = np.frombuffer(half(-0.5) + bytes(range(0x10, 0x20)), np.uint8)[None]
    expected = [-0.5 * (low - 8) for low in range(16)] + [-0.5 * (1 - 8)] * 16
    np.testing.assert_array_equal(decode(Q4_0, row)[0], expected)
    codes, scales = q4_0_parts(row)
    np.testing.assert_array_equal(codes[0], [*range(-8, 8), *[-7] * 16])
    assert scales.tolist() == [[-0.5]]


def test_parts_of_q4_0_are_its_values() -> None:
    rows = random_rows(Q4_0)
    rows.reshape(-1, 18)[:, 1] &= 0xBF  # keep d finite
    codes, scales = q4_0_parts(rows)
    assert codes.dtype == np.int8
    assert (codes.min(), codes.max()) == (-8, 7)
    assert (scales < 0).any()
    values = codes.reshape(ROWS, -1, 32) * scales[..., None]
    np.testing.assert_array_equal(values.reshape(ROWS, -1), decode(Q4_0, rows))


def test_q8_0_by_hand() -> None:
    row = np.frombuffer(half(0.25) + bytes(range(240, 256)) + bytes(range(16)), np.uint8)[None]
    np.testing.assert_array_equal(decode(8, row)[0], np.arange(-16, 16) * 0.25)


def test_q6_k_by_hand() -> None:
    """One scale, all codes 0b10_0001 = 33 - 32 = 1."""
    block = bytes([0x11] * 128 + [0b10101010] * 64 + [3] * 16) + half(0.5)
    np.testing.assert_array_equal(decode(14, np.frombuffer(block, np.uint8)[None])[0], [1.5] * 256)


def test_an_unknown_type_has_a_name() -> None:
    assert type_name(23) == "IQ4_XS"
    assert type_name(1 << 31) == "type 2147483648"
