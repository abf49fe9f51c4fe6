"""Look into a tokenizer in tiktoken's form: one base64 token and its rank per line."""

from __future__ import annotations

import base64
from pathlib import Path

from llamac.runtime.errors import TokenizerError

# Llama 3's has 2.2 MB.
_LARGEST_FILE_BYTES = 64 << 20


def _damaged(path: Path, what: str) -> TokenizerError:
    return TokenizerError(
        f"{path} is not a tokenizer in tiktoken form: {what}.",
        cause="The file is damaged, or it is another kind of tokenizer (SentencePiece, JSON).",
        fix="Take the tokenizer.model of the base model (one base64 token and rank per line).",
    )


def _read(path: Path) -> bytes:
    if not path.is_file():
        raise TokenizerError(
            f"There is no tokenizer at {path}.",
            cause="A checkpoint's tokenizer.model is a file of its own; it was not found.",
            fix="Copy tokenizer.model of the base model beside the checkpoint, or name it.",
        )
    try:
        if path.stat().st_size > _LARGEST_FILE_BYTES:
            raise _damaged(path, f"it has {path.stat().st_size} bytes")
        return path.read_bytes()
    except OSError as error:
        raise _damaged(path, f"it cannot be read ({error.strerror})") from error


def count_ranks(path: Path) -> int:
    """Count the ordinary tokens of a tokenizer, checking that their ranks are 0, 1, 2, ...

    Raises:
        TokenizerError: no such file, or a line that is not a new token and its rank.
    """
    tokens: set[bytes] = set()
    ranks: set[int] = set()
    for number, line in enumerate(_read(path).splitlines(), start=1):
        if not line:
            continue
        try:
            encoded, rank_text = line.split()
            token, rank = base64.b64decode(encoded, validate=True), int(rank_text)
        except ValueError as error:
            raise _damaged(path, f"line {number} holds no token and rank") from error
        if token in tokens or rank in ranks or not token:
            raise _damaged(path, f"line {number} repeats a token or rank, or has no token")
        tokens.add(token)
        ranks.add(rank)
    if not ranks or ranks != set(range(len(ranks))):
        raise _damaged(path, f"its {len(ranks)} ranks do not count up from 0")
    return len(ranks)


def check_tokenizer(path: Path, vocab_size: int) -> int:
    """Check a tokenizer against a model's vocabulary and return the number of special tokens.

    Special tokens are not in the file: they take the ids after its ranks (256 in Llama 3).

    Raises:
        TokenizerError: missing or damaged, or more tokens than the model has embeddings.
    """
    num_ranks = count_ranks(path)
    if num_ranks > vocab_size:
        raise TokenizerError(
            f"{path} has {num_ranks} tokens, but the model's vocabulary only {vocab_size}.",
            cause="The tokenizer belongs to another model.",
            fix="Take the tokenizer.model that was published with these weights.",
        )
    return vocab_size - num_ranks
