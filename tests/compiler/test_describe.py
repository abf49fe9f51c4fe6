"""The manifest says of a model what its checkpoint says."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import asdict, replace
from pathlib import Path

import pytest

from llamac.compiler import describe
from llamac.compiler.checkpoint import Checkpoint
from llamac.compiler.describe import (
    describe_model,
    describe_quantization,
    describe_tokenizer,
    tool_versions,
)
from llamac.compiler.frontends.meta import from_meta
from llamac.runtime.manifest import LoraEntry


@pytest.fixture
def checkpoint(write_meta: Callable[..., Path]) -> Callable[[str], Checkpoint]:
    """checkpoint(form): a tiny one."""
    return lambda form: from_meta(write_meta(form))


def test_model(checkpoint: Callable[[str], Checkpoint]) -> None:
    """All of the configuration, under the name and for the context that the user chose."""
    source = checkpoint("ptq")
    entry = asdict(describe_model(source, "my-model", 60))
    assert (entry.pop("name"), entry.pop("context_length")) == ("my-model", 60)
    assert entry.pop("family") == "llama"
    assert entry == asdict(source.config)


def test_model_without_rope_scaling(checkpoint: Callable[[str], Checkpoint]) -> None:
    source = checkpoint("ptq")
    plain = replace(source, config=replace(source.config, rope_scaling=None))
    assert describe_model(plain, "x", 60).rope_scaling is None


@pytest.mark.parametrize(
    ("form", "expected"),
    [
        ("spinquant", {"hadamard_r4": True, "lora": None, "weights": "int4 group-32"}),
        ("qlora", {"hadamard_r4": False, "lora": LoraEntry(4, 2.0), "output": "int8 per channel"}),
        ("ptq", {"hadamard_r4": False, "lora": None, "scale_dtype": "bfloat16"}),
        ("float", {"weights": "bfloat16", "activations": "float32", "embedding": "bfloat16"}),
        ("float", {"scale_dtype": "none", "activation_rule": "none", "output": "bfloat16"}),
    ],
)
def test_quantization(
    checkpoint: Callable[[str], Checkpoint], form: str, expected: dict[str, object]
) -> None:
    """The arithmetic of each form; dtypes and notes as they were chosen."""
    entry = describe_quantization(checkpoint(form), "bfloat16", "int8", ("a note",))
    assert {name: getattr(entry, name) for name in expected} == expected
    assert (entry.form, entry.kv_cache, entry.notes) == (form, "int8", ("a note",))
    assert entry.shared_embedding is False


def test_shared_embedding(checkpoint: Callable[[str], Checkpoint]) -> None:
    shared = replace(checkpoint("ptq"), shared_embedding=True)
    assert describe_quantization(shared, "float16", "float16", ()).shared_embedding is True


def tokenizer_with(
    source: Checkpoint, meta_layout: object, tmp_path: Path, *, num_special: int
) -> Checkpoint:
    """The same checkpoint with a tokenizer that leaves room for so many special tokens."""
    path = tmp_path / "other.model"
    meta_layout.write_tokenizer(path, source.config.vocab_size - num_special)  # type: ignore[attr-defined]
    return replace(source, tokenizer=path)


def test_special_tokens_follow_the_ordinary_ones(
    checkpoint: Callable[[str], Checkpoint], meta_layout: object, tmp_path: Path
) -> None:
    """Llama 3's order: known names at their places, the others reserved and counted."""
    source = tokenizer_with(checkpoint("ptq"), meta_layout, tmp_path, num_special=13)
    entry = describe_tokenizer(source, "tokenizer.model")
    names = {index - 83: name for name, index in entry.special_tokens.items()}
    assert sorted(names) == list(range(13))
    assert {i: n for i, n in names.items() if "reserved" not in n} == describe.SPECIAL_TOKENS
    reserved = [names[i] for i in (2, 3, 5, 11, 12)]
    assert reserved == [f"<|reserved_special_token_{i}|>" for i in range(5)]
    assert entry.bos_id == 83
    assert entry.stop_ids == (84, 83 + 8, 83 + 9)
    assert entry.chat_template == "llama3"
    assert (entry.file, entry.format, entry.pattern) == ("tokenizer.model", "tiktoken", "llama3")


@pytest.mark.parametrize(
    ("num_special", "bos", "stops"), [(0, None, ()), (1, 95, ()), (9, 87, (88, 95))]
)
def test_without_all_special_tokens_there_is_no_chat(
    checkpoint: Callable[[str], Checkpoint],
    meta_layout: object,
    tmp_path: Path,
    num_special: int,
    bos: int | None,
    stops: tuple[int, ...],
) -> None:
    """A small vocabulary may have no room for them."""
    source = tokenizer_with(checkpoint("ptq"), meta_layout, tmp_path, num_special=num_special)
    entry = describe_tokenizer(source, "tokenizer.model")
    assert (entry.bos_id, entry.stop_ids, entry.chat_template) == (bos, stops, None)
    assert len(entry.special_tokens) == num_special


def test_names_and_ids_are_those_of_llama_3_2() -> None:
    """128000 ordinary tokens and 256 special ones."""
    special = describe._special_tokens(128000, 256)
    known = {
        "<|begin_of_text|>": 128000,
        "<|end_of_text|>": 128001,
        "<|start_header_id|>": 128006,
        "<|end_header_id|>": 128007,
        "<|eom_id|>": 128008,
        "<|eot_id|>": 128009,
        "<|python_tag|>": 128010,
        "<|reserved_special_token_2|>": 128005,
        "<|reserved_special_token_247|>": 128255,
    }
    assert {name: special[name] for name in known} == known
    assert len(special) == 256


def test_tool_versions(monkeypatch: pytest.MonkeyPatch) -> None:
    """Installed packages with their versions; others are left out."""
    versions = tool_versions()
    assert {"llamac", "numpy", "apache-tvm"} <= versions.keys() <= set(describe.TOOLS)
    assert all(text[0].isdigit() for text in versions.values())
    monkeypatch.setattr(describe, "TOOLS", ("llamac", "no-such-package-of-ours"))
    assert list(tool_versions()) == ["llamac"]
