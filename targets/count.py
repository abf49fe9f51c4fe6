"""Exact instruction counts of AArch64 programs: QEMU with a plug-in of ours.

The plug-in (`targets/c/instruction_counter.c`) is built at its first use. It counts the regions
between two marker instructions, which the callers of kernels execute, by class. The figures do not
depend on the machine nor on its load; they say nothing about caches and memory.
"""

from __future__ import annotations

import hashlib
import platform
import subprocess
import tempfile
from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, ClassVar

from llamac.runtime.errors import DeviceError, ToolchainMissing
from llamac.targets.emulator import Emulator
from llamac.targets.toolchain import cache_folder, find_toolchain, link_executable

SOURCE = Path(__file__).parent / "c" / "instruction_counter.c"
HOST_TARGET = f"{platform.machine()}-linux-gnu.2.28"


@dataclass(frozen=True)
class Counts:
    """Instructions of one region by class, in the order of the plug-in's output.

    Attributes:
        load: loads and prefetches, of any register.
        store: stores.
        dot: sdot, udot and their like.
        mmla: int8 matrix products.
        sme: outer products and moves of SME.
        vector: other NEON, SVE and floating point.
        branch: branches, calls, returns and system instructions.
        scalar: the rest.
    """

    unit: ClassVar[str] = "instructions"

    load: int = 0
    store: int = 0
    dot: int = 0
    mmla: int = 0
    sme: int = 0
    vector: int = 0
    branch: int = 0
    scalar: int = 0

    @property
    def total(self) -> int:
        """All instructions."""
        return sum(vars(self).values())

    def details(self) -> dict[str, Any]:
        """What JSON says beside the total."""
        return {"by_class": vars(self)}

    def __add__(self, other: Counts) -> Counts:
        mine, others = vars(self), vars(other)
        return Counts(**{name: mine[name] + others[name] for name in mine})


def counter_plugin() -> Path:
    """Return the path of the plug-in, built if this is its first use.

    Raises:
        BuildFailed, ToolchainMissing: it cannot be built.
    """
    name = hashlib.sha256(SOURCE.read_bytes()).hexdigest()[:16]
    out = cache_folder() / "plugins" / f"instruction_counter-{name}.so"
    if not out.is_file():
        out.parent.mkdir(parents=True, exist_ok=True)
        link_executable(
            find_toolchain(),
            sources=[SOURCE],
            include_dirs=[],
            out=out,
            target=HOST_TARGET,
            # QEMU itself defines the functions that the plug-in calls.
            cflags=["-shared", "-fPIC", "-Wl,-z,undefs"],
        )
    return out


def counting(emulator: Emulator, out: Path) -> Emulator:
    """The same emulator, which writes the counts of every region of what it runs into a file.

    Args:
        emulator: it must load plug-ins.
        out: complete when the program has ended by itself.

    Raises:
        ToolchainMissing: the emulator has no plug-ins.
        BuildFailed, ToolchainMissing: the plug-in cannot be built.
    """
    if not emulator.has_plugins:
        raise ToolchainMissing(
            f"{Path(emulator.program).name} {emulator.version_text} has no plug-ins",
            cause="it was built without -plugin, as static builds of QEMU are",
            fix="use the dynamic build (Debian 12: qemu-user), by LLAMAC_QEMU if it is not first",
        )
    plugin, file = (str(path).replace(",", ",,") for path in (counter_plugin(), out))
    return replace(emulator, plugin=f"{plugin},out={file}")


def count_instructions(
    emulator: Emulator, program: Sequence[str | Path], stdin: bytes = b""
) -> tuple[bytes, list[Counts]]:
    """Run a static program and count the instructions of each of its regions.

    Args:
        emulator: it must load plug-ins.
        program: path and arguments; it must compute in one thread.
        stdin: what it reads.

    Returns:
        What it wrote to standard output, and the regions in their order.

    Raises:
        ToolchainMissing: the emulator has no plug-ins.
        DeviceError: the program failed.
    """
    with tempfile.TemporaryDirectory(prefix="llamac-count-") as folder:
        out = Path(folder) / "counts"
        command = counting(emulator, out).command(*program)
        done = subprocess.run(command, input=stdin, capture_output=True, check=False)
        if done.returncode != 0:
            raise DeviceError(
                f"{Path(program[0]).name} ended with code {done.returncode} while it was counted",
                cause=done.stderr.decode(errors="replace").strip() or "a crash",
                fix="run it without counting; if that works, report it",
            )
        return done.stdout, read_counts(out)


def read_counts(path: Path) -> list[Counts]:
    """Read what the plug-in wrote."""
    return [Counts(*map(int, line.split())) for line in path.read_text("ascii").splitlines()]
