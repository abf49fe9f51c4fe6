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
from llamac.compiler.config import RopeScaling
from llamac.compiler.describe import describe_quantization
from llamac.compiler.floats import from_bfloat16
from llamac.compiler.frontends.gguf import from_gguf
from llamac.compiler.frontends.gguf_blocks import decode
from llamac.compiler.frontends.meta import from_meta
from llamac.compiler.frontends.recognize import open_checkpoint
from llamac.compiler.llama import ModelOptions, build_llama
from llamac.compiler.reference_model import ReferenceModel
from llamac.runtime.errors import (
    ModelUnsupported,
    ParamsInvalid,
    TensorInvalid,
    UsageError,
    ValuesInvalid,
)

Make = Callable[..., Path]
TINY = Path(__file__).resolve().parents[2] / "examples" / "tiny-llama"
PROMPT = [1008, *range(300, 312)]
F32, F16, Q4_0, Q4_1, Q8_0, Q4_K, Q5_K, Q6_K, BF16 = 0, 1, 2, 3, 8, 12, 13, 14, 30


@pytest.fixture(scope="module")
def tiny() -> Checkpoint:
    """The trained float model of the repository."""
    return from_meta(TINY / "bf16")


@pytest.fixture
def write(gguf_layout: ModuleType, tmp_path: Path) -> Make:
    """write(checkpoint, types, change=None, table=None): a GGUF file of a float checkpoint."""

    def make(checkpoint: Checkpoint, types: Any, change: Any = None, table: Any = None) -> Path:
        layout = gguf_layout.make_layout(checkpoint, types, table)
        if change is not None:
            change(layout)
        written: Path = layout.write(tmp_path / "model Q.gguf")
        return written

    return make


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
    tiny: Checkpoint,
    write: Make,
    read_all: Callable[[Checkpoint], dict[str, np.ndarray]],
) -> None:
    """The same configuration, tensors, modules and tokens: q and k need no other order."""
    ours = from_gguf(write(tiny, type_id))
    assert (ours.config, ours.quant, ours.shared_embedding) == (
        tiny.config,
        tiny.quant,
        tiny.shared_embedding,
    )
    expected, found = read_all(tiny), read_all(ours)
    assert list(found) == list(expected)
    for name, array in expected.items():
        assert found[name].dtype == array.dtype
        np.testing.assert_array_equal(found[name], array)
        assert ours.weights.info(name) == tiny.weights.info(name)
    options = ModelOptions(64, (8,))
    tvm.ir.assert_structural_equal(build_llama(ours, options), build_llama(tiny, options))
    assert ReferenceModel(ours).greedy(PROMPT, 12) == ReferenceModel(tiny).greedy(PROMPT, 12)
    assert ours.tokenizer.read_bytes() == tiny.tokenizer.read_bytes()
    assert ours.name == "model-Q"


def test_q4_0_is_kept_bit_for_bit(tiny: Checkpoint, write: Make, gguf_layout: ModuleType) -> None:
    """Codes and scales are the file's, negative scales too; together they are its values."""
    checkpoint = from_gguf(write(tiny, Q4_0))
    assert checkpoint.quant.form == "ptq"
    assert checkpoint.quant.signed_scales
    assert "28 linear layers of type Q4_0: int4 group-32, without loss" in checkpoint.notes
    scales = checkpoint.weights.read("layers.0.attention.wq.scales")
    assert 0.2 < (scales < 0).mean() < 0.8
    np.testing.assert_array_equal(scales, scales.astype(np.float16))
    for name in ("layers.0.attention.wq", "layers.3.feed_forward.w2"):
        floats = from_bfloat16(tiny.weights.read(f"{name}.weight"))
        raw = np.frombuffer(gguf_layout.quantize_q4_0(floats), np.uint8)
        stored = decode(Q4_0, raw.reshape(len(floats), -1))
        np.testing.assert_array_equal(values_of(checkpoint, name), stored)
        assert deviation(stored, floats) > 18


def test_q4_0_predicts_nearly_as_well(tiny: Checkpoint, write: Make) -> None:
    """A wrong nibble or sign would leave no likelihood at all."""
    from llamac.runtime.manifest import TokenizerEntry  # noqa: PLC0415
    from llamac.runtime.tokenizer import Tokenizer  # noqa: PLC0415

    entry = TokenizerEntry("t", "tiktoken", "llama3", {}, None, (), None)
    text = "Once upon a time, there was a little owl named Dot. One day, Dot wanted to play."
    ids = [1008, *Tokenizer(tiny.tokenizer, entry).encode(text)]
    loss = ReferenceModel(tiny).nll(ids)
    assert ReferenceModel(from_gguf(write(tiny, Q4_0))).nll(ids) < loss + 0.3
    assert loss < 1.5


