"""What the runtime asks the operating system: architecture, usable CPUs, free memory."""

from __future__ import annotations

import os
import platform
import signal
import sys
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from types import FrameType

__all__ = [
    "available_memory",
    "c_library",
    "default_threads",
    "interrupts_later",
    "machine",
    "operating_system",
    "usable_cpus",
]

_MACHINE_ALIASES = {"amd64": "x86_64", "arm64": "aarch64"}


def machine() -> str:
    """Return the architecture of this machine as manifests name it: "x86_64", "aarch64"."""
    name = platform.machine().lower()
    return _MACHINE_ALIASES.get(name, name)


def operating_system() -> str:
    """Return the operating system as manifests name it: "linux", "android", "darwin"."""
    # Python on Android calls itself Linux before 3.13; only there does sys have this function.
    return "android" if hasattr(sys, "getandroidapilevel") else platform.system().lower()


def c_library() -> str:
    """Return the C library of this process: "glibc", "musl", "android" (bionic); else ""."""
    system = operating_system()
    if system != "linux":
        return "android" if system == "android" else ""
    try:
        name = os.confstr("CS_GNU_LIBC_VERSION")
    except (AttributeError, ValueError, OSError):  # this name of glibc is unknown to others
        name = None
    return "glibc" if name else "musl"


def available_memory(meminfo: Path = Path("/proc/meminfo")) -> int | None:
    """Return the bytes that programs can still take without swapping, None where unknown."""
    try:
        lines = meminfo.read_text("ascii").splitlines()
    except OSError:
        return None
    for line in lines:
        name, _, value = line.partition(":")
        if name == "MemAvailable":
            return int(value.split()[0]) * 1024
    return None


def usable_cpus() -> tuple[int, ...]:
    """Return the numbers of the CPUs on which this process may run, in ascending order."""
    if hasattr(os, "sched_getaffinity"):
        return tuple(sorted(os.sched_getaffinity(0)))
    return tuple(range(os.cpu_count() or 1))


def default_threads(cpu_folder: Path = Path("/sys/devices/system/cpu")) -> int:
    """Return how many threads to use if nobody says: one for each big core that may be used.

    Kernels cut their work into equal parts, so that one slow core makes all others wait. Cores
    with less than half the capacity of the biggest one, which Linux reports on Arm, do not count.
    """
    capacities = [_capacity(cpu_folder / f"cpu{cpu}" / "cpu_capacity") for cpu in usable_cpus()]
    return sum(2 * capacity >= max(capacities) for capacity in capacities)


def _capacity(path: Path) -> int:
    """Return the relative speed of a core; 1 for all where the system does not tell."""
    try:
        return int(path.read_text("ascii"))
    except (OSError, ValueError):
        return 1


@contextmanager
def interrupts_later() -> Iterator[None]:
    """Let Ctrl-C wait until the body has ended.

    For starting a process: an exception between its start and the line that remembers it would
    leave it running. Handlers belong to the main thread, and other threads are never interrupted.
    """
    handler = signal.getsignal(signal.SIGINT)
    if not callable(handler) or threading.current_thread() is not threading.main_thread():
        yield
        return
    came: list[tuple[int, FrameType | None]] = []
    signal.signal(signal.SIGINT, lambda number, frame: came.append((number, frame)))
    try:
        yield
    finally:
        signal.signal(signal.SIGINT, handler)
        if came:
            handler(*came[0])
