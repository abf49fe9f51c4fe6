"""Write models as Hugging Face's directories, for tests of their reader."""

from __future__ import annotations

import base64
import json
import struct
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np

from llamac.compiler.checkpoint import Checkpoint
from llamac.compiler.config import LlamaConfig
from llamac.compiler.describe import describe_tokenizer
from llamac.compiler.floats import from_bfloat16, to_bfloat16
from llamac.runtime.tokenizer import PATTERNS

NAMES = {
    "attention_norm": "input_layernorm",
    "ffn_norm": "post_attention_layernorm",
    "attention.wq": "self_attn.q_proj",
    "attention.wk": "self_attn.k_proj",
    "attention.wv": "self_attn.v_proj",
    "attention.wo": "self_attn.o_proj",
    "feed_forward.w1": "mlp.gate_proj",
    "feed_forward.w2": "mlp.down_proj",
    "feed_forward.w3": "mlp.up_proj",
    "tok_embeddings": "model.embed_tokens",
    "norm": "model.norm",
    "output": "lm_head",
}
STORED = {"|i1": "I8", "|u1": "U8", "<i4": "I32", "<i8": "I64", "<f2": "F16", "<f4": "F32"}


@dataclass
class Tensor:
    """A tensor as it lies in a file; bfloat16 as bits."""

    dtype: str
    data: np.ndarray


def stored(array: np.ndarray) -> Tensor:
    """An array; uint16 is bfloat16."""
    array = np.ascontiguousarray(array)
    name = "BF16" if array.dtype == np.uint16 else STORED[array.dtype.str]
    return Tensor(name, array)


def to_bytes(tensors: Mapping[str, Tensor], metadata: Mapping[str, str] | None = None) -> bytes:
    """One file."""
    header: dict[str, Any] = {"__metadata__": dict(metadata)} if metadata else {}
    place, parts = 0, []
    for name, tensor in tensors.items():
        data = tensor.data.tobytes()
        offsets = [place, place + len(data)]
        header[name] = {
            "dtype": tensor.dtype,
            "shape": list(tensor.data.shape),
            "data_offsets": offsets,
        }
        place += len(data)
        parts.append(data)
    text = json.dumps(header).encode()
    text += b" " * (-len(text) % 8)
    return struct.pack("<Q", len(text)) + text + b"".join(parts)


@dataclass
class Layout:
    """All of a folder, to be changed by a test before it is written."""

    config: dict[str, Any]
    generation: dict[str, Any]
    tokenizer: dict[str, Any]
    tensors: dict[str, Tensor] = field(default_factory=dict)
    metadata: dict[str, str] = field(default_factory=dict)

    def write(self, folder: Path, shards: int = 1) -> Path:
        folder.mkdir(parents=True, exist_ok=True)
        for name, content in (
            ("config.json", self.config),
            ("generation_config.json", self.generation),
            ("tokenizer.json", self.tokenizer),
        ):
            (folder / name).write_text(json.dumps(content))
        if shards == 1:
            content = to_bytes(self.tensors, self.metadata)
            (folder / "model.safetensors").write_bytes(content)
            return folder
        places = {}
        for i in range(shards):
            file = f"model-{i + 1:05}-of-{shards:05}.safetensors"
            part = dict(list(self.tensors.items())[i::shards])
            (folder / file).write_bytes(to_bytes(part, self.metadata))
            places |= dict.fromkeys(part, file)
        index = {"metadata": {"total_size": 1}, "weight_map": places}
        (folder / "model.safetensors.index.json").write_text(json.dumps(index))
        return folder


def module_name(name: str) -> str:
    """Hugging Face's name of a layer, from Meta's."""
    if name.startswith("layers."):
        _, number, part = name.split(".", 2)
        return f"model.layers.{number}.{NAMES[part]}"
    return NAMES[name]


