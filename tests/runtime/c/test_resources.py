"""Threads, memory, profiling and the bandwidth probe of the C support library."""

from __future__ import annotations

import ctypes
import os
import time
from collections.abc import Callable
from ctypes import c_float, c_int32, c_void_p
from pathlib import Path
from typing import Any

import numpy as np
import pytest

TOKENS = (3, 1, 4, 1, 5, 9, 2, 6, 5, 3, 5, 8, 9)
WEIGHTS, ARENA, KV = range(3)


def _threads() -> set[str]:
    return set(os.listdir("/proc/self/task"))


def _num_mappings() -> int:
    return len(Path("/proc/self/maps").read_text().splitlines())


def test_one_thread_starts_none(fake: Any, model: c_void_p) -> None:
    """A session of one thread runs in its caller; one of four has three more threads."""
    before = _threads()
    alone, four = fake.session(model), None
    assert _threads() == before
    four = fake.session(model, 4)
    assert len(_threads() - before) == 3
    four.close()
    assert _threads() == before
    alone.close()


def test_default_options_are_one_thread(fake: Any, model: c_void_p) -> None:
    """Options may be NULL."""
    before = _threads()
    handle = c_void_p()
    assert fake.lib.llamac_session_create(model, None, ctypes.byref(handle), None) == 0
    assert _threads() == before
    fake.lib.llamac_session_destroy(handle)


def test_tensors_where_kernels_do_not_expect_them_are_refused(
    fake: Any, link_fake: Callable[..., Path]
) -> None:
    """HVX would ignore the low bits of their addresses."""
    other = type(fake)(link_fake("-DFAKE_ALIGNMENT=1048576"), fake.weights_path)
    model = other.open()
    with pytest.raises(Exception, match="behind a multiple of 1048576") as info:
        other.session(model)
    assert getattr(info.value, "status", None) == 3  # LLAMAC_ERROR_WEIGHTS
    other.lib.llamac_model_close(model)


def test_workers_block_signals(fake: Any, model: c_void_p) -> None:
    """Signal handlers keep running in the caller's threads."""
    before = _threads()
    session = fake.session(model, 2)
    (worker,) = _threads() - before
    status = Path(f"/proc/self/task/{worker}/status").read_text()
    blocked = int(status.split("SigBlk:")[1].split()[0], 16)
    assert blocked & 1 << 1, "SIGINT"
    session.close()


def test_pinned_threads(fake: Any, model: c_void_p) -> None:
    """Workers stay on their CPU; the caller is there for the call only."""
    cpus = sorted(os.sched_getaffinity(0))
    before, last = _threads(), cpus[-1]
    session = fake.session(model, 2, cpus=(cpus[0], last))
    (worker,) = _threads() - before
    assert os.sched_getaffinity(int(worker)) == {last}
    np.testing.assert_array_equal(session.eval(TOKENS), fake.expected(TOKENS))
    assert sorted(os.sched_getaffinity(0)) == cpus
    session.close()


def test_idle_threads_sleep(fake: Any, model: c_void_p) -> None:
    """Between evals a session uses no CPU time."""
    session = fake.session(model, 4)
    session.eval(TOKENS)
    time.sleep(0.02)
    before = time.process_time()
    time.sleep(0.2)
    assert time.process_time() - before < 0.05
    session.close()


def test_nothing_is_left_behind(fake: Any) -> None:
    """Opening and closing leaves no thread, file or mapping, failures included."""

    def once(tokens: tuple[int, ...]) -> None:
        model = fake.open()
        session = fake.session(model, 3)
        try:
            session.eval(tokens)
        except Exception as error:
            assert "13 is unlucky" in str(error)
        session.close()
        with fake.fails("THREAD", "CPU 1023"):
            fake.session(model, 2, cpus=(min(os.sched_getaffinity(0)), 1023))
        fake.lib.llamac_model_close(model)
        with fake.fails("CPU", "lacks"):
            fake.open(level="foreign")
        with fake.fails("WEIGHTS", "not a llamac"):
            fake.open(fake.library)

    for _ in range(10):
        once((*TOKENS, 13))
    files, threads, mappings = os.listdir("/proc/self/fd"), _threads(), _num_mappings()
    for i in range(100):
        once(TOKENS if i % 2 else (*TOKENS, 13))
    assert os.listdir("/proc/self/fd") == files
    assert _threads() == threads
    assert _num_mappings() <= mappings + 2, "the allocator may add an arena, not one per round"


