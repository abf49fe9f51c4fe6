"""Ways to a device: each runs one static program on it, with a deadline, and needs nothing there.

    local    a process of this machine                       microseconds
    qemu     the same under an emulator                      instructions, or packets
    ssh      a machine with a shell                          microseconds
    adb      a phone                                         microseconds

All take a folder with the files `program` and `call`, and leave what the program writes in the file
`output`. Commands are lists of arguments; the one line that a device's shell reads is made of
numbers and of names that are chosen here.
"""

from __future__ import annotations

import asyncio
import contextlib
import os
import re
import secrets
import signal
import subprocess
from abc import ABC, abstractmethod
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from llamac.compiler.farm.processes import MOST_MESSAGE, DeviceLost, Limits, end, run_process
from llamac.runtime.errors import UsageError
from llamac.targets.count import counting, read_counts
from llamac.targets.emulator import HEXAGON, Emulator

PROGRAM, CALL, OUTPUT = "program", "call", "output"
COPY_SECONDS = 120.0  # to bring files to a device and back
REMOTE_FOLDER = "llamac-farm"
ADB_FOLDER = "/data/local/tmp"
_TIMED_OUT = (124, 137)  # exit codes of timeout(1)
_SIGNALS = 32
_HOST = re.compile(r"[A-Za-z0-9_.@:\[\]][A-Za-z0-9_.@:\[\]-]*")


@dataclass(frozen=True)
class Ran:
    """How a program ended.

    Attributes:
        problem: why its output is worth nothing, "" if it is.
        count: instructions of the kernel, where an emulator counted them.
    """

    problem: str = ""
    count: int = 0


class Transport(ABC):
    """A way to one device.

    Attributes:
        name: of the transport, with what it leads to.
        device: what the device is, for records.
        cost: kind of cost that programs tell of it, a key of `records.KINDS`.
        cpu: number of the CPU that programs stay on; None: any.
    """

    cost = "time_us"

    def __init__(self, name: str, device: str, cpu: int | None = None) -> None:
        self.name, self.device, self.cpu = name, device, cpu

    @abstractmethod
    async def run(self, folder: Path, seconds: float, most_output: int) -> Ran:
        """Run the folder's program on its call.

        Args:
            folder: has the files `program` and `call`; `output` is written.
            seconds: after which the program is ended.
            most_output: bytes that it may write.

        Raises:
            DeviceLost: the device is not there.
        """

    async def temperature(self) -> float | None:
        """Degrees Celsius of the hottest part that tells one; None: none does."""
        return None

    @property
    def arguments(self) -> list[str]:
        """Arguments of programs."""
        return [] if self.cpu is None else [str(self.cpu)]


class LocalTransport(Transport):
    """Runs programs as processes of this machine, each in a group of its own that ends with us."""

    async def run(self, folder: Path, seconds: float, most_output: int) -> Ran:
        """See `Transport.run`."""
        command = [os.fspath(folder / PROGRAM), *self.arguments]
        return Ran(await self._run_here(folder, command, seconds, Limits(most_output)))

    async def _run_here(
        self, folder: Path, command: Sequence[str], seconds: float, limits: Limits
    ) -> str:
        """Run a command on the folder's call; return its problem."""
        (folder / PROGRAM).chmod(0o700)
        with (folder / CALL).open("rb") as stdin, (folder / OUTPUT).open("wb") as stdout:
            code, said = await run_process(
                command, seconds, stdin=stdin, stdout=stdout, limits=limits
            )
        return _problem(code, said, seconds)

    async def temperature(self) -> float | None:
        """See `Transport.temperature`."""
        texts = []
        for path in Path("/sys/class/thermal").glob("thermal_zone*/temp"):
            with contextlib.suppress(OSError):
                texts.append(path.read_text("ascii"))
        return _hottest(" ".join(texts))


