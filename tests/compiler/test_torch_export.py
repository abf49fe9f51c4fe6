"""Exported programs of PyTorch: models of transformers and of one's own, as programs and files."""

from __future__ import annotations

import base64
from collections.abc import Callable
from pathlib import Path
from types import ModuleType
from typing import Any

import numpy as np
import pytest
import torch

from llamac.compiler import from_torch
from llamac.compiler.checkpoint import Checkpoint
from llamac.compiler.config import RopeScaling
from llamac.compiler.floats import to_bfloat16
from llamac.compiler.frontends.recognize import open_checkpoint
from llamac.compiler.reference_model import ReferenceModel
from llamac.runtime.errors import CheckpointUnsafe, LlamacError, ModelUnsupported, UsageError

VOCAB, NUM_TOKENS = 320, 8
TOKENS = torch.tensor([[5, 311, 7, 7, 42, 0, 319, 100]])
LLAMA3 = {
    "rope_type": "llama3",
    "rope_theta": 500000.0,
    "factor": 32.0,
    "low_freq_factor": 1.0,
    "high_freq_factor": 4.0,
    "original_max_position_embeddings": 8192,
}
pytestmark = pytest.mark.filterwarnings("ignore::FutureWarning", "ignore::DeprecationWarning")


@pytest.fixture(scope="module")
def models(helper: Callable[[str], ModuleType]) -> ModuleType:
    """The module `exported_llama.py`."""
    return helper("compiler/exported_llama")


