"""Generated text: what comes, when it stops, and what is left in the context."""

from __future__ import annotations

import itertools
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from llamac.runtime import (
    ContextFull,
    Model,
    SessionClosed,
    UsageError,
    load,
)
from llamac.runtime.generation import StopScanner
from llamac.runtime.library import NativeSession

Maker = Callable[..., Path]
BOS, END_OF_TEXT, EOT = 270, 271, 274


def script_of(start: int, text: bytes, end: int | None = END_OF_TEXT) -> dict[int, int]:
    """Make the model say `text`, byte by byte, after a context of `start` tokens, then stop."""
    tokens = [*text] if end is None else [*text, end]
    return {start + i: token for i, token in enumerate(tokens)}


def test_greedy_text_is_that_of_the_best_tokens(model: Model, greedy_after: Callable) -> None:
    """Every token equals the best one of an evaluation from scratch."""
    session = model.session()
    generation = session.generate("hello", max_tokens=40)
    text = "".join(generation)
    assert generation.tokens == greedy_after([BOS, *b"hello"], len(generation.tokens))
    assert text == model.tokenizer.decode(generation.tokens)
    assert session.tokens == (BOS, *b"hello", *generation.tokens)


def test_pieces_come_as_soon_as_characters_are_complete(make_bundle: Maker) -> None:
    with load(make_bundle(script_of(2, "é🦙.".encode())), threads=1) as model:
        generation = model.generate("a")
        assert list(generation) == ["é", "🦙", "."]
        assert generation.finish_reason == "stop"


def test_unfinished_character_at_the_end_is_marked(make_bundle: Maker) -> None:
    with load(make_bundle(script_of(2, "a€".encode()[:-1])), threads=1) as model:
        assert list(model.generate("a")) == ["a", "\ufffd"]


@pytest.mark.parametrize("stop_id", [END_OF_TEXT, EOT])
def test_stop_id_ends_the_text_and_is_not_part_of_it(make_bundle: Maker, stop_id: int) -> None:
    """Every stop id of the manifest counts, and only those."""
    with load(make_bundle(script_of(3, b"ok", stop_id)), threads=1) as model:
        session = model.session()
        generation = session.generate("ab")
        assert "".join(generation) == "ok"
        assert generation.finish_reason == "stop"
        assert generation.tokens == [*b"ok"]
        assert session.tokens == (BOS, *b"abok")


def test_max_tokens_ends_the_text(make_bundle: Maker) -> None:
    with load(make_bundle(script_of(2, b"abcdef")), threads=1) as model:
        generation = model.generate("x", max_tokens=4)
        assert generation.finish_reason is None
        assert "".join(generation) == "abcd"
        assert generation.finish_reason == "length"


