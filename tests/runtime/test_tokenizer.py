"""Text to ids and back; damaged files; characters that arrive in parts."""

from __future__ import annotations

import base64
from collections.abc import Callable
from pathlib import Path

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from llamac.runtime import Model, Tokenizer, TokenizerError, UsageError
from llamac.runtime.manifest import TokenizerEntry
from llamac.runtime.tokenizer import read_ranks

BOS, EOT = 270, 274
SINGLES = [bytes([value]) for value in range(256)]
LLAMA3_SPECIAL = {"<|begin_of_text|>": 128000, "<|end_of_text|>": 128001, "<|eot_id|>": 128009}


@pytest.fixture(scope="module")
def tokenizer(bundle: Path) -> Tokenizer:
    """The small tokenizer of the chain model: all bytes, nine merges, six special tokens."""
    return make_tokenizer(bundle / "tokenizer.model")


def make_tokenizer(path: Path, vocab_size: int | None = None) -> Tokenizer:
    special = {"<|begin_of_text|>": BOS, "<|eot_id|>": EOT}
    entry = TokenizerEntry("tokenizer.model", "tiktoken", "llama3", special, BOS, (EOT,), None)
    return Tokenizer(path, entry, vocab_size=vocab_size)


def test_merges_follow_their_ranks(tokenizer: Tokenizer) -> None:
    assert tokenizer.encode("the user thing") == [257, 32, 264, 32, 256, 261]


def test_begin_of_text_is_added_on_request(tokenizer: Tokenizer) -> None:
    assert tokenizer.encode("a", bos=True) == [BOS, 97]
    assert tokenizer.encode("", bos=True) == [BOS]
    assert tokenizer.encode("") == []


def test_special_names_in_text_are_text_unless_allowed(tokenizer: Tokenizer) -> None:
    """Text from a user must not be able to end a turn."""
    text = "a<|eot_id|>"
    assert EOT not in tokenizer.encode(text)
    assert tokenizer.encode(text, allow_special=True) == [97, EOT]
    assert tokenizer.decode(tokenizer.encode(text)) == text
    assert tokenizer.decode([97, EOT]) == text


@settings(deadline=None)
@given(st.text())
def test_decoding_gives_the_text_back(tokenizer: Tokenizer, text: str) -> None:
    assert tokenizer.decode(tokenizer.encode(text)) == text


def test_ids_without_text_decode_to_nothing(tokenizer: Tokenizer) -> None:
    """A model's vocabulary may be rounded up beyond the tokenizer's."""
    assert tokenizer.decode([97, 287, 98]) == "ab"
    assert tokenizer.token_bytes(-1) == b""
    assert tokenizer.token_bytes(10**12) == b""


def test_half_a_surrogate_pair_does_not_break_encoding(tokenizer: Tokenizer) -> None:
    assert tokenizer.decode(tokenizer.encode("a\ud800b")) == "a\ufffdb"


@pytest.mark.parametrize("unit", ["^", " ", "\n", "a", "ä", " ^"])
def test_long_runs_are_encoded(tokenizer: Tokenizer, unit: str) -> None:
    """tiktoken panics on a million equal characters that are neither letter nor space."""
    text = unit * 1_000_000
    assert tokenizer.decode(tokenizer.encode(text)) == text


def test_cutting_long_runs_leaves_the_rest_alone(tokenizer: Tokenizer) -> None:
    """Ids beside an overlong run are those of the same text without it."""
    text = "the user " * 4000
    run = "^" * 30_000
    ids = tokenizer.encode(text + run + "\n" + text)
    assert ids == tokenizer.encode(text) + tokenizer.encode(run + "\n") + tokenizer.encode(text)


def test_no_begin_of_text(bundle: Path) -> None:
    entry = TokenizerEntry("tokenizer.model", "tiktoken", "llama3", {}, None, (), None)
    tokenizer = Tokenizer(bundle / "tokenizer.model", entry)
    assert tokenizer.bos_id is None
    with pytest.raises(UsageError, match="no id that begins a text"):
        tokenizer.encode("a", bos=True)


def test_stream_never_emits_part_of_a_character(tokenizer: Tokenizer) -> None:
    """Each byte is a token here; the pieces come with the last byte of each character."""
    stream = tokenizer.stream()
    pieces = [stream.feed(token) for token in "aä€🦙".encode()]
    assert pieces == ["a", "", "ä", "", "", "€", "", "", "", "🦙"]
    assert stream.finish() == ""


def test_stream_shows_an_unfinished_character_at_the_end(tokenizer: Tokenizer) -> None:
    stream = tokenizer.stream()
    assert [stream.feed(token) for token in "€".encode()[:2]] == ["", ""]
    assert stream.finish() == "\ufffd"


@settings(deadline=None)
@given(st.lists(st.integers(0, 287)))
def test_stream_adds_up_to_decode(tokenizer: Tokenizer, ids: list[int]) -> None:
    """Also for bytes that are not UTF-8."""
    stream = tokenizer.stream()
    assert "".join([*map(stream.feed, ids), stream.finish()]) == tokenizer.decode(ids)


def test_missing_file_is_found_at_first_use(tmp_path: Path) -> None:
    tokenizer = make_tokenizer(tmp_path / "tokenizer.model")
    with pytest.raises(TokenizerError, match="cannot be read: No such file"):
        tokenizer.encode("a")


