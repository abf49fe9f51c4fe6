"""GGUF files as checkpoints: equal to Meta's where nothing is lost, converted elsewhere."""

from __future__ import annotations

import gc
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from types import ModuleType
from typing import Any

import numpy as np
import pytest
import tvm

from llamac.compiler.checkpoint import Checkpoint
from llamac.compiler.describe import describe_quantization
from llamac.compiler.floats import from_bfloat16
from llamac.compiler.frontends.gguf import from_gguf
from llamac.compiler.frontends.gguf_blocks import decode
from llamac.compiler.frontends.meta import from_meta
from llamac.compiler.frontends.recognize import open_checkpoint
from llamac.compiler.llama import ModelOptions, build_llama
from llamac.compiler.reference_model import ReferenceModel
from llamac.runtime.errors import (
    UsageError,
)

Make = Callable[..., Path]
TINY = Path(__file__).resolve().parents[2] / "examples" / "tiny-llama"
PROMPT = [1008, *range(300, 312)]
F32, F16, Q4_0, Q4_1, Q8_0, Q4_K, Q5_K, Q6_K, BF16 = 0, 1, 2, 3, 8, 12, 13, 14, 30


@pytest.fixture
def wide(write_meta: Callable[..., Path], meta_layout: ModuleType) -> Checkpoint:
    """A random float model whose rows hold whole K blocks; its output is not tied."""
    config = replace(meta_layout.TINY, dim=256, num_layers=1, head_dim=64, ffn_dim=768)
    return from_meta(write_meta("float", config=config))


def deviation(found: np.ndarray, expected: np.ndarray) -> float:
    """Signal to noise in dB."""
    noise = float(np.sum((found.astype(np.float64) - expected) ** 2))
    return 300.0 if noise == 0 else 10 * np.log10(np.sum(expected.astype(np.float64) ** 2) / noise)


