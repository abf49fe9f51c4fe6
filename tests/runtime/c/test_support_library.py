"""The C support library computes what its header promises, with any number of threads."""

from __future__ import annotations

import ctypes
import os
import threading
from ctypes import byref, c_int32, c_void_p
from pathlib import Path
from typing import Any

import numpy as np
import pytest

THREADS = (1, 2, 4)
TOKENS = (3, 1, 4, 1, 5, 9, 2, 6, 5, 3, 5, 8, 9, 7, 9, 3, 2, 3, 8, 4)


def test_abi_version_is_the_header_s(fake: Any) -> None:
    """A caller built with llamac.h of this version may use the library."""
    assert fake.lib.llamac_abi_version() == 1


def test_info_tells_the_tables(fake: Any, model: c_void_p) -> None:
    """Sizes, name and level are those of the program."""
    info = fake.info(model)
    assert (info.vocab_size, info.context_length, info.max_chunk) == (32, 20, 8)
    assert info.weights_bytes == fake.weights_path.stat().st_size
    assert (info.kv_bytes, info.arena_bytes) == (28 * 16 * 4, 4096 + 3 * 8 * 16 * 4)
    assert (info.model_name, info.level) == (b"fake", b"fast")


def test_info_writes_no_more_than_the_caller_s_structure(fake: Any, model: c_void_p) -> None:
    """A caller with an older, shorter structure keeps what lies behind it."""
    raw = (ctypes.c_uint32 * 20)(8, *[77] * 19)
    pointer = ctypes.cast(raw, fake.lib.llamac_model_info.argtypes[1])
    assert fake.lib.llamac_model_info(model, pointer) == 0
    assert list(raw)[:4] == [8, 32, 77, 77]


# ---- Evaluation ----


@pytest.mark.parametrize("num_threads", THREADS)
@pytest.mark.parametrize("num_tokens", range(1, 21))
def test_eval_equals_numpy(fake: Any, model: c_void_p, num_tokens: int, num_threads: int) -> None:
    """Any number of tokens gives the logits and argmax of the last one."""
    session = fake.session(model, num_threads)
    expected = fake.expected(TOKENS[:num_tokens])
    np.testing.assert_array_equal(session.eval(TOKENS[:num_tokens]), expected)
    assert session.argmax == int(expected.argmax())
    assert session.position == num_tokens
    session.close()


def test_the_calculation_depends_on_order_and_all_tokens(fake: Any) -> None:
    """The fake model can tell wrong positions from right ones, or the tests above prove nothing."""
    expected = fake.expected(TOKENS)
    for i in range(len(TOKENS) - 1):
        swapped = list(TOKENS)
        swapped[i], swapped[i + 1] = swapped[i + 1], swapped[i]
        assert (fake.expected(swapped) == expected).all() == (TOKENS[i] == TOKENS[i + 1])


@pytest.mark.parametrize(
    ("num_tokens", "chunks"),
    [
        (1, [(1, 0, 0)]),
        (2, [(4, 0, 1)]),
        (4, [(4, 0, 3)]),
        (5, [(4, 0, 3), (1, 4, 0)]),
        (7, [(4, 0, 3), (4, 4, 2)]),
        (8, [(8, 0, 7)]),
        (19, [(8, 0, 7), (8, 8, 7), (4, 16, 2)]),
        (20, [(8, 0, 7), (8, 8, 7), (4, 16, 3)]),
    ],
)
def test_tokens_are_cut_into_the_largest_chunks(
    fake: Any, model: c_void_p, num_tokens: int, chunks: list[tuple[int, int, int]]
) -> None:
    """Large chunks first, then a smaller one, one token alone, or a padded smallest one."""
    session = fake.session(model)
    session.eval(TOKENS[:num_tokens])
    assert session.take_chunks() == chunks
    assert session.log()[-1] == 1, "logits are computed for the last chunk only"
    session.close()


def test_evals_append(fake: Any, model: c_void_p) -> None:
    """Tokens given in several calls equal tokens given at once, padded chunks included."""
    session = fake.session(model, 2)
    done = 0
    for count in (3, 1, 6, 2, 8):
        logits = session.eval(TOKENS[done : done + count])
        done += count
        np.testing.assert_array_equal(logits, fake.expected(TOKENS[:done]))
    assert session.take_chunks()[0] == (4, 0, 2)
    session.close()


def test_rewind_forgets(fake: Any, model: c_void_p) -> None:
    """After a rewind the next tokens continue at that position."""
    session = fake.session(model, 2)
    session.eval(TOKENS)
    session.rewind(5)
    assert session.position == 5
    np.testing.assert_array_equal(session.eval((7, 7)), fake.expected((*TOKENS[:5], 7, 7)))
    session.rewind(0)
    np.testing.assert_array_equal(session.eval(TOKENS[:9]), fake.expected(TOKENS[:9]))
    for position in (10, -1):
        with fake.fails("ARGUMENT", f"cannot rewind from position 9 to {position}"):
            session.rewind(position)
    assert session.position == 9
    session.close()


