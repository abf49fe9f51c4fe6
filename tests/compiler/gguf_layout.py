"""Write GGUF files for tests of their reader, from a float checkpoint in Meta's layout."""

from __future__ import annotations

import base64
import struct
import zlib
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

import numpy as np

from llamac.compiler.checkpoint import Checkpoint
from llamac.compiler.config import LlamaConfig, rope_frequencies
from llamac.compiler.describe import describe_tokenizer
from llamac.compiler.floats import from_bfloat16, to_bfloat16
from llamac.compiler.frontends.gguf_blocks import BLOCKS

F32, F16, Q4_0, Q4_1, Q8_0, Q4_K, Q5_K, Q6_K, BF16 = 0, 1, 2, 3, 8, 12, 13, 14, 30
NUMBERS = {4: "<I", 5: "<i", 6: "<f", 7: "<?", 10: "<Q"}
U32, I32, FLOAT, STRING, ARRAY = 4, 5, 6, 8, 9

NAMES = {
    "attention_norm": "attn_norm",
    "ffn_norm": "ffn_norm",
    "attention.wq": "attn_q",
    "attention.wk": "attn_k",
    "attention.wv": "attn_v",
    "attention.wo": "attn_output",
    "feed_forward.w1": "ffn_gate",
    "feed_forward.w2": "ffn_down",
    "feed_forward.w3": "ffn_up",
    "tok_embeddings": "token_embd",
    "norm": "output_norm",
    "output": "output",
}


@dataclass
class Strings:
    """An array of strings."""

    values: list[bytes]


@dataclass
class Tensor:
    """A tensor as it lies in a file: shape with rows first, and its bytes."""

    type_id: int
    shape: tuple[int, ...]
    data: bytes


@dataclass
class Layout:
    """All of a file, to be changed by a test before it is written."""

    metadata: dict[str, tuple[int, Any]] = field(default_factory=dict)
    tensors: dict[str, Tensor] = field(default_factory=dict)
    version: int = 3
    alignment: int = 32

    def write(self, path: Path) -> Path:
        path.write_bytes(self.to_bytes())
        return path

    def to_bytes(self) -> bytes:
        parts = [b"GGUF", struct.pack("<IQQ", self.version, len(self.tensors), len(self.metadata))]
        for key, (kind, value) in self.metadata.items():
            parts += [string(key.encode()), struct.pack("<I", kind), encode_value(kind, value)]
        offset, data = 0, []
        for name, tensor in self.tensors.items():
            dimensions = struct.pack(f"<{len(tensor.shape)}Q", *tensor.shape[::-1])
            parts += [string(name.encode()), struct.pack("<I", len(tensor.shape)), dimensions]
            parts.append(struct.pack("<IQ", tensor.type_id, offset))
            data.append(self.padded(tensor.data))
            offset += len(data[-1])
        return self.padded(b"".join(parts)) + b"".join(data)

    def padded(self, data: bytes) -> bytes:
        return data + bytes(-len(data) % self.alignment)


def string(text: bytes) -> bytes:
    return struct.pack("<Q", len(text)) + text


def encode_value(kind: int, value: Any) -> bytes:
    if kind == STRING:
        return string(value if isinstance(value, bytes) else value.encode())
    if kind != ARRAY:
        return struct.pack(NUMBERS[kind], value)
    if isinstance(value, Strings):
        return struct.pack("<IQ", STRING, len(value.values)) + b"".join(map(string, value.values))
    kinds = {"int32": I32, "uint32": U32, "float32": FLOAT}
    return struct.pack("<IQ", kinds[value.dtype.name], len(value)) + value.tobytes()


def encode(type_id: int, values: np.ndarray) -> bytes:
    """Float32 rows as blocks of a type; what nothing here quantizes gets random codes."""
    if type_id == F32:
        return values.astype("<f4").tobytes()
    if type_id == F16:
        return values.astype("<f2").tobytes()
    if type_id == BF16:
        return to_bfloat16(values).tobytes()
    if type_id == Q4_0:
        return quantize_q4_0(values)
    if type_id == Q8_0:
        return quantize_q8_0(values)
    if type_id == Q4_1:
        return quantize_q4_1(values)
    return random_blocks(type_id, values)


