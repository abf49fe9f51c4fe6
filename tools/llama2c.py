"""Read models of llama2.c's legacy format, such as stories260K, and write them in Meta's layouts.

Such a model is small, trained by others, and its text is known, which makes it a good test of the
whole way through. The format: seven int32, then float32 tensors without names; a tokenizer file
of sentencepiece tokens with scores.
"""

from __future__ import annotations

import struct
import sys
from collections.abc import Mapping
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any, NamedTuple

import numpy as np
from numpy.typing import NDArray

from llamac.compiler.config import LlamaConfig
from llamac.compiler.meta_writer import write_checkpoint
from llamac.compiler.quantize import Tensors, pad_ffn, quantize_model
from llamac.runtime.errors import CheckpointUnreadable
from llamac.tools.tiny_tokenizer import special_tokens, write_ranks

# Ids of sentencepiece, before the 256 byte tokens.
UNKNOWN, BEGIN, END = 0, 1, 2
_FIRST_BYTE, _FIRST_PIECE = 3, 259

_HEADER = struct.Struct("<7i")


class Vocabulary(NamedTuple):
    """A tokenizer of llama2.c.

    Attributes:
        pieces: bytes of each token by id; ids from 259 on are pieces of text, in merge order
            down to the single characters.
        scores: of each token; a higher one is merged earlier.
    """

    pieces: list[bytes]
    scores: list[float]


def read_llama2c(path: Path) -> tuple[LlamaConfig, Tensors]:
    """Read a model file.

    Args:
        path: file in the legacy format (version 0, float32).

    Returns:
        The configuration (RoPE base 10000, no scaling) and float32 tensors under Meta's names;
        no `output.weight` when it is tied.

    Raises:
        CheckpointUnreadable: the file has not the size that its header promises.
    """
    data = path.read_bytes()
    if len(data) < _HEADER.size:
        raise _unreadable(path, f"{len(data)} bytes are too few for a header")
    dim, ffn_dim, layers, heads, kv_heads, vocab, context = _HEADER.unpack_from(data)
    config = LlamaConfig(
        dim, layers, heads, kv_heads, dim // heads, ffn_dim, abs(vocab), 1e-5, 10000.0, None
    )
    # A negative vocabulary size says that the output layer has weights of its own.
    shapes = _stacked_shapes(config, context, is_tied=vocab > 0)
    floats = np.frombuffer(data, np.float32, offset=_HEADER.size)
    expected = sum(int(np.prod(shape)) for shape in shapes.values())
    if floats.size != expected:
        raise _unreadable(path, f"{floats.size} numbers after the header instead of {expected}")
    ends = np.cumsum([int(np.prod(shape)) for shape in shapes.values()])
    parts = np.split(floats, ends[:-1])
    stacked = {
        name: part.reshape(shape) for (name, shape), part in zip(shapes.items(), parts, strict=True)
    }
    return config, _unstack(config, stacked)


def _unreadable(path: Path, what: str) -> CheckpointUnreadable:
    return CheckpointUnreadable(
        f"{path} is no llama2.c model: {what}",
        cause="the file was cut off, or is of another version than the legacy float32 format",
        fix="export it again with version 0 of llama2.c's export script",
    )


