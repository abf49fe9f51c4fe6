"""The plug-in: a CPU target for boards with AMD's Piledriver cores (2012).

All that is the same for every CPU (choice of kernels, packing, memory plan, linking) is inherited.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING, Any, ClassVar

from llamac.targets.cpu.target import CpuTarget
from llamac.targets.soc import cpu_tvm_target

if TYPE_CHECKING:
    from llamac.schedules.intrin.isa import Isa


class ExampleCpu(CpuTarget):
    """Serves the processor "cpu" of the example board."""

    name: ClassVar[str] = "example-cpu"
    feature_prefix: ClassVar[str] = "LLAMAC_X86_"
    zig_target: ClassVar[str] = "x86_64-linux-gnu.2.34"

    def tvm_target(self, level: str = "") -> dict[str, Any]:
        """Return what the SoC file says of the CPU; its one level needs no choice."""
        return cpu_tvm_target(self.soc)

    def isas(self) -> Sequence[Isa]:
        """Return the one instruction set; imported here, so that listing needs no TVM."""
        from llamac_example_target.piledriver import Piledriver  # noqa: PLC0415

        return (Piledriver(self.tvm_target()),)
