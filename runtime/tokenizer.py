"""Text to token ids and back, by the tokenizer file of a bundle.

The file has one line for each token, base64 of its bytes and its rank, which is also its id (the
form of the tiktoken package, which does the work). It is read at first use: loading a model for
its token-level interface needs neither the file nor tiktoken.
"""

from __future__ import annotations

import base64
import codecs
import re
from collections.abc import Iterable, Iterator, Mapping
from functools import cached_property
from pathlib import Path
from typing import TYPE_CHECKING

from llamac.runtime.errors import TokenizerError, UsageError
from llamac.runtime.manifest import TokenizerEntry

if TYPE_CHECKING:
    import tiktoken

__all__ = ["PATTERNS", "StreamDecoder", "Tokenizer", "read_ranks"]

# How text is cut before byte pairs are merged, by name. Source of "llama3": models/llama3/
# tokenizer.py of meta-llama/llama-models; checked by tests with 46 known texts.
PATTERNS: Mapping[str, str] = {
    "llama3": r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}{1,3}"
    r"| ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+|\s+(?!\S)|\s+",
}

# tiktoken's regular expressions fail on a run of about a million equal characters.
_LONGEST_RUN = 25_000


class Tokenizer:
    """The tokenizer of a bundle.

    Args:
        path: file in tiktoken form.
        entry: the manifest's description of it.
        vocab_size: tokens that the model knows; None does not check that all ids are among them.

    Raises:
        TokenizerError: the format or the pattern is unknown; reading the file comes later.
    """

    def __init__(self, path: Path, entry: TokenizerEntry, *, vocab_size: int | None = None) -> None:
        if entry.format != "tiktoken" or entry.pattern not in PATTERNS:
            raise TokenizerError(
                f"unknown tokenizer format {entry.format!r} with pattern {entry.pattern!r}",
                cause=f"this runtime knows the format 'tiktoken' with {', '.join(PATTERNS)}",
                fix="update llamac on this machine",
            )
        self._path = path
        self._entry = entry
        self._vocab_size = vocab_size

    @property
    def special_tokens(self) -> Mapping[str, int]:
        """Ids of the special tokens by name."""
        return self._entry.special_tokens

    @property
    def bos_id(self) -> int | None:
        """Id that begins a text; None if the model has none."""
        return self._entry.bos_id

    @property
    def stop_ids(self) -> frozenset[int]:
        """Ids after which a model has nothing more to say."""
        return frozenset(self._entry.stop_ids)

    @cached_property
    def _encoding(self) -> tiktoken.Encoding:
        import tiktoken  # noqa: PLC0415  (only needed once text is used)

        ranks = read_ranks(self._path)
        if self._vocab_size is not None and len(ranks) > self._vocab_size:
            excess = f"{len(ranks)} tokens, but the model knows {self._vocab_size}"
            raise _damaged(self._path, excess)
        for name, token in self.special_tokens.items():
            if token < len(ranks):
                raise _damaged(self._path, f"id {token} of {name} is also that of a normal token")
        return tiktoken.Encoding(
            self._entry.pattern,
            pat_str=PATTERNS[self._entry.pattern],
            mergeable_ranks=ranks,
            special_tokens=dict(self.special_tokens),
        )

    def encode(self, text: str, *, bos: bool = False, allow_special: bool = False) -> list[int]:
        """Turn text into token ids.

        Args:
            text: any string.
            bos: put the id that begins a text in front.
            allow_special: turn names such as "<|eot_id|>" inside the text into their special ids.
                Leave it off for text from others, which then cannot pretend to be a chat turn.

        Raises:
            TokenizerError: the file is missing or damaged.
            UsageError: `bos` for a model that has no such id.
        """
        if bos and self.bos_id is None:
            raise UsageError(
                "bos=True, but the model has no id that begins a text",
                cause="the manifest's tokenizer.bos_id is null",
                fix="call encode() without bos",
            )
        encoding = self._encoding
        ids = [self.bos_id] if bos and self.bos_id is not None else []
        for part in _cut_long_runs(text):
            if allow_special:
                ids += encoding.encode(part, allowed_special="all")
            else:
                ids += encoding.encode_ordinary(part)
        return ids

    def decode(self, ids: Iterable[int]) -> str:
        """Turn token ids into text; bytes that are not UTF-8 become U+FFFD."""
        return b"".join(map(self.token_bytes, ids)).decode("utf-8", "replace")

    def token_bytes(self, token: int) -> bytes:
        """Return the bytes of one token, none for an id of the model without text."""
        try:
            return self._encoding.decode_single_token_bytes(token)
        except (KeyError, OverflowError):
            return b""

    def stream(self) -> StreamDecoder:
        """Return a decoder for tokens that arrive one by one."""
        return StreamDecoder(self)