def _stacked_shapes(
    config: LlamaConfig, context: int, *, is_tied: bool
) -> dict[str, tuple[int, ...]]:
    """Tensors in the order of the file; each holds all layers."""
    layers, linears = config.num_layers, config.linear_shapes()
    shapes: dict[str, tuple[int, ...]] = {
        "tok_embeddings": (config.vocab_size, config.dim),
        "attention_norm": (layers, config.dim),
    }
    shapes |= {
        f"attention.{n}": (layers, *linears[f"attention.{n}"]) for n in ("wq", "wk", "wv", "wo")
    }
    shapes["ffn_norm"] = (layers, config.dim)
    shapes |= {
        f"feed_forward.{n}": (layers, *linears[f"feed_forward.{n}"]) for n in ("w1", "w2", "w3")
    }
    shapes["norm"] = (config.dim,)
    # Cosines and sines, which readers compute themselves.
    shapes["rope"] = (2, context, config.head_dim // 2)
    if not is_tied:
        shapes["output"] = (config.vocab_size, config.dim)
    return shapes


def _unstack(config: LlamaConfig, stacked: Mapping[str, NDArray[Any]]) -> Tensors:
    whole = ("tok_embeddings", "norm", "output")
    tensors = {f"{name}.weight": stacked[name] for name in whole if name in stacked}
    for name, tensor in stacked.items():
        if name not in (*whole, "rope"):
            tensors |= {f"layers.{i}.{name}.weight": tensor[i] for i in range(config.num_layers)}
    return tensors


def read_vocabulary(path: Path, vocab_size: int) -> Vocabulary:
    """Read a tokenizer file of llama2.c: a score, a length and the bytes of each token.

    Raises:
        CheckpointUnreadable: the file ends too early.
    """
    data, offset = path.read_bytes(), 4
    vocabulary = Vocabulary([], [])
    for _ in range(vocab_size):
        if offset + 8 > len(data):
            raise _unreadable(
                path, f"its tokenizer ends after {len(vocabulary.pieces)} of {vocab_size} tokens"
            )
        score, length = struct.unpack_from("<fi", data, offset)
        offset += 8 + length
        vocabulary.scores.append(score)
        vocabulary.pieces.append(data[offset - length : offset])
    return vocabulary


def encode(vocabulary: Vocabulary, text: str) -> list[int]:
    """Token ids as llama2.c makes them: a space in front, then the best merge, again and again.

    Meant for comparison; it is quadratic.
    """
    ids_of = {piece: index for index, piece in enumerate(vocabulary.pieces)}
    ids: list[int] = []
    for character in " " + text:
        raw = character.encode()
        ids += [ids_of[raw]] if raw in ids_of else [byte + _FIRST_BYTE for byte in raw]
    while True:
        merges = []
        for index in range(len(ids) - 1):
            joined = vocabulary.pieces[ids[index]] + vocabulary.pieces[ids[index + 1]]
            if joined in ids_of:
                merges.append((-vocabulary.scores[ids_of[joined]], index, ids_of[joined]))
        if not merges:
            return ids
        _, index, merged = min(merges)
        ids[index : index + 2] = [merged]


def rank_order(vocabulary: Vocabulary) -> list[int]:
    """Old ids in the order of tiktoken ranks: the 256 bytes, then the pieces as they merge.

    sentencepiece has a token for the byte and one for the character of most bytes; text uses the
    character's, so that one is taken and the other dropped. For text of single-byte characters
    byte-level BPE with these ranks makes the same tokens as sentencepiece, because no piece
    crosses a boundary of Llama 3's pattern. Other characters may become bytes.
    """
    pieces = range(_FIRST_PIECE, len(vocabulary.pieces))
    single = {vocabulary.pieces[i]: i for i in pieces if len(vocabulary.pieces[i]) == 1}
    order = [single.get(bytes([value]), value + _FIRST_BYTE) for value in range(256)]
    longer = [index for index in pieces if len(vocabulary.pieces[index]) > 1]
    return order + sorted(longer, key=lambda index: -vocabulary.scores[index])


def token_bytes(vocabulary: Vocabulary, index: int) -> bytes:
    """The bytes that a token stands for."""
    if _FIRST_BYTE <= index < _FIRST_PIECE:
        return bytes([index - _FIRST_BYTE])
    return vocabulary.pieces[index]


def renumber(
    config: LlamaConfig, weights: Tensors, vocabulary: Vocabulary
) -> tuple[Tensors, list[int]]:
    """Give the tokens the ids that Meta's layout wants: ranks, then special tokens.

    The vocabulary keeps its size. Special tokens that llama2.c lacks get the row of the unknown
    token, which the model never says.

    Returns:
        The weights with renumbered rows, and the old id of each new one.
    """
    old_ids = rank_order(vocabulary)
    specials = special_tokens(len(old_ids), config.vocab_size)
    known = {"<|begin_of_text|>": BEGIN, "<|end_of_text|>": END}
    old_ids = [*old_ids, *(known.get(name, UNKNOWN) for name in specials)]
    tables = ("tok_embeddings.weight", "output.weight")
    renumbered = {name: weights[name][old_ids] for name in tables if name in weights}
    return {**weights, **renumbered}, old_ids


def to_meta(form: str, folder: Path, model: Path, tokenizer: Path) -> None:
    """Write a llama2.c model as a checkpoint in Meta's layout.

    The feed-forward width is padded with zeros to a power of two, the vocabulary renumbered; the
    model computes the same function.

    Args:
        form: "float", "ptq", "spinquant" or "qlora".
        folder: made if missing.
        model: model file, legacy format.
        tokenizer: its tokenizer file.
    """
    config, weights = read_llama2c(model)
    vocabulary = read_vocabulary(tokenizer, config.vocab_size)
    config, weights = pad_ffn(config, weights, 1 << (config.ffn_dim - 1).bit_length())
    weights, old_ids = renumber(config, weights, vocabulary)
    num_ranks = len(rank_order(vocabulary))
    quant, tensors = quantize_model(config, weights, form)
    with TemporaryDirectory() as scratch:
        ranks = Path(scratch) / "tokenizer.model"
        write_ranks(ranks, (token_bytes(vocabulary, old) for old in old_ids[:num_ranks]))
        write_checkpoint(folder, config, quant, tensors, ranks)


def main() -> int:
    """Convert: FORM MODEL TOKENIZER FOLDER."""
    if len(sys.argv) != 5:
        print("usage: python -m llamac.tools.llama2c FORM MODEL TOKENIZER FOLDER", file=sys.stderr)
        return 2
    form, model, tokenizer, folder = sys.argv[1], *map(Path, sys.argv[2:])
    to_meta(form, folder, model, tokenizer)
    return 0


if __name__ == "__main__":
    sys.exit(main())
