"""The whole-model reference against an independent Llama in torch, and on a trained model."""

from __future__ import annotations

import struct
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from numpy.typing import NDArray

from llamac.compiler import reference
from llamac.compiler.checkpoint import Checkpoint, TensorInfo
from llamac.compiler.config import LlamaConfig, LoraConfig, QuantConfig, RopeScaling
from llamac.compiler.floats import round_to, to_bfloat16, widen
from llamac.compiler.reference_model import ReferenceModel

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
    # A short original context, so that all three bands of the scaling matter for few tokens.
    rope_scaling=RopeScaling(factor=32.0, original_context=64),
)
TOKENS = np.random.default_rng(5).integers(0, CONFIG.vocab_size, 20).tolist()
Arrays = dict[str, NDArray[Any]]


@dataclass(frozen=True)
class InMemory:
    """A weight source over a dict."""

    arrays: Arrays

    def names(self) -> Sequence[str]:
        return list(self.arrays)

    def info(self, name: str) -> TensorInfo:
        array = self.arrays[name]
        dtype = "bfloat16" if array.dtype == np.uint16 else str(array.dtype)
        return TensorInfo(array.shape, dtype)

    def read(self, name: str) -> NDArray[Any]:
        return self.arrays[name]


def _linear_shapes(config: LlamaConfig) -> dict[str, tuple[int, int]]:
    q, kv = config.num_heads * config.head_dim, config.num_kv_heads * config.head_dim
    shapes: dict[str, tuple[int, int]] = {}
    for layer in range(config.num_layers):
        attention, feed_forward = f"layers.{layer}.attention", f"layers.{layer}.feed_forward"
        shapes[f"{attention}.wq"] = (q, config.dim)
        shapes[f"{attention}.wk"] = shapes[f"{attention}.wv"] = (kv, config.dim)
        shapes[f"{attention}.wo"] = (config.dim, q)
        shapes[f"{feed_forward}.w1"] = shapes[f"{feed_forward}.w3"] = (config.ffn_dim, config.dim)
        shapes[f"{feed_forward}.w2"] = (config.dim, config.ffn_dim)
    return shapes


def _float_arrays(seed: int = 0) -> dict[str, NDArray[np.float32]]:
    rng = np.random.default_rng(seed)
    tables = {"tok_embeddings": (96, 64), "output": (96, 64)}
    arrays = {
        f"{name}.weight": (rng.standard_normal(shape) * 1.5 / np.sqrt(shape[1])).astype(np.float32)
        for name, shape in (_linear_shapes(CONFIG) | tables).items()
    }
    norms = [f"layers.{i}.{kind}_norm" for i in range(2) for kind in ("attention", "ffn")]
    for name in [*norms, "norm"]:
        arrays[f"{name}.weight"] = rng.uniform(0.5, 1.5, 64).astype(np.float32)
    return arrays


def _rounded(weight: NDArray[np.float32], steps: float, group: int) -> tuple[NDArray[Any], ...]:
    """Codes and scales of a symmetric quantization, one scale per `group` columns."""
    grouped = weight.reshape(len(weight), -1, group)
    scales = (np.abs(grouped).max(-1) / steps).astype(np.float32)
    codes = np.clip(np.rint(grouped / scales[..., None]), -np.ceil(steps), np.floor(steps))
    return codes.astype(np.int8).reshape(weight.shape), scales


def _quantized_arrays(arrays: dict[str, NDArray[np.float32]]) -> Arrays:
    result: Arrays = dict(arrays)
    for name in ("tok_embeddings", "output"):
        codes, scales = _rounded(arrays[f"{name}.weight"], 127, 64)
        result[f"{name}.weight"], result[f"{name}.scales"] = codes, scales[:, 0]
    for name in _linear_shapes(CONFIG):
        codes, scales = _rounded(arrays[f"{name}.weight"], 7.5, 32)
        result[f"{name}.weight"], result[f"{name}.scales"] = codes, scales
    return result


def _with_lora(arrays: Arrays) -> Arrays:
    rng = np.random.default_rng(9)
    result = dict(arrays)
    for name, (rows, columns) in _linear_shapes(CONFIG).items():
        result[f"{name}.adaptor.A.weight"] = to_bfloat16(rng.standard_normal((4, columns)) * 0.1)
        result[f"{name}.adaptor.B.weight"] = to_bfloat16(rng.standard_normal((rows, 4)) * 0.1)
    return result


def _checkpoint(arrays: Arrays, quant: QuantConfig) -> Checkpoint:
    return Checkpoint(
        name="random", config=CONFIG, quant=quant, weights=InMemory(arrays), tokenizer=Path("none")
    )


