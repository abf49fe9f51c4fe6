"""Folders of Hugging Face with floats: the same model as in Meta's layout."""

from __future__ import annotations

import gc
import json
import mmap
import shutil
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from types import ModuleType
from typing import Any

import numpy as np
import pytest
import tvm

from llamac.compiler.checkpoint import Checkpoint
from llamac.compiler.floats import from_bfloat16
from llamac.compiler.frontends.hf import from_hf
from llamac.compiler.frontends.meta import from_meta
from llamac.compiler.frontends.recognize import open_checkpoint
from llamac.compiler.llama import ModelOptions, build_llama
from llamac.compiler.reference_model import ReferenceModel
from llamac.runtime.errors import (
    CheckpointMissing,
    LlamacError,
    ParamsInvalid,
    TensorInvalid,
    TokenizerError,
    ValuesInvalid,
)

Make = Callable[..., Path]
Refused = Callable[..., LlamacError]
TINY = Path(__file__).resolve().parents[2] / "examples" / "tiny-llama"
PROMPT = [1008, *range(300, 312)]


@pytest.fixture
def untied(write_meta: Callable[..., Path], meta_layout: ModuleType) -> Checkpoint:
    """A random float model whose output is a layer of its own."""
    return from_meta(write_meta("float", config=replace(meta_layout.TINY, num_layers=1)))


@pytest.mark.parametrize("shards", [1, 3])
def test_bfloat16_is_the_meta_checkpoint(
    shards: int,
    tiny_float: Checkpoint,
    write_hf: Make,
    read_all: Callable[[Checkpoint], dict[str, np.ndarray]],
) -> None:
    """The same configuration, tensors, modules and tokens, from one file or several."""
    ours = from_hf(write_hf(tiny_float, shards=shards))
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
    assert ours.name == "Some-Model"
    assert "28 linear layers of type BF16: bfloat16, without loss" in ours.notes


def is_mapped(array: Any) -> bool:
    while isinstance(array, np.ndarray) and array.base is not None:
        array = array.base
    return isinstance(array, memoryview | mmap.mmap)


def test_only_q_and_k_are_copied(tiny_float: Checkpoint, write_hf: Make) -> None:
    weights = from_hf(write_hf(tiny_float)).weights
    for part in ("wq", "wk", "wv", "wo"):
        array = weights.read(f"layers.0.attention.{part}.weight")
        assert is_mapped(array) == (part in ("wv", "wo"))
        assert not array.flags.writeable


def test_float32_that_is_bfloat16_loses_nothing(
    tiny_float: Checkpoint,
    write_hf: Make,
    read_all: Callable[[Checkpoint], dict[str, np.ndarray]],
) -> None:
    ours = from_hf(write_hf(tiny_float, floats="F32"))
    for name, array in read_all(tiny_float).items():
        np.testing.assert_array_equal(ours.weights.read(name), array)
    assert "28 linear layers of type F32: bfloat16, no loss on the rows that were measured" in (
        ours.notes
    )


def test_float16_is_rounded_and_the_notes_say_so(tiny_float: Checkpoint, write_hf: Make) -> None:
    def disturb(layout: Any) -> None:
        tensor = layout.tensors["model.layers.0.mlp.up_proj.weight"]
        tensor.data = tensor.data * np.float16(1.001)

    ours = from_hf(write_hf(tiny_float, disturb, floats="F16"))
    exact = from_bfloat16(tiny_float.weights.read("layers.0.feed_forward.w3.weight"))
    found = from_bfloat16(ours.weights.read("layers.0.feed_forward.w3.weight"))
    np.testing.assert_allclose(found, exact * 1.001, rtol=2**-8, atol=1e-6)
    [note] = [note for note in ours.notes if "linear layers of type F16" in note]
    assert 50 < float(note.split(", ")[1].split(" dB")[0]) < 80


def test_logits_of_transformers(tiny_float: Checkpoint, write_hf: Make) -> None:
    """Their own model reads the folder, and says what ours says."""
    torch = pytest.importorskip("torch")
    transformers = pytest.importorskip("transformers")
    path = write_hf(tiny_float)
    theirs = transformers.LlamaForCausalLM.from_pretrained(path, dtype=torch.float32)
    ids = PROMPT * 3
    with torch.no_grad():
        expected = theirs(torch.tensor([ids])).logits[0].numpy()
    found = np.asarray(all_logits(from_hf(path), ids))
    np.testing.assert_allclose(found, expected, atol=1e-4)


