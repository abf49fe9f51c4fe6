"""Exact counts of what an emulated Hexagon executes: packets, and the instructions in them.

qemu-hexagon counts by itself, and programs of ours read its counters around each call of a kernel
(`runtime/c/hexagon_counters.h`). The figures depend on neither the machine nor its load. A packet
takes a cycle at least: they say nothing about stalls, caches and memory.
"""

from __future__ import annotations

from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, ClassVar

from llamac.targets.emulator import Emulator


@dataclass(frozen=True)
class Packets:
    """What one region executed; zeros where the processor does not say.

    Attributes:
        packets: of up to four instructions, which start together.
        instructions: in these packets.
        vector_instructions: those of them that are HVX's.
    """

    unit: ClassVar[str] = "packets"

    packets: int = 0
    instructions: int = 0
    vector_instructions: int = 0

    @property
    def total(self) -> int:
        """All packets."""
        return self.packets

    def __add__(self, other: Packets) -> Packets:
        return Packets(
            self.packets + other.packets,
            self.instructions + other.instructions,
            self.vector_instructions + other.vector_instructions,
        )

    def details(self) -> dict[str, Any]:
        """What JSON says beside the packets."""
        return {
            "instructions": self.instructions,
            "vector_instructions": self.vector_instructions,
        }


def counting_packets(emulator: Emulator, out: Path) -> Emulator:
    """The same emulator, whose runner writes the counts of every call of a kernel into a file."""
    return replace(emulator, packets=str(out))


def read_packets(path: Path) -> list[Packets]:
    """Read what the runner wrote."""
    return [Packets(*map(int, line.split())) for line in path.read_text("ascii").splitlines()]
