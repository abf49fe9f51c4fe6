"""What of a GGUF file's metadata and tensors is read, and what is refused with the reason."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from llamac.compiler.checkpoint import Checkpoint
from llamac.compiler.config import RopeScaling
from llamac.compiler.frontends.gguf import from_gguf
from llamac.runtime.errors import (
    ModelUnsupported,
    ParamsInvalid,
    TensorInvalid,
    UsageError,
    ValuesInvalid,
)

Make = Callable[..., Path]
F16, Q4_0, Q8_0, BF16 = 1, 2, 8, 30


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
    name: str, tiny_float: Checkpoint, write_gguf: Make, refused: Callable[..., Exception]
) -> None:
    kind, match, change = REFUSED[name]
    refused(kind, match, write_gguf(tiny_float, BF16, change))


@pytest.mark.parametrize("requantize", [False, True])
@pytest.mark.parametrize("type_id", [Q4_0, Q8_0, F16])
def test_damaged_scales_are_refused(
    type_id: int, requantize: bool, tiny_float: Checkpoint, write_gguf: Make, refused: Any
) -> None:
    """An infinite scale in one block, in a row that no loss was measured on."""

    def spoil(layout: Any) -> None:
        stored = layout.tensors["blk.0.ffn_up.weight"]
        place = len(stored.data) // 256 * 3
        stored.data = stored.data[:place] + b"\x00\x7c" + stored.data[place + 2 :]

    path = write_gguf(tiny_float, type_id, spoil)
    refused(ValuesInvalid, "w3|ffn_up", path, requantize=requantize)


@pytest.mark.parametrize("factor", [8.0, 32.0])
def test_the_factor_is_found(factor: float, tiny_float: Checkpoint, write_gguf: Make) -> None:
    scaled = replace(
        tiny_float, config=replace(tiny_float.config, rope_scaling=RopeScaling(factor))
    )
    checkpoint = from_gguf(write_gguf(scaled, BF16))
    assert checkpoint.config == scaled.config
    assert f"RoPE factor {factor:g}, found from rope_freqs.weight" in checkpoint.notes


def test_no_scaling_is_no_scaling(tiny_float: Checkpoint, write_gguf: Make) -> None:
    """Without the tensor, or with ones in it; the user may still give a factor."""
    plain = write_gguf(tiny_float, BF16, tensor("rope_freqs.weight"))
    assert from_gguf(plain).config.rope_scaling is None
    assert from_gguf(plain, rope_factor=8).config.rope_scaling == RopeScaling(8.0)
    with pytest.raises(UsageError, match="expected a finite number of at least 1"):
        from_gguf(plain, rope_factor=0.5)
    ones = tensor("rope_freqs.weight", data=np.ones(16, "<f4").tobytes())
    assert from_gguf(write_gguf(tiny_float, BF16, ones)).config.rope_scaling is None


def test_fields_that_may_be_missing(tiny_float: Checkpoint, write_gguf: Make) -> None:
    def drop(layout: Any) -> None:
        for name in ("key_length", "value_length"):
            del layout.metadata[f"llama.attention.{name}"]
        del layout.metadata["llama.rope.dimension_count"], layout.metadata["llama.vocab_size"]

    assert from_gguf(write_gguf(tiny_float, BF16, drop)).config == tiny_float.config