def test_the_module_knows_signed_scales(tiny: Checkpoint, write: Make) -> None:
    """Kernels for negative scales are chosen where they are needed, and nowhere else."""
    script = build_llama(from_gguf(write(tiny, Q4_0)), ModelOptions(64, (8,))).script()
    assert "signed_scales" in script
    requantized = from_gguf(write(tiny, BF16), requantize=True)
    assert "signed_scales" not in build_llama(requantized, ModelOptions(64, (8,))).script()


@pytest.mark.parametrize(
    ("type_id", "least_db"),
    [(F16, 50), (Q8_0, 50), (Q4_K, 45), (Q5_K, 45), (Q6_K, 45), (6, 50), (7, 45)],
)
def test_other_types_become_bfloat16_and_int8(
    type_id: int, least_db: float, wide: Checkpoint, write: Make, gguf_layout: ModuleType
) -> None:
    path = write(wide, type_id)
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
def test_all_becomes_small_when_asked(type_id: int, wide: Checkpoint, write: Make) -> None:
    exact = from_gguf(write(wide, type_id))
    checkpoint = from_gguf(write(wide, type_id), requantize=True)
    assert (checkpoint.quant.form, checkpoint.quant.signed_scales) == ("ptq", False)
    entry = describe_quantization(checkpoint, "float16", "float16", ())
    assert (entry.weights, entry.embedding) == ("int4 group-32", "int8 per channel")
    name = "layers.0.feed_forward.w2"
    assert checkpoint.weights.read(f"{name}.weight").min() >= -8
    assert 12 < deviation(values_of(checkpoint, name), values_of(exact, name)) < 30
    scales = checkpoint.weights.read(f"{name}.scales")
    np.testing.assert_array_equal(scales, scales.astype(np.float16))
    assert scales.min() >= 2.0**-14


def test_zeros_and_tiny_weights_can_be_requantized(tiny: Checkpoint, write: Make) -> None:
    def shrink(layout: Any) -> None:
        tensor = layout.tensors["blk.0.attn_q.weight"]
        values = np.frombuffer(tensor.data, "<f4").copy()
        values[:64], values[64:128] = 0, 1e-7
        tensor.data = values.tobytes()

    checkpoint = from_gguf(write(tiny, F32, shrink), requantize=True)
    values = values_of(checkpoint, "layers.0.attention.wq")
    assert not values[0].any()
    assert (checkpoint.weights.read("layers.0.attention.wq.scales")[0] >= 2.0**-14).all()


def test_layers_of_one_kernel_are_int4_together(tiny: Checkpoint, write: Make) -> None:
    """As in files with importance weights: the first ffn_down are Q4_1, and one v is larger."""

    def choose(name: str) -> int:
        other = ("blk.0.ffn_down.weight", "blk.1.attn_v.weight")
        return Q8_0 if name in other else Q4_0

    checkpoint = from_gguf(write(tiny, choose, table=Q8_0))
    names = frozenset(checkpoint.weights.names())
    int4 = {name.removesuffix(".scales") for name in names if name.endswith(".scales")}
    lacking = {
        f"layers.{i}.{part}" for i in range(4) for part in tiny.config.linear_shapes()
    } - int4
    assert lacking == {"layers.0.feed_forward.w2"} | {
        f"layers.1.attention.{part}" for part in ("wq", "wk", "wv")
    }
    entry = describe_quantization(checkpoint, "float16", "float16", ())
    assert entry.weights == "int4 group-32 and bfloat16"
    assert entry.activations == "int8 per token, asymmetric"
    assert any("2 linear layers of type Q4_0: bfloat16" in note for note in checkpoint.notes)


def test_tables_that_int8_would_spoil_stay_bfloat16(wide: Checkpoint, write: Make) -> None:
    """One large value in each row leaves few codes to the others."""

    def spoil(layout: Any) -> None:
        stored = layout.tensors["token_embd.weight"]
        blocks = np.frombuffer(stored.data, np.uint8).reshape(-1, 8, 34).copy()
        blocks[:, 0] = 0
        blocks[:, 0, :3] = [*np.float16(0.02).tobytes(), 127]
        stored.data = blocks.tobytes()

    for change, dtype in ((spoil, "bfloat16"), (None, "int8")):
        checkpoint = from_gguf(write(wide, Q8_0, change))
        assert checkpoint.weights.info("tok_embeddings.weight").dtype == dtype
        assert checkpoint.weights.info("output.weight").dtype == "int8"
        entry = describe_quantization(checkpoint, "float16", "float16", ())
        assert entry.embedding.startswith(dtype)
        assert entry.activations.startswith("int8")


