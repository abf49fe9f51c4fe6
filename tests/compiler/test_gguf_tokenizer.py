"""Tokenizers inside GGUF files: equal to the tiktoken file they stand for, or refused."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from types import ModuleType
from typing import Any

import numpy as np
import pytest

from llamac.compiler.checkpoint import Checkpoint
from llamac.compiler.frontends.gguf import from_gguf
from llamac.compiler.frontends.gguf_file import GgufFile, open_gguf
from llamac.compiler.frontends.gguf_tokenizer import write_tokenizer
from llamac.runtime.errors import LlamacError, TokenizerError

VOCAB, RANKS = 1024, 1008
U32, STRING, ARRAY = 4, 8, 9


@pytest.fixture
def layout(gguf_layout: ModuleType, tiny_float: Checkpoint) -> Any:
    """A file with the tokenizer alone."""
    return gguf_layout.Layout(gguf_layout.tokenizer_fields(tiny_float))


Write = Callable[[Any], bytes]


@pytest.fixture
def convert(tmp_path: Path) -> Write:
    """Write a layout, and return the tokenizer that is made of it."""

    def run(layout: Any) -> bytes:
        out = tmp_path / "tokenizer.model"
        write_tokenizer(open_gguf(layout.write(tmp_path / "t.gguf")), VOCAB, out)
        return out.read_bytes()

    return run


@pytest.mark.parametrize("pattern", ["llama-bpe", "llama3", "llama-v3"])
def test_the_file_is_made_again(
    layout: Any, convert: Write, tiny_float: Checkpoint, pattern: str
) -> None:
    layout.metadata["tokenizer.ggml.pre"] = (STRING, pattern)
    assert convert(layout) == tiny_float.tokenizer.read_bytes()


def test_tokens_that_are_not_special_by_their_kind(layout: Any, convert: Write) -> None:
    """Reserved tokens may be "unused" or "user defined"."""
    _, types = layout.metadata["tokenizer.ggml.token_type"]
    types[RANKS + 2], types[RANKS + 3] = 4, 5
    assert convert(layout)


def test_llama_3s_own_tokenizer(
    gguf_layout: ModuleType, shared_data: Path, tmp_path: Path, tiny_float: Checkpoint
) -> None:
    """128,000 tokens, and the 280,147 merges that llama.cpp's files have."""
    path = shared_data / "llama3_tokenizer" / "tokenizer.model"
    config = replace(tiny_float.config, vocab_size=128256)
    checkpoint = replace(tiny_float, tokenizer=path, config=config)
    layout = gguf_layout.Layout(gguf_layout.tokenizer_fields(checkpoint))
    assert len(layout.metadata["tokenizer.ggml.merges"][1].values) == 280_147
    file = open_gguf(layout.write(tmp_path / "t.gguf"))
    write_tokenizer(file, 128256, tmp_path / "out")
    assert (tmp_path / "out").read_bytes().split() == path.read_bytes().split()


def field(name: str, kind: int | None, value: Any = None) -> Callable[[Any], None]:
    def change(layout: Any) -> None:
        if kind is None:
            del layout.metadata[f"tokenizer.ggml.{name}"]
        else:
            layout.metadata[f"tokenizer.ggml.{name}"] = (kind, value)

    return change


def strings(name: str, change: Callable[[list[bytes]], object]) -> Callable[[Any], None]:
    return lambda layout: change(layout.metadata[f"tokenizer.ggml.{name}"][1].values)


def exchange(first: int, second: int) -> Callable[[list[Any]], None]:
    def change(values: list[Any]) -> None:
        values[first], values[second] = values[second], values[first]

    return change


def put(index: int, value: bytes) -> Callable[[list[bytes]], None]:
    return lambda values: values.__setitem__(index, value)


def kind_of(token: int, kind: int) -> Callable[[Any], None]:
    return lambda layout: layout.metadata["tokenizer.ggml.token_type"][1].__setitem__(token, kind)


