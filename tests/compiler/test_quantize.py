"""Our weight quantizers: formulas beside torch, and what each form does to a model's logits."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from hypothesis.extra import numpy as hnp
from numpy.typing import NDArray

from llamac.compiler.checkpoint import Checkpoint, TensorInfo
from llamac.compiler.config import LlamaConfig, LoraConfig, QuantConfig, RopeScaling
from llamac.compiler.floats import from_bfloat16
from llamac.compiler.quantize import (
    fit_lora,
    linear_names,
    norm_names,
    pad_ffn,
    quantize_int4,
    quantize_int8,
    quantize_model,
    random_rotation,
    rotate_spinquant,
)
from llamac.compiler.reference_model import ReferenceModel
from llamac.runtime.errors import ModelUnsupported

CONFIG = LlamaConfig(
    dim=64,
    num_layers=2,
    num_heads=4,
    num_kv_heads=2,
    head_dim=16,
    ffn_dim=128,
    vocab_size=96,
    norm_eps=1e-5,
    rope_theta=5e5,
    rope_scaling=RopeScaling(factor=32.0),
)
TOKENS = np.random.default_rng(3).integers(0, CONFIG.vocab_size, 24).tolist()
Arrays = dict[str, NDArray[Any]]


@dataclass(frozen=True)
class InMemory:
    """A weight source over a dict; scales of tables as the contract of WeightSource wants them."""

    arrays: Arrays

    def names(self) -> Sequence[str]:
        return list(self.arrays)

    def info(self, name: str) -> TensorInfo:
        raise NotImplementedError

    def read(self, name: str) -> NDArray[Any]:
        array = self.arrays[name]
        return array[:, 0] if name.endswith(".scales") and array.shape[1] == 1 else array


def float_weights(config: LlamaConfig = CONFIG, seed: int = 0) -> Arrays:
    """A tied random model with one outlier feature, which group-wise int4 dislikes."""
    rng = np.random.default_rng(seed)
    weights: Arrays = {
        f"layers.{layer}.{part}.weight": rng.standard_normal(shape) * 1.5 / np.sqrt(shape[1])
        for layer in range(config.num_layers)
        for part, shape in config.linear_shapes().items()
    }
    weights |= {name: rng.uniform(0.5, 1.5, config.dim) for name in norm_names(config)}
    weights["tok_embeddings.weight"] = rng.standard_normal((config.vocab_size, config.dim))
    weights["tok_embeddings.weight"][:, 5] *= 20
    return {name: value.astype(np.float32) for name, value in weights.items()}


def logits(
    config: LlamaConfig, quant: QuantConfig, weights: Arrays, *, apply_r4: bool = True
) -> NDArray[np.float64]:
    checkpoint = Checkpoint("test", config, quant, InMemory(weights), Path())
    model = ReferenceModel(checkpoint, kv_dtype="float32", scale_dtype="float32", apply_r4=apply_r4)
    return model.logits(TOKENS)


FLOAT = QuantConfig("float")
FLOAT_R4 = QuantConfig("float", hadamard_r4=True)

weights_2d = hnp.arrays(
    np.float32,
    st.tuples(st.integers(1, 4), st.sampled_from([32, 64])),
    elements=st.floats(-1e4, 1e4, width=32),
)


@given(weights_2d)
def test_int4_equals_the_formula_in_torch(weight: NDArray[np.float32]) -> None:
    ours = quantize_int4(weight)
    groups = torch.from_numpy(weight.copy()).reshape(len(weight), -1, 32)
    largest = torch.maximum(-groups.amin(-1).clamp(max=0), groups.amax(-1).clamp(min=0))
    scales = (largest / 7.5).clamp(min=torch.finfo(torch.float32).eps)
    codes = (groups * (1 / scales)[..., None]).round().clamp(-8, 7)
    np.testing.assert_array_equal(ours.codes, codes.reshape(weight.shape).numpy())
    nonzero = largest.numpy() > 0
    np.testing.assert_array_equal(ours.scales[nonzero], scales.numpy()[nonzero])
    assert (ours.scales[~nonzero] == 1).all()
    assert ours.codes.dtype == np.int8 and ours.scales.dtype == np.float32


@given(weights_2d)
def test_int8_equals_the_formula_in_torch(weight: NDArray[np.float32]) -> None:
    ours = quantize_int8(weight)
    rows = torch.from_numpy(weight.copy())
    largest = rows.abs().amax(-1, keepdim=True)
    scales = (largest / 127).clamp(min=torch.finfo(torch.float32).eps)
    codes = (rows * (1 / scales)).round().clamp(-127, 127)
    np.testing.assert_array_equal(ours.codes, codes.numpy())
    nonzero = largest.numpy() > 0
    np.testing.assert_array_equal(ours.scales[nonzero], scales.numpy()[nonzero])


@pytest.mark.parametrize(("quantize", "steps"), [(quantize_int4, 0.51), (quantize_int8, 0.501)])
def test_dequantized_weights_are_within_half_a_step(quantize: Any, steps: float) -> None:
    weight = np.random.default_rng(0).standard_normal((40, 96)).astype(np.float32)
    quantized = quantize(weight)
    step = np.repeat(quantized.scales, 96 // quantized.scales.shape[1], axis=1)
    assert (np.abs(quantized.dequantize() - weight) <= steps * step).all()


@pytest.mark.parametrize("size", [1, 2, 16, 64, 12, 48])
def test_random_rotations_are_orthogonal_and_differ(size: int) -> None:
    rng = np.random.default_rng(1)
    rotation = random_rotation(size, rng)
    np.testing.assert_allclose(rotation @ rotation.T, np.eye(size), atol=1e-12)
    if size > 2:
        assert np.abs(rotation - random_rotation(size, rng)).max() > 0.1


@pytest.mark.parametrize("tied", [True, False])
@pytest.mark.parametrize("dim", [64, 96])
def test_rotation_keeps_the_logits(dim: int, tied: bool) -> None:
    config = replace(CONFIG, dim=dim)
    weights = float_weights(config)
    if not tied:
        weights["output.weight"] = weights["tok_embeddings.weight"][::-1].copy()
    before = logits(config, FLOAT, weights)
    rotated = rotate_spinquant(config, weights)
    np.testing.assert_allclose(
        logits(config, FLOAT_R4, rotated), before, atol=2e-5 * np.abs(before).max()
    )
    assert all((rotated[name] == 1).all() for name in norm_names(config))


def test_rotated_weights_without_the_online_transform_are_far_off() -> None:
    before = logits(CONFIG, FLOAT, float_weights())
    without = logits(CONFIG, FLOAT_R4, rotate_spinquant(CONFIG, float_weights()), apply_r4=False)
    assert np.abs(without - before).max() > 0.3 * before.std()


def test_rotation_spreads_the_outlier_feature() -> None:
    weights = float_weights()
    rotated = rotate_spinquant(CONFIG, weights)

    def peak(table: NDArray[Any]) -> float:
        return float(np.max(np.abs(table).max(-1) / table.std(-1)))

    assert peak(rotated["tok_embeddings.weight"]) < 0.75 * peak(weights["tok_embeddings.weight"])


def test_rotation_is_repeatable_and_follows_the_seed() -> None:
    first, second = (rotate_spinquant(CONFIG, float_weights(), seed=4) for _ in range(2))
    other = rotate_spinquant(CONFIG, float_weights(), seed=5)
    assert all(np.array_equal(first[name], second[name]) for name in first)
    assert not np.array_equal(first["output.weight"], other["output.weight"])


def test_padding_the_feed_forward_keeps_the_logits() -> None:
    narrow = replace(CONFIG, ffn_dim=88)
    weights = float_weights(narrow)
    wide, padded = pad_ffn(narrow, weights, 128)
    assert wide.ffn_dim == 128 and padded["layers.1.feed_forward.w2.weight"].shape == (64, 128)
    np.testing.assert_allclose(
        logits(wide, FLOAT, padded), logits(narrow, FLOAT, weights), atol=1e-12
    )


def test_lora_is_the_best_approximation_of_its_rank() -> None:
    error = np.random.default_rng(2).standard_normal((40, 64))
    lora = LoraConfig(rank=8, scale=2.0)
    a, b = fit_lora(error, lora)
    assert a.shape == (8, 64) and b.shape == (40, 8)
    left = np.linalg.norm(error - lora.scale * (b.astype(np.float64) @ a))
    best = np.sqrt(np.sum(np.linalg.svd(error, compute_uv=False)[8:] ** 2))
    assert best <= left < 1.001 * best


def test_forms_hold_what_meta_stores() -> None:
    quant, tensors = quantize_model(CONFIG, float_weights(), "spinquant")
    assert quant == QuantConfig("spinquant", 32, hadamard_r4=True)
    assert tensors["tok_embeddings.scales"].shape == (96, 1)
    assert tensors["layers.0.feed_forward.w2.scales"].shape == (64, 4)
    assert (from_bfloat16(tensors["norm.weight"]) == 1).all()
    quant, tensors = quantize_model(CONFIG, float_weights(), "qlora")
    assert quant.lora == LoraConfig(16, 2.0) and not quant.hadamard_r4
    assert np.array_equal(tensors["output.weight"], tensors["tok_embeddings.weight"])
    for name in linear_names(CONFIG):
        assert tensors[f"{name}.weight"].min() >= -8 and tensors[f"{name}.weight"].max() <= 7
        assert tensors[f"{name}.adaptor.A.weight"].dtype == np.uint16


def test_lora_and_rotation_bring_the_weights_nearer_to_the_float_model() -> None:
    weights = float_weights()
    error = {}
    for form in ("ptq", "spinquant", "qlora"):
        source = rotate_spinquant(CONFIG, weights) if form == "spinquant" else weights
        _, tensors = quantize_model(CONFIG, weights, form)
        key = "layers.0.attention.wq"
        scales = np.repeat(tensors[f"{key}.scales"], 32, axis=1)
        value = tensors[f"{key}.weight"] * scales
        if form == "qlora":
            a, b = (from_bfloat16(tensors[f"{key}.adaptor.{side}.weight"]) for side in "AB")
            value = value + 2.0 * b @ a
        target = source[f"{key}.weight"]
        error[form] = np.linalg.norm(value - target) / np.linalg.norm(target)
    assert error["qlora"] < 0.75 * error["ptq"]
    assert error["spinquant"] < 1.05 * error["ptq"]


@pytest.mark.parametrize("form", ["ptq", "spinquant", "qlora"])
def test_widths_that_do_not_suit_a_form_are_refused(form: str) -> None:
    narrow = replace(CONFIG, ffn_dim=88)
    with pytest.raises(ModelUnsupported, match="88"):
        quantize_model(narrow, float_weights(narrow), form)


def test_spinquant_refuses_a_width_without_hadamard_matrix() -> None:
    config = replace(CONFIG, ffn_dim=96)
    with pytest.raises(ModelUnsupported, match="96 is no power of two"):
        rotate_spinquant(config, float_weights(config))


def test_an_unknown_form_is_refused() -> None:
    with pytest.raises(ValueError, match="int3"):
        quantize_model(CONFIG, float_weights(), "int3")
