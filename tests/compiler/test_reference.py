"""The reference arithmetic against independent formulations: torch, exact fractions, matrices."""

from __future__ import annotations

from fractions import Fraction
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from hypothesis.extra import numpy as hnp
from numpy.typing import NDArray

from llamac.compiler import reference

RNG = np.random.default_rng(20240925)


def _activations() -> dict[str, NDArray[np.float32]]:
    normal = RNG.standard_normal((16, 256)).astype(np.float32)
    outlier = normal.copy()
    outlier[:, 3] *= 300
    # The range -128..127 makes the scale exactly 1, so each x.5 is a true tie.
    ties = np.tile(np.arange(-128, 128, dtype=np.float32), (2, 1))
    ties[:, 1:-1] = RNG.integers(-127, 127, (2, 254)).astype(np.float32) + np.float32(0.5)
    # One step up the zero point is odd: rounding after it was added would go the other way.
    ties[1] += 1
    # x / s and x * (1 / s) round to different sides of such values.
    high = np.arange(3, 67, dtype=np.float32)[:, None]
    near_ties = (np.arange(256, dtype=np.float32) + np.float32(0.5)) * (high / np.float32(255))
    near_ties[:, 0], near_ties[:, 255] = 0, high[:, 0]
    return {
        "normal": normal,
        "outlier": outlier,
        "heavy": RNG.standard_cauchy((16, 256)).astype(np.float32),
        "tiny": normal * np.float32(1e-3),
        "below_the_smallest_scale": normal * np.float32(1e-9),
        "negative": -np.abs(normal) - np.float32(1),
        "positive": np.abs(normal) + np.float32(1),
        "zeros": np.zeros((2, 256), np.float32),
        "ties": ties,
        "near_ties": near_ties,
        # Both ends stand 127.5 steps from zero, one more than there are codes.
        "symmetric": np.concatenate([normal.clip(-1, 1), [[1, -1]] * 16], 1).astype(np.float32),
    }


ACTIVATIONS = _activations()