REFUSED: dict[str, tuple[str, Callable[[Any], None]]] = {
    "SentencePiece": ("model 'llama'", field("model", STRING, "llama")),
    "no tokenizer": ("model 'None'", field("model", None)),
    "another pattern": ("pre 'qwen2'", field("pre", STRING, "qwen2")),
    "no pattern": ("pre 'None'", field("pre", None)),
    "no tokens": ("tokens is missing", field("tokens", None)),
    "tokens of numbers": ("no array of strings", field("tokens", ARRAY, np.zeros(9, np.int32))),
    "too few tokens": ("1023 tokens", strings("tokens", list.pop)),
    "a token of no text": ("not UTF-8", strings("tokens", put(5, b"\xff"))),
    "a token without bytes": ("stands for no byte", strings("tokens", put(5, "\u4e2d".encode()))),
    "an empty token": ("token 300 is empty", strings("tokens", put(300, b""))),
    "a long token": ("5000 bytes long", strings("tokens", put(300, b"a" * 5000))),
    "a token twice": ("1 tokens appear twice", strings("tokens", lambda v: put(300, v[301])(v))),
    "no types": ("token_type is no array", field("token_type", None)),
    "types of other tokens": ("array of 1024", field("token_type", ARRAY, np.ones(9, np.int32))),
    "a special token in between": ("stand between", kind_of(50, 3)),
    "an ordinary token behind": ("stand between", kind_of(RANKS + 3, 1)),
    "other special tokens": (
        r"token 1009 is '<\|im_end\|>', expected '<\|end_of_text\|>'",
        strings("tokens", put(RANKS + 1, b"<|im_end|>")),
    ),
    "another first token": ("bos_token_id is 5", field("bos_token_id", U32, 5)),
    "another end": ("eos_token_id is 1011", field("eos_token_id", U32, RANKS + 3)),
    "an end of text": ("eos_token_id is '9'", field("eos_token_id", STRING, "9")),
    "no merges": ("merges is missing", field("merges", None)),
    "a merge of strangers": ("does not fit", strings("merges", put(0, b"\xc4\x80 \xc4\x80"))),
    "a merge of one": ("does not fit", strings("merges", put(0, b"th"))),
    "merges in another order": ("does not fit", strings("merges", exchange(3, -1))),
    "a merge twice": ("does not fit", strings("merges", lambda v: v.insert(1, v[0]))),
    "a merge too few": ("joints of two tokens", strings("merges", list.pop)),
}


@pytest.mark.parametrize("name", REFUSED)
def test_others_are_refused(
    name: str, layout: Any, convert: Write, check_advice: Callable[[LlamacError], None]
) -> None:
    match, change = REFUSED[name]
    change(layout)
    with pytest.raises(TokenizerError, match=match) as caught:
        convert(layout)
    check_advice(caught.value)
    assert "--tokenizer" in caught.value.fix


def test_nothing_is_written_when_it_is_refused(layout: Any, convert: Write, tmp_path: Path) -> None:
    layout.metadata["tokenizer.ggml.merges"][1].values.pop()
    with pytest.raises(TokenizerError):
        convert(layout)
    assert not (tmp_path / "tokenizer.model").exists()


def test_a_tokenizer_can_be_given(
    gguf_layout: ModuleType, tiny_float: Checkpoint, tmp_path: Path
) -> None:
    """Then the file's own is not looked at."""
    layout = gguf_layout.make_layout(tiny_float)
    del layout.metadata["tokenizer.ggml.model"]
    path = layout.write(tmp_path / "t.gguf")
    assert from_gguf(path, tokenizer=tiny_float.tokenizer).tokenizer == tiny_float.tokenizer
    with pytest.raises(TokenizerError):
        from_gguf(path)


def test_a_field_may_hold_anything(layout: Any, convert: Write, tmp_path: Path) -> None:
    """Text that is no UTF-8 stays printable."""
    layout.metadata["tokenizer.ggml.pre"] = (STRING, b"\xff\xfe\x1b")
    file: GgufFile = open_gguf(layout.write(tmp_path / "u.gguf"))
    assert file.metadata["tokenizer.ggml.pre"].startswith("\ufffd")
    with pytest.raises(TokenizerError, match="pre"):
        convert(layout)