def test_an_output_of_its_own(wide: Checkpoint, write: Make, gguf_layout: ModuleType) -> None:
    checkpoint = from_gguf(write(wide, Q4_0, table=Q6_K))
    assert not checkpoint.shared_embedding
    assert checkpoint.weights.info("output.scales").shape == (wide.config.vocab_size,)

    def repeat(layout: Any) -> None:
        layout.tensors["output.weight"] = layout.tensors["token_embd.weight"]

    assert from_gguf(write(wide, Q4_0, repeat, Q6_K)).shared_embedding


def test_the_tokenizer_lives_as_long_as_the_weights(tiny: Checkpoint, write: Make) -> None:
    checkpoint = from_gguf(write(tiny, BF16))
    path, weights = checkpoint.tokenizer, checkpoint.weights
    del checkpoint
    gc.collect()
    assert path.is_file()
    del weights
    gc.collect()
    assert not path.parent.exists()


def test_the_front_end_is_told_by_content(tiny: Checkpoint, write: Make, tmp_path: Path) -> None:
    path = write(tiny, BF16).rename(tmp_path / "no-suffix.pth")
    assert open_checkpoint(path).config == tiny.config
    assert open_checkpoint(TINY / "bf16").config == tiny.config
    with pytest.raises(UsageError, match="cannot be quantized anew"):
        open_checkpoint(TINY / "bf16", requantize=True)


# -- what is refused -------------------------------------------------------------------------------


def field(name: str, kind: int | None, value: Any = None) -> Callable[[Any], None]:
    """Set a field, or remove it."""

    def change(layout: Any) -> None:
        if kind is None:
            layout.metadata.pop(name)
        else:
            layout.metadata[name] = (kind, value)

    return change


def tensor(name: str, **changes: Any) -> Callable[[Any], None]:
    """Change a tensor, or remove it."""

    def change(layout: Any) -> None:
        if not changes:
            del layout.tensors[name]
            return
        layout.tensors[name] = replace(layout.tensors[name], **changes)

    return change


def rename(old: str, new: str) -> Callable[[Any], None]:
    def change(layout: Any) -> None:
        layout.tensors[new] = layout.tensors.pop(old)

    return change


U32, FLOAT, STRING, ARRAY = 4, 6, 8, 9
REFUSED: dict[str, tuple[type[Exception], str, Callable[[Any], None]]] = {
    "another architecture": (
        ModelUnsupported,
        "architecture 'qwen2'",
        field("general.architecture", STRING, "qwen2"),
    ),
    "no architecture": (ModelUnsupported, "'None'", field("general.architecture", None)),
    "experts": (ModelUnsupported, "experts", field("llama.expert_count", U32, 8)),
    "a split file": (ModelUnsupported, "several files", field("split.count", U32, 2)),
    "yarn": (ModelUnsupported, "'yarn'", field("llama.rope.scaling.type", STRING, "yarn")),
    "linear": (ModelUnsupported, "linear", field("llama.rope.scale_linear", FLOAT, 2.0)),
    "no sizes": (ParamsInvalid, "block_count is missing", field("llama.block_count", None)),
    "a size of text": (ParamsInvalid, "'4'", field("llama.block_count", STRING, "4")),
    "a size of 0": (ParamsInvalid, "is 0", field("llama.embedding_length", U32, 0)),
    "heads by layer": (
        ParamsInvalid,
        "an array, expected one integer",
        field("llama.attention.head_count_kv", ARRAY, np.array([1, 2], np.int32)),
    ),
    "odd heads": (
        ParamsInvalid,
        "head_count_kv is 3",
        field("llama.attention.head_count_kv", 4, 3),
    ),
    "part of a head": (ParamsInvalid, "rope.dimension", field("llama.rope.dimension_count", 4, 16)),
    "no eps": (
        ParamsInvalid,
        "epsilon is 0.0",
        field("llama.attention.layer_norm_rms_epsilon", FLOAT, 0.0),
    ),
    "NaN": (ParamsInvalid, "freq_base is nan", field("llama.rope.freq_base", FLOAT, float("nan"))),
    "too many layers": (TensorInvalid, "blk.4.attn_norm", field("llama.block_count", U32, 5)),
    "too few layers": (TensorInvalid, "blk.3.attn_norm", field("llama.block_count", U32, 3)),
    "no embedding": (TensorInvalid, "lacks token_embd", tensor("token_embd.weight")),
    "no final norm": (TensorInvalid, "output_norm.weight is missing", tensor("output_norm.weight")),
    "another shape": (
        TensorInvalid,
        r"BF16 \[256, 64\], expected shape \[128, 128\]",
        tensor("blk.1.attn_q.weight", shape=(256, 64)),
    ),
    "a bias": (TensorInvalid, "attn_q.bias", rename("rope_freqs.weight", "blk.0.attn_q.bias")),
    "an unknown type": (
        ModelUnsupported,
        "of type IQ4_NL",
        tensor("blk.1.attn_q.weight", type_id=20),
    ),
    "other RoPE": (
        ModelUnsupported,
        "not what Llama 3's rule gives",
        tensor("rope_freqs.weight", data=np.linspace(1, 9, 16, dtype="<f4").tobytes()),
    ),
    "RoPE of 0": (TensorInvalid, "above 0", tensor("rope_freqs.weight", data=bytes(64))),
    "RoPE of another head": (
        TensorInvalid,
        r"F32 \[8\], expected F32 \[16\]",
        tensor("rope_freqs.weight", shape=(8,)),
    ),
    "NaN in a norm": (
        ValuesInvalid,
        "layers.2.ffn_norm.weight",
        tensor("blk.2.ffn_norm.weight", data=np.full(128, np.nan, "<f4").tobytes()),
    ),
    "infinities in a layer": (
        ValuesInvalid,
        "layers.2.attention.wo",
        tensor("blk.2.attn_output.weight", data=b"\x80\x7f" * 128 * 128),
    ),
}