def _torchao(x: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """torchao's affine quantization, one int8 range per row, written with torch operators."""
    low = torch.clamp(x.amin(-1, keepdim=True), max=0.0)
    high = torch.clamp(x.amax(-1, keepdim=True), min=0.0)
    scale = torch.clamp((high - low) / 255.0, min=torch.finfo(torch.float32).eps)
    zero = torch.clamp(-128 - torch.round(low / scale), -128, 127)
    codes = torch.clamp(torch.round(x * (1.0 / scale)) + zero, -128, 127)
    return codes.to(torch.int8), scale[:, 0], zero[:, 0].to(torch.int32)


def _xnnpack_row(row: NDArray[np.float32]) -> tuple[list[int], np.float32, int]:
    """XNNPACK's rule for one row, one value after the other."""
    f32 = np.float32
    low, high = min(row.min(), f32(0)), max(row.max(), f32(0))
    inverse = f32(1) if low == high else f32(255) / (high - low)
    from_low, from_high = f32(-128) - low * inverse, f32(127) - high * inverse
    low_error, high_error = f32(-128) + low * inverse, f32(127) + high * inverse
    zero = from_low if low_error + high_error > 0 else from_high
    zero_point = round(float(min(max(zero, f32(-128)), f32(127))))
    codes = []
    for value in row:
        clamped = min(max(value * inverse, f32(-128 - zero_point)), f32(127 - zero_point))
        codes.append(round(float(clamped)) + zero_point)
    return codes, f32(1) / inverse, zero_point


@pytest.mark.parametrize("kind", ACTIVATIONS)
def test_the_default_rule_equals_torchao_bit_for_bit(kind: str) -> None:
    x = ACTIVATIONS[kind]
    got: tuple[NDArray[Any], ...] = reference.quantize_per_token(x)
    for ours, theirs in zip(got, _torchao(torch.from_numpy(x)), strict=True):
        assert ours.dtype == theirs.numpy().dtype
        assert np.array_equal(ours, theirs.numpy())


@pytest.mark.parametrize("kind", ACTIVATIONS)
def test_the_xnnpack_rule_equals_its_scalar_form_bit_for_bit(kind: str) -> None:
    x = ACTIVATIONS[kind]
    got = reference.RULES["xnnpack"](x)
    for row, codes, scale, zero_point in zip(x, *got, strict=True):
        assert (codes.tolist(), scale, zero_point) == _xnnpack_row(row)


def test_ties_round_to_even() -> None:
    row = np.array([[-128, 127, 0.5, 1.5, 2.5, -0.5, -1.5]], np.float32)
    got = reference.quantize_per_token(row)
    assert (got.scale[0], got.zero_point[0]) == (1.0, 0)
    assert got.codes[0].tolist() == [-128, 127, 0, 2, 2, 0, -2]


def test_a_zero_row_has_the_smallest_scale_and_codes_at_the_zero_point() -> None:
    got = reference.quantize_per_token(np.zeros((1, 4), np.float32))
    assert (got.scale[0], got.zero_point[0]) == (np.float32(2.0**-23), -128)
    assert got.codes.tolist() == [[-128] * 4]
    assert not got.dequantize().any()


ROWS = hnp.arrays(
    np.float32,
    st.tuples(st.integers(1, 3), st.integers(1, 40)),
    elements=st.floats(-(2.0**60), 2.0**60, width=32),
)


@settings(deadline=None)
@given(ROWS)
def test_every_value_comes_back_within_half_a_step(x: NDArray[np.float32]) -> None:
    got = reference.quantize_per_token(x)
    # 1e-4 of a step: the float32 rounding of x * (1 / s), at most 255 * 2^-22.
    allowed = got.scale.astype(np.float64)[:, None] * (0.5 + 1e-4)
    assert (np.abs(got.dequantize() - x) <= allowed).all()


@settings(deadline=None)
@given(ROWS)
def test_zero_comes_back_as_zero(x: NDArray[np.float32]) -> None:
    # XNNPACK's rule divides by the range and is defined for normal numbers only.
    x[np.abs(x) < 1e-30] = 0
    x[:, 0] = 0
    for rule in reference.RULES.values():
        assert not rule(x).dequantize()[:, 0].any()


@settings(deadline=None)
@given(ROWS)
def test_rows_are_quantized_independently(x: NDArray[np.float32]) -> None:
    whole: tuple[NDArray[Any], ...] = reference.quantize_per_token(x)
    for row in range(len(x)):
        alone: tuple[NDArray[Any], ...] = reference.quantize_per_token(x[row : row + 1])
        for part, all_rows in zip(alone, whole, strict=True):
            assert np.array_equal(part[0], all_rows[row])


def test_group_sums_do_not_wrap_in_int8() -> None:
    codes = np.full((2, 64), -128, np.int8)
    codes[1, 32:] = 127
    got = reference.group_sums(codes, 32)
    assert got.dtype == np.int32
    assert got.tolist() == [[-4096, -4096], [-4096, 4064]]


def test_embedding_scales_the_rows_asked_for() -> None:
    table = np.array([[1, -2], [3, 4], [-128, 127]], np.int8)
    scales = np.array([1.0, 0.5, 0.25], np.float32)
    assert reference.embedding([2, 0, 2], table, scales).tolist() == [
        [-32.0, 31.75],
        [1.0, -2.0],
        [-32.0, 31.75],
    ]


def test_a_bfloat16_embedding_is_read_as_bits() -> None:
    table = np.array([[0x3F80, 0xC000], [0x3FC0, 0]], np.uint16)
    assert reference.embedding_float([1, 0], table).tolist() == [[1.5, 0.0], [1.0, -2.0]]


def test_rms_norm_equals_torch() -> None:
    x, gamma = RNG.standard_normal((5, 64)) * 0.01, RNG.standard_normal(64)
    expected = torch.nn.functional.rms_norm(
        torch.from_numpy(x), (64,), torch.from_numpy(gamma), eps=1e-5
    )
    np.testing.assert_allclose(reference.rms_norm(x, gamma, 1e-5), expected.numpy(), rtol=1e-13)


def _int4_weight(num_rows: int, num_cols: int) -> tuple[NDArray[np.int8], NDArray[np.float32]]:
    weight = RNG.integers(-8, 8, (num_rows, num_cols), dtype=np.int8)
    scales = (RNG.random((num_rows, num_cols // 32)) * 0.02 + 1e-4).astype(np.float32)
    return weight, scales


def test_int4_linear_equals_the_integer_form_in_exact_fractions() -> None:
    weight, scales = _int4_weight(3, 96)
    codes = reference.quantize_per_token(RNG.standard_normal((2, 96)) + 1)
    got = reference.qlinear_int4(codes, weight, scales)
    for t, n in np.ndindex(got.shape):
        dot, weight_sum = Fraction(0), Fraction(0)
        for g in range(3):
            columns = slice(32 * g, 32 * g + 32)
            row = weight[n, columns].astype(int)
            dot += Fraction(float(scales[n, g])) * int(codes.codes[t, columns].astype(int) @ row)
            weight_sum += Fraction(float(scales[n, g])) * int(row.sum())
        scale, zero_point = Fraction(float(codes.scale[t])), int(codes.zero_point[t])
        assert got[t, n] == pytest.approx(float(scale * (dot - zero_point * weight_sum)), rel=1e-12)


def test_int4_linear_is_near_the_float_product_of_the_dequantized_weight() -> None:
    weight, scales = _int4_weight(64, 256)
    x = RNG.standard_normal((4, 256)).astype(np.float32)
    expected = x @ (weight * np.repeat(scales, 32, axis=1)).T
    assert reference.sqnr_db(expected, reference.qlinear_int4(x, weight, scales)) > 35


def test_row_blocks_do_not_change_the_result(monkeypatch: pytest.MonkeyPatch) -> None:
    weight, scales = _int4_weight(37, 64)
    x = RNG.standard_normal((3, 64))
    whole = reference.qlinear_int4(x, weight, scales)
    per_channel = reference.qlinear_int8(x, weight, scales[:, 0])
    monkeypatch.setattr(reference, "BLOCK_ELEMENTS", 5 * 64)
    np.testing.assert_allclose(reference.qlinear_int4(x, weight, scales), whole, rtol=1e-12)
    np.testing.assert_allclose(reference.qlinear_int8(x, weight, scales[:, 0]), per_channel)


def test_the_lora_branch_sees_the_unquantized_input() -> None:
    weight, scales = _int4_weight(8, 64)
    x = RNG.standard_normal((3, 64)).astype(np.float32)
    a, b = RNG.standard_normal((2, 64)), RNG.standard_normal((8, 2))
    base = reference.qlinear_int4(x, weight, scales)
    branch = reference.qlinear_int4(x, weight, scales, reference.Lora(a, b, 2.0)) - base
    np.testing.assert_allclose(branch, 2.0 * (x.astype(np.float64) @ a.T) @ b.T, atol=1e-11)


def test_a_lora_branch_on_codes_is_refused() -> None:
    weight, scales = _int4_weight(8, 64)
    codes = reference.quantize_per_token(np.ones((1, 64)))
    with pytest.raises(ValueError, match="unquantized"):
        reference.qlinear_int4(codes, weight, scales, reference.Lora(weight, weight, 1.0))


def test_int8_linear_equals_the_integer_dot_times_the_scales() -> None:
    weight = RNG.integers(-128, 128, (9, 160), dtype=np.int8)
    scales = RNG.random(9).astype(np.float32)
    codes = reference.quantize_per_token(RNG.standard_normal((4, 160)))
    centred = codes.codes.astype(np.int64) - codes.zero_point[:, None]
    expected = (
        (centred @ weight.T.astype(np.int64))
        * scales.astype(np.float64)
        * codes.scale.astype(np.float64)[:, None]
    )
    np.testing.assert_allclose(
        reference.qlinear_int8(codes, weight, scales), expected, rtol=1e-15, atol=0
    )


def test_the_rule_asked_for_makes_the_codes() -> None:
    weight, scales = _int4_weight(4, 64)
    x = np.full((1, 64), 1e-9, np.float32)
    # Far below the smallest scale torchao's codes are all zero points; XNNPACK's are not.
    assert not reference.qlinear_int4(x, weight, scales, rule="torchao").any()
    assert reference.qlinear_int4(x, weight, scales, rule="xnnpack").all()


def test_linear_reads_bfloat16_weights() -> None:
    weight = torch.randn(6, 32, generator=torch.Generator().manual_seed(1)).to(torch.bfloat16)
    x = RNG.standard_normal((2, 32))
    expected = x @ weight.to(torch.float64).numpy().T
    np.testing.assert_allclose(reference.linear(x, weight.view(torch.uint16).numpy()), expected)


@pytest.mark.parametrize("length", [1, 2, 8, 256])
def test_hadamard_equals_the_sylvester_matrix(length: int) -> None:
    matrix = np.ones((1, 1))
    while len(matrix) < length:
        matrix = np.kron(np.array([[1.0, 1.0], [1.0, -1.0]]), matrix)
    x = RNG.standard_normal((3, length))
    np.testing.assert_allclose(
        reference.hadamard(x), x @ matrix / np.sqrt(length), atol=1e-13, rtol=0
    )


def test_hadamard_is_its_own_inverse_and_leaves_its_input_alone() -> None:
    x = RNG.standard_normal((2, 8192))
    before = x.copy()
    np.testing.assert_allclose(reference.hadamard(reference.hadamard(x)), x, atol=1e-13, rtol=0)
    assert np.array_equal(x, before)


@pytest.mark.parametrize("length", [0, 3, 96])
def test_hadamard_refuses_other_lengths(length: int) -> None:
    with pytest.raises(ValueError, match=str(length)):
        reference.hadamard(np.zeros((1, length)))


def test_rope_is_a_complex_rotation_of_interleaved_pairs() -> None:
    x = RNG.standard_normal((5, 3, 16))
    angles = np.outer(np.arange(30, 35), 5e5 ** (-np.arange(8) / 8))
    table = np.stack([np.cos(angles), np.sin(angles)], axis=-1)
    rotated = x.view(np.complex128) * np.exp(1j * angles)[:, None]
    np.testing.assert_allclose(reference.rope(x, table), rotated.view(np.float64), atol=1e-13)


@pytest.mark.parametrize(("position", "num_tokens"), [(0, 1), (0, 7), (5, 1), (11, 4)])
def test_attention_equals_torch(position: int, num_tokens: int) -> None:
    q = RNG.standard_normal((num_tokens, 8, 16))
    # Five rows beyond the valid positions, as a padded chunk leaves them: they must not count.
    k, v = RNG.standard_normal((2, position + num_tokens + 5, 2, 16))
    end = position + num_tokens
    visible = torch.arange(end) <= position + torch.arange(num_tokens)[:, None]
    heads_first = [torch.from_numpy(a).transpose(0, 1) for a in (q, k[:end], v[:end])]
    keys, values = (side.repeat_interleave(4, dim=0) for side in heads_first[1:])
    expected = torch.nn.functional.scaled_dot_product_attention(
        heads_first[0], keys, values, attn_mask=visible
    ).transpose(0, 1)
    got = reference.attention(q, k, v, position)
    np.testing.assert_allclose(got, expected.numpy(), atol=1e-13, rtol=0)


def test_attention_survives_huge_scores() -> None:
    q = np.full((1, 1, 4), 1e4)
    k = np.array([[[1e4] * 4], [[-1e4] * 4]])
    v = np.array([[[1.0] * 4], [[2.0] * 4]])
    assert reference.attention(q, k, v, 1).tolist() == [[[1.0] * 4]]


def test_an_int8_kv_cache_has_one_scale_per_position_and_head() -> None:
    x = RNG.standard_normal((4, 2, 64)).astype(np.float32) * np.array([1, 50], np.float32)[:, None]
    cache = reference.quantize_kv(x)
    assert (cache.codes.shape, cache.scale.shape) == ((4, 2, 64), (4, 2))
    codes, scale, zero_point = _torchao(torch.from_numpy(x.reshape(8, 64)))
    assert np.array_equal(cache.codes.reshape(8, 64), codes.numpy())
    assert np.array_equal(cache.scale.reshape(8), scale.numpy())
    assert np.array_equal(cache.zero_point.reshape(8), zero_point.numpy())
    step = cache.scale[..., None].astype(np.float64)
    assert (np.abs(reference.dequantize_kv(cache) - x) <= step * 0.5001).all()


def test_swiglu_equals_torch_and_does_not_overflow() -> None:
    gate = np.concatenate([RNG.standard_normal(64) * 5, [-800.0, -40.0, 0.0, 800.0]])
    up = RNG.standard_normal(68)
    expected = torch.nn.functional.silu(torch.from_numpy(gate)) * torch.from_numpy(up)
    np.testing.assert_allclose(
        reference.swiglu(gate, up), expected.numpy(), rtol=1e-13, atol=1e-300
    )


def test_argmax_takes_the_lowest_index_on_ties() -> None:
    got = reference.argmax([[0.0, 3.0, 3.0], [-1.0, -2.0, -1.0]])
    assert got.dtype == np.int32
    assert got.tolist() == [1, 0]


def test_sqnr_counts_decibels() -> None:
    assert reference.sqnr_db([3.0, 4.0], [3.0, 4.5]) == pytest.approx(20.0)
    assert reference.sqnr_db([1.0], [1.0]) == float("inf")
    assert reference.sqnr_db([0.0], [1.0]) == float("-inf")
    assert reference.sqnr_db([1.0], [float("nan")]) == float("-inf")
