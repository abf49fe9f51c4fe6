"""Processes of this machine that leave nothing behind: each has a deadline, limits and a group."""

from __future__ import annotations

import asyncio
import contextlib
import ctypes
import errno
import os
import resource
import signal
import subprocess
from collections.abc import Sequence
from pathlib import Path

MOST_MESSAGE = 400
NO_PROGRAM = 126  # as shells say it
MOST_MEMORY = 8 << 30
_PDEATHSIG = 1


class DeviceLost(Exception):
    """A device does not do what every device does: it cannot be reached, or copies nothing."""


def die_with_parent() -> None:
    """Let this process end when the one that started it does, however that ends."""
    _PRCTL(_PDEATHSIG, signal.SIGKILL)


_PRCTL = ctypes.CDLL(None).prctl


class Limits:
    """What a program may not exceed; called in its process before it becomes the program.

    Args:
        most_output: bytes of a file that it writes.
        most_memory: bytes; 0: any.
    """

    def __init__(self, most_output: int, most_memory: int = MOST_MEMORY) -> None:
        self._output, self._memory = most_output, most_memory

    def __call__(self) -> None:
        """Limit this process."""
        resource.setrlimit(resource.RLIMIT_FSIZE, (self._output, self._output))
        resource.setrlimit(resource.RLIMIT_CORE, (0, 0))
        if self._memory:
            resource.setrlimit(resource.RLIMIT_AS, (self._memory, self._memory))
        die_with_parent()


async def run_process(
    command: Sequence[str],
    seconds: float,
    *,
    stdin: object = subprocess.DEVNULL,
    stdout: object = subprocess.DEVNULL,
    limits: Limits | None = None,
) -> tuple[int | None, str]:
    """Run a command; return its exit code, None if it took too long, and the end of what it said.

    Whatever happens, nothing of its process group is left.

    Raises:
        DeviceLost: it does not start.
    """
    try:
        process = await asyncio.create_subprocess_exec(
            *command,
            stdin=stdin,  # type: ignore[arg-type]
            stdout=stdout,  # type: ignore[arg-type]
            stderr=subprocess.PIPE,
            start_new_session=True,
            preexec_fn=limits,
        )
    except (OSError, subprocess.SubprocessError) as error:
        if getattr(error, "errno", None) == errno.ENOEXEC:
            return NO_PROGRAM, "it is no program of this machine"
        raise DeviceLost(f"{Path(command[0]).name} does not start: {error}") from error
    said = asyncio.create_task(_last_words(process))
    try:
        async with asyncio.timeout(seconds):
            code: int | None = await process.wait()
    except TimeoutError:
        code = None
    finally:
        await end(process)
        text = await said
    return code, text


async def _last_words(process: asyncio.subprocess.Process) -> str:
    """What a process writes to standard error, the end of it."""
    assert process.stderr is not None
    data = b""
    while piece := await process.stderr.read(1 << 16):
        data = (data + piece)[-MOST_MESSAGE:]
    return "; ".join(data.decode(errors="replace").split("\n")).strip("; ")


async def end(process: asyncio.subprocess.Process) -> None:
    """End a process and all that it started."""
    with contextlib.suppress(ProcessLookupError, PermissionError):
        os.killpg(process.pid, signal.SIGKILL)
    await process.wait()