PTQ = QuantConfig(form="ptq")
SPIN = QuantConfig(form="spinquant", hadamard_r4=True)
LORA = QuantConfig(form="qlora", lora=LoraConfig(rank=4, scale=2.0))


def _fake_quantized(x: torch.Tensor) -> torch.Tensor:
    """The float64 values that torchao's int8 codes of `x` stand for."""
    values = x.to(torch.float32)
    low, high = values.amin(-1, True).clamp(max=0), values.amax(-1, True).clamp(min=0)
    scale = ((high - low) / 255.0).clamp(min=torch.finfo(torch.float32).eps)
    zero = (-128 - torch.round(low / scale)).clamp(-128, 127)
    codes = (torch.round(values * (1.0 / scale)) + zero).clamp(-128, 127)
    return (codes - zero).double() * scale.double()


def _sylvester(length: int) -> torch.Tensor:
    matrix = torch.ones(1, 1, dtype=torch.float64)
    while len(matrix) < length:
        matrix = torch.kron(matrix, torch.tensor([[1.0, 1.0], [1.0, -1.0]], dtype=torch.float64))
    return matrix


class TorchLlama:
    """Llama in torch float64: complex RoPE, torch's attention, weights dequantized beforehand."""

    def __init__(self, arrays: Arrays, quant: QuantConfig, scale_dtype: str, kv_dtype: str) -> None:
        self.arrays, self.quant = arrays, quant
        self.scale_dtype, self.kv_dtype = scale_dtype, kv_dtype

    def weight(self, name: str) -> torch.Tensor:
        weight = widen(self.arrays[f"{name}.weight"])
        if f"{name}.scales" in self.arrays:
            scales = self.arrays[f"{name}.scales"]
            if scales.ndim == 2:
                stored = round_to(scales, self.scale_dtype).astype(np.float64)
                weight = weight * np.repeat(stored, 32, axis=1)
            else:
                weight = weight * scales.astype(np.float64)[:, None]
        return torch.from_numpy(weight)

    def linear(self, name: str, x: torch.Tensor) -> torch.Tensor:
        is_float = f"{name}.scales" not in self.arrays
        y = (x if is_float else _fake_quantized(x)) @ self.weight(name).T
        if f"{name}.adaptor.A.weight" in self.arrays:
            assert self.quant.lora is not None
            a, b = (self.weight(f"{name}.adaptor.{side}") for side in "AB")
            y = y + self.quant.lora.scale * (x @ a.T @ b.T)
        return y

    def norm(self, name: str, x: torch.Tensor) -> torch.Tensor:
        return torch.nn.functional.rms_norm(x, (64,), self.weight(name), eps=1e-5)

    def rope(self, x: torch.Tensor) -> torch.Tensor:
        angles = 5e5 ** -(torch.arange(0, 16, 2, dtype=torch.float64) / 16)
        wavelength = 2 * torch.pi / angles
        smooth = (64 / wavelength - 1) / 3
        blended = (1 - smooth) * angles / 32 + smooth * angles
        angles = torch.where(
            wavelength < 16, angles, torch.where(wavelength > 64, angles / 32, blended)
        )
        turns = torch.outer(torch.arange(x.shape[1], dtype=torch.float64), angles)
        pairs = torch.view_as_complex(x.reshape(*x.shape[:-1], 8, 2))
        # A bundle stores the table as float32.
        cos, sin = (side.to(torch.float32).double() for side in (turns.cos(), turns.sin()))
        rotated = pairs * torch.complex(cos, sin)
        return torch.view_as_real(rotated).reshape(x.shape)

    def stored(self, x: torch.Tensor) -> torch.Tensor:
        if self.kv_dtype == "int8":
            return _fake_quantized(x)
        return x.to(torch.float32).to(getattr(torch, self.kv_dtype)).double()

    def block(self, prefix: str, x: torch.Tensor) -> torch.Tensor:
        normed = self.norm(f"{prefix}.attention_norm", x)
        q, k, v = (
            self.linear(f"{prefix}.attention.{name}", normed)
            .reshape(len(x), -1, 16)
            .transpose(0, 1)
            for name in ("wq", "wk", "wv")
        )
        k, v = (self.stored(s).repeat_interleave(2, 0) for s in (self.rope(k), v))
        mixed = torch.nn.functional.scaled_dot_product_attention(self.rope(q), k, v, is_causal=True)
        x = x + self.linear(f"{prefix}.attention.wo", mixed.transpose(0, 1).reshape(len(x), -1))
        normed = self.norm(f"{prefix}.ffn_norm", x)
        gate, up = (self.linear(f"{prefix}.feed_forward.{name}", normed) for name in ("w1", "w3"))
        inner = torch.nn.functional.silu(gate) * up
        if self.quant.hadamard_r4:
            inner = inner @ _sylvester(128) / 128**0.5
        return x + self.linear(f"{prefix}.feed_forward.w2", inner)

    def logits(self, tokens: Sequence[int]) -> NDArray[np.float64]:
        x = self.weight("tok_embeddings")[torch.tensor(tokens)]
        for layer in range(CONFIG.num_layers):
            x = self.block(f"layers.{layer}", x)
        result: NDArray[np.float64] = self.linear("output", self.norm("norm", x)).numpy()
        return result


