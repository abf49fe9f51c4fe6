"""Packing loses nothing: what was packed is taken apart again here, without the code under test."""

from __future__ import annotations

import tracemalloc
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import pytest
from numpy.typing import NDArray

from llamac.compiler import reference
from llamac.compiler.checkpoint import TensorInfo, check_scales_fit_float16
from llamac.compiler.config import LLAMA_3_2_1B, rope_table
from llamac.compiler.floats import from_bfloat16, round_to
from llamac.compiler.floats import to_bfloat16 as reference_bfloat16
from llamac.runtime.errors import ValuesInvalid
from llamac.targets.cpu import packing
from llamac.targets.cpu.packing import Packer
from llamac.targets.program import Pack

Array = NDArray[Any]
N, K = 128, 96


@dataclass(frozen=True)
class Weights:
    """Tensors in memory."""

    tensors: dict[str, Array]

    def names(self) -> Sequence[str]:
        """All tensors."""
        return list(self.tensors)

    def info(self, name: str) -> TensorInfo:
        """Shape and dtype."""
        array = self.tensors[name]
        return TensorInfo(array.shape, str(array.dtype))

    def read(self, name: str) -> Array:
        """The values."""
        return self.tensors[name]


@pytest.fixture
def weights(rng: np.random.Generator) -> Weights:
    """Two linear layers "a" and "b" in every form, an int8 table "t", a RoPE table."""
    tensors: dict[str, Array] = {"rope.table": rope_table(LLAMA_3_2_1B, 80)}
    for name in "ab":
        tensors[f"{name}.weight"] = rng.integers(-8, 8, (N, K)).astype(np.int8)
        tensors[f"{name}.scales"] = rng.uniform(1e-3, 1, (N, K // 32)).astype(np.float32)
        tensors[f"{name}.adaptor.A.weight"] = reference_bfloat16(rng.normal(size=(4, K)))
        tensors[f"{name}.adaptor.B.weight"] = reference_bfloat16(rng.normal(size=(N, 4)))
    tensors["t.weight"] = rng.integers(-128, 128, (N, K)).astype(np.int8)
    tensors["t.scales"] = rng.uniform(1e-3, 1, N).astype(np.float32)
    tensors["f.weight"] = reference_bfloat16(rng.normal(size=(N, K)))
    return Weights(tensors)


def packed(weights: Weights, pack: Pack, scale_dtype: str = "float16") -> Array:
    """All pieces of a packed tensor."""
    return np.concatenate(list(Packer(weights, scale_dtype).pack(pack)))


def unpack_int4(blocks: Array) -> Array:
    """Codes [n, k] from blocks [n/16, k/32, 256]; the layout is told in schedules/qmatmul.py."""
    num_blocks, groups, _ = blocks.shape
    codes = np.empty((num_blocks * 16, groups * 32), np.int8)
    for j in range(4):
        for row in range(16):
            for b in range(4):
                byte = blocks[:, :, j * 64 + row * 4 + b].astype(np.int8)
                codes[row::16, 8 * j + b :: 32] = (byte & 15) - 8
                codes[row::16, 8 * j + 4 + b :: 32] = (byte >> 4 & 15) - 8
    return codes


def unpack_columns(blocks: Array) -> Array:
    """Rows [n, c] from blocks [n/16, c, 16]."""
    return np.concatenate([block.T for block in blocks])


def unpack_int8(blocks: Array) -> Array:
    """Codes [n, k] from blocks [n/16, k/4, 64]."""
    rows = [block.reshape(-1, 16, 4)[:, row].reshape(-1) for block in blocks for row in range(16)]
    return np.stack(rows)


def alternate(first: Array, second: Array, count: int = 16) -> Array:
    """Blocks of `count` rows of both in turn."""
    starts = range(0, len(first), count)
    return np.concatenate([rows[i : i + count] for i in starts for rows in (first, second)])


def unpack_hvx(blocks: Array) -> Array:
    """Codes [n, k] from blocks [n/64, k/32, 1024]; the layout is told in qmatmul_hvx.py."""
    num_blocks, groups, _ = blocks.shape
    codes = np.empty((num_blocks, 64, groups * 32), np.int8)
    for j in range(8):
        for row in range(32):
            for b in range(4):
                byte = blocks[:, :, j * 128 + row * 4 + b].astype(np.int8)
                codes[:, row, 4 * j + b :: 32] = (byte & 15) - 8
                codes[:, row + 32, 4 * j + b :: 32] = (byte >> 4 & 15) - 8
    return codes.reshape(num_blocks * 64, -1)


@pytest.mark.parametrize("interleave", [False, True])
def test_int4_codes(weights: Weights, interleave: bool) -> None:
    """Projections follow each other, or their blocks alternate (gate and up)."""
    a, b = weights.read("a.weight"), weights.read("b.weight")
    blocks = packed(weights, Pack("int4.codes", ("a", "b"), interleave))
    assert (blocks.dtype, blocks.shape) == (np.uint8, (2 * N // 16, K // 32, 256))
    expected = alternate(a, b) if interleave else np.concatenate([a, b])
    np.testing.assert_array_equal(unpack_int4(blocks), expected)


@pytest.mark.parametrize("scale_dtype", ["float16", "bfloat16"])
def test_int4_scales_and_sums(weights: Weights, scale_dtype: str) -> None:
    """Scales are rounded once, and ksum is made of the rounded ones."""
    codes, scales = weights.read("a.weight"), weights.read("a.scales")
    rounded = round_to(scales, scale_dtype)
    blocks = packed(weights, Pack("int4.scales", ("a",)), scale_dtype)
    stored = unpack_columns(blocks)
    values = stored if scale_dtype == "float16" else from_bfloat16(stored)
    np.testing.assert_array_equal(values.astype(np.float32), rounded)
    ksum = packed(weights, Pack("int4.ksum", ("a",)), scale_dtype)
    expected = (codes * np.repeat(rounded.astype(np.float64), 32, axis=1)).sum(axis=1)
    assert ksum.dtype == np.float32
    np.testing.assert_allclose(ksum, expected, rtol=1e-6, atol=1e-6)


def test_interleaved_parts_match(weights: Weights) -> None:
    """Scales, sums and LoRA's B alternate as the codes do."""
    for layout, name in (("int4.scales", "scales"), ("lora.b", "adaptor.B.weight")):
        rows = unpack_columns(packed(weights, Pack(layout, ("a", "b"), True)))
        first, second = weights.read(f"a.{name}"), weights.read(f"b.{name}")
        np.testing.assert_array_equal(rows, alternate(first, second).astype(rows.dtype))
    ksum = [packed(weights, Pack("int4.ksum", (name,))) for name in "ab"]
    both = packed(weights, Pack("int4.ksum", ("a", "b"), True))
    np.testing.assert_array_equal(both, alternate(*ksum))


@pytest.mark.parametrize("interleave", [False, True])
def test_layouts_of_hvx(weights: Weights, interleave: bool) -> None:
    """Codes, scales, sums and LoRA's B have the same rows; gate and up alternate in 32."""

    def rows(part: str) -> Array:
        both = [weights.read(f"{name}.{part}") for name in "ab"]
        return alternate(*both, 32) if interleave else np.concatenate(both)

    def made(layout: str) -> Array:
        return packed(weights, Pack(layout, ("a", "b"), interleave))

    codes, scales = rows("weight"), rows("scales").astype(np.float16)
    np.testing.assert_array_equal(unpack_hvx(made("hvx.int4")), codes)
    pairs = made("hvx.scales").reshape(-1, K // 32, 32, 2)
    np.testing.assert_array_equal(pairs.transpose(0, 3, 2, 1).reshape(scales.shape), scales)
    ksum = (codes * np.repeat(scales.astype(np.float64), 32, axis=1)).sum(axis=1)
    np.testing.assert_allclose(made("hvx.ksum"), ksum, rtol=1e-6, atol=1e-6)
    columns = made("hvx.lora.b")
    assert columns.shape == (2 * N // 64, 4, 64)
    np.testing.assert_array_equal(unpack_columns(columns), rows("adaptor.B.weight"))


def test_the_int8_layout_of_hvx(weights: Weights) -> None:
    """Unsigned, and four columns of each of 32 rows."""
    blocks = packed(weights, Pack("hvx.int8", ("t",)))
    assert (blocks.dtype, blocks.shape) == (np.uint8, (N // 32, K // 4, 128))
    words = blocks.reshape(-1, K // 4, 32, 4).transpose(0, 2, 1, 3).reshape(N, K)
    np.testing.assert_array_equal(words.astype(np.int16) - 128, weights.read("t.weight"))


def test_int8_layouts(weights: Weights) -> None:
    codes = weights.read("t.weight")
    blocks = packed(weights, Pack("int8.blocks", ("t",)))
    assert (blocks.dtype, blocks.shape) == (np.int8, (N // 16, K // 4, 64))
    np.testing.assert_array_equal(unpack_int8(blocks), codes)
    np.testing.assert_array_equal(packed(weights, Pack("int8.rows", ("t",))), codes)
    wsum = packed(weights, Pack("int8.wsum", ("t",)))
    assert wsum.dtype == np.int32
    np.testing.assert_array_equal(wsum, codes.astype(np.int64).sum(axis=1))
    scales = packed(weights, Pack("int8.scales", ("t",)))
    np.testing.assert_array_equal(scales, weights.read("t.scales"))


def test_bfloat16_layouts(weights: Weights) -> None:
    bits = weights.read("f.weight")
    np.testing.assert_array_equal(
        unpack_columns(packed(weights, Pack("bf16.blocks", ("f",)))), bits
    )
    np.testing.assert_array_equal(packed(weights, Pack("bf16.rows", ("f",))), bits)
    stacked = packed(weights, Pack("lora.a", ("a", "b")))
    expected = [weights.read(f"{name}.adaptor.A.weight") for name in "ab"]
    np.testing.assert_array_equal(stacked, np.concatenate(expected))


def test_bfloat16_is_rounded_half_to_even() -> None:
    """Ties, carries into the exponent, subnormals, infinity; bits that are bits already stay."""
    ties = np.array([0x3F808000, 0x3F818000, 0x3FFFFFFF, 0x00000001, 0x7F7F8000, 0x7F800000])
    values = ties.astype(np.uint32).view(np.float32)
    np.testing.assert_array_equal(packing.to_bfloat16(values), reference_bfloat16(values))
    bits = np.arange(10, dtype=np.uint16)
    assert packing.to_bfloat16(bits) is bits


def test_rope_rows_rotate_pairs(weights: Weights, rng: np.random.Generator) -> None:
    """x * cosines + swapped x * sines is the rotation."""
    rows = packed(weights, Pack("rope", ("rope",)))
    assert rows.shape == (80, 2, 64)
    x = rng.normal(size=(80, 64))
    swapped = x.reshape(80, 32, 2)[:, :, ::-1].reshape(80, 64)
    expected = reference.rope(x[:, None], weights.read("rope.table"))[:, 0]
    np.testing.assert_allclose(x * rows[:, 0] + swapped * rows[:, 1], expected, atol=1e-12)


PACKS = [
    Pack("int4.codes", ("a", "b")),
    Pack("int4.codes", ("a", "b"), True),
    Pack("int4.scales", ("a", "b"), True),
    Pack("int4.ksum", ("a", "b"), True),
    Pack("int8.blocks", ("t",)),
    Pack("hvx.int4", ("a", "b"), True),
    Pack("hvx.int8", ("t",)),
    Pack("int8.wsum", ("t",)),
    Pack("bf16.blocks", ("f",)),
    Pack("lora.b", ("a", "b"), True),
    Pack("rope", ("rope",)),
]


@pytest.mark.parametrize("pack", PACKS, ids=lambda p: p.layout + ("+" if p.interleave else ""))
def test_small_pieces_are_the_same_bytes(
    weights: Weights, pack: Pack, monkeypatch: pytest.MonkeyPatch
) -> None:
    """However it is cut, the tensor is the same."""
    whole = packed(weights, pack)
    monkeypatch.setattr(packing, "PIECE_BYTES", 1)
    pieces = list(Packer(weights, "float16").pack(pack))
    assert len(pieces) > 1
    assert all(piece.flags.c_contiguous for piece in pieces)
    np.testing.assert_array_equal(np.concatenate(pieces), whole)


@pytest.mark.parametrize(
    "pack",
    [
        Pack("int4.codes", ("x", "y"), True),
        Pack("int4.ksum", ("x",)),
        Pack("int8.blocks", ("x",)),
        Pack("int8.wsum", ("x",)),
    ],
    ids=lambda p: p.layout,
)
def test_memory_is_that_of_a_piece(pack: Pack, monkeypatch: pytest.MonkeyPatch) -> None:
    """A tensor of 32 MiB in pieces of 1 MiB never needs more than 12 MiB beside itself."""
    monkeypatch.setattr(packing, "PIECE_BYTES", 1 << 20)
    codes, scales = np.zeros((16384, 2048), np.int8), np.ones((16384, 64), np.float32)
    named = {"weight": codes, "scales": scales}
    weights = Weights({f"{name}.{part}": array for name in "xy" for part, array in named.items()})
    tracemalloc.start()
    try:
        total = sum(piece.nbytes for piece in Packer(weights, "float16").pack(pack))
        _, peak = tracemalloc.get_traced_memory()
    finally:
        tracemalloc.stop()
    assert total >= 16384 * 4
    assert peak < 12 << 20


@pytest.mark.parametrize("layout", ["int4.scales", "hvx.scales"])
def test_scales_are_checked_before_they_become_float16(weights: Weights, layout: str) -> None:
    """The check names the tensor; bfloat16 has float32's range and needs none."""
    weights.tensors["a.scales"][3, 1] = 1e6
    pack = Pack(layout, ("b", "a"))
    with pytest.raises(ValuesInvalid, match=r"a\.scales"):
        list(Packer(weights, "float16", check_scales_fit_float16).pack(pack))
    stored = list(Packer(weights, "bfloat16", check_scales_fit_float16).pack(pack))
    assert from_bfloat16(np.concatenate(stored)).max() == pytest.approx(1e6, rel=0.01)