def test_memory_spaces(fake: Any, model: c_void_p) -> None:
    """The spaces are the mapped file, the arena and the KV cache, all page aligned."""
    session = fake.session(model)
    session.eval(TOKENS[:5])
    table = session.memory(WEIGHTS, 4096, fake.table.shape, c_float)
    np.testing.assert_array_equal(table, fake.table)
    cache = session.memory(KV, 0, (28, 16), c_float)
    np.testing.assert_array_equal(cache[:5], fake.table[list(TOKENS[:5])] + fake.bias)
    assert not cache[5:].any(), "untouched rows are zero"
    for space in (WEIGHTS, ARENA, KV):
        assert fake.lib.llamac_session_memory(session.handle, space) % 4096 == 0
    for space in (-1, 3):
        assert not fake.lib.llamac_session_memory(session.handle, space)
    session.close()


def test_weights_are_shared_with_the_page_cache(fake: Any, model: c_void_p) -> None:
    """The file is mapped read-only and shared, not copied."""
    lines = Path("/proc/self/maps").read_text().splitlines()
    (line,) = [line for line in lines if line.endswith(str(fake.weights_path))]
    assert line.split()[1] == "r--s"


@pytest.mark.parametrize("num_threads", [1, 2])
def test_run_steps(fake: Any, model: c_void_p, num_threads: int) -> None:
    """Single steps work on the memory as it is and leave the position alone."""
    session = fake.session(model, num_threads)
    session.memory(ARENA, 0, (4,), c_int32)[:] = (1, 2, 3, 4)
    session.memory(ARENA, 64, (2,), c_int32)[:] = (2, 3)
    session.run_steps("prefill_4", 1, 3)
    cache = session.memory(KV, 0, (28, 16), c_float)
    np.testing.assert_array_equal(cache[2:6], fake.table[[1, 2, 3, 4]] + fake.bias)
    assert not cache[:2].any()
    assert session.position == 0
    assert session.take_chunks() == [], "step 0 did not run"
    session.run_steps("prefill_4", 9, 0)
    session.close()


def test_run_steps_checks_its_arguments(fake: Any, model: c_void_p) -> None:
    """Unknown functions and steps outside the function are refused."""
    session = fake.session(model)
    with fake.fails("ARGUMENT", "no function named 'prefill_5'"):
        session.run_steps("prefill_5", 0, 1)
    for first, count in ((0, 10), (9, 1), (5, 2**32 - 1)):
        with fake.fails("ARGUMENT", f"decode has 9 steps, not {first + count}"):
            session.run_steps("decode", first, count)
    session.close()


@pytest.mark.parametrize("num_threads", [1, 2])
def test_profile(fake: Any, model: c_void_p, num_threads: int) -> None:
    """Times accumulate per step while profiling is on, and start again from zero."""
    session = fake.session(model, num_threads)
    assert session.step_ns("decode") is None
    assert fake.lib.llamac_session_profile(session.handle, 1) == 0
    assert session.step_ns("prefill_5") is None
    session.eval(TOKENS[:9])
    large, decode = session.step_ns("prefill_8"), session.step_ns("decode")
    assert len(large) == len(decode) == 9
    assert (large[:5] > 0).all(), "steps of the first chunk"
    assert not large[5:].any(), "logits are not computed for it"
    assert (decode > 0).all()
    fake.lib.llamac_session_profile(session.handle, 0)
    session.eval(TOKENS[9:10])
    np.testing.assert_array_equal(session.step_ns("decode"), decode)
    fake.lib.llamac_session_profile(session.handle, 1)
    assert not session.step_ns("decode").any()
    session.close()


def test_profiled_times_add_up(fake: Any, model: c_void_p) -> None:
    """The steps' times are those of the evals, less the call itself."""
    session = fake.session(model, 2)
    fake.lib.llamac_session_profile(session.handle, 1)
    started = time.perf_counter_ns()
    for _ in range(200):
        session.rewind(0)
        session.eval(TOKENS[:1])
    elapsed = time.perf_counter_ns() - started
    assert 0 < session.step_ns("decode").sum() <= elapsed
    session.close()


def test_read_bandwidth(fake: Any) -> None:
    """The probe gives a possible number, with and without pinning."""
    cpu = (c_int32 * 1)(min(os.sched_getaffinity(0)))
    for cpus, num_cpus in ((None, 0), (cpu, 1)):
        rate = fake.lib.llamac_read_bandwidth(1, 1 << 24, 1, cpus, num_cpus)
        assert 0.1 < rate < 2000
    assert fake.lib.llamac_read_bandwidth(2, 1 << 24, 1, None, 0) > 0.1


def test_read_bandwidth_refuses_nonsense(fake: Any) -> None:
    """Zero says that nothing was measured."""
    probe = fake.lib.llamac_read_bandwidth
    assert probe(0, 1 << 24, 1, None, 0) == 0
    assert probe(65, 1 << 30, 1, None, 0) == 0
    assert probe(1, 1 << 19, 1, None, 0) == 0
    assert probe(1, 1 << 24, 0, None, 0) == 0
    assert probe(1, 1 << 60, 1, None, 0) == 0
    assert probe(1, 1 << 24, 1, (c_int32 * 1)(1023), 1) == 0