def _bfloat16_arrays() -> Arrays:
    return {name: to_bfloat16(array) for name, array in _float_arrays().items()}


CASES: dict[str, tuple[Callable[[], Arrays], QuantConfig]] = {
    "float": (_bfloat16_arrays, QuantConfig(form="float")),
    "ptq": (lambda: _quantized_arrays(_float_arrays()), PTQ),
    "spinquant": (lambda: _quantized_arrays(_float_arrays()), SPIN),
    "qlora": (lambda: _with_lora(_quantized_arrays(_float_arrays())), LORA),
}


@pytest.mark.parametrize("kv_dtype", ["float16", "float32", "int8"])
@pytest.mark.parametrize("case", CASES)
def test_logits_equal_those_of_torch(case: str, kv_dtype: str) -> None:
    make, quant = CASES[case]
    arrays = make()
    expected = TorchLlama(arrays, quant, "float16", kv_dtype).logits(TOKENS)
    got = ReferenceModel(_checkpoint(arrays, quant), kv_dtype=kv_dtype).logits(TOKENS)
    np.testing.assert_allclose(got, expected, atol=1e-10, rtol=0)


@pytest.mark.parametrize("scale_dtype", ["float16", "float32", "bfloat16"])
def test_group_scales_are_those_the_bundle_stores(scale_dtype: str) -> None:
    arrays = _quantized_arrays(_float_arrays())
    expected = TorchLlama(arrays, PTQ, scale_dtype, "float32").logits(TOKENS)
    model = ReferenceModel(_checkpoint(arrays, PTQ), scale_dtype=scale_dtype, kv_dtype="float32")
    np.testing.assert_allclose(model.logits(TOKENS), expected, atol=1e-10, rtol=0)


def test_r4_undoes_the_rotation_of_w2_and_its_absence_shows() -> None:
    arrays: Arrays = dict(_float_arrays())
    plain = ReferenceModel(_checkpoint(dict(arrays), QuantConfig(form="float"))).logits(TOKENS)
    for layer in range(CONFIG.num_layers):
        name = f"layers.{layer}.feed_forward.w2.weight"
        arrays[name] = reference.hadamard(arrays[name])
    rotated = _checkpoint(arrays, QuantConfig(form="float", hadamard_r4=True))
    # Not equal: a last bit may move a key or value to the next float16.
    assert reference.sqnr_db(plain, ReferenceModel(rotated).logits(TOKENS)) > 60
    assert reference.sqnr_db(plain, ReferenceModel(rotated, apply_r4=False).logits(TOKENS)) < 6


def test_the_activation_rule_of_the_checkpoint_is_used() -> None:
    arrays = _quantized_arrays(_float_arrays())
    # The last norm makes activations so small that only torchao's smallest scale matters.
    arrays["norm.weight"] = arrays["norm.weight"] * np.float32(1e-9)
    torchao = ReferenceModel(_checkpoint(arrays, PTQ)).logits(TOKENS)
    xnnpack = ReferenceModel(_checkpoint(arrays, replace(PTQ, activation_rule="xnnpack"))).logits(
        TOKENS
    )
    assert not torchao.any()
    assert xnnpack.all()


def test_a_model_without_output_table_uses_its_embedding() -> None:
    arrays = _quantized_arrays(_float_arrays())
    tied = dict(arrays)
    for part in ("weight", "scales"):
        arrays[f"output.{part}"] = arrays[f"tok_embeddings.{part}"]
        del tied[f"output.{part}"]
    assert np.array_equal(
        ReferenceModel(_checkpoint(tied, PTQ)).logits(TOKENS),
        ReferenceModel(_checkpoint(arrays, PTQ)).logits(TOKENS),
    )