def half_split(rows: np.ndarray, heads: int) -> np.ndarray:
    """Rows of q or k in Hugging Face's order, from Meta's."""
    pairs = rows.reshape(heads, len(rows) // heads // 2, 2, *rows.shape[1:])
    return np.ascontiguousarray(np.moveaxis(pairs, 2, 1)).reshape(rows.shape)


def config_fields(checkpoint: Checkpoint) -> dict[str, Any]:
    """`config.json`, as transformers wrote it before version 5."""
    config = checkpoint.config
    fields: dict[str, Any] = {
        "architectures": ["LlamaForCausalLM"],
        "attention_bias": False,
        "attention_dropout": 0.0,
        "head_dim": config.head_dim,
        "hidden_act": "silu",
        "hidden_size": config.dim,
        "intermediate_size": config.ffn_dim,
        "max_position_embeddings": 131072,
        "mlp_bias": False,
        "model_type": "llama",
        "num_attention_heads": config.num_heads,
        "num_hidden_layers": config.num_layers,
        "num_key_value_heads": config.num_kv_heads,
        "rms_norm_eps": config.norm_eps,
        "rope_scaling": rope_fields(config),
        "rope_theta": config.rope_theta,
        "tie_word_embeddings": checkpoint.shared_embedding,
        "torch_dtype": "bfloat16",
        "vocab_size": config.vocab_size,
    }
    return fields


def rope_fields(config: LlamaConfig) -> dict[str, Any] | None:
    rule = config.rope_scaling
    if rule is None:
        return None
    return {
        "factor": rule.factor,
        "high_freq_factor": rule.high_freq_factor,
        "low_freq_factor": rule.low_freq_factor,
        "original_max_position_embeddings": rule.original_context,
        "rope_type": "llama3",
    }


def byte_table() -> dict[int, str]:
    """GPT-2's printable character of each byte."""
    plain = [*range(33, 127), *range(161, 173), *range(174, 256)]
    others = [byte for byte in range(256) if byte not in plain]
    return {b: chr(b) for b in plain} | {b: chr(256 + i) for i, b in enumerate(others)}


TABLE = byte_table()


def merges_of(tokens: list[bytes]) -> list[tuple[str, str]]:
    """All joints of two tokens, by the rank of what they make."""
    known = set(tokens)
    joints = ((t[:i], t[i:]) for t in tokens for i in range(1, len(t)))
    return [(text(a), text(b)) for a, b in joints if a in known and b in known]


def text(token: bytes) -> str:
    return "".join(TABLE[b] for b in token)


def tokenizer_fields(checkpoint: Checkpoint) -> dict[str, Any]:
    """`tokenizer.json` of a checkpoint."""
    lines = checkpoint.tokenizer.read_bytes().splitlines()
    tokens = [base64.b64decode(line.split()[0]) for line in lines]  # in the order of their ranks
    special = describe_tokenizer(checkpoint, "tokenizer.model").special_tokens
    split = {"Regex": PATTERNS["llama3"]}
    byte_level = {"add_prefix_space": False, "trim_offsets": True, "use_regex": False}
    flags = {"single_word": False, "lstrip": False, "rstrip": False, "normalized": False}
    return {
        "version": "1.0",
        "truncation": None,
        "padding": None,
        "added_tokens": [
            {"id": i, "content": name, **flags, "special": True} for name, i in special.items()
        ],
        "normalizer": None,
        "pre_tokenizer": {
            "type": "Sequence",
            "pretokenizers": [
                {"type": "Split", "pattern": split, "behavior": "Isolated", "invert": False},
                {"type": "ByteLevel", **byte_level},
            ],
        },
        "post_processor": None,
        "decoder": {"type": "ByteLevel", **byte_level | {"use_regex": True}},
        "model": {
            "type": "BPE",
            "dropout": None,
            "unk_token": None,
            "continuing_subword_prefix": None,
            "end_of_word_suffix": None,
            "fuse_unk": False,
            "byte_fallback": False,
            "ignore_merges": True,
            "vocab": {text(token): rank for rank, token in enumerate(tokens)},
            "merges": [f"{left} {right}" for left, right in merges_of(tokens)],
        },
    }


def float_values(checkpoint: Checkpoint) -> dict[str, np.ndarray]:
    """Float32 tensors of a float checkpoint by Meta's layers, rows of q and k in HF's order."""
    values, config = {}, checkpoint.config
    for name in checkpoint.weights.names():
        if name == "output.weight" and checkpoint.shared_embedding:
            continue
        array = checkpoint.weights.read(name)
        array = from_bfloat16(array) if array.dtype == np.uint16 else array.astype(np.float32)
        if name.endswith("wq.weight"):
            array = half_split(array, config.num_heads)
        if name.endswith("wk.weight"):
            array = half_split(array, config.num_kv_heads)
        values[name.removesuffix(".weight")] = array
    return values


Encode = Callable[[np.ndarray], Mapping[str, np.ndarray]]


def as_float(dtype: str) -> Encode:
    """A tensor of floats: "BF16", "F16" or "F32"."""
    kinds = {"F16": np.float16, "F32": np.float32}

    def encode(values: np.ndarray) -> Mapping[str, np.ndarray]:
        return {"weight": to_bfloat16(values) if dtype == "BF16" else values.astype(kinds[dtype])}

    return encode


def make_layout(
    checkpoint: Checkpoint, encode: Encode | None = None, floats: str = "BF16"
) -> Layout:
    """A folder of a float checkpoint.

    Args:
        checkpoint: the model.
        encode: makes of a linear layer what the folder has of it; by default floats.
        floats: type of all other tensors.
    """
    entry = describe_tokenizer(checkpoint, "tokenizer.model")
    ends = {"bos_token_id": entry.bos_id, "eos_token_id": list(entry.stop_ids)}
    layout = Layout(config_fields(checkpoint) | ends, dict(ends), tokenizer_fields(checkpoint))
    for name, values in float_values(checkpoint).items():
        is_linear = name.startswith("layers.") and values.ndim == 2
        make = encode if encode is not None and is_linear else as_float(floats)
        for part, array in make(values).items():
            layout.tensors[f"{module_name(name)}.{part}"] = stored(array)
    return layout