def quantize_q4_0(values: np.ndarray) -> bytes:
    """As llama.cpp does: the value of the largest magnitude becomes code -8, with its sign in d."""
    groups = values.astype(np.float32).reshape(-1, 32)
    extreme = np.take_along_axis(groups, np.abs(groups).argmax(1)[:, None], 1)
    scales = extreme / np.float32(-8)
    with np.errstate(divide="ignore"):
        inverse = np.where(scales == 0, 0, np.float32(1) / scales)
    codes = np.minimum(15, np.floor(groups * inverse + np.float32(8.5))).astype(np.uint8)
    packed = codes[:, :16] | codes[:, 16:] << 4
    return np.concatenate([scales.astype("<f2").view(np.uint8), packed], axis=1).tobytes()


def quantize_q4_1(values: np.ndarray) -> bytes:
    groups = values.astype(np.float32).reshape(-1, 32)
    low, high = groups.min(1, keepdims=True), groups.max(1, keepdims=True)
    scales = np.maximum(high - low, np.float32(1e-6)) / np.float32(15)
    codes = np.clip(np.rint((groups - low) / scales), 0, 15).astype(np.uint8)
    halves = np.concatenate([scales, low], axis=1).astype("<f2").view(np.uint8)
    return np.concatenate([halves, codes[:, :16] | codes[:, 16:] << 4], axis=1).tobytes()


def quantize_q8_0(values: np.ndarray) -> bytes:
    groups = values.astype(np.float32).reshape(-1, 32)
    scales = np.abs(groups).max(1, keepdims=True) / np.float32(127)
    codes = np.rint(groups / np.where(scales == 0, 1, scales)).astype(np.int8)
    return np.concatenate([scales.astype("<f2").view(np.uint8), codes.view(np.uint8)], 1).tobytes()


