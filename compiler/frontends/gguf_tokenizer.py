"""The tokenizer inside a GGUF file, written as a file in tiktoken form.

Llama 3's tokens stand in GGUF as text in which every byte is a printable character (GPT-2's table),
with a type each and a list of merges, best first. In tiktoken form a token's rank is its id, and
the joint with the lowest rank is merged first. Both are the same tokenizer if the merges are all
joints of two tokens, in the order of their ranks. This is checked: one that was trained otherwise
would cut texts in other places, without any error.

Source of the table: `bytes_to_unicode` in encoder.py of openai/gpt-2.
"""

from __future__ import annotations

import base64
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np

from llamac.compiler.describe import SPECIAL_TOKENS, STOP_TOKENS
from llamac.compiler.frontends.gguf_file import GgufFile, StringArray
from llamac.runtime.errors import TokenizerError

_PATTERNS = ("llama-bpe", "llama3", "llama-v3")  # all mean Llama 3's way to cut text
_NORMAL = 1
_LONGEST_TOKEN = 1 << 11  # bytes; Llama 3's have 256, and a merge has the bytes of its token
_REQUIRED = (0, 1, 6, 7, 9)  # places of special tokens that decide where texts and turns end


def _byte_characters() -> dict[str, int]:
    """Byte of each character: printable ones stand for themselves, the others begin at 256."""
    plain = [*range(0x21, 0x7F), *range(0xA1, 0xAD), *range(0xAE, 0x100)]
    others = [byte for byte in range(256) if byte not in plain]
    return {chr(b): b for b in plain} | {chr(256 + i): b for i, b in enumerate(others)}


_BYTES = _byte_characters()


def _refuse(file: GgufFile, what: str, cause: str) -> TokenizerError:
    return TokenizerError(
        f"{file.path}: {what}.",
        cause=cause,
        fix="If the model has Llama 3's own tokenizer.model, name that file with --tokenizer.",
    )


def _damaged(file: GgufFile, what: str) -> TokenizerError:
    return _refuse(file, what, "The tokenizer in the file is damaged, or not of Llama 3's kind.")


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
        raise _damaged(file, f"it names {len(tokens)} tokens, but the model has {vocab_size}")
    num_ranks = _count_ranks(file, vocab_size)
    texts = [_text(file, token) for token in tokens]
    ranks = {text: rank for rank, text in enumerate(texts[:num_ranks])}
    if len(ranks) != num_ranks:
        raise _damaged(file, f"{num_ranks - len(ranks)} tokens appear twice")
    _check_special(file, texts[num_ranks:], num_ranks)
    lines = "".join(_lines(file, texts[:num_ranks]))
    _check_merges(file, ranks)
    path.write_text(lines, encoding="ascii")


def _check_kind(file: GgufFile) -> None:
    """Refuse tokenizers that work in another way."""
    model, pattern = (file.metadata.get(f"tokenizer.ggml.{name}") for name in ("model", "pre"))
    if model != "gpt2" or pattern not in _PATTERNS:
        raise _refuse(
            file,
            f"its tokenizer is of model {str(model)[:40]!r} with pre {str(pattern)[:40]!r}, "
            "expected 'gpt2' with 'llama-bpe'",
            "llamac cuts text as Llama 3 does; another tokenizer would give other tokens.",
        )


def _strings(file: GgufFile, name: str) -> StringArray:
    value = file.metadata.get(f"tokenizer.ggml.{name}")
    if not isinstance(value, StringArray):
        found = "missing" if value is None else "no array of strings"
        raise _damaged(file, f"tokenizer.ggml.{name} is {found}")
    return value


def _text(file: GgufFile, token: bytes) -> str:
    if len(token) > _LONGEST_TOKEN:
        raise _damaged(file, f"a token is {len(token)} bytes long")
    try:
        return token.decode()
    except UnicodeDecodeError as error:
        raise _damaged(file, f"the token {token[:40]!r} is not UTF-8") from error


def _count_ranks(file: GgufFile, vocab_size: int) -> int:
    """How many ordinary tokens there are; no other kind may stand among them."""
    types = file.metadata.get("tokenizer.ggml.token_type")
    if not isinstance(types, np.ndarray) or len(types) != vocab_size:
        raise _damaged(file, f"tokenizer.ggml.token_type is no array of {vocab_size} numbers")
    is_normal = types == _NORMAL
    count = int(is_normal.sum())
    if not is_normal[:count].all() or count == 0:
        raise _damaged(file, "special tokens stand between ordinary ones")
    return count


def _lines(file: GgufFile, texts: list[str]) -> Iterator[str]:
    """The lines of the new file."""
    for rank, text in enumerate(texts):
        try:
            token = bytes(_BYTES[character] for character in text)
        except KeyError as error:
            message = f"the token {text[:40]!r} holds {error.args[0]!r}, which stands for no byte"
            raise _damaged(file, message) from error
        if not token:
            raise _damaged(file, f"token {rank} is empty")
        yield f"{base64.b64encode(token).decode()} {rank}\n"


def _check_special(file: GgufFile, names: list[str], first: int) -> None:
    """Compare special tokens with Llama 3's, which have fixed places after the ordinary ones."""
    for index in _REQUIRED:
        if index < len(names) and names[index] != SPECIAL_TOKENS[index]:
            raise _refuse(
                file,
                f"token {first + index} is {names[index][:40]!r}, expected "
                f"{SPECIAL_TOKENS[index]!r}",
                "The model was trained with special tokens of its own.",
            )
    ends = {first + i for i, name in SPECIAL_TOKENS.items() if name in STOP_TOKENS}
    expected: dict[str, set[int]] = {"bos": {first}, "eos": ends, "eot": ends, "eom": ends}
    for name, ids in expected.items():
        found: Any = file.metadata.get(f"tokenizer.ggml.{name}_token_id")
        if found is not None and (not isinstance(found, int) or found not in ids):
            raise _refuse(
                file,
                f"tokenizer.ggml.{name}_token_id is {str(found)[:20]}, expected one of "
                f"{sorted(ids)}",
                "The model begins or ends its texts in another way than Llama 3.",
            )


def _check_merges(file: GgufFile, ranks: dict[str, int]) -> None:
    """Check that merging by rank is merging by this list."""
    last = count = 0
    lefts: set[str] = set()  # of the merges that make the last token
    for merge in _strings(file, "merges"):
        left, _, right = _text(file, merge).partition(" ")
        rank = ranks.get(left + right, -1)
        if rank > last:
            last, lefts = rank, set()
        if left not in ranks or right not in ranks or rank < last or left in lefts:
            raise _damaged(file, f"the merge {merge[:60]!r} does not fit the order of its tokens")
        lefts.add(left)
        count += 1
    joints = sum(
        text[:i] in ranks and text[i:] in ranks for text in ranks for i in range(1, len(text))
    )
    if count != joints:
        raise _refuse(
            file,
            f"it has {count} merges, but {joints} joints of two tokens are tokens",
            "It merges some tokens by other rules than their ids, and would cut text elsewhere.",
        )
