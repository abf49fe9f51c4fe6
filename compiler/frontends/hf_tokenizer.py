"""Hugging Face's `tokenizer.json`, written as a file in tiktoken form.

Llama 3's is byte-level BPE whose text is cut by a regular expression first. All that decides which
tokens a text has is compared with what our runtime does; a tokenizer that differs in any of it is
refused, because the model would read other tokens than it was trained on.

Source: the tokenizer.json format of huggingface/tokenizers.
"""

from __future__ import annotations

import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from llamac.compiler.describe import CHAT_TOKENS
from llamac.compiler.frontends.byte_level_bpe import (
    check_id,
    check_length,
    check_special,
    damaged,
    refuse,
    stop_ids,
    tiktoken_form,
)
from llamac.compiler.frontends.meta_params import read_object, shown
from llamac.runtime.tokenizer import PATTERNS

_LARGEST_FILE_BYTES = 64 << 20  # Llama 3's has 17 MB
# Fields of the model that change how tokens are merged, with the values that do not.
_PLAIN = {
    "dropout": (None, 0, 0.0),
    "continuing_subword_prefix": (None, ""),
    "end_of_word_suffix": (None, ""),
    "unk_token": (None,),
    "byte_fallback": (None, False),
    # A word that is a token is that token, whatever its merges are: what tiktoken does.
    "ignore_merges": (True,),
}


def write_tokenizer(
    source: Path, vocab_size: int, ends: dict[str, tuple[Path, list[Any]]], path: Path
) -> None:
    """Write a tokenizer in tiktoken form.

    Args:
        source: `tokenizer.json`.
        vocab_size: of the model; ids beyond those of the file are reserved.
        ends: what `end_tokens` found in the model's configuration.
        path: of the new file.

    Raises:
        TokenizerError: one of another kind, a damaged one, or special tokens that are not Llama
            3's.
    """
    content = _read(source)
    model = _object(source, content, "model")
    _check_kind(source, content, model)
    texts = _texts(source, model)
    special = _special(source, content, len(texts), vocab_size)
    check_special(source, special, len(texts))
    check_ends(ends, len(texts))
    path.write_text(tiktoken_form(source, texts, _merges(source, model)), encoding="ascii")


def check_ends(ends: dict[str, tuple[Path, list[Any]]], first: int) -> None:
    """Compare the tokens that begin and end texts with Llama 3's.

    Args:
        ends: what `end_tokens` found in the model's configuration.
        first: id after the ordinary tokens.

    Raises:
        TokenizerError: they are others.
    """
    expected = {"bos_token_id": {first}, "eos_token_id": stop_ids(first)}
    for name, (file, ids) in ends.items():
        for found in ids:
            check_id(file, name, found, expected[name])


def chat_notes(folder: Path) -> list[str]:
    """What to know about conversations, which bundles always write as Llama 3 does.

    Raises:
        ParamsInvalid: `tokenizer_config.json` is no JSON object.
    """
    found = _chat_template(folder)
    if found is None:
        return [
            "no chat template in the folder: conversations are written by Llama 3's, which a base "
            "model does not know"
        ]
    if all(token in found for token in CHAT_TOKENS[1:]):  # the first may be added by the tokenizer
        return []
    return ["the folder's chat template is not Llama 3's, but conversations are written by that"]


def _chat_template(folder: Path) -> str | None:
    """The folder's template, or all of several in one text."""
    path = folder / "chat_template.jinja"
    if path.is_file():
        return path.read_text("utf-8", errors="replace")
    path = folder / "tokenizer_config.json"
    template = read_object(path).values.get("chat_template") if path.is_file() else None
    return None if template is None else json.dumps(template)


def _read(source: Path) -> dict[str, Any]:
    try:
        if source.stat().st_size > _LARGEST_FILE_BYTES:
            raise ValueError(f"{source.stat().st_size} bytes are too many")
        content = json.loads(source.read_bytes())
    except (OSError, ValueError, RecursionError) as error:
        raise damaged(source, f"it is no JSON ({str(error)[:100]!a})") from error
    if not isinstance(content, dict):
        raise damaged(source, "it is no JSON object")
    return content


def _object(source: Path, parent: dict[str, Any], name: str) -> dict[str, Any]:
    value = parent.get(name)
    if not isinstance(value, dict):
        raise damaged(source, f"{name} is no object")
    return value