def values_of(checkpoint: Checkpoint, name: str) -> np.ndarray:
    """The float32 weights that a layer is computed with."""
    weight = checkpoint.weights.read(f"{name}.weight")
    if weight.dtype == np.uint16:
        return from_bfloat16(weight)
    scales = checkpoint.weights.read(f"{name}.scales").reshape(len(weight), -1)
    return weight * np.repeat(scales, weight.shape[1] // scales.shape[1], axis=1)


@pytest.mark.parametrize("type_id", [BF16, F32])
def test_a_float_file_is_the_meta_checkpoint(
    type_id: int,
    tiny_float: Checkpoint,
    write_gguf: Make,
    read_all: Callable[[Checkpoint], dict[str, np.ndarray]],
) -> None:
    """The same configuration, tensors, modules and tokens: q and k need no other order."""
    ours = from_gguf(write_gguf(tiny_float, type_id))
    assert (ours.config, ours.quant, ours.shared_embedding) == (
        tiny_float.config,
        tiny_float.quant,
        tiny_float.shared_embedding,
    )
    expected, found = read_all(tiny_float), read_all(ours)
    assert list(found) == list(expected)
    for name, array in expected.items():
        assert found[name].dtype == array.dtype
        np.testing.assert_array_equal(found[name], array)
        assert ours.weights.info(name) == tiny_float.weights.info(name)
    options = ModelOptions(64, (8,))
    tvm.ir.assert_structural_equal(build_llama(ours, options), build_llama(tiny_float, options))
    assert ReferenceModel(ours).greedy(PROMPT, 12) == ReferenceModel(tiny_float).greedy(PROMPT, 12)
    assert ours.tokenizer.read_bytes() == tiny_float.tokenizer.read_bytes()
    assert ours.name == "model-Q"


def test_q4_0_is_kept_bit_for_bit(
    tiny_float: Checkpoint, write_gguf: Make, gguf_layout: ModuleType
) -> None:
    """Codes and scales are the file's, negative scales too; together they are its values."""
    checkpoint = from_gguf(write_gguf(tiny_float, Q4_0))
    assert checkpoint.quant.form == "ptq"
    assert checkpoint.quant.signed_scales
    assert "28 linear layers of type Q4_0: int4 group-32, without loss" in checkpoint.notes
    scales = checkpoint.weights.read("layers.0.attention.wq.scales")
    assert 0.2 < (scales < 0).mean() < 0.8
    np.testing.assert_array_equal(scales, scales.astype(np.float16))
    for name in ("layers.0.attention.wq", "layers.3.feed_forward.w2"):
        floats = from_bfloat16(tiny_float.weights.read(f"{name}.weight"))
        raw = np.frombuffer(gguf_layout.quantize_q4_0(floats), np.uint8)
        stored = decode(Q4_0, raw.reshape(len(floats), -1))
        np.testing.assert_array_equal(values_of(checkpoint, name), stored)
        assert deviation(stored, floats) > 18


def test_q4_0_predicts_nearly_as_well(tiny_float: Checkpoint, write_gguf: Make) -> None:
    """A wrong nibble or sign would leave no likelihood at all."""
    from llamac.runtime.manifest import TokenizerEntry  # noqa: PLC0415
    from llamac.runtime.tokenizer import Tokenizer  # noqa: PLC0415

    entry = TokenizerEntry("t", "tiktoken", "llama3", {}, None, (), None)
    text = "Once upon a time, there was a little owl named Dot. One day, Dot wanted to play."
    ids = [1008, *Tokenizer(tiny_float.tokenizer, entry).encode(text)]
    loss = ReferenceModel(tiny_float).nll(ids)
    assert ReferenceModel(from_gguf(write_gguf(tiny_float, Q4_0))).nll(ids) < loss + 0.3
    assert loss < 1.5


def test_the_module_knows_signed_scales(tiny_float: Checkpoint, write_gguf: Make) -> None:
    """Kernels for negative scales are chosen where they are needed, and nowhere else."""
    script = build_llama(from_gguf(write_gguf(tiny_float, Q4_0)), ModelOptions(64, (8,))).script()
    assert "signed_scales" in script
    requantized = from_gguf(write_gguf(tiny_float, BF16), requantize=True)
    assert "signed_scales" not in build_llama(requantized, ModelOptions(64, (8,))).script()


@pytest.mark.parametrize(
    ("type_id", "least_db"),
    [(F16, 50), (Q8_0, 50), (Q4_K, 45), (Q5_K, 45), (Q6_K, 45), (6, 50), (7, 45)],
)
def test_other_types_become_bfloat16_and_int8(
    type_id: int, least_db: float, wide: Checkpoint, write_gguf: Make, gguf_layout: ModuleType
) -> None:
    path = write_gguf(wide, type_id)
    checkpoint = from_gguf(path)
    assert checkpoint.quant.form == "float"
    assert checkpoint.weights.info("layers.0.attention.wo.weight").dtype == "bfloat16"
    table = checkpoint.weights.info("tok_embeddings.weight").dtype
    assert table == ("bfloat16" if type_id == F16 else "int8")
    shape = wide.weights.info("layers.0.feed_forward.w1.weight").shape
    floats = from_bfloat16(wide.weights.read("layers.0.feed_forward.w1.weight"))
    raw = np.frombuffer(gguf_layout.encode(type_id, floats), np.uint8).reshape(shape[0], -1)
    found = deviation(values_of(checkpoint, "layers.0.feed_forward.w1"), decode(type_id, raw))
    assert found > least_db
    [note] = [n for n in checkpoint.notes if n.startswith("7 linear layers")]
    assert "bfloat16" in note
    told = note.split(", ")[1]
    assert abs((300 if told.startswith("no loss") else float(told.split(" dB")[0])) - found) < 3


@pytest.mark.parametrize("type_id", [Q8_0, Q6_K, Q4_K, BF16])
def test_all_becomes_small_when_asked(type_id: int, wide: Checkpoint, write_gguf: Make) -> None:
    exact = from_gguf(write_gguf(wide, type_id))
    checkpoint = from_gguf(write_gguf(wide, type_id), requantize=True)
    assert (checkpoint.quant.form, checkpoint.quant.signed_scales) == ("ptq", False)
    entry = describe_quantization(checkpoint, "float16", "float16", ())
    assert (entry.weights, entry.embedding) == ("int4 group-32", "int8 per channel")
    name = "layers.0.feed_forward.w2"
    assert checkpoint.weights.read(f"{name}.weight").min() >= -8
    assert 12 < deviation(values_of(checkpoint, name), values_of(exact, name)) < 30
    scales = checkpoint.weights.read(f"{name}.scales")
    np.testing.assert_array_equal(scales, scales.astype(np.float16))
    assert scales.min() >= 2.0**-14


def test_zeros_and_tiny_weights_can_be_requantized(
    tiny_float: Checkpoint, write_gguf: Make
) -> None:
    def shrink(layout: Any) -> None:
        tensor = layout.tensors["blk.0.attn_q.weight"]
        values = np.frombuffer(tensor.data, "<f4").copy()
        values[:64], values[64:128] = 0, 1e-7
        tensor.data = values.tobytes()

    checkpoint = from_gguf(write_gguf(tiny_float, F32, shrink), requantize=True)
    values = values_of(checkpoint, "layers.0.attention.wq")
    assert not values[0].any()
    assert (checkpoint.weights.read("layers.0.attention.wq.scales")[0] >= 2.0**-14).all()


def test_layers_of_one_kernel_are_int4_together(tiny_float: Checkpoint, write_gguf: Make) -> None:
    """As in files with importance weights: the first ffn_down are Q4_1, and one v is larger."""

    def choose(name: str) -> int:
        other = ("blk.0.ffn_down.weight", "blk.1.attn_v.weight")
        return Q8_0 if name in other else Q4_0

    checkpoint = from_gguf(write_gguf(tiny_float, choose, table=Q8_0))
    names = frozenset(checkpoint.weights.names())
    int4 = {name.removesuffix(".scales") for name in names if name.endswith(".scales")}
    lacking = {
        f"layers.{i}.{part}" for i in range(4) for part in tiny_float.config.linear_shapes()
    } - int4
    assert lacking == {"layers.0.feed_forward.w2"} | {
        f"layers.1.attention.{part}" for part in ("wq", "wk", "wv")
    }
    entry = describe_quantization(checkpoint, "float16", "float16", ())
    assert entry.weights == "int4 group-32 and bfloat16"
    assert entry.activations == "int8 per token, asymmetric"
    assert any("2 linear layers of type Q4_0: bfloat16" in note for note in checkpoint.notes)


def test_tables_that_int8_would_spoil_stay_bfloat16(wide: Checkpoint, write_gguf: Make) -> None:
    """One large value in each row leaves few codes to the others."""

    def spoil(layout: Any) -> None:
        stored = layout.tensors["token_embd.weight"]
        blocks = np.frombuffer(stored.data, np.uint8).reshape(-1, 8, 34).copy()
        blocks[:, 0] = 0
        blocks[:, 0, :3] = [*np.float16(0.02).tobytes(), 127]
        stored.data = blocks.tobytes()

    for change, dtype in ((spoil, "bfloat16"), (None, "int8")):
        checkpoint = from_gguf(write_gguf(wide, Q8_0, change))
        assert checkpoint.weights.info("tok_embeddings.weight").dtype == dtype
        assert checkpoint.weights.info("output.weight").dtype == "int8"
        entry = describe_quantization(checkpoint, "float16", "float16", ())
        assert entry.embedding.startswith(dtype)
        assert entry.activations.startswith("int8")


def test_an_output_of_its_own(wide: Checkpoint, write_gguf: Make, gguf_layout: ModuleType) -> None:
    checkpoint = from_gguf(write_gguf(wide, Q4_0, table=Q6_K))
    assert not checkpoint.shared_embedding
    assert checkpoint.weights.info("output.scales").shape == (wide.config.vocab_size,)

    def repeat(layout: Any) -> None:
        layout.tensors["output.weight"] = layout.tensors["token_embd.weight"]

    assert from_gguf(write_gguf(wide, Q4_0, repeat, Q6_K)).shared_embedding


def test_the_tokenizer_lives_as_long_as_the_weights(
    tiny_float: Checkpoint, write_gguf: Make
) -> None:
    checkpoint = from_gguf(write_gguf(tiny_float, BF16))
    path, weights = checkpoint.tokenizer, checkpoint.weights
    del checkpoint
    gc.collect()
    assert path.is_file()
    del weights
    gc.collect()
    assert not path.parent.exists()


def test_the_front_end_is_told_by_content(
    tiny_float: Checkpoint, write_gguf: Make, tmp_path: Path
) -> None:
    path = write_gguf(tiny_float, BF16).rename(tmp_path / "no-suffix.pth")
    assert open_checkpoint(path).config == tiny_float.config
    assert open_checkpoint(TINY / "bf16").config == tiny_float.config
    with pytest.raises(UsageError, match="cannot be quantized anew"):
        open_checkpoint(TINY / "bf16", requantize=True)