def test_two_sessions_do_not_share_state(fake: Any, model: c_void_p) -> None:
    """Each session has its own KV cache and memory."""
    first, second = fake.session(model), fake.session(model, 2)
    first.eval(TOKENS[:6])
    second.eval(TOKENS[10:13])
    np.testing.assert_array_equal(first.eval((1,)), fake.expected((*TOKENS[:6], 1)))
    np.testing.assert_array_equal(second.logits(), fake.expected(TOKENS[10:13]))
    first.close()
    second.close()


def test_a_session_keeps_its_model(fake: Any) -> None:
    """Closing the model first is allowed."""
    model = fake.open()
    session = fake.session(model)
    fake.lib.llamac_model_close(model)
    np.testing.assert_array_equal(session.eval(TOKENS), fake.expected(TOKENS))
    session.close()


@pytest.mark.parametrize("spin_us", [-1, 1, 0])
def test_two_thousand_evals_with_two_threads(fake: Any, model: c_void_p, spin_us: int) -> None:
    """Synchronization holds when threads always sleep, sometimes sleep and mostly spin."""
    session = fake.session(model, 2, spin_us=spin_us)
    expected = [fake.expected(TOKENS[: i + 1]) for i in range(20)]
    for i in range(2000):
        if i % 20 == 0:
            session.rewind(0)
        logits = session.eval(TOKENS[i % 20 : i % 20 + 1])
        assert (logits == expected[i % 20]).all(), i
    session.close()


# ---- Errors ----


def test_full_context(fake: Any, model: c_void_p) -> None:
    """Too many tokens are refused before anything is computed; the exact rest fits."""
    session = fake.session(model)
    session.eval(TOKENS[:18])
    before = session.logits()
    with fake.fails("CONTEXT", "3 tokens at position 18 do not fit into a context of 20"):
        session.eval((1, 2, 3))
    assert session.position == 18
    np.testing.assert_array_equal(session.logits(), before)
    np.testing.assert_array_equal(session.eval((6, 6)), fake.expected((*TOKENS[:18], 6, 6)))
    with fake.fails("CONTEXT", "1 tokens at position 20"):
        session.eval((1,))
    session.close()


@pytest.mark.parametrize("token", [-1, 32, 2**31 - 1])
def test_token_outside_the_vocabulary(fake: Any, model: c_void_p, token: int) -> None:
    """A bad token id is named and nothing is computed."""
    session = fake.session(model)
    with fake.fails("ARGUMENT", f"token 2 is {token}, not 0 to 31"):
        session.eval((1, 2, token))
    assert session.position == 0
    assert session.take_chunks() == []
    session.close()


def test_no_tokens(fake: Any, model: c_void_p) -> None:
    """An empty input is the caller's mistake."""
    session = fake.session(model)
    with fake.fails("ARGUMENT", "no tokens"):
        session.eval(())
    session.close()


def test_there_are_no_logits_before_the_first_eval(fake: Any, model: c_void_p) -> None:
    """Nothing can be mistaken for a result."""
    session = fake.session(model)
    assert not session.has_logits
    assert session.argmax == -1
    session.close()


@pytest.mark.parametrize("num_threads", THREADS)
def test_kernel_error(fake: Any, model: c_void_p, num_threads: int) -> None:
    """Kernel, step and text are reported, the position stays, and the session works on."""
    session = fake.session(model, num_threads)
    session.eval(TOKENS[:2])
    with fake.fails("KERNEL", r"kernel embed \(step 1 of prefill_4\).*ValueError: token 13 is"):
        session.eval((1, 2, 3, 4, 5, 6, 7, 8, 9, 13, 11))
    assert session.position == 2
    assert not session.has_logits
    assert session.argmax == -1
    with fake.fails("KERNEL", r"kernel embed \(step 1 of decode\) failed: no message"):
        session.eval((14,))
    np.testing.assert_array_equal(session.eval(TOKENS[2:]), fake.expected(TOKENS))
    session.close()


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"magic": b"GGUF\0\0\0\0"}, "not a llamac weights file"),
        ({"version": 2}, "version 2"),
        ({"header_bytes": 64}, "64 header bytes"),
        ({"build_id": b"x" * 32}, "another build"),
        ({"file_bytes": 5000}, "header says 5000 bytes"),
    ],
)
def test_wrong_header(fake: Any, tmp_path: Path, change: dict[str, Any], message: str) -> None:
    """Every field of the header is checked."""
    path = tmp_path / "weights.bin"
    path.write_bytes(fake.weights_bytes(**change))
    with fake.fails("WEIGHTS", message):
        fake.open(path)