@pytest.mark.parametrize(
    ("change", "problem"),
    [
        (lambda data: b"", "256 of the 256 single bytes"),
        (lambda data: data[:100], "ranks are not"),
        (lambda data: data[:-3], "line 256 is not base64|ranks are not"),
        (lambda data: data + b"YWI=\n", "line 257 is not base64 and a rank"),
        (lambda data: data + b"YWI= 256 1\n", "line 257 is not base64 and a rank"),
        (lambda data: data + b"YW! 256\n", "line 257 is not base64 and a rank"),
        (lambda data: data + b"YWI= x\n", "line 257 is not base64 and a rank"),
        (lambda data: data + b"YWI= 300\n", "ranks are not 0, 1, 2"),
        (lambda data: data + b"YWI= 5\n", "ranks are not 0, 1, 2"),
        (lambda data: data + b"YQ== 256\n", "1 tokens appear twice"),
        (lambda data: data.replace(b"YQ== 97", b"YWI= 97"), "1 of the 256 single bytes"),
        (lambda data: b"\x80\x04PK" + data, "line 1 is not base64 and a rank"),
    ],
)
def test_damaged_files_are_refused(
    tmp_path: Path,
    tiktoken_file: Callable[..., bytes],
    change: Callable[[bytes], bytes],
    problem: str,
) -> None:
    """What tiktoken would accept silently, or panic on later."""
    path = tmp_path / "tokenizer.model"
    path.write_bytes(change(tiktoken_file(SINGLES)))
    with pytest.raises(TokenizerError, match=problem):
        make_tokenizer(path).encode("a")


def test_empty_lines_are_allowed(tmp_path: Path, tiktoken_file: Callable[..., bytes]) -> None:
    path = tmp_path / "tokenizer.model"
    path.write_bytes(tiktoken_file(SINGLES) + b"\n")
    assert make_tokenizer(path).encode("a") == [97]


def test_ids_must_fit_the_model_and_each_other(
    tmp_path: Path, tiktoken_file: Callable[..., bytes]
) -> None:
    path = tmp_path / "tokenizer.model"
    path.write_bytes(tiktoken_file([*SINGLES, *(b"x%d" % i for i in range(20))]))
    with pytest.raises(TokenizerError, match="276 tokens, but the model knows 275"):
        make_tokenizer(path, vocab_size=275).encode("a")
    with pytest.raises(TokenizerError, match="is also that of a normal token"):
        make_tokenizer(path).encode("a")


@settings(max_examples=200, deadline=None)
@given(st.data())
def test_any_mutated_file_is_read_or_refused(
    tmp_path_factory: pytest.TempPathFactory,
    tiktoken_file: Callable[..., bytes],
    data: st.DataObject,
) -> None:
    """Success means ids for every text; anything but a TokenizerError is a bug."""
    text = bytearray(tiktoken_file(SINGLES))
    start = data.draw(st.integers(0, len(text)))
    end = data.draw(st.integers(start, min(len(text), start + 30)))
    token = base64.b64encode(data.draw(st.binary(max_size=3)))
    text[start:end] = data.draw(st.binary(max_size=12) | st.just(token + b" 256\n"))
    path = tmp_path_factory.getbasetemp() / "mutated.model"
    path.write_bytes(text)
    try:
        ranks = read_ranks(path)
    except TokenizerError:
        return
    assert sorted(ranks.values()) == list(range(len(ranks)))
    assert make_tokenizer(path).decode(make_tokenizer(path).encode("aä")) == "aä"


def test_the_model_has_its_tokenizer(model: Model) -> None:
    assert model.tokenizer.encode("the", bos=True) == [BOS, 257]
    assert model.tokenizer.stop_ids == {271, 274}


@pytest.fixture(scope="module")
def llama3(shared_data: Path) -> Tokenizer:
    """The tokenizer of Llama 3, from the shared data."""
    path = shared_data / "llama3_tokenizer" / "tokenizer.model"
    if not path.exists():
        pytest.skip("shared data: no llama3_tokenizer")
    entry = TokenizerEntry(
        path.name, "tiktoken", "llama3", LLAMA3_SPECIAL, 128000, (128001,), "llama3"
    )
    return Tokenizer(path, entry, vocab_size=128256)


def test_llama3_gives_the_ids_of_the_known_texts(llama3: Tokenizer, shared_data: Path) -> None:
    """46 texts with spaces, digits, emoji and scripts, and their ids from another project."""
    folder = shared_data / "llama3_tokenizer"
    texts = (folder / "ggml-vocab-llama-bpe.gguf.inp").read_bytes().decode()
    lines = (folder / "ggml-vocab-llama-bpe.gguf.out").read_text("ascii").splitlines()
    inputs = texts.split("\n__ggml_vocab_test__\n")
    expected = [[int(token) for token in line.split()] for line in lines]
    # The input ends with a separator; what follows it is no text.
    assert len(expected) == 46
    assert [llama3.encode(text) for text in inputs[:46]] == expected
    assert [llama3.decode(ids) for ids in expected] == inputs[:46]


def test_llama3_sentence_of_the_model_card(llama3: Tokenizer) -> None:
    assert llama3.encode("This is a test sentence.") == [2028, 374, 264, 1296, 11914, 13]
    assert llama3.encode("<|begin_of_text|>", allow_special=True) == [128000]
