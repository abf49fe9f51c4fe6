"""The token level: what is evaluated, in which chunks, and what the context then holds."""

from __future__ import annotations

import gc
import threading
import weakref
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
from numpy.testing import assert_array_equal

from llamac.runtime import (
    ContextFull,
    DeviceError,
    Model,
    Session,
    SessionClosed,
    UsageError,
    load,
)
from llamac.runtime.library import NativeSession

UNLUCKY = 255  # the chain model's kernel fails on it
PROMPT = [270, *range(3, 40)]


def test_logits_depend_on_all_tokens_whatever_the_chunks(
    model: Model, logits_after: Callable
) -> None:
    """Every way to cut a prompt, with full, padded and single-token chunks, gives one result."""
    for cut in range(len(PROMPT) + 1):
        with model.session() as session:
            session.append(PROMPT[:cut])
            session.append(PROMPT[cut:])
            assert session.position == len(PROMPT)
            assert_array_equal(session.logits, logits_after(PROMPT))


def test_a_call_into_the_library_never_gets_more_than_a_chunk(
    model: Model, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Ctrl-C is served between calls, so that calls must be short."""
    sizes = []
    evaluate = NativeSession.eval

    def record(self: NativeSession, tokens: np.ndarray) -> None:
        sizes.append(len(tokens))
        evaluate(self, tokens)

    monkeypatch.setattr(NativeSession, "eval", record)
    model.session().append(PROMPT)
    assert sizes == [16, 16, 6]


def test_interrupted_append_changes_nothing(
    model: Model, logits_after: Callable, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Ctrl-C between two chunks takes back the first one too."""
    session = model.session()
    session.append([1, 2, 3])
    evaluate = NativeSession.eval
    calls = iter([evaluate, None])

    def interrupt_second(self: NativeSession, tokens: np.ndarray) -> None:
        call = next(calls)
        if call is None:
            raise KeyboardInterrupt
        call(self, tokens)

    monkeypatch.setattr(NativeSession, "eval", interrupt_second)
    with pytest.raises(KeyboardInterrupt):
        session.append(PROMPT)
    monkeypatch.undo()
    assert session.tokens == (1, 2, 3)
    assert_array_equal(session.logits, logits_after([1, 2, 3]))


def test_failing_kernel_is_a_device_error_and_changes_nothing(
    model: Model, logits_after: Callable
) -> None:
    """The text of the kernel's error reaches the user, and the session goes on."""
    session = model.session()
    session.append(PROMPT)
    with pytest.raises(DeviceError, match="token 255 is unlucky"):
        session.append([*range(20), UNLUCKY])
    assert session.tokens == tuple(PROMPT)
    session.append([7])
    assert_array_equal(session.logits, logits_after([*PROMPT, 7]))


@pytest.mark.parametrize("position", [0, 1, 15, 16, 37, 38])
def test_rewind_continues_as_if_the_rest_had_never_been(
    model: Model, logits_after: Callable, position: int
) -> None:
    """Appending after a rewind equals a session that never saw the dropped tokens."""
    session = model.session()
    session.append(PROMPT)
    session.rewind(position)
    assert session.position == position
    session.append([50, 51])
    assert_array_equal(session.logits, logits_after([*PROMPT[:position], 50, 51]))


def test_logits_after_rewind_are_those_of_the_tokens_left(
    model: Model, logits_after: Callable
) -> None:
    """The library still has logits of a dropped token; they must not be shown."""
    session = model.session()
    session.append(PROMPT)
    session.rewind(20)
    assert_array_equal(session.logits, logits_after(PROMPT[:20]))
    assert session.argmax() == logits_after(PROMPT[:20]).argmax()
    assert session.tokens == tuple(PROMPT[:20])


@pytest.mark.parametrize("position", [-1, 4])
def test_rewind_goes_only_back(model: Model, position: int) -> None:
    session = model.session()
    session.append([1, 2, 3])
    with pytest.raises(UsageError, match=f"rewind to position {position} of 3"):
        session.rewind(position)


def test_pushed_token_counts_at_once_and_is_evaluated_when_needed(
    model: Model, logits_after: Callable
) -> None:
    session = model.session()
    session.append([1, 2])
    session.push(3)
    assert (session.position, session.native.position()) == (3, 2)
    assert_array_equal(session.logits, logits_after([1, 2, 3]))
    assert session.native.position() == 3


def test_logits_are_a_copy(model: Model, logits_after: Callable) -> None:
    """A caller may keep and change them."""
    session = model.session()
    session.append([1])
    first = session.logits
    assert (first.dtype, first.shape) == (np.float32, (288,))
    first[:] = 0
    assert_array_equal(session.logits, logits_after([1]))


def test_empty_context_has_no_logits(model: Model) -> None:
    session = model.session()
    session.append([])
    with pytest.raises(UsageError, match="empty context"):
        _ = session.logits
    session.append([1])
    session.rewind(0)
    with pytest.raises(UsageError, match="empty context"):
        session.argmax()


def test_context_full_is_raised_before_anything_is_evaluated(
    model: Model, logits_after: Callable
) -> None:
    """The last token that fits fits; one more raises and changes nothing."""
    session = model.session()
    session.append(range(90))
    assert session.remaining == 6
    with pytest.raises(ContextFull, match="7 tokens do not fit: the context holds 96 tokens"):
        session.append(range(7))
    session.append(range(6))
    assert session.remaining == 0
    assert_array_equal(session.logits, logits_after([*range(90), *range(6)]))
    with pytest.raises(ContextFull):
        session.push(1)


@pytest.mark.parametrize(
    ("tokens", "problem"),
    [
        ([1, -1], "token -1 is outside"),
        ([288], "token 288 is outside"),
        ([2**70], "tokens are object"),
        ([0.5], "tokens are float64"),
        (["a"], "tokens are <U1"),
        (np.zeros((2, 2), np.int32), "of 2 dimensions"),
    ],
)
def test_wrong_tokens_are_refused(model: Model, tokens: object, problem: str) -> None:
    session = model.session()
    with pytest.raises(UsageError, match=problem):
        session.append(tokens)
    assert session.position == 0


@pytest.mark.parametrize("kind", [tuple, iter, np.array, lambda t: np.array(t, np.uint16)])
def test_tokens_may_come_in_any_container(
    model: Model, logits_after: Callable, kind: Callable
) -> None:
    session = model.session()
    session.append(kind([5, 6, 7]))
    assert_array_equal(session.logits, logits_after([5, 6, 7]))


def test_sessions_of_one_model_are_independent(model: Model, logits_after: Callable) -> None:
    with model.session() as one, model.session(threads=1) as two:
        one.append([1, 2])
        two.append([3])
        one.append([4])
        assert_array_equal(one.logits, logits_after([1, 2, 4]))
        assert_array_equal(two.logits, logits_after([3]))


def test_pinned_threads_compute_the_same(model: Model, logits_after: Callable) -> None:
    session = model.session(cpus=[0])
    session.append(PROMPT)
    assert_array_equal(session.logits, logits_after(PROMPT))


@pytest.mark.parametrize(
    "use",
    [
        lambda session: session.append([1]),
        lambda session: session.push(1),
        lambda session: session.logits,
        lambda session: session.argmax(),
        lambda session: session.position,
        lambda session: session.remaining,
        lambda session: session.rewind(0),
        lambda session: session.generate("a"),
        lambda session: session.native.position(),
    ],
)
def test_use_after_close_is_refused(model: Model, use: Callable[[Session], object]) -> None:
    """A freed session must never be passed to the library."""
    session = model.session()
    session.append([1])
    session.close()
    session.close()
    assert session.is_closed
    with pytest.raises(SessionClosed):
        use(session)


def test_closing_a_model_closes_its_sessions(bundle: Path) -> None:
    model = load(bundle, threads=1)
    session, chat = model.session(), model.chat()
    model.close()
    model.close()
    assert model.is_closed and session.is_closed and chat.session.is_closed
    with pytest.raises(SessionClosed, match="session is closed"):
        session.append([1])
    with pytest.raises(SessionClosed, match="model is closed"):
        model.session()


def test_forgotten_sessions_are_freed(model: Model) -> None:
    """A session without an owner stops its threads, also while its model lives."""
    before = threading_count()
    session = model.session(threads=2)
    assert threading_count() == before + 1
    reference = weakref.ref(session)
    del session
    gc.collect()
    assert reference() is None
    assert threading_count() == before


def test_opening_and_closing_leaves_nothing(bundle: Path) -> None:
    """Fifty times: no thread, no mapping and no open file is left over."""

    def once() -> None:
        with load(bundle, threads=2) as model, model.session() as session:
            session.append(PROMPT)
            model.session().append([1])

    once()
    before = resources()
    for _ in range(50):
        once()
    assert resources() == before


def test_close_waits_for_a_running_call(model: Model) -> None:
    """Closing from another thread is safe: the other one gets SessionClosed, not a crash."""
    session = model.session()
    outcome: list[object] = []

    def work() -> None:
        try:
            for _ in range(100_000):
                session.append(range(90))
                session.rewind(0)
        except SessionClosed as error:
            outcome.append(error)

    thread = threading.Thread(target=work)
    thread.start()
    while not session.is_closed:
        session.close()
    thread.join(timeout=30)
    assert not thread.is_alive()
    assert len(outcome) == 1


def threading_count() -> int:
    """Number of threads of this process, the library's included."""
    return len(list(Path("/proc/self/task").iterdir()))


def resources() -> tuple[int, int, list[str]]:
    """Threads, open files, and mappings that belong to a bundle."""
    gc.collect()
    maps = Path("/proc/self/maps").read_text().splitlines()
    weights = [line for line in maps if "weights.bin" in line]
    return threading_count(), len(list(Path("/proc/self/fd").iterdir())), weights