def test_last_token_is_not_evaluated_for_nothing(
    make_bundle: Maker, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Four tokens cost one prefill and three single tokens."""
    sizes = []
    evaluate = NativeSession.eval

    def record(self: NativeSession, tokens: Any) -> None:
        sizes.append(len(tokens))
        evaluate(self, tokens)

    monkeypatch.setattr(NativeSession, "eval", record)
    with load(make_bundle(script_of(2, b"abcdef")), threads=1) as model:
        session = model.session()
        assert "".join(session.generate("x", max_tokens=4)) == "abcd"
        assert sizes == [2, 1, 1, 1]
        assert "".join(session.generate(max_tokens=1)) == "e"
        assert sizes == [2, 1, 1, 1, 1]


@pytest.mark.parametrize("max_tokens", [None, 1000])
def test_full_context_ends_the_text(make_bundle: Maker, max_tokens: int | None) -> None:
    """The context of 96 holds the prompt of 2 and 94 more tokens."""
    with load(make_bundle(script_of(2, b"x" * 200, None)), threads=1) as model:
        session = model.session()
        generation = session.generate("a", max_tokens=max_tokens)
        assert "".join(generation) == "x" * 94
        assert generation.finish_reason == "context"
        assert session.remaining == 0
        again = session.generate()
        assert list(again) == []
        assert again.finish_reason == "context"


def test_prompt_that_does_not_fit_is_refused_before_evaluation(model: Model) -> None:
    session = model.session()
    with pytest.raises(ContextFull, match="97 tokens do not fit"):
        session.generate("a" * 96)
    assert session.position == 0
    assert list(session.generate("a" * 95)) == []


def test_nothing_is_evaluated_before_the_first_piece(model: Model) -> None:
    session = model.session()
    generation = session.generate("abc")
    assert session.position == 0
    next(generation)
    assert session.position >= 5


def test_a_second_prompt_continues_without_a_new_beginning(
    model: Model, greedy_after: Callable
) -> None:
    """The id that begins a text stands only at the start of the context."""
    session = model.session()
    first = session.generate("one", max_tokens=5)
    list(first)
    second = session.generate("two", max_tokens=5)
    list(second)
    assert second.tokens
    context = [BOS, *b"one", *first.tokens, *b"two"]
    assert second.tokens == greedy_after(context, len(second.tokens))


def test_stopped_reading_keeps_what_was_said(make_bundle: Maker) -> None:
    """A caller may leave the loop; the session goes on from there."""
    with load(make_bundle(script_of(2, b"abcdef")), threads=1) as model:
        session = model.session()
        assert list(itertools.islice(session.generate("x"), 3)) == ["a", "b", "c"]
        assert session.tokens == (BOS, *b"xabc")
        assert "".join(session.generate()) == "def"


def test_prompt_may_be_token_ids(model: Model, greedy_after: Callable) -> None:
    """They are taken as they are, without an id that begins a text."""
    generation = model.generate([1, 2, 3], max_tokens=3)
    list(generation)
    assert generation.tokens == greedy_after([1, 2, 3], 3)


def test_no_prompt_at_the_start_is_an_error(model: Model) -> None:
    with pytest.raises(UsageError, match="nothing to continue"):
        model.session().generate([])


def test_empty_text_at_the_start_is_the_beginning_of_a_text(
    model: Model, greedy_after: Callable
) -> None:
    generation = model.generate("", max_tokens=3)
    list(generation)
    assert generation.tokens == greedy_after([BOS], 3)


def test_two_generations_in_one_session_are_refused(model: Model) -> None:
    """Their tokens would mix; the message says what happened."""
    session = model.session()
    first, second = session.generate("a"), session.generate("b")
    next(first)
    with pytest.raises(UsageError, match="moved from position 0 to"):
        next(second)
    session.append([1])
    with pytest.raises(UsageError, match="while text was generated"):
        list(first)


def test_sampling_with_a_seed_repeats(model: Model) -> None:
    """And another seed, or none, gives another text."""
    rules: dict[str, Any] = {"temperature": 1.5, "top_k": 200, "top_p": 0.99, "max_tokens": 30}

    def text(seed: int | None) -> str:
        return "".join(model.generate("hello", seed=seed, **rules))

    assert text(1) == text(1)
    assert text(1) != text(2)
    assert text(None) != text(None)


def test_repetition_penalty_looks_at_the_whole_context(make_bundle: Maker) -> None:
    """A certain token (logit 100) of the prompt is no longer the best after a factor of 1000."""
    with load(make_bundle({3: ord("a")}), threads=1) as model:
        assert next(model.generate("ab", max_tokens=1)) == "a"
        penalized = model.generate("ab", max_tokens=1, repetition_penalty=1000.0)
        list(penalized)
        assert penalized.tokens != [ord("a")]


@pytest.mark.parametrize("stop", ["cd", ["xyz", "cd"], ("cdef", "bcd", "cd")])
def test_stop_text_ends_the_text_and_is_not_shown(make_bundle: Maker, stop: Any) -> None:
    with load(make_bundle(script_of(2, b"abcdefgh")), threads=1) as model:
        generation = model.generate("x", stop=stop)
        assert "".join(generation) == ("a" if "bcd" in stop else "ab")
        assert generation.finish_reason == "stop"


def test_start_of_a_stop_text_is_shown_if_nothing_follows(make_bundle: Maker) -> None:
    with load(make_bundle(script_of(2, b"abc")), threads=1) as model:
        assert list(model.generate("x", stop="cd")) == ["a", "b", "c"]


@settings(deadline=None)
@given(
    pieces=st.lists(st.text("ab", max_size=4)),
    stops=st.lists(st.text("ab", min_size=1, max_size=4), max_size=3),
)
def test_scanner_shows_all_text_before_the_first_stop(pieces: list[str], stops: list[str]) -> None:
    """However the text is cut. Text is shown no later than needed: only a possible start waits."""
    scanner = StopScanner(stops)
    shown = ""
    seen = ""
    for piece in pieces:
        seen += piece
        shown += scanner.feed(piece)
        if scanner.is_found:
            break
        held = seen[len(shown) :]
        assert seen.startswith(shown)
        assert not held or any(stop.startswith(held) for stop in stops)
    shown += scanner.finish()
    ends = [seen.find(stop) for stop in stops if stop in seen]
    assert scanner.is_found == bool(ends)
    assert shown == (seen[: min(ends)] if ends else seen)


@pytest.mark.parametrize(
    ("options", "problem"),
    [
        ({"max_tokens": -1}, "max_tokens is -1"),
        ({"max_tokens": 1.5}, "max_tokens is 1.5"),
        ({"seed": -1}, "seed is -1"),
        ({"stop": ""}, "stop is"),
        ({"stop": ["a", ""]}, "stop is"),
        ({"temperature": -1}, "temperature is -1"),
        ({"top_p": 0}, "top_p is 0"),
    ],
)
def test_wrong_options_are_refused_at_once(
    model: Model, options: dict[str, Any], problem: str
) -> None:
    with pytest.raises(UsageError, match=problem):
        model.generate("a", **options)


def test_zero_tokens_give_no_text(model: Model) -> None:
    generation = model.generate("a", max_tokens=0)
    assert list(generation) == []
    assert generation.finish_reason == "length"


def test_generate_of_a_model_closes_its_session(model: Model) -> None:
    """After the last piece, after close, and when the caller just stops reading."""
    threads = len(list(Path("/proc/self/task").iterdir()))

    def is_free() -> bool:
        return len(list(Path("/proc/self/task").iterdir())) == threads

    list(model.generate("a", max_tokens=2))
    assert is_free()
    generation = model.generate("a")
    next(generation)
    assert not is_free()
    generation.close()
    assert is_free()
    unstarted = model.generate("a")
    unstarted.close()
    assert is_free()
    for _ in model.generate("a"):
        break
    assert is_free()


def test_closing_the_model_ends_a_generation_with_an_error(bundle: Path) -> None:
    model = load(bundle, threads=1)
    generation = model.generate("a")
    next(generation)
    model.close()
    with pytest.raises(SessionClosed):
        list(generation)