def random_blocks(type_id: int, values: np.ndarray) -> bytes:
    """Codes that are random, but the same for the same values; float16 fields are small numbers."""
    block, rng = BLOCKS[type_id], np.random.default_rng(zlib.crc32(values.tobytes()))
    rows = rng.integers(0, 256, (values.size // block.values, block.bytes)).astype(np.uint8)
    places = {Q6_K: (208,), Q4_K: (0, 2), Q5_K: (0, 2), 6: (0,)}.get(type_id, (0, 2))
    for place in places:
        halves = rng.uniform(1e-4, 2e-4, (len(rows), 1)).astype("<f2")
        rows[:, place : place + 2] = halves.view(np.uint8)
    return rows.tobytes()


def byte_table() -> dict[int, str]:
    """GPT-2's printable character of each byte."""
    plain = [*range(33, 127), *range(161, 173), *range(174, 256)]
    others = [byte for byte in range(256) if byte not in plain]
    return {b: chr(b) for b in plain} | {b: chr(256 + i) for i, b in enumerate(others)}


TABLE = byte_table()


def byte_text(token: bytes) -> bytes:
    """The printable form of a token, in UTF-8."""
    return "".join(TABLE[b] for b in token).encode()


def merges_of(tokens: list[bytes]) -> list[bytes]:
    """All joints of two tokens, by the rank of what they make."""
    known, merges = set(tokens), []
    for token in tokens:
        for i in range(1, len(token)):
            left, right = token[:i], token[i:]
            if left in known and right in known:
                merges.append(byte_text(left) + b" " + byte_text(right))
    return merges


def tokenizer_fields(checkpoint: Checkpoint) -> dict[str, tuple[int, Any]]:
    """The tokenizer of a checkpoint, as metadata."""
    lines = checkpoint.tokenizer.read_bytes().splitlines()
    tokens = [base64.b64decode(line.split()[0]) for line in lines]  # in the order of their ranks
    entry = describe_tokenizer(checkpoint, "tokenizer.model")
    special = [name.encode() for name in entry.special_tokens]
    types = np.array([1] * len(tokens) + [3] * len(special), np.int32)
    fields: dict[str, tuple[int, Any]] = {
        "tokenizer.ggml.model": (STRING, "gpt2"),
        "tokenizer.ggml.pre": (STRING, "llama-bpe"),
        "tokenizer.ggml.tokens": (ARRAY, Strings([*map(byte_text, tokens), *special])),
        "tokenizer.ggml.token_type": (ARRAY, types),
        "tokenizer.ggml.merges": (ARRAY, Strings(merges_of(tokens))),
    }
    if special:
        stop = entry.special_tokens["<|end_of_text|>"]
        fields["tokenizer.ggml.bos_token_id"] = (U32, len(tokens))
        fields["tokenizer.ggml.eos_token_id"] = (U32, stop)
    return fields


def config_fields(config: LlamaConfig) -> dict[str, tuple[int, Any]]:
    """Sizes, as metadata."""
    numbers = {
        "block_count": config.num_layers,
        "context_length": 131072,
        "embedding_length": config.dim,
        "feed_forward_length": config.ffn_dim,
        "attention.head_count": config.num_heads,
        "attention.head_count_kv": config.num_kv_heads,
        "attention.key_length": config.head_dim,
        "attention.value_length": config.head_dim,
        "rope.dimension_count": config.head_dim,
        "vocab_size": config.vocab_size,
    }
    fields: dict[str, tuple[int, Any]] = {"general.architecture": (STRING, "llama")}
    fields |= {f"llama.{name}": (U32, value) for name, value in numbers.items()}
    fields["llama.attention.layer_norm_rms_epsilon"] = (FLOAT, config.norm_eps)
    fields["llama.rope.freq_base"] = (FLOAT, config.rope_theta)
    return fields


def stored_name(name: str) -> str:
    """GGUF's name of a tensor, from Meta's."""
    stem = name.removesuffix(".weight")
    if stem.startswith("layers."):
        _, number, part = stem.split(".", 2)
        return f"blk.{number}.{NAMES[part]}.weight"
    return f"{NAMES[stem]}.weight"


def rope_divisors(config: LlamaConfig) -> np.ndarray:
    plain = rope_frequencies(replace(config, rope_scaling=None))
    return (plain / rope_frequencies(config)).astype(np.float32)


def float_values(checkpoint: Checkpoint) -> dict[str, np.ndarray]:
    """Float32 tensors of a float checkpoint under Meta's names; a tied output is left out."""
    values = {}
    for name in checkpoint.weights.names():
        if name == "output.weight" and checkpoint.shared_embedding:
            continue
        array = checkpoint.weights.read(name)
        is_bits = array.dtype == np.uint16
        values[name] = from_bfloat16(array) if is_bits else array.astype(np.float32)
    return values


def make_layout(
    checkpoint: Checkpoint,
    types: int | Mapping[str, int] | Callable[[str], int] = BF16,
    table: int | None = None,
) -> Layout:
    """A file of a float checkpoint.

    Args:
        checkpoint: the model.
        types: of linear layers: one, or by GGUF's name of the layer (others: BF16).
        table: type of the embedding and the output layer; by default that of the linear layers.
    """
    layout = Layout({**config_fields(checkpoint.config), **tokenizer_fields(checkpoint)})
    for name, values in float_values(checkpoint).items():
        stored = stored_name(name)
        if values.ndim == 1:
            type_id = F32
        elif stored.startswith("blk."):
            type_id = choose(types, stored)
        else:
            type_id = choose(types, stored) if table is None else table
        layout.tensors[stored] = Tensor(type_id, values.shape, encode(type_id, values))
    if checkpoint.config.rope_scaling is not None:
        divisors = rope_divisors(checkpoint.config)
        layout.tensors["rope_freqs.weight"] = Tensor(F32, divisors.shape, divisors.tobytes())
    return layout


def choose(types: int | Mapping[str, int] | Callable[[str], int], name: str) -> int:
    if isinstance(types, int):
        return types
    return types.get(name, BF16) if isinstance(types, Mapping) else types(name)