class StreamDecoder:
    """Turns tokens into text as they arrive and never emits part of a character.

    A token may end in the middle of a UTF-8 sequence; its bytes wait for the rest.
    """

    def __init__(self, tokenizer: Tokenizer) -> None:
        self._tokenizer = tokenizer
        self._decoder = codecs.getincrementaldecoder("utf-8")("replace")

    def feed(self, token: int) -> str:
        """Return the text that the token completes, possibly none."""
        return self._decoder.decode(self._tokenizer.token_bytes(token))

    def finish(self) -> str:
        """Return U+FFFD if the last character was never completed, otherwise nothing."""
        return self._decoder.decode(b"", final=True)


def read_ranks(path: Path) -> dict[bytes, int]:
    """Read a file in tiktoken form.

    Returns:
        The id of each token's bytes; ids are 0, 1, 2, ... and every single byte has one.

    Raises:
        TokenizerError: the file is missing or damaged.
    """
    try:
        lines = path.read_bytes().splitlines()
    except OSError as error:
        raise TokenizerError(
            f"the tokenizer {path} cannot be read: {error.strerror}",
            cause="it was not copied together with the other files, or may not be read",
            fix="copy the bundle or the checkpoint again, with all its files",
        ) from error
    ranks: dict[bytes, int] = {}
    for number, line in enumerate(lines, start=1):
        if not line:
            continue
        try:
            encoded, rank = line.split()
            ranks[base64.b64decode(encoded, validate=True)] = int(rank)
        except ValueError as error:
            raise _damaged(path, f"line {number} is not base64 and a rank") from error
    _check_ranks(path, ranks, sum(map(bool, lines)))
    return ranks


def _check_ranks(path: Path, ranks: Mapping[bytes, int], num_lines: int) -> None:
    """Check what tiktoken takes for granted: it panics on text with a byte that has no token."""
    if len(ranks) != num_lines:
        raise _damaged(path, f"{num_lines - len(ranks)} tokens appear twice")
    if set(ranks.values()) != set(range(len(ranks))):
        raise _damaged(path, "the ranks are not 0, 1, 2, ... without gaps")
    lacking = [value for value in range(256) if bytes([value]) not in ranks]
    if lacking:
        raise _damaged(path, f"{len(lacking)} of the 256 single bytes have no token")


def _damaged(path: Path, what: str) -> TokenizerError:
    return TokenizerError(
        f"the tokenizer {path} is damaged: {what}",
        cause="the file was cut off or changed, or is not in tiktoken form",
        fix="copy the file again from where the checkpoint or the bundle came from",
    )


def _cut_long_runs(text: str) -> Iterator[str]:
    """Yield the text in parts, cut only inside runs of (non-)space too long for tiktoken."""
    start = 0
    if len(text) > _LONGEST_RUN:
        for run in re.finditer(r"\s+|\S+", text):
            for end in range(run.start() + _LONGEST_RUN, run.end(), _LONGEST_RUN):
                yield text[start:end]
                start = end
    yield text[start:]