@pytest.mark.parametrize("size", [0, 8, 56, 4096, -1])
def test_truncated_weights(fake: Any, tmp_path: Path, size: int) -> None:
    """A file that is cut off anywhere is refused."""
    path = tmp_path / "weights.bin"
    path.write_bytes(fake.weights_bytes()[:size])
    with fake.fails("WEIGHTS", "cut off|has [0-9]+ bytes, not"):
        fake.open(path)


def test_longer_weights(fake: Any, tmp_path: Path) -> None:
    """A file with something behind its end is refused."""
    path = tmp_path / "weights.bin"
    path.write_bytes(fake.weights_bytes() + b"\0")
    with fake.fails("WEIGHTS", "bytes, not"):
        fake.open(path)


def test_missing_weights(fake: Any, tmp_path: Path) -> None:
    """A missing file and a folder are input errors, with the system's words."""
    with fake.fails("IO", "No such file"):
        fake.open(tmp_path / "absent.bin")
    with fake.fails("IO", "not a regular file"):
        fake.open(tmp_path)


def test_levels(fake: Any) -> None:
    """A level can be named, computes with its own kernels, and is checked against the CPU."""
    model = fake.open(level="slow")
    assert fake.info(model).level == b"slow"
    session = fake.session(model)
    np.testing.assert_array_equal(session.eval(TOKENS), 3 * fake.expected(TOKENS))
    session.close()
    fake.lib.llamac_model_close(model)
    with fake.fails("CPU", "lacks (i8mm sme|avx2 avx512vnni), which level 'foreign' needs"):
        fake.open(level="foreign")
    with fake.fails("ARGUMENT", "no level named 'fastest'"):
        fake.open(level="fastest")


def test_null_arguments(fake: Any, model: c_void_p) -> None:
    """NULL is refused or harmless everywhere, and errors need not be wanted."""
    lib = fake.lib
    assert lib.llamac_model_open(None, None, byref(c_void_p()), None) == 1
    assert lib.llamac_model_open(b"weights.bin", None, None, None) == 1
    assert lib.llamac_model_info(None, None) == 1
    assert lib.llamac_session_create(None, None, byref(c_void_p()), None) == 1
    assert lib.llamac_session_create(model, None, None, None) == 1
    assert lib.llamac_session_eval(None, (c_int32 * 1)(1), 1, None) == 1
    assert lib.llamac_session_rewind(None, 0, None) == 1
    assert lib.llamac_session_run_steps(None, b"decode", 0, 1, None) == 1
    assert lib.llamac_session_profile(None, 1) == 1
    assert not lib.llamac_session_logits(None)
    assert not lib.llamac_session_memory(None, 0)
    assert not lib.llamac_session_step_ns(None, b"decode", None)
    assert lib.llamac_session_argmax(None) == -1
    lib.llamac_session_destroy(None)
    lib.llamac_model_close(None)


@pytest.mark.parametrize("num_threads", [-1, 65])
def test_wrong_number_of_threads(fake: Any, model: c_void_p, num_threads: int) -> None:
    """The number of threads is bounded."""
    with fake.fails("ARGUMENT", f"num_threads is {num_threads}, not 1 to 64"):
        fake.session(model, num_threads)


def test_wrong_cpus(fake: Any, model: c_void_p) -> None:
    """CPUs are one per thread, and must exist."""
    with fake.fails("ARGUMENT", "3 CPUs given for 2 threads"):
        fake.session(model, 2, cpus=(0, 0, 0))
    with fake.fails("ARGUMENT", "no CPU can have the number -1"):
        fake.session(model, 1, cpus=(-1,))
    here = min(os.sched_getaffinity(0))
    with fake.fails("THREAD", "cannot run thread 0 on CPU 1023"):
        fake.session(model, 1, cpus=(1023,))
    with fake.fails("THREAD", "cannot run thread 1 on CPU 1023"):
        fake.session(model, 2, cpus=(here, 1023))


def test_one_caller_at_a_time(fake: Any, model: c_void_p) -> None:
    """Overlapping calls are refused; whatever succeeds is right."""
    session = fake.session(model, 2, spin_us=-1)
    refused: list[str] = []

    def hammer() -> None:
        for _ in range(300):
            try:
                session.rewind(0)
                session.eval(TOKENS)
            except Exception as error:
                refused.append(str(error))

    threads = [threading.Thread(target=hammer) for _ in range(2)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    expected = ("another thread is using", "do not fit into a context")
    assert all(any(text in error for text in expected) for error in refused)
    session.rewind(0)
    np.testing.assert_array_equal(session.eval(TOKENS), fake.expected(TOKENS))
    session.close()
