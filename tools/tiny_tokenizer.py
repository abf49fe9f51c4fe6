"""A byte-level BPE tokenizer trained from text, written in tiktoken's form like Meta's."""

from __future__ import annotations

import base64
from collections import Counter
from collections.abc import Iterable, Sequence
from itertools import pairwise
from pathlib import Path

import regex
import tiktoken

from llamac.runtime.tokenizer import PATTERNS
from llamac.tools.tiny_corpus import Document

# Meta's order; further ids are reserved ones that count on from 3.
_NAMED_SPECIALS = (
    "<|begin_of_text|>",
    "<|end_of_text|>",
    "<|reserved_special_token_0|>",
    "<|reserved_special_token_1|>",
    "<|finetune_right_pad_id|>",
    "<|reserved_special_token_2|>",
    "<|start_header_id|>",
    "<|end_header_id|>",
    "<|eom_id|>",
    "<|eot_id|>",
    "<|python_tag|>",
)


def special_tokens(num_ranks: int, vocab_size: int) -> dict[str, int]:
    """Names and ids of Llama 3's special tokens: they follow the ranks up to the vocabulary."""
    count = vocab_size - num_ranks
    reserved = (f"<|reserved_special_token_{n}|>" for n in range(3, count))
    names = [*_NAMED_SPECIALS, *reserved][:count]
    return {name: num_ranks + offset for offset, name in enumerate(names)}


def train_ranks(texts: Iterable[str], num_ranks: int) -> list[bytes]:
    """Tokens by rank: the 256 bytes, then the most frequent pairs, merged one after the other.

    Ties go to the pair that is smaller byte by byte, so equal texts give equal ranks.

    Args:
        texts: what to count pairs in, cut into words by Llama 3's pattern.
        num_ranks: tokens to make, more than 256.
    """
    counts = Counter(word for text in texts for word in regex.findall(PATTERNS["llama3"], text))
    words = [([bytes([b]) for b in word.encode()], count) for word, count in counts.items()]
    ranks = [bytes([value]) for value in range(256)]
    while len(ranks) < num_ranks:
        pairs: Counter[tuple[bytes, bytes]] = Counter()
        for parts, count in words:
            for pair in pairwise(parts):
                pairs[pair] += count
        best = min(pairs, key=lambda pair: (-pairs[pair], pair))
        ranks.append(best[0] + best[1])
        for parts, _ in words:
            _merge(parts, best)
    return ranks


def _merge(parts: list[bytes], pair: tuple[bytes, bytes]) -> None:
    """Join every occurrence of a pair, from the left, in place."""
    index = 0
    while index < len(parts) - 1:
        if (parts[index], parts[index + 1]) == pair:
            parts[index : index + 2] = [pair[0] + pair[1]]
        index += 1


def write_ranks(path: Path, tokens: Iterable[bytes]) -> None:
    """Write a tokenizer file: one base64 token and its rank per line."""
    with path.open("wb") as file:
        for rank, token in enumerate(tokens):
            file.write(base64.b64encode(token) + b" %d\n" % rank)


def make_encoding(tokens: Sequence[bytes], vocab_size: int) -> tiktoken.Encoding:
    """The tokenizer as tiktoken runs it, with the special tokens."""
    return tiktoken.Encoding(
        "llama3",
        pat_str=PATTERNS["llama3"],
        mergeable_ranks={token: rank for rank, token in enumerate(tokens)},
        special_tokens=special_tokens(len(tokens), vocab_size),
    )


def encode_document(
    encoding: tiktoken.Encoding, document: Document
) -> tuple[list[int], list[bool]]:
    """Token ids of a document, and which of them a model should learn to say.

    A plain text ends with end_of_text and is learnt as a whole. A chat follows Llama 3's
    template; only what the assistant says is learnt.
    """
    ids, learnt = [encoding.encode_single_token("<|begin_of_text|>")], [False]
    for role, text in document:
        header = _header(encoding, role)
        end = encoding.encode_single_token("<|eot_id|>" if role else "<|end_of_text|>")
        said = [*encoding.encode_ordinary(text), end]
        ids += header + said
        learnt += [False] * len(header) + [role in ("", "assistant")] * len(said)
    return ids, learnt


def encode_prompt(encoding: tiktoken.Encoding, document: Document) -> list[int]:
    """Token ids of a document that a model shall continue: a plain text, or a chat to answer."""
    ids, _ = encode_document(encoding, document)
    return ids + _header(encoding, "assistant") if document[-1].role else ids[:-1]


def _header(encoding: tiktoken.Encoding, role: str) -> list[int]:
    if not role:
        return []
    return encoding.encode(f"<|start_header_id|>{role}<|end_header_id|>\n\n", allowed_special="all")
