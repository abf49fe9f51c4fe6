"""Tokenizer files: damaged, of another kind, or of another model."""

from __future__ import annotations

import os
from collections.abc import Callable
from pathlib import Path
from types import ModuleType

import pytest

from llamac.compiler.frontends.tiktoken_form import check_tokenizer, count_ranks
from llamac.runtime.errors import (
    LlamacError,
    TokenizerError,
)

Refused = Callable[..., LlamacError]


@pytest.mark.parametrize(
    ("content", "message"),
    [
        (b"", "0 ranks do not count up"),
        (b"YQ== 0\nYg== 2\n", "2 ranks do not count up"),
        (b"YQ== 0\nYQ== 1\n", "line 2 repeats"),
        (b"YQ== 0\nYg== 0\n", "line 2 repeats"),
        (b"YQ== 0\n!!!! 1\n", "line 2 holds no token"),
        (b"YQ== zero\n", "line 1 holds no token"),
        (b"YQ==\n", "line 1 holds no token"),
        (b"\n\x0e\n\x05<unk>\x15\x00\x00\x00\x00\x18\x02", "holds no token"),
        (b'{"model": {"type": "BPE"}}', "holds no token"),
        (b"YQ== " + b"9" * 10_000, "holds no token"),
    ],
)
def test_damaged_tokenizers_are_refused(
    content: bytes, message: str, write_meta: Callable[..., Path], refused: Refused
) -> None:
    folder = write_meta("float")
    (folder / "tokenizer.model").write_bytes(content)
    refused(TokenizerError, message, folder)


def test_tokenizer_of_another_model_is_refused(
    tmp_path: Path, meta_layout: ModuleType, check_advice: Callable[[LlamacError], None]
) -> None:
    path = tmp_path / "tokenizer.model"
    meta_layout.write_tokenizer(path, 40)
    assert check_tokenizer(path, 40) == 0
    assert check_tokenizer(path, 296) == 256
    with pytest.raises(TokenizerError, match=r"has 40 tokens, .* only 39") as caught:
        check_tokenizer(path, 39)
    check_advice(caught.value)


def test_tokenizer_of_absurd_size_is_not_read(tmp_path: Path) -> None:
    path = tmp_path / "tokenizer.model"
    path.touch()
    os.truncate(path, 1 << 33)
    with pytest.raises(TokenizerError, match="8589934592 bytes"):
        count_ranks(path)


def test_llama3_tokenizer_leaves_256_special_tokens(shared_data: Path) -> None:
    path = shared_data / "llama3_tokenizer" / "tokenizer.model"
    if not path.exists():
        pytest.skip("shared data: no llama3_tokenizer")
    assert check_tokenizer(path, 128256) == 256
