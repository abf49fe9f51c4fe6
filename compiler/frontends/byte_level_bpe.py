"""Byte-level BPE, the tokenizer of Llama 3, written as a file in tiktoken form.

Other formats have its tokens as text in which every byte is a printable character (GPT-2's table),
and a list of merges, best first. In tiktoken form a token's rank is its id, and the joint with the
lowest rank is merged first. Both are the same tokenizer if the merges are all joints of two tokens,
in the order of their ranks. This is checked: one that was trained otherwise would cut texts in
other places, without any error.

Source of the table: `bytes_to_unicode` in encoder.py of openai/gpt-2.
"""

from __future__ import annotations

import base64
from collections.abc import Iterable, Iterator, Mapping, Sequence
from pathlib import Path

from llamac.compiler.describe import SPECIAL_TOKENS, STOP_TOKENS
from llamac.compiler.frontends.meta_params import shown
from llamac.runtime.errors import TokenizerError

_LONGEST_TOKEN = 1 << 11  # bytes; Llama 3's have 256, and a merge has the bytes of its token
_REQUIRED = (0, 1, 6, 7, 9)  # places of special tokens that decide where texts and turns end


def _byte_characters() -> dict[str, int]:
    """Byte of each character: printable ones stand for themselves, the others begin at 256."""
    plain = [*range(0x21, 0x7F), *range(0xA1, 0xAD), *range(0xAE, 0x100)]
    others = [byte for byte in range(256) if byte not in plain]
    return {chr(b): b for b in plain} | {chr(256 + i): b for i, b in enumerate(others)}


_BYTES = _byte_characters()


def refuse(source: Path, what: str, cause: str) -> TokenizerError:
    """A tokenizer that cannot be written in tiktoken form."""
    return TokenizerError(
        f"{source}: {what}.",
        cause=cause,
        fix="If the model has Llama 3's own tokenizer.model, name that file with --tokenizer.",
    )


def damaged(source: Path, what: str) -> TokenizerError:
    """A tokenizer that contradicts itself."""
    return refuse(source, what, "The tokenizer in the file is damaged, or not of Llama 3's kind.")


def check_length(source: Path, token: str | bytes) -> None:
    """Refuse what is too long to be a token or a merge.

    Raises:
        TokenizerError: it is.
    """
    if len(token) > _LONGEST_TOKEN:
        raise damaged(source, f"a token is {len(token)} bytes long")


def tiktoken_form(source: Path, texts: Sequence[str], merges: Iterable[tuple[str, str]]) -> str:
    """The content of a file in tiktoken form.

    Args:
        source: file that is converted, for errors.
        texts: ordinary tokens by id, as text in which a character is a byte.
        merges: pairs of such texts, best first.

    Raises:
        TokenizerError: a token that is damaged or appears twice, or merges of another order.
    """
    ranks = {text: rank for rank, text in enumerate(texts)}
    if len(ranks) != len(texts):
        raise damaged(source, f"{len(texts) - len(ranks)} tokens appear twice")
    lines = "".join(_lines(source, texts))
    _check_merges(source, ranks, merges)
    return lines


def _lines(source: Path, texts: Sequence[str]) -> Iterator[str]:
    for rank, text in enumerate(texts):
        try:
            token = bytes(_BYTES[character] for character in text)
        except KeyError as error:
            message = f"the token {text[:40]!r} holds {error.args[0]!r}, which stands for no byte"
            raise damaged(source, message) from error
        if not token:
            raise damaged(source, f"token {rank} is empty")
        yield f"{base64.b64encode(token).decode()} {rank}\n"


def check_special(source: Path, names: Mapping[int, str], first: int) -> None:
    """Compare special tokens with Llama 3's, which have fixed places after the ordinary ones.

    Args:
        source: file that is converted, for errors.
        names: of the special tokens, by id.
        first: id after the ordinary tokens.

    Raises:
        TokenizerError: another token at a place that matters.
    """
    for index in _REQUIRED:
        name = names.get(first + index, SPECIAL_TOKENS[index])
        if name != SPECIAL_TOKENS[index]:
            raise refuse(
                source,
                f"token {first + index} is {name[:40]!r}, expected {SPECIAL_TOKENS[index]!r}",
                "The model was trained with special tokens of its own.",
            )


def stop_ids(first: int) -> set[int]:
    """Ids that end a text or a turn."""
    return {first + i for i, name in SPECIAL_TOKENS.items() if name in STOP_TOKENS}


def check_id(source: Path, name: str, found: object, expected: set[int]) -> None:
    """Compare the id of a token with Llama 3's.

    Raises:
        TokenizerError: it is another one.
    """
    if not isinstance(found, int) or found not in expected:
        raise refuse(
            source,
            f"{name} is {shown(found)}, expected one of {sorted(expected)}",
            "The model begins or ends its texts in another way than Llama 3.",
        )


def _check_merges(
    source: Path, ranks: Mapping[str, int], merges: Iterable[tuple[str, str]]
) -> None:
    """Check that merging by rank is merging by this list."""
    last = count = 0
    lefts: set[str] = set()  # of the merges that make the last token
    for left, right in merges:
        rank = ranks.get(left + right, -1)
        if rank > last:
            last, lefts = rank, set()
        if left not in ranks or right not in ranks or rank < last or left in lefts:
            merge = f"{left[:30]} {right[:30]}"
            raise damaged(source, f"the merge {merge!r} does not fit the order of its tokens")
        lefts.add(left)
        count += 1
    joints = sum(
        text[:i] in ranks and text[i:] in ranks for text in ranks for i in range(1, len(text))
    )
    if count != joints:
        raise refuse(
            source,
            f"it has {count} merges, but {joints} joints of two tokens are tokens",
            "It merges some tokens by other rules than their ids, and would cut text elsewhere.",
        )