@pytest.mark.parametrize("name", REFUSED)
def test_what_cannot_be_compiled_is_refused(
    name: str, tiny: Checkpoint, write: Make, refused: Callable[..., Exception]
) -> None:
    kind, match, change = REFUSED[name]
    refused(kind, match, write(tiny, BF16, change))


@pytest.mark.parametrize("requantize", [False, True])
@pytest.mark.parametrize("type_id", [Q4_0, Q8_0, F16])
def test_damaged_scales_are_refused(
    type_id: int, requantize: bool, tiny: Checkpoint, write: Make, refused: Any
) -> None:
    """An infinite scale in one block, in a row that no loss was measured on."""

    def spoil(layout: Any) -> None:
        stored = layout.tensors["blk.0.ffn_up.weight"]
        place = len(stored.data) // 256 * 3
        stored.data = stored.data[:place] + b"\x00\x7c" + stored.data[place + 2 :]

    path = write(tiny, type_id, spoil)
    refused(ValuesInvalid, "w3|ffn_up", path, requantize=requantize)


# -- RoPE ------------------------------------------------------------------------------------------


@pytest.mark.parametrize("factor", [8.0, 32.0])
def test_the_factor_is_found(factor: float, wide: Checkpoint, write: Make) -> None:
    scaled = replace(wide, config=replace(wide.config, rope_scaling=RopeScaling(factor)))
    checkpoint = from_gguf(write(scaled, BF16))
    assert checkpoint.config == scaled.config
    assert f"RoPE factor {factor:g}, found from rope_freqs.weight" in checkpoint.notes


def test_no_scaling_is_no_scaling(tiny: Checkpoint, write: Make) -> None:
    """Without the tensor, or with ones in it; the user may still give a factor."""
    plain = write(tiny, BF16, tensor("rope_freqs.weight"))
    assert from_gguf(plain).config.rope_scaling is None
    assert from_gguf(plain, rope_factor=8).config.rope_scaling == RopeScaling(8.0)
    with pytest.raises(UsageError, match="expected a finite number of at least 1"):
        from_gguf(plain, rope_factor=0.5)
    ones = tensor("rope_freqs.weight", data=np.ones(16, "<f4").tobytes())
    assert from_gguf(write(tiny, BF16, ones)).config.rope_scaling is None


def test_fields_that_may_be_missing(tiny: Checkpoint, write: Make) -> None:
    def drop(layout: Any) -> None:
        for name in ("key_length", "value_length"):
            del layout.metadata[f"llama.attention.{name}"]
        del layout.metadata["llama.rope.dimension_count"], layout.metadata["llama.vocab_size"]

    assert from_gguf(write(tiny, BF16, drop)).config == tiny.config