def test_folders_that_transformers_writes(
    tiny_float: Checkpoint,
    write_hf: Make,
    tmp_path: Path,
    read_all: Callable[[Checkpoint], dict[str, np.ndarray]],
) -> None:
    """What it saves today, `rope_parameters` and all, is what it read."""
    torch = pytest.importorskip("torch")
    transformers = pytest.importorskip("transformers")
    path = write_hf(tiny_float)
    theirs = transformers.LlamaForCausalLM.from_pretrained(path, dtype=torch.bfloat16)
    again = tmp_path / "again"
    theirs.save_pretrained(again, max_shard_size="200KB")
    transformers.PreTrainedTokenizerFast(
        tokenizer_file=str(path / "tokenizer.json")
    ).save_pretrained(again)
    assert len(list(again.glob("*.safetensors"))) > 2
    assert "rope_parameters" in json.loads((again / "config.json").read_text())
    ours = from_hf(again)
    assert ours.config == tiny_float.config
    assert ours.tokenizer.read_bytes() == tiny_float.tokenizer.read_bytes()
    for name, array in read_all(tiny_float).items():
        np.testing.assert_array_equal(ours.weights.read(name), array)


def all_logits(checkpoint: Checkpoint, ids: list[int]) -> np.ndarray:
    return ReferenceModel(checkpoint, kv_dtype="float32").logits(ids)


def test_an_output_of_its_own(untied: Checkpoint, write_hf: Make) -> None:
    ours = from_hf(write_hf(untied))
    assert not ours.shared_embedding
    np.testing.assert_array_equal(
        ours.weights.read("output.weight"), untied.weights.read("output.weight")
    )


def test_a_copy_of_the_embedding_is_shared(tiny_float: Checkpoint, write_hf: Make) -> None:
    def copy(layout: Any) -> None:
        layout.tensors["lm_head.weight"] = layout.tensors["model.embed_tokens.weight"]

    assert from_hf(write_hf(tiny_float, copy)).shared_embedding

    def untie(layout: Any) -> None:
        copy(layout)
        layout.config["tie_word_embeddings"] = False

    assert from_hf(write_hf(tiny_float, untie)).shared_embedding


def test_all_becomes_small_when_asked(tiny_float: Checkpoint, write_hf: Make) -> None:
    ours = from_hf(write_hf(tiny_float), requantize=True)
    assert ours.quant.form == "ptq"
    assert ours.weights.info("tok_embeddings.weight").dtype == "int8"
    assert ours.weights.info("layers.0.attention.wq.weight").dtype == "int8"
    assert ReferenceModel(ours).nll([*PROMPT, 5, 6]) > 0
    assert any("quantized anew" in note for note in ours.notes)


def test_tensors_without_meaning_are_passed_over(tiny_float: Checkpoint, write_hf: Make) -> None:
    def add(layout: Any) -> None:
        tensor = layout.tensors["model.norm.weight"]
        layout.tensors["model.layers.0.self_attn.rotary_emb.inv_freq"] = tensor
        zeros = replace(tensor, data=np.zeros_like(tensor.data))
        layout.tensors["model.layers.0.self_attn.q_proj.bias"] = zeros

    assert from_hf(write_hf(tiny_float, add)).config == tiny_float.config


def test_the_front_end_is_told_by_content(
    tiny_float: Checkpoint, write_hf: Make, tmp_path: Path
) -> None:
    path = write_hf(tiny_float)
    assert open_checkpoint(path).name == "Some-Model"
    snapshot = tmp_path / "models--someone--Their-Model" / "snapshots" / "0123abcd"
    shutil.copytree(path, snapshot)
    assert open_checkpoint(snapshot, requantize=True).name == "Their-Model"
    for name in ("consolidated.00.pth", "params.json", "tokenizer.model"):
        shutil.copy(TINY / "bf16" / name, path)
    assert open_checkpoint(path).notes[0].endswith("params.json names no factor")


