"""tokenizer.json: equal to the tiktoken file it stands for, or refused."""

from __future__ import annotations

import json
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest

from llamac.compiler.checkpoint import Checkpoint
from llamac.compiler.describe import describe_tokenizer
from llamac.compiler.frontends.hf import from_hf
from llamac.compiler.frontends.hf_tokenizer import write_tokenizer
from llamac.runtime.errors import LlamacError, TokenizerError
from llamac.runtime.tokenizer import Tokenizer

VOCAB, RANKS = 1024, 1008
Fields = dict[str, Any]
TEXTS = (
    "Once upon a time, there was a little owl named Dot.",
    "It's 12345 o'clock!\n\n  What?  \t end",
    "naïve — 日本語 \N{OWL}\x00\x7f",
    " leading, trailing \r\n\r\n",
    "aaaaaaaa<|eot_id|>",
)


@pytest.fixture
def fields(hf_layout: ModuleType, tiny_float: Checkpoint) -> Fields:
    """The tokenizer of the repository's model."""
    content: Fields = hf_layout.tokenizer_fields(tiny_float)
    return content


@pytest.fixture
def convert(tmp_path: Path) -> Callable[..., bytes]:
    """Write a tokenizer.json, and return the tokenizer that is made of it."""

    def run(fields: Any, vocab_size: int = VOCAB) -> bytes:
        source, out = tmp_path / "tokenizer.json", tmp_path / "tokenizer.model"
        source.write_bytes(fields if isinstance(fields, bytes) else json.dumps(fields).encode())
        write_tokenizer(source, vocab_size, {}, out)
        return out.read_bytes()

    return run


Convert = Callable[..., bytes]


def test_the_file_is_made_again(fields: Fields, convert: Convert, tiny_float: Checkpoint) -> None:
    expected = tiny_float.tokenizer.read_bytes()
    assert convert(fields) == expected
    fields["model"]["merges"] = [merge.split(" ") for merge in fields["model"]["merges"]]
    assert convert(fields) == expected
    fields["added_tokens"] = fields["added_tokens"][:10]
    assert convert(fields) == expected


def test_tokens_are_those_of_the_library(
    fields: Fields, convert: Convert, tiny_float: Checkpoint, tmp_path: Path
) -> None:
    """The file that we write and the one that was read cut texts alike."""
    library = pytest.importorskip("tokenizers")
    convert(fields)
    entry = describe_tokenizer(tiny_float, "tokenizer.model")
    ours = Tokenizer(tmp_path / "tokenizer.model", replace(entry, special_tokens={}))
    for token in fields["added_tokens"]:
        token["content"] = f"\x01{token['content']}"  # texts never name special tokens
    theirs = library.Tokenizer.from_str(json.dumps(fields))
    for text in (*TEXTS, Path(__file__).read_text("utf-8")):
        assert ours.encode(text) == theirs.encode(text, add_special_tokens=False).ids


def test_llama_3s_own_tokenizer(
    hf_layout: ModuleType, shared_data: Path, tiny_float: Checkpoint, convert: Convert
) -> None:
    path = shared_data / "llama3_tokenizer" / "tokenizer.model"
    config = replace(tiny_float.config, vocab_size=128256)
    checkpoint = replace(tiny_float, tokenizer=path, config=config)
    content = hf_layout.tokenizer_fields(checkpoint)
    assert len(content["model"]["merges"]) == 280_147
    assert convert(content, 128256).split() == path.read_bytes().split()


def put(path: str, value: Any) -> Callable[[Fields], object]:
    def change(fields: Fields) -> None:
        *parents, last = path.split(".")
        target: Any = fields
        for name in parents:
            target = target[int(name) if isinstance(target, list) else name]
        target[int(last) if isinstance(target, list) else last] = value

    return change


def swap_merges(fields: Fields) -> None:
    merges = fields["model"]["merges"]
    merges[10], merges[400] = merges[400], merges[10]