def test_the_last_position_alone_equals_the_last_row() -> None:
    model = ReferenceModel(_checkpoint(_quantized_arrays(_float_arrays()), PTQ))
    last = model.logits(TOKENS, all_positions=False)
    assert last.shape == (1, CONFIG.vocab_size)
    np.testing.assert_allclose(last, model.logits(TOKENS)[-1:], atol=1e-12)


def test_nll_is_the_cross_entropy_of_the_logits_over_several_chunks() -> None:
    tokens = np.random.default_rng(6).integers(0, CONFIG.vocab_size, 150).tolist()
    model = ReferenceModel(_checkpoint(_quantized_arrays(_float_arrays()), PTQ))
    expected = torch.nn.functional.cross_entropy(
        torch.from_numpy(model.logits(tokens)[:-1]), torch.tensor(tokens[1:])
    )
    assert model.nll(tokens) == pytest.approx(float(expected), rel=1e-12)


def test_nll_of_one_token_is_refused() -> None:
    model = ReferenceModel(_checkpoint(_quantized_arrays(_float_arrays()), PTQ))
    with pytest.raises(ValueError, match="at least 2"):
        model.nll([1])


@pytest.mark.parametrize("kv_dtype", ["float16", "int8"])
def test_greedy_over_a_cache_equals_recomputing_everything(kv_dtype: str) -> None:
    arrays = _with_lora(_quantized_arrays(_float_arrays()))
    model = ReferenceModel(_checkpoint(arrays, LORA), kv_dtype=kv_dtype)
    tokens = list(TOKENS[:5])
    for _ in range(8):
        tokens.append(int(model.logits(tokens)[-1].argmax()))
    assert model.greedy(TOKENS[:5], 8) == tokens[5:]
    assert len(set(tokens[5:])) > 1, "a model that repeats one token shows nothing"


def test_an_unknown_kv_dtype_is_refused() -> None:
    model = ReferenceModel(_checkpoint(_bfloat16_arrays(), QuantConfig(form="float")), kv_dtype="x")
    with pytest.raises(ValueError, match="'x'"):
        model.logits([1])


def _read_stories(path: Path) -> Checkpoint:
    """Read llama2.c's oldest format: 7 int32, then float32 tensors stacked over the layers."""
    data = path.read_bytes()
    dim, ffn_dim, layers, heads, kv_heads, vocab, _ = struct.unpack_from("7i", data)
    values, offset = np.frombuffer(data, np.float32, offset=28), 0
    kv_dim = dim // heads * kv_heads
    stacked = {
        "attention_norm": (dim,),
        "attention.wq": (dim, dim),
        "attention.wk": (kv_dim, dim),
        "attention.wv": (kv_dim, dim),
        "attention.wo": (dim, dim),
        "ffn_norm": (dim,),
        "feed_forward.w1": (ffn_dim, dim),
        "feed_forward.w2": (dim, ffn_dim),
        "feed_forward.w3": (ffn_dim, dim),
    }

    def take(*shape: int) -> NDArray[np.float32]:
        nonlocal offset
        part = values[offset : offset + int(np.prod(shape))].reshape(shape)
        offset += part.size
        return part

    arrays: Arrays = {"tok_embeddings.weight": take(vocab, dim)}
    for name, shape in stacked.items():
        for layer, part in enumerate(take(layers, *shape)):
            arrays[f"layers.{layer}.{name}.weight"] = part
    arrays["norm.weight"] = take(dim)
    config = LlamaConfig(
        dim, layers, heads, kv_heads, dim // heads, ffn_dim, vocab, 1e-5, 10000.0, None
    )
    return Checkpoint("stories260K", config, QuantConfig(form="float"), InMemory(arrays), path)


def _pieces(path: Path) -> list[bytes]:
    """The vocabulary of llama2.c's tokenizer file: int32, then (float32, int32, bytes) each."""
    data, offset, pieces = path.read_bytes(), 4, []
    while offset < len(data):
        _, length = struct.unpack_from("fi", data, offset)
        pieces.append(data[offset + 8 : offset + 8 + length])
        offset += 8 + length
    return pieces


def test_a_trained_model_tells_the_story_it_is_known_for(shared_data: Path) -> None:
    folder = shared_data / "stories260K"
    model = ReferenceModel(_read_stories(folder / "stories260K.bin"), kv_dtype="float32")
    pieces = _pieces(folder / "tok512.bin")
    generated = model.greedy([1], 60)
    text = b"".join(pieces[token] for token in generated).decode().strip()
    assert text.startswith(
        "Once upon a time, there was a little girl named Lily. She loved to play outside in the "
        "park. One day, she saw a big, red ball"
    )
    assert model.nll([1, *generated]) < 1.0