class QemuTransport(LocalTransport):
    """Runs programs under QEMU, which counts what the kernel executes; counts are no time."""

    def __init__(self, emulator: Emulator) -> None:
        super().__init__(f"qemu-{emulator.arch}", f"qemu-{emulator.arch} {emulator.version_text}")
        self._emulator = emulator
        self._counts_by_itself = emulator.arch == HEXAGON.name
        self.cost = "packets" if self._counts_by_itself else "instructions"

    async def run(self, folder: Path, seconds: float, most_output: int) -> Ran:
        """See `Transport.run`."""
        counts = folder / "counts"
        emulator = self._emulator if self._counts_by_itself else counting(self._emulator, counts)
        command = emulator.command(folder / PROGRAM)
        limits = Limits(most_output, most_memory=0)  # QEMU reserves the addresses of its guest
        problem = await self._run_here(folder, command, seconds, limits)
        if problem or self._counts_by_itself:
            return Ran(problem)
        regions = read_counts(counts)
        if len(regions) != 1:
            return Ran(f"{len(regions)} calls were counted instead of one")
        return Ran(count=regions[0].total)

    async def temperature(self) -> float | None:
        """An emulator has none."""
        return None


class ShellTransport(Transport):
    """Copies files to a device, runs the program with its shell, copies the output back."""

    def __init__(self, name: str, device: str, folder: str, cpu: int | None) -> None:
        super().__init__(name, device, cpu)
        self._folder = f"{folder}-{secrets.token_hex(6)}"

    async def run(self, folder: Path, seconds: float, most_output: int) -> Ran:
        """See `Transport.run`."""
        await self._do(self.shell(f"rm -rf {self._folder}; mkdir -p {self._folder}"))
        await self._do(self._push([folder / PROGRAM, folder / CALL], self._folder))
        program = " ".join([f"./{PROGRAM}", *self.arguments])
        line = (
            f"cd {self._folder} && chmod 700 {PROGRAM} && ulimit -f {most_output // 512 + 1} && "
            f"timeout -s KILL {max(1, round(seconds))} {program} < {CALL} > {OUTPUT}"
        )
        code, said = await run_process(self.shell(line), seconds + COPY_SECONDS)
        if self._is_lost(code):
            raise DeviceLost(said or f"{self.name} ended with {code}")
        problem = _problem(_code_of_program(code), said, seconds)
        if not problem:
            size = await self._do(self.shell(f"wc -c < {self._folder}/{OUTPUT}"))
            if not size.strip().isdecimal() or int(size) > most_output:
                problem = f"it wrote {size.strip()!r:.40} bytes instead of {most_output}"
        if not problem:
            await self._do(self._pull(f"{self._folder}/{OUTPUT}", folder))
        await self._do(self.shell(f"rm -rf {self._folder}"))
        return Ran(problem)

    async def temperature(self) -> float | None:
        """See `Transport.temperature`."""
        line = "cat /sys/class/thermal/thermal_zone*/temp 2>/dev/null || true"
        return _hottest(await self._do(self.shell(line)))

    async def _do(self, command: Sequence[str]) -> str:
        """Run a command that works on every device; return what it printed."""
        try:
            process = await asyncio.create_subprocess_exec(
                *command,
                stdin=subprocess.DEVNULL,
                stdout=subprocess.PIPE,
                stderr=subprocess.PIPE,
                start_new_session=True,
            )
        except OSError as error:
            raise DeviceLost(f"{command[0]} does not start: {error.strerror}") from error
        try:
            async with asyncio.timeout(COPY_SECONDS):
                printed, said = await process.communicate()
        except TimeoutError:
            raise DeviceLost(f"{command[0]} took longer than {COPY_SECONDS:.0f} s") from None
        finally:
            await end(process)
        if process.returncode:
            text = said.decode(errors="replace").strip().splitlines()[-1:]
            raise DeviceLost(f"{command[0]}: {(text or ['failed'])[0]:.{MOST_MESSAGE}}")
        return printed.decode(errors="replace")

    @abstractmethod
    def shell(self, line: str) -> list[str]:
        """The command that lets the device's shell read a line."""

    @abstractmethod
    def _push(self, paths: Sequence[Path], folder: str) -> list[str]:
        """The command that copies files into a folder of the device."""

    @abstractmethod
    def _pull(self, path: str, folder: Path) -> list[str]:
        """The command that copies a file from the device."""

    @abstractmethod
    def _is_lost(self, code: int | None) -> bool:
        """Whether an exit code is the transport's own."""