def test_the_tokenizer_lives_as_long_as_the_weights(tiny_float: Checkpoint, write_hf: Make) -> None:
    checkpoint = from_hf(write_hf(tiny_float))
    path, weights = checkpoint.tokenizer, checkpoint.weights
    del checkpoint
    gc.collect()
    assert path.is_file()
    del weights
    gc.collect()
    assert not path.parent.exists()


def drop(name: str) -> Callable[[Any], object]:
    return lambda layout: layout.tensors.pop(name)


def spoil(name: str, make: Callable[[np.ndarray], np.ndarray], dtype: str | None = None) -> Any:
    def change(layout: Any) -> None:
        tensor = layout.tensors[name]
        layout.tensors[name] = replace(tensor, data=make(tensor.data), dtype=dtype or tensor.dtype)

    return change


def add(name: str) -> Callable[[Any], object]:
    return lambda layout: layout.tensors.update(
        {name: layout.tensors["model.layers.0.mlp.up_proj.weight"]}
    )


def untie(layout: Any) -> None:
    layout.config["tie_word_embeddings"] = False


def other_output(layout: Any) -> None:
    tensor = layout.tensors["model.embed_tokens.weight"]
    layout.tensors["lm_head.weight"] = replace(tensor, data=tensor.data[::-1])


def infinite(data: np.ndarray) -> np.ndarray:
    changed = data.copy()
    changed[3, 5] = 0x7F80
    return changed


UP = "model.layers.1.mlp.up_proj.weight"
DAMAGED: dict[str, tuple[type[LlamacError], str, Callable[[Any], object]]] = {
    "a missing layer": (TensorInvalid, "up_proj.weight is missing", drop(UP)),
    "a missing norm": (TensorInvalid, "norm.weight is missing", drop("model.norm.weight")),
    "no output": (TensorInvalid, "lm_head.weight is missing", untie),
    "two outputs": (TensorInvalid, "though tie_word_embeddings is true", other_output),
    "a shape": (TensorInvalid, r"up_proj.weight is BF16 \[", spoil(UP, lambda a: a[:, :-1])),
    "a dtype": (TensorInvalid, "is I8", spoil(UP, lambda a: a.astype(np.int8), "I8")),
    "a bias": (TensorInvalid, "proj.bias'", add("model.layers.0.self_attn.q_proj.bias")),
    "more layers": (
        TensorInvalid,
        "holds 'model.layers.9",
        add("model.layers.9.mlp.up_proj.weight"),
    ),
    "an infinity": (ValuesInvalid, "1 infinite or NaN", spoil(UP, infinite)),
    "garbage in generation": (
        ParamsInvalid,
        "vocab_size is 'x'",
        lambda layout: layout.config.update(vocab_size="x"),
    ),
    "more tokens than embeddings": (
        TokenizerError,
        "expected 1008 to 1019",
        lambda layout: (
            layout.config.update(vocab_size=1020)
            or spoil("model.embed_tokens.weight", lambda a: a[:1020])(layout)
        ),
    ),
}


@pytest.mark.parametrize("name", DAMAGED)
def test_damaged_folders(
    name: str, tiny_float: Checkpoint, write_hf: Make, refused: Refused
) -> None:
    kind, match, change = DAMAGED[name]
    refused(kind, match, write_hf(tiny_float, change))


@pytest.mark.parametrize("file", ["config.json", "generation_config.json"])
@pytest.mark.parametrize("content", [b"", b"\xff", b"[1]", b"{" * 100_000])
def test_garbage_for_json(
    file: str, content: bytes, tiny_float: Checkpoint, write_hf: Make, refused: Refused
) -> None:
    path = write_hf(tiny_float)
    (path / file).write_bytes(content)
    refused(ParamsInvalid, "is not a JSON object", path)


def test_missing_files(tiny_float: Checkpoint, write_hf: Make, refused: Refused) -> None:
    path = write_hf(tiny_float)
    (path / "tokenizer.json").unlink()
    refused(TokenizerError, "no tokenizer", path)
    shutil.copy(tiny_float.tokenizer, path / "tokenizer.model")
    assert from_hf(path).tokenizer == path / "tokenizer.model"
    (path / "model.safetensors").unlink()
    refused(CheckpointMissing, r"no \*.safetensors", path)
    with pytest.raises(CheckpointMissing, match=r"no config\.json"):
        from_hf(path.parent)
