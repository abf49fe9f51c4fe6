"""x86-64 CPUs under Linux: AVX-512 VNNI, AVX-VNNI, AVX2, and a portable level."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING, Any, ClassVar

from llamac.targets.cpu.target import CpuTarget

if TYPE_CHECKING:
    from llamac.schedules.intrin.isa import Isa


class X86Cpu(CpuTarget):
    """The host and other x86-64 machines; the library picks the best level that the CPU has."""

    name: ClassVar[str] = "x86-cpu"
    feature_prefix: ClassVar[str] = "LLAMAC_X86_"
    # glibc 2.34 merged libpthread into libc, so the library needs libc and libm only.
    zig_target: ClassVar[str] = "x86_64-linux-gnu.2.34"

    known_levels: ClassVar[frozenset[str]] = frozenset({"avx512vnni", "avxvnni", "avx2", "x86-64"})

    def tvm_target(self, level: str = "") -> dict[str, Any]:
        """TVM target of a level; the best one by default."""
        isas = self.isas()
        return dict(next((isa for isa in isas if isa.name == level), isas[0]).target)

    def isas(self) -> Sequence[Isa]:
        """Instruction sets of the SoC's levels."""
        from llamac.schedules.intrin.x86 import X86_LEVELS  # noqa: PLC0415

        wanted = [level.name for level in self.soc.levels]
        return [isa for isa in X86_LEVELS if isa.name in wanted]
