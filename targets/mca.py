"""What a processor model says of a kernel's hot loop: llvm-mca, where it is installed.

The hot loop is the innermost loop with the most dot products. llvm-mca predicts the cycles of an
iteration from a core's pipes, latencies and width. It knows no caches, so its figures are ceilings.
"""

from __future__ import annotations

import functools
import re
import shutil
import subprocess
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

# Core models of LLVM 19 by the cores that they stand for.
MODELS: Mapping[str, str] = {
    "A55": "cortex-a55",
    "A510": "cortex-a510",
    "A710..X4 (N2)": "neoverse-n2",
    "V1": "neoverse-v1",
    "X925 (V2)": "neoverse-v2",
    "M1": "apple-m1",
}
PROGRAMS = ("llvm-mca-20", "llvm-mca-19", "llvm-mca-18", "llvm-mca-17", "llvm-mca-16", "llvm-mca")
_ITERATIONS = 200
_LABEL = re.compile(r"^(\.L\w+):")
_BRANCH = re.compile(r"\s+(?:b\.\w+|cbn?z|tbn?z|b)\s+.*?(\.L\w+)\s*$")
# int8 products of one instruction, by its first word; .s lanes of a NEON register.
_PRODUCTS = {"sdot": 16, "udot": 16, "smmla": 32, "smull": 8, "smull2": 8, "smlal": 8, "smlal2": 8}


@dataclass(frozen=True)
class Loop:
    """The lines of a loop and how many int8 products one iteration makes."""

    lines: tuple[str, ...]
    macs: int

    @property
    def instructions(self) -> int:
        """Instructions of one iteration."""
        return len(self.lines)


def hot_loop(assembly: str) -> Loop | None:
    """Find the innermost loop with the most int8 products; None if no loop has any."""
    lines = assembly.splitlines()
    places = {match[1]: i for i, line in enumerate(lines) if (match := _LABEL.match(line))}
    loops = []
    for end, line in enumerate(lines):
        match = _BRANCH.match(line)
        if match and places.get(match[1], end) < end:
            loops.append((places[match[1]], end))
    innermost = [
        loop
        for loop in loops
        if not any(other != loop and loop[0] <= other[0] and other[1] <= loop[1] for other in loops)
    ]
    found = [_loop(lines[start : end + 1]) for start, end in innermost]
    return max((loop for loop in found if loop.macs), key=lambda loop: loop.macs, default=None)


def _loop(lines: Sequence[str]) -> Loop:
    code = tuple(line for line in lines if re.match(r"\s+[a-z]", line))
    return Loop(code, sum(_PRODUCTS.get(line.split()[0], 0) for line in code))


@functools.cache
def find_mca() -> str | None:
    """Path of an llvm-mca that knows these cores; None if there is none."""
    for name in PROGRAMS:
        path = shutil.which(name)
        if path is not None and _version(path) >= 16:
            return path
    return None


def _version(path: str) -> int:
    done = subprocess.run([path, "--version"], capture_output=True, text=True, check=False)
    found = re.search(r"LLVM version (\d+)", done.stdout)
    return int(found[1]) if found else 0


def macs_per_cycle(loop: Loop, cpu: str) -> float | None:
    """Predict the int8 products per cycle of a loop on a core.

    Args:
        loop: from `hot_loop`.
        cpu: LLVM's name of the core.

    Returns:
        None if llvm-mca is missing or its model rejects the loop.
    """
    program = find_mca()
    if program is None:
        return None
    command = [program, "-mtriple=aarch64", f"-mcpu={cpu}", f"-iterations={_ITERATIONS}"]
    text = "\n".join(loop.lines) + "\n"
    done = subprocess.run(
        [*command, "-mattr=+dotprod,+i8mm"], input=text, capture_output=True, text=True, check=False
    )
    found = re.search(r"Total Cycles:\s+(\d+)", done.stdout)
    if done.returncode != 0 or found is None:
        return None
    return _ITERATIONS * loop.macs / int(found[1])