def _check_kind(source: Path, content: dict[str, Any], model: dict[str, Any]) -> None:
    """Refuse tokenizers that work in another way."""
    kind, cause = model.get("type"), "llamac merges bytes as Llama 3 does."
    if kind not in (None, "BPE"):
        raise refuse(source, f"its model is {shown(kind)}, expected 'BPE'", cause)
    for name, plain in _PLAIN.items():
        value = model.get(name)
        if value not in plain:
            if name in ("byte_fallback", "unk_token"):
                cause = (
                    "Such tokenizers, of the SentencePiece kind, merge characters and mark spaces "
                    "in their tokens; a file in tiktoken form, which has bytes, cannot express it."
                )
            raise refuse(source, f"model.{name} is {shown(value)}", cause)
    if content.get("normalizer") is not None:
        raise refuse(
            source, "it changes texts by a normalizer", "Llama 3's takes them as they are."
        )
    if not _cuts_as_llama_3(content.get("pre_tokenizer")):
        raise refuse(
            source,
            "its pre_tokenizer is not Llama 3's",
            "llamac cuts text by Llama 3's pattern before it merges; another one gives others.",
        )


def _cuts_as_llama_3(cut: Any) -> bool:
    """Whether text is cut by Llama 3's pattern, then turned into characters of bytes."""
    steps = cut.get("pretokenizers") if isinstance(cut, dict) else None
    if not isinstance(steps, list) or not all(isinstance(step, dict) for step in steps):
        return False
    if [step.get("type") for step in steps] != ["Split", "ByteLevel"]:
        return False
    split, byte_level = steps
    return (
        cut.get("type") == "Sequence"
        and split.get("pattern") == {"Regex": PATTERNS["llama3"]}
        and split.get("behavior") == "Isolated"
        and split.get("invert") is False
        and byte_level.get("add_prefix_space") is False
        and byte_level.get("use_regex") is False
    )


def _texts(source: Path, model: dict[str, Any]) -> list[str]:
    """Ordinary tokens by id."""
    vocab = _object(source, model, "vocab")
    texts: list[str | None] = [None] * len(vocab)
    for text, rank in vocab.items():
        if type(rank) is not int or not 0 <= rank < len(texts) or texts[rank] is not None:
            raise damaged(source, f"the token {text[:40]!r} has the id {shown(rank)}")
        check_length(source, text)
        texts[rank] = text
    return [text for text in texts if text is not None]


def _special(source: Path, content: dict[str, Any], first: int, vocab_size: int) -> dict[int, str]:
    """Special tokens by id; all must come after the ordinary ones."""
    names: dict[int, str] = {}
    entries = content.get("added_tokens")
    for entry in entries if isinstance(entries, list) else []:
        number, name, is_special = (
            entry.get(key) if isinstance(entry, dict) else None
            for key in ("id", "content", "special")
        )
        if type(number) is not int or not isinstance(name, str) or number in names:
            raise damaged(source, f"added_tokens holds {_short(entry)}")
        if not first <= number < vocab_size:
            expected = f"expected {first} to {vocab_size - 1}"
            raise refuse(
                source,
                f"the added token {name[:40]!r} has the id {number}, {expected}",
                "The tokenizer belongs to another model, or one of its ordinary tokens is special.",
            )
        if is_special is not True:
            raise refuse(
                source,
                f"the added token {name[:40]!r} is not special",
                "It is cut out of any text before the pattern; tiktoken form cannot express that.",
            )
        names[number] = name
    return names


def _short(entry: Any) -> str:
    """An added token for an error."""
    if not isinstance(entry, dict):
        return shown(entry)
    return f"{shown(entry.get('content'))} with the id {shown(entry.get('id'))}"


def _merges(source: Path, model: dict[str, Any]) -> Iterator[tuple[str, str]]:
    """Pairs of tokens: "a b" in older files, ["a", "b"] in newer ones."""
    merges = model.get("merges")
    if not isinstance(merges, list):
        raise damaged(source, "model.merges is no list")
    for merge in merges:
        pair = merge.split(" ") if isinstance(merge, str) else merge
        is_pair = isinstance(pair, list) and len(pair) == 2
        if not is_pair or not all(isinstance(part, str) for part in pair):
            raise damaged(source, f"model.merges holds {shown(merge)}")
        yield pair[0], pair[1]
