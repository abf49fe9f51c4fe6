"""The tokenizer inside a GGUF file: tokens with a type each, and merges."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import numpy as np

from llamac.compiler.frontends.byte_level_bpe import (
    check_id,
    check_length,
    check_special,
    damaged,
    refuse,
    stop_ids,
    tiktoken_form,
)
from llamac.compiler.frontends.gguf_file import GgufFile, StringArray

_PATTERNS = ("llama-bpe", "llama3", "llama-v3")  # all mean Llama 3's way to cut text
_NORMAL = 1


def write_tokenizer(file: GgufFile, vocab_size: int, path: Path) -> None:
    """Write the file's tokenizer in tiktoken form.

    Args:
        file: with the tokenizer in its metadata.
        vocab_size: of the model.
        path: of the new file.

    Raises:
        TokenizerError: no tokenizer, one of another kind, a damaged one, or special tokens that
            are not Llama 3's.
    """
    _check_kind(file)
    tokens = _strings(file, "tokens")
    if len(tokens) != vocab_size:
        raise damaged(file.path, f"it names {len(tokens)} tokens, but the model has {vocab_size}")
    num_ranks = _count_ranks(file, vocab_size)
    texts = [_text(file, token) for token in tokens]
    check_special(file.path, dict(enumerate(texts)), num_ranks)
    _check_ids(file, num_ranks)
    content = tiktoken_form(file.path, texts[:num_ranks], _merges(file))
    path.write_text(content, encoding="ascii")


def _check_kind(file: GgufFile) -> None:
    """Refuse tokenizers that work in another way."""
    model, pattern = (file.metadata.get(f"tokenizer.ggml.{name}") for name in ("model", "pre"))
    if model != "gpt2" or pattern not in _PATTERNS:
        raise refuse(
            file.path,
            f"its tokenizer is of model {str(model)[:40]!r} with pre {str(pattern)[:40]!r}, "
            "expected 'gpt2' with 'llama-bpe'",
            "llamac cuts text as Llama 3 does; another tokenizer would give other tokens.",
        )


def _strings(file: GgufFile, name: str) -> StringArray:
    value = file.metadata.get(f"tokenizer.ggml.{name}")
    if not isinstance(value, StringArray):
        found = "missing" if value is None else "no array of strings"
        raise damaged(file.path, f"tokenizer.ggml.{name} is {found}")
    return value


def _text(file: GgufFile, token: bytes) -> str:
    check_length(file.path, token)
    try:
        return token.decode()
    except UnicodeDecodeError as error:
        raise damaged(file.path, f"the token {token[:40]!r} is not UTF-8") from error


def _count_ranks(file: GgufFile, vocab_size: int) -> int:
    """How many ordinary tokens there are; no other kind may stand among them."""
    types = file.metadata.get("tokenizer.ggml.token_type")
    if not isinstance(types, np.ndarray) or len(types) != vocab_size:
        raise damaged(file.path, f"tokenizer.ggml.token_type is no array of {vocab_size} numbers")
    is_normal = types == _NORMAL
    count = int(is_normal.sum())
    if not is_normal[:count].all() or count == 0:
        raise damaged(file.path, "special tokens stand between ordinary ones")
    return count


def _check_ids(file: GgufFile, first: int) -> None:
    """Check the tokens that begin and end texts."""
    ends = stop_ids(first)
    for name, ids in {"bos": {first}, "eos": ends, "eot": ends, "eom": ends}.items():
        found = file.metadata.get(f"tokenizer.ggml.{name}_token_id")
        if found is not None:
            check_id(file.path, f"tokenizer.ggml.{name}_token_id", found, ids)


def _merges(file: GgufFile) -> Iterator[tuple[str, str]]:
    for merge in _strings(file, "merges"):
        left, _, right = _text(file, merge).partition(" ")
        yield left, right
