"""What the operating system is asked."""

from __future__ import annotations

import os
import platform
import signal
import threading
from pathlib import Path

import pytest

from llamac.runtime import system


@pytest.mark.parametrize(
    ("reported", "name"),
    [("AMD64", "x86_64"), ("arm64", "aarch64"), ("x86_64", "x86_64"), ("riscv64", "riscv64")],
)
def test_architectures_have_one_name(
    monkeypatch: pytest.MonkeyPatch, reported: str, name: str
) -> None:
    monkeypatch.setattr(platform, "machine", lambda: reported)
    assert system.machine() == name


def test_available_memory_is_read_from_meminfo(tmp_path: Path) -> None:
    meminfo = tmp_path / "meminfo"
    meminfo.write_text("MemTotal: 9 kB\nMemAvailable:    1024 kB\n")
    assert system.available_memory(meminfo) == 1 << 20
    meminfo.write_text("MemTotal: 9 kB\n")
    assert system.available_memory(meminfo) is None
    assert system.available_memory(tmp_path / "none") is None


def test_usable_cpus_are_those_of_the_process() -> None:
    """A container or taskset may allow fewer than the machine has."""
    before = os.sched_getaffinity(0)
    try:
        os.sched_setaffinity(0, {min(before)})
        assert system.usable_cpus() == (min(before),)
        assert system.default_threads() == 1
    finally:
        os.sched_setaffinity(0, before)


@pytest.mark.parametrize(
    ("capacities", "threads"),
    [
        ({}, 4),
        ({0: 1024, 1: 1024, 2: 1024, 3: 1024}, 4),
        ({0: 300, 1: 300, 2: 800, 3: 1024}, 2),
        ({0: 512, 1: 512, 2: 511, 3: 1024}, 3),
    ],
)
def test_small_cores_get_no_thread(
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capacities: dict[int, int],
    threads: int,
) -> None:
    """A core of less than half the capacity would make the others wait."""
    monkeypatch.setattr(system, "usable_cpus", lambda: (0, 1, 2, 3))
    for cpu, capacity in capacities.items():
        (tmp_path / f"cpu{cpu}").mkdir()
        (tmp_path / f"cpu{cpu}" / "cpu_capacity").write_text(f"{capacity}\n")
    assert system.default_threads(tmp_path) == threads


def test_an_interrupt_waits_until_the_body_has_ended() -> None:
    done = []
    with pytest.raises(KeyboardInterrupt), system.interrupts_later():
        signal.raise_signal(signal.SIGINT)
        done.append("the rest of the body")
    assert done
    assert signal.getsignal(signal.SIGINT) is signal.default_int_handler


def test_an_error_of_the_body_is_not_lost_behind_an_interrupt() -> None:
    with pytest.raises(KeyboardInterrupt) as raised, system.interrupts_later():
        signal.raise_signal(signal.SIGINT)
        raise ValueError("of the body")
    assert isinstance(raised.value.__context__, ValueError)


def test_other_threads_change_no_handler() -> None:
    """They may not; Python interrupts the main thread alone."""
    handlers = []

    def enter() -> None:
        with system.interrupts_later():
            handlers.append(signal.getsignal(signal.SIGINT))

    thread = threading.Thread(target=enter)
    thread.start()
    thread.join()
    assert handlers == [signal.default_int_handler]