class SshTransport(ShellTransport):
    """A machine that is reached by ssh, without a password.

    Args:
        host: "name" or "user@name", as ssh knows it.
        cpu: see `Transport`.
        config: a file in place of ssh's own configuration.
    """

    def __init__(self, host: str, cpu: int | None = None, config: str = "") -> None:
        super().__init__(f"ssh {check_host(host)}", host, REMOTE_FOLDER, cpu)
        self._host = host
        self._options = ssh_options(config)

    def shell(self, line: str) -> list[str]:
        """See `ShellTransport.shell`."""
        return ["ssh", *self._options, self._host, line]

    def _push(self, paths: Sequence[Path], folder: str) -> list[str]:
        return ["scp", "-q", *self._options, *map(str, paths), f"{self._host}:{folder}/"]

    def _pull(self, path: str, folder: Path) -> list[str]:
        return ["scp", "-q", *self._options, f"{self._host}:{path}", f"{folder}/"]

    def _is_lost(self, code: int | None) -> bool:
        return code is None or code == 255


class AdbTransport(ShellTransport):
    """A phone.

    Args:
        serial: as `adb devices` shows it.
        cpu: see `Transport`.
    """

    def __init__(self, serial: str, cpu: int | None = None) -> None:
        folder = f"{ADB_FOLDER}/{REMOTE_FOLDER}"
        super().__init__(f"adb {check_host(serial)}", serial, folder, cpu)
        self._adb = ["adb", "-s", serial]

    def shell(self, line: str) -> list[str]:
        """See `ShellTransport.shell`."""
        return [*self._adb, "shell", line]

    def _push(self, paths: Sequence[Path], folder: str) -> list[str]:
        return [*self._adb, "push", *map(str, paths), f"{folder}/"]

    def _pull(self, path: str, folder: Path) -> list[str]:
        return [*self._adb, "pull", path, f"{folder}/"]

    def _is_lost(self, code: int | None) -> bool:
        return code is None  # adb itself ends with 1, as programs do: the canary tells


def ssh_options(config: str = "") -> list[str]:
    """Options of every ssh: it asks nothing, and gives up when nothing answers."""
    options = ("BatchMode=yes", "ConnectTimeout=10", "ServerAliveInterval=5")
    file = ["-F", config] if config else []
    return [*file, *(part for option in options for part in ("-o", option))]


def check_host(text: str) -> str:
    """A name of a host or device that no program takes for an option.

    Raises:
        UsageError: it may be something else.
    """
    if _HOST.fullmatch(text) is None:
        raise UsageError(
            f"{text!r} is no name of a host or device",
            cause="names have letters, digits and the characters _ . - @ : [ ]",
            fix="give it as `ssh` or `adb devices` knows it",
        )
    return text


def _code_of_program(code: int | None) -> int | None:
    """A program's exit code as this machine tells it, from that of a shell with timeout(1)."""
    if code is None or code in _TIMED_OUT:
        return None
    return 128 - code if 128 < code < 128 + _SIGNALS else code


def _problem(code: int | None, said: str, seconds: float) -> str:
    """Why the output is worth nothing."""
    if code is None:
        return f"it took longer than {seconds:g} s"
    if code == 0:
        return ""
    if code < 0:
        return f"it was ended by {signal.Signals(-code).name}"
    return f"it ended with code {code}" + (f": {said}" if said else "")


def _hottest(text: str) -> float | None:
    """The highest of temperatures in thousandths of a degree, where sensors make sense."""
    found = [int(word) / 1000 for word in text.split() if re.fullmatch(r"\d{4,6}", word)]
    sensible = [degrees for degrees in found if degrees < 150]
    return max(sensible, default=None)
