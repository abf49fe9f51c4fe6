"""AArch64 code as text: what LLVM prints while it compiles, and what llvm-objdump reads back.

Libraries are stripped, but their kernels are exported, so that a kernel is found by name in the
file that was really built. What a kernel calls has no name; it is found by the calls.
"""

from __future__ import annotations

import bisect
import functools
import re
import shutil
import subprocess
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path

from llamac.runtime.errors import DeviceError

FIRST_VERSION = 16  # the first one whose models are those of MODELS in targets/mca.py
LAST_VERSION = 24
PACKAGE = "llvm-19"

_LABEL = re.compile(r"^(\.L\w+):")
_ASSEMBLY = re.compile(r"^\s+([a-z][\w.]*)(?:\s+(.*?))?\s*(?://.*)?$")
_SYMBOL = re.compile(r"^([0-9a-f]+) <(.+)>:$")
_DISASSEMBLY = re.compile(r"^\s*([0-9a-f]+):\s+([a-z][\w.]*)(?:\s+(.*?))?\s*(?://.*)?$")
_PLACE = re.compile(r"0x([0-9a-f]+) <[^>]*>$")
_BRANCH = re.compile(r"b|bl|b\.\w+|bc\.\w+|cbn?z|tbn?z")
_ANY_LABEL = ".Ltarget"  # llvm-mca wants an operand, and does not look where it leads


@dataclass(frozen=True)
class Instruction:
    """One instruction.

    Attributes:
        address: in its file, or its number where there are no addresses.
        mnemonic: "b.ne".
        operands: as text that an assembler reads.
        target: address that it branches to, if it is a direct branch.
    """

    address: int
    mnemonic: str
    operands: str
    target: int | None = None

    @property
    def text(self) -> str:
        """The line for an assembler."""
        return f"\t{self.mnemonic}\t{self.operands}"


def parse_assembly(text: str) -> list[Instruction]:
    """Read assembly with labels `.L...`, as LLVM prints it; all functions as one list."""
    labels: dict[str, int] = {}
    found: list[tuple[str, str]] = []
    for line in text.splitlines():
        if label := _LABEL.match(line):
            labels[label[1]] = len(found)
        elif match := _ASSEMBLY.match(line):
            found.append((match[1], match[2] or ""))
    code = []
    for number, (mnemonic, operands) in enumerate(found):
        target = None
        if _BRANCH.fullmatch(mnemonic):
            target = labels.get(operands.rpartition(",")[2].strip())
        code.append(Instruction(number, mnemonic, operands, target))
    return code


class Disassembly:
    """The code of a library, from the output of `llvm-objdump -d --no-show-raw-insn`."""

    def __init__(self, text: str) -> None:
        self._symbols: dict[str, int] = {}
        self._code: list[Instruction] = []
        for line in text.splitlines():
            if match := _DISASSEMBLY.match(line):
                self._code.append(_disassembled(int(match[1], 16), match[2], match[3] or ""))
            elif match := _SYMBOL.match(line):
                self._symbols[match[2]] = int(match[1], 16)
        self._addresses = [instruction.address for instruction in self._code]
        called = {i.target for i in self._code if i.mnemonic == "bl" and i.target is not None}
        self._starts = sorted(called | set(self._symbols.values()))

    def function(self, symbol: str) -> list[Instruction]:
        """The code of an exported function and of the nameless ones that it calls, by address.

        Empty if there is no such symbol.
        """
        if symbol not in self._symbols:
            return []
        named = set(self._symbols.values())
        pending, bodies = [self._symbols[symbol]], dict[int, Sequence[Instruction]]()
        while pending:
            start = pending.pop()
            bodies[start] = self._body(start)
            for target in _targets(bodies[start]):
                callee = self._start_of(target)
                if callee is not None and callee not in named and callee not in bodies:
                    pending.append(callee)
        return [instruction for start in sorted(bodies) for instruction in bodies[start]]

    def _start_of(self, address: int) -> int | None:
        """Where the function begins that an address is in; None outside of the code."""
        if not self._addresses or not self._addresses[0] <= address <= self._addresses[-1]:
            return None
        at = bisect.bisect_right(self._starts, address)
        return self._starts[at - 1] if at else None

    def _body(self, start: int) -> Sequence[Instruction]:
        following = bisect.bisect_right(self._starts, start)
        last = following == len(self._starts)
        first = bisect.bisect_left(self._addresses, start)
        end = None if last else bisect.bisect_left(self._addresses, self._starts[following])
        return self._code[first:end]


def _disassembled(address: int, mnemonic: str, operands: str) -> Instruction:
    place = _PLACE.search(operands)
    if place is None:
        return Instruction(address, mnemonic, operands)
    target = int(place[1], 16) if _BRANCH.fullmatch(mnemonic) else None
    return Instruction(address, mnemonic, operands[: place.start()] + _ANY_LABEL, target)


def _targets(code: Iterable[Instruction]) -> list[int]:
    return [instruction.target for instruction in code if instruction.target is not None]


def disassemble(library: Path, program: str) -> Disassembly:
    """Read the code of a library.

    Args:
        library: for AArch64.
        program: path of llvm-objdump, from `find_llvm_tool`.

    Raises:
        DeviceError: it cannot be read.
    """
    command = [program, "-d", "--no-show-raw-insn", "--section=.text", str(library)]
    # Words are decoded by all extensions, whatever the file says that it needs.
    done = subprocess.run([*command, "--mattr=+all"], capture_output=True, text=True, check=False)
    if done.returncode != 0:
        raise DeviceError(
            f"{Path(program).name} cannot read {library}",
            cause=done.stderr.strip() or f"it ended with code {done.returncode}",
            fix="check the bundle with `llamac inspect --check`",
        )
    return Disassembly(done.stdout)


@functools.cache
def find_llvm_tool(name: str) -> str | None:
    """Path of a tool of LLVM 16 or later ("llvm-mca"); None if there is none."""
    versions = range(LAST_VERSION, FIRST_VERSION - 1, -1)
    for candidate in (*(f"{name}-{version}" for version in versions), name):
        path = shutil.which(candidate)
        if path is not None and _version(path) >= FIRST_VERSION:
            return path
    return None


def _version(path: str) -> int:
    done = subprocess.run([path, "--version"], capture_output=True, text=True, check=False)
    found = re.search(r"LLVM version (\d+)", done.stdout)
    return int(found[1]) if found else 0