SPLIT = "pre_tokenizer.pretokenizers.0"
REFUSED: dict[str, tuple[str, Callable[[Fields], object]]] = {
    "another model": ("its model is 'Unigram'", put("model.type", "Unigram")),
    "SentencePiece's BPE": ("byte_fallback is True", put("model.byte_fallback", True)),
    "an unknown token": ("unk_token is '<unk>'", put("model.unk_token", "<unk>")),
    "dropout": ("dropout is 0", put("model.dropout", 0.1)),
    "a suffix": ("end_of_word_suffix", put("model.end_of_word_suffix", "</w>")),
    "merges of whole words": ("ignore_merges", put("model.ignore_merges", False)),
    "a normalizer": ("normalizer", put("normalizer", {"type": "NFC"})),
    "no pattern": ("pre_tokenizer", put("pre_tokenizer", None)),
    "another pattern": ("pre_tokenizer", put(f"{SPLIT}.pattern", {"Regex": r"\p{N}{1,2}"})),
    "a pattern that is dropped": ("pre_tokenizer", put(f"{SPLIT}.behavior", "Removed")),
    "a pattern upside down": ("pre_tokenizer", put(f"{SPLIT}.invert", True)),
    "a space in front": (
        "pre_tokenizer",
        put("pre_tokenizer.pretokenizers.1.add_prefix_space", True),
    ),
    "GPT-2's pattern as well": (
        "pre_tokenizer",
        put("pre_tokenizer.pretokenizers.1.use_regex", True),
    ),
    "steps that are none": ("pre_tokenizer", put("pre_tokenizer.pretokenizers", [1, 2])),
    "another special token": ("token 1017 is", put("added_tokens.9.content", "<|im_end|>")),
    "a word that was added": ("is not special", put("added_tokens.12.special", False)),
    "an id among the ranks": ("has the id 5", put("added_tokens.12.id", 5)),
    "an id behind the model": ("has the id 1024", put("added_tokens.12.id", 1024)),
    "an id twice": ("added_tokens holds", put("added_tokens.12.id", 1009)),
    "an entry that is none": ("added_tokens holds", put("added_tokens.12", "x")),
    "merges in another order": ("does not fit the order", swap_merges),
    "a merge too few": ("merges, but", lambda f: f["model"]["merges"].pop()),
    "a merge of three": ("merges holds", put("model.merges.3", "a b c")),
    "a merge of numbers": ("merges holds", put("model.merges.3", [1, 2])),
    "no merges": ("no list", put("model.merges", None)),
    "no vocabulary": ("vocab is no object", put("model.vocab", [])),
    "no model": ("model is no object", put("model", None)),
    "an id that is a text": ("has the id 'x'", put("model.vocab.a", "x")),
    "a gap": ("has the id 5000", put("model.vocab.a", 5000)),
    "an id of two": ("has the id 7", put("model.vocab.a", 7)),
    "a token without bytes": ("stands for no byte", put("model.vocab", {"\u4e00": 0})),
    "a long token": ("bytes long", put("model.vocab", {"a" * 5000: 0})),
}


@pytest.mark.parametrize("name", REFUSED)
def test_others_are_refused(
    name: str, fields: Fields, convert: Convert, check_advice: Callable[[LlamacError], None]
) -> None:
    match, change = REFUSED[name]
    change(fields)
    with pytest.raises(TokenizerError, match=match) as caught:
        convert(fields)
    check_advice(caught.value)


@pytest.mark.parametrize("content", [b"", b"\xff", b"[]", b"[" * 100_000])
def test_garbage(content: bytes, convert: Convert) -> None:
    with pytest.raises(TokenizerError, match="it is no JSON"):
        convert(content)


@pytest.mark.parametrize(
    ("field", "value", "match"),
    [
        ("eos_token_id", 7, "eos_token_id is 7"),
        ("eos_token_id", [1009, 2], "eos_token_id is 2"),
        ("eos_token_id", ["x"], "eos_token_id is 'x'"),
        ("bos_token_id", 1, "bos_token_id is 1"),
    ],
)
def test_models_that_end_in_another_way(
    field: str,
    value: object,
    match: str,
    tiny_float: Checkpoint,
    write_hf: Callable[..., Path],
    refused: Callable[..., LlamacError],
) -> None:
    """The file of the generation counts; with a tokenizer of the user, too."""

    def change(layout: Any) -> None:
        layout.generation[field] = value

    path = write_hf(tiny_float, change)
    refused(TokenizerError, match, path)
    refused(TokenizerError, match, path, tokenizer=tiny_float.tokenizer)


def test_a_tokenizer_of_the_user(tiny_float: Checkpoint, write_hf: Callable[..., Path]) -> None:
    path = write_hf(tiny_float)
    (path / "tokenizer.json").write_text("{}")
    assert from_hf(path, tokenizer=tiny_float.tokenizer).tokenizer == tiny_float.tokenizer


LLAMA_3 = "{{ '<|start_header_id|>' + role + '<|end_header_id|>' + text + '<|eot_id|>' }}"
TEMPLATES: dict[str, tuple[str | None, dict[str, str]]] = {
    "none": ("no chat template", {}),
    "no field": ("no chat template", {"tokenizer_config.json": "{}"}),
    "Llama 3's": (None, {"tokenizer_config.json": json.dumps({"chat_template": LLAMA_3})}),
    "a list": (
        None,
        {"tokenizer_config.json": json.dumps({"chat_template": [{"template": LLAMA_3}]})},
    ),
    "a file": (None, {"chat_template.jinja": LLAMA_3}),
    "another": ("is not Llama 3's", {"chat_template.jinja": "<|im_start|>{{ role }}"}),
}


@pytest.mark.parametrize("name", TEMPLATES)
def test_chat_templates_are_noted(
    name: str, tiny_float: Checkpoint, write_hf: Callable[..., Path]
) -> None:
    expected, files = TEMPLATES[name]
    path = write_hf(tiny_float)
    for file, content in files.items():
        (path / file).write_text(content)
    found = [note for note in from_hf(path).notes if "chat template" in note]
    assert len(found) == (expected is not None)
    assert expected is None or expected in found[0]