@pytest.fixture(scope="module")
def tokenizer(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """One token for each byte."""
    path = tmp_path_factory.mktemp("tokenizer") / "tokenizer.model"
    tokens = (base64.b64encode(bytes([i])).decode() for i in range(64))
    path.write_text("".join(f"{token} {i}\n" for i, token in enumerate(tokens)))
    return path


@pytest.fixture(scope="module")
def of_transformers(models: ModuleType) -> Callable[..., torch.nn.Module]:
    """A small LlamaForCausalLM whose weights are numbers of bfloat16, so that nothing is lost."""
    transformers = pytest.importorskip("transformers")

    def make(**changes: Any) -> torch.nn.Module:
        sizes = {
            "hidden_size": 64,
            "intermediate_size": 128,
            "num_hidden_layers": 2,
            "num_attention_heads": 4,
            "num_key_value_heads": 2,
            "head_dim": 16,
            "vocab_size": VOCAB,
            "max_position_embeddings": 9000,
            "rms_norm_eps": 1e-5,
            "rope_parameters": {"rope_type": "default", "rope_theta": 500000.0},
            "tie_word_embeddings": False,
        }
        torch.manual_seed(0)
        model = transformers.LlamaForCausalLM(transformers.LlamaConfig(**sizes | changes)).eval()
        with torch.no_grad():
            for name, weight in model.named_parameters():
                noise = 0.1 * torch.randn_like(weight) if "norm" in name else 0
                weight.copy_((weight + noise).to(torch.bfloat16))
        return model

    return make


def export(model: torch.nn.Module, most: int | None = 512) -> Any:
    """Export; `most` tokens at once, or always eight."""
    count = torch.export.Dim("count", min=2, max=most) if most else None
    return torch.export.export(model, (TOKENS,), dynamic_shapes=({1: count},) if count else None)


def expected_logits(model: torch.nn.Module) -> np.ndarray:
    """Of the last rows that the model gives, in float64."""
    with torch.no_grad():
        logits = model.double()(TOKENS)
    model.float()
    return logits.numpy().reshape(-1, VOCAB)


def check(checkpoint: Checkpoint, expected: np.ndarray, limit: float = 1e-5) -> None:
    """Compare the reference of what was read with the model's own logits."""
    model = ReferenceModel(checkpoint, kv_dtype="float32", quantize_activations=False)
    found = model.logits(TOKENS[0].tolist())[-len(expected) :]
    assert np.abs(found - expected).max() <= limit * np.abs(expected).max()


@pytest.mark.parametrize("kind", ["program", "file"])
@pytest.mark.parametrize("is_decomposed", [False, True])
@pytest.mark.parametrize("most", [None, 512])
def test_a_model_of_transformers(
    kind: str,
    is_decomposed: bool,
    most: int | None,
    models: ModuleType,
    of_transformers: Callable[..., torch.nn.Module],
    tokenizer: Path,
    tmp_path: Path,
) -> None:
    """Its own logits; any number of tokens or a fixed one; ATen's core operators or all."""
    model = models.Logits(of_transformers())
    program = export(model, most)
    if is_decomposed:
        program = program.run_decompositions()
    if kind == "file":
        torch.export.save(program, tmp_path / "model.pt2")
        checkpoint = open_checkpoint(tmp_path / "model.pt2", tokenizer=tokenizer)
        assert checkpoint.name == "model"
    else:
        checkpoint = from_torch(program, tokenizer=tokenizer)
    config = checkpoint.config
    assert (config.num_layers, config.ffn_dim, config.vocab_size) == (2, 128, VOCAB)
    assert (config.num_heads, config.num_kv_heads, config.head_dim) == (4, 2, 16)
    assert (config.norm_eps, config.rope_theta, config.rope_scaling) == (1e-5, 500000.0, None)
    assert not checkpoint.shared_embedding and checkpoint.quant.form == "float"
    check(checkpoint, expected_logits(model))


def test_weights_are_those_of_the_model(
    models: ModuleType, of_transformers: Callable[..., torch.nn.Module], tokenizer: Path
) -> None:
    """Bit for bit where nothing is turned; tied tables are found."""
    model = of_transformers(tie_word_embeddings=True)
    checkpoint = from_torch(export(models.Logits(model)), tokenizer=tokenizer)
    assert checkpoint.shared_embedding
    weights = {name: w.detach().numpy() for name, w in model.named_parameters()}
    for ours, theirs in (
        ("tok_embeddings", "model.embed_tokens"),
        ("layers.1.attention.wo", "model.layers.1.self_attn.o_proj"),
        ("layers.0.feed_forward.w2", "model.layers.0.mlp.down_proj"),
        ("layers.1.feed_forward.w1", "model.layers.1.mlp.gate_proj"),
    ):
        expected = to_bfloat16(weights[f"{theirs}.weight"])
        assert np.array_equal(checkpoint.weights.read(f"{ours}.weight"), expected)
    norm = checkpoint.weights.read("layers.1.ffn_norm.weight")
    assert np.array_equal(norm, weights["model.layers.1.post_attention_layernorm.weight"])


@pytest.mark.parametrize(
    "changes",
    [
        {"head_dim": 64, "rope_parameters": LLAMA3},
        {"num_key_value_heads": 4},
        {"num_key_value_heads": 1, "attn_implementation": "eager"},
    ],
)
def test_other_models_of_transformers(
    changes: dict[str, Any],
    models: ModuleType,
    of_transformers: Callable[..., torch.nn.Module],
    tokenizer: Path,
) -> None:
    """Llama 3's scaling, as many key heads as query heads or one, attention written out."""
    model = models.Logits(of_transformers(**changes))
    checkpoint = from_torch(export(model), tokenizer=tokenizer)
    if "rope_parameters" in changes:
        assert checkpoint.config.rope_scaling == RopeScaling(32.0, 1.0, 4.0, 8192)
    check(checkpoint, expected_logits(model))


def test_a_model_with_a_static_cache(
    of_transformers: Callable[..., torch.nn.Module], tokenizer: Path, tmp_path: Path
) -> None:
    """As ExecuTorch exports them: positions are an input, keys and values are buffers."""
    module = pytest.importorskip("transformers.integrations.executorch")
    model = of_transformers()
    model.generation_config.cache_implementation = "static"
    model.generation_config.use_cache = model.config.use_cache = True
    cached = module.TorchExportableModuleWithStaticCache(
        model, batch_size=1, max_cache_len=64, device="cpu"
    )
    inputs = {"input_ids": TOKENS, "cache_position": torch.arange(NUM_TOKENS)}
    program = torch.export.export(cached, (), kwargs=inputs, strict=False)
    torch.export.save(program, tmp_path / "cached.pt2")
    with torch.no_grad():
        expected = cached(**inputs)[0].numpy().reshape(-1, VOCAB)
    for source in (program, tmp_path / "cached.pt2"):
        check(from_torch(source, tokenizer=tokenizer), expected)


@pytest.mark.parametrize("is_decomposed", [False, True])
@pytest.mark.parametrize("most", [None, 60])
def test_a_model_of_one_s_own(
    is_decomposed: bool, most: int | None, models: ModuleType, tokenizer: Path, tmp_path: Path
) -> None:
    """Complex numbers, neighbours turned, a mask of infinities, logits of the last token only."""
    torch.manual_seed(1)
    model = models.OwnLlama(models.Sizes()).eval()
    with torch.no_grad():
        for weight in model.parameters():
            weight.copy_(weight.to(torch.bfloat16))
        expected = model(TOKENS).numpy()
    program = export(model, most)
    torch.export.save(
        program.run_decompositions() if is_decomposed else program, tmp_path / "m.pt2"
    )
    checkpoint = from_torch(tmp_path / "m.pt2", tokenizer=tokenizer)
    assert (checkpoint.config.num_layers, checkpoint.config.rope_theta) == (3, 10000.0)
    assert checkpoint.config.norm_eps == 1e-6
    assert any("neighbours" in note for note in checkpoint.notes)
    check(checkpoint, expected)


def test_layers_in_one_matrix(models: ModuleType, tokenizer: Path) -> None:
    """q, k and v, and gate and up, as rows of one matrix each."""
    torch.manual_seed(2)
    model = models.OwnLlama(models.Sizes(change="fused")).eval()
    with torch.no_grad():
        for weight in model.parameters():
            weight.copy_(weight.to(torch.bfloat16))
        expected = model(TOKENS).numpy()
    checkpoint = from_torch(export(model, 60), tokenizer=tokenizer)
    assert checkpoint.config.ffn_dim == 96 and checkpoint.config.kv_dim == 32
    check(checkpoint, expected)


# -- Quantized ------------------------------------------------------------------------------------


def quantized(model: torch.nn.Module, kind: str) -> torch.nn.Module:
    """A model whose linear layers torchao has quantized."""
    api = pytest.importorskip("torchao.quantization")
    granularity = pytest.importorskip("torchao.quantization.granularity")
    configs = {
        "8da4w": lambda: api.Int8DynamicActivationIntxWeightConfig(
            weight_dtype=torch.int4, weight_granularity=granularity.PerGroup(32)
        ),
        "int4": lambda: api.IntxWeightOnlyConfig(
            weight_dtype=torch.int4, granularity=granularity.PerGroup(64)
        ),
        "int8": lambda: api.IntxWeightOnlyConfig(
            weight_dtype=torch.int8, granularity=granularity.PerAxis(0)
        ),
    }
    api.quantize_(model, configs[kind]())
    return model


@pytest.mark.parametrize("kind", ["8da4w", "int4", "int8"])
def test_codes_are_taken_over(
    kind: str, models: ModuleType, of_transformers: Callable[..., torch.nn.Module], tokenizer: Path
) -> None:
    """int4 in groups keeps its codes and scales; int8 by rows, which no kernel has, is widened."""
    model = quantized(of_transformers(), kind)
    program = export(models.Logits(model))
    checkpoint = from_torch(program, tokenizer=tokenizer)
    layer = model.model.layers[1].mlp.down_proj.weight
    found = checkpoint.weights.read("layers.1.feed_forward.w2.weight")
    if kind == "int8":
        assert checkpoint.quant.form == "float"
        assert np.array_equal(found, to_bfloat16(layer_values(layer)))
        return
    assert checkpoint.quant.form == "ptq"
    assert np.array_equal(found, layer.qdata.numpy())
    scales = np.repeat(layer.scale.numpy(), 2 if kind == "int4" else 1, axis=1)
    assert np.array_equal(checkpoint.weights.read("layers.1.feed_forward.w2.scales"), scales)
    quantized_weights = {n: layer_values(m.weight) for n, m in linears(model)}
    plain = of_transformers()
    with torch.no_grad():
        for name, module in linears(plain):
            module.weight.copy_(torch.from_numpy(quantized_weights[name]))
    check(checkpoint, expected_logits(models.Logits(plain)), limit=0.01)


def linears(model: torch.nn.Module) -> list[tuple[str, Any]]:
    """All linear layers; torchao quantizes the last one, too."""
    return [(n, m) for n, m in model.named_modules() if n.endswith(("_proj", "lm_head"))]


def layer_values(weight: Any) -> np.ndarray:
    """What a weight of torchao stands for."""
    codes, scales = weight.qdata.numpy().astype(np.float32), weight.scale.numpy()
    return codes * np.repeat(scales, codes.shape[1] // scales.shape[1], axis=1)


def test_a_file_with_pickled_weights_is_refused(
    models: ModuleType,
    of_transformers: Callable[..., torch.nn.Module],
    tokenizer: Path,
    tmp_path: Path,
) -> None:
    """Classes of torchao are pickled; taken apart before the export they are plain tensors."""
    utils = pytest.importorskip("torchao.utils")
    path = tmp_path / "model.pt2"
    model = quantized(of_transformers(), "8da4w")
    torch.export.save(export(models.Logits(model)), path)
    with pytest.raises(CheckpointUnsafe, match="is pickled") as caught:
        from_torch(path, tokenizer=tokenizer)
    assert "unwrap_tensor_subclass" in caught.value.fix
    torch.export.save(export(models.Logits(utils.unwrap_tensor_subclass(model))), path)
    assert from_torch(path, tokenizer=tokenizer).quant.form == "ptq"


# -- Refused --------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("change", "words"),
    [
        ("tanh", r"is not silu\(gate\) \* up"),
        ("layer norm", "is no RMSNorm"),
        ("scale", "has scores that are 4.0000 times"),
        ("not causal", "a token sees one behind it"),
        ("gelu", r"does not know: aten\.gelu"),
        ("residual", "is no RMSNorm of the residual stream"),
        ("scaled embedding", "is no RMSNorm of the residual stream"),
        ("softcap", "changes the logits"),
        ("linear rope", "turns the first pair by 0.5 per position"),
        ("bias", "adds a bias"),
    ],
)
def test_what_is_no_llama_is_refused(
    change: str, words: str, models: ModuleType, tokenizer: Path
) -> None:
    """The value at which it is none is named."""
    program = export(models.OwnLlama(models.Sizes(change=change)).eval(), 60)
    with pytest.raises(ModelUnsupported, match=words):
        from_torch(program, tokenizer=tokenizer)


def test_a_sliding_window_is_refused(models: ModuleType, tokenizer: Path) -> None:
    """It would not show in the few positions that are computed; without one Mistral is a Llama."""
    transformers = pytest.importorskip("transformers")
    sizes = {"hidden_size": 32, "intermediate_size": 64, "num_hidden_layers": 1, "head_dim": 16}
    heads = {"num_attention_heads": 2, "num_key_value_heads": 1, "vocab_size": VOCAB}
    for window in (100, None):
        config = transformers.MistralConfig(**sizes, **heads, sliding_window=window)
        program = export(models.Logits(transformers.MistralForCausalLM(config).eval()))
        if window is None:
            assert from_torch(program, tokenizer=tokenizer).config.num_kv_heads == 1
            continue
        with pytest.raises(ModelUnsupported, match="positions with 100: attention over a sliding"):
            from_torch(program, tokenizer=tokenizer)


def test_operations_that_are_not_on_the_list_are_refused(
    models: ModuleType, tokenizer: Path
) -> None:
    """By name, and with what to do."""

    class Sorted(torch.nn.Module):
        def forward(self, tokens: torch.Tensor) -> torch.Tensor:
            return torch.sort(tokens.float()).values

    with pytest.raises(ModelUnsupported, match=r"does not know: aten\.sort") as caught:
        from_torch(export(Sorted()), tokenizer=tokenizer)
    assert "run_decompositions" in caught.value.fix


def test_options_that_it_does_not_have(models: ModuleType, tokenizer: Path, tmp_path: Path) -> None:
    program = export(models.OwnLlama(models.Sizes()).eval(), 60)
    torch.export.save(program, tmp_path / "m.pt2")
    with pytest.raises(UsageError, match="a graph needs --tokenizer"):
        open_checkpoint(tmp_path / "m.pt2")
    with pytest.raises(UsageError, match="--rope-factor 32 cannot be had"):
        open_checkpoint(tmp_path / "m.pt2", tokenizer=tokenizer, rope_factor=32.0)
    (tmp_path / "tokenizer.model").write_bytes(tokenizer.read_bytes())
    assert isinstance(open_checkpoint(tmp_path / "m.pt2"), Checkpoint)
    assert issubclass(UsageError, LlamacError)
