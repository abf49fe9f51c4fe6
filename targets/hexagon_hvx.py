"""Qualcomm's Hexagon DSP: a whole model on it, as a program that qemu-hexagon executes.

The products of linear layers use HVX; the other kernels come from the same generators as those of
CPUs and are scalar, because no emulator executes floats of HVX. The program is a static Linux one,
which no DSP of a phone runs: those load libraries into a user process by FastRPC.
"""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any, ClassVar

from llamac.runtime.errors import SocInvalid
from llamac.targets.base import Artifact, Identity, Lowered, Missing, Progress
from llamac.targets.cpu.target import CpuTarget, compile_levels
from llamac.targets.soc import Level as SocLevel
from llamac.targets.soc import SoC

if TYPE_CHECKING:
    from llamac.schedules.intrin.isa import Isa
    from llamac.targets.program import Program

ARCH = "hexagon"


class HexagonHvx(CpuTarget):
    """The processor "hvx" of a Snapdragon."""

    name: ClassVar[str] = "hexagon-hvx"
    processor: ClassVar[str] = "hvx"
    feature_prefix: ClassVar[str] = "LLAMAC_HEXAGON_"
    emulated_by: ClassVar[str] = "qemu-hexagon"
    known_versions: ClassVar[tuple[str, ...]] = ("v66", "v68", "v69", "v73", "v75", "v79", "v81")

    def __init__(self, soc: SoC) -> None:
        super().__init__(soc)
        if soc.hexagon is not None and soc.hexagon.version not in self.known_versions:
            raise SocInvalid(
                f"{soc.name}: hexagon.version: expected one of {', '.join(self.known_versions)}, "
                f"found {soc.hexagon.version!r}",
                cause=f"the plug-in {self.name} has no kernels for a DSP of that version",
                fix="correct the version in the SoC file, or leave the processor 'hvx' out",
            )

    @property
    def arch(self) -> str:
        """Not the CPU's."""
        return ARCH

    @property
    def os(self) -> str:
        """Of the program for the emulator."""
        return "linux"

    @property
    def version(self) -> str:
        """Of the DSP, "v75"; the SoC file has it if there is a processor "hvx"."""
        assert self.soc.hexagon is not None
        return self.soc.hexagon.version

    @property
    def tuned_core(self) -> str:
        """The DSP by its version."""
        return self.version

    def tvm_target(self, level: str = "") -> dict[str, Any]:
        """TVM target of a level; the best one by default."""
        isas = self.isas()
        return dict(next((isa for isa in isas if isa.name == level), isas[0]).target)

    def isas(self) -> Sequence[Isa]:
        """Instruction sets of the levels of the DSP's version, best first."""
        from llamac.schedules.intrin.hexagon import HexagonHvx as Hvx  # noqa: PLC0415

        return (Hvx(int(self.version.removeprefix("v")), simulate=True),)

    def levels(self) -> Sequence[SocLevel]:
        """The levels by name and features; those of the SoC file are the CPU's."""
        return [SocLevel(name=isa.name, features=isa.features) for isa in self.isas()]

    def check(self) -> Sequence[Missing]:
        """zig: a system compiler links for no DSP."""
        from llamac.runtime.errors import ToolchainMissing  # noqa: PLC0415
        from llamac.targets.toolchain import find_toolchain  # noqa: PLC0415

        why = "it links programs for Hexagon; no system compiler does"
        try:
            found = find_toolchain()
        except ToolchainMissing as error:
            return (Missing(what="zig", why=error.cause, fix=error.fix),)
        return () if found.is_zig else (Missing("zig", why, "pip install ziglang"),)

    def build(
        self, lowered: Lowered, identity: Identity, out: Path, progress: Progress
    ) -> Sequence[Artifact]:
        """Make the runner for the emulator, and the libraries for phones."""
        return [
            *super().build(lowered, identity, out, progress),
            *self._phone(lowered, identity, out, progress),
        ]

    def link(
        self, program: Program, entry: Path, objects: Sequence[Path], out: Path
    ) -> list[Artifact]:
        """Link the static runner for the emulator."""
        from llamac.targets.runner_program import RUNNER, RUNNER_ROLE, link_runner  # noqa: PLC0415
        from llamac.targets.toolchain import find_toolchain  # noqa: PLC0415

        runner = out / RUNNER
        runner.parent.mkdir(exist_ok=True)
        link_runner(find_toolchain(), entry=entry, objects=objects, arch=ARCH, out=runner)
        return [Artifact(RUNNER, RUNNER_ROLE)]

    def _phone(
        self, lowered: Lowered, identity: Identity, out: Path, progress: Progress
    ) -> list[Artifact]:
        """Link the libraries for phones, whose DSP has a second level: floats of HVX.

        It is no default, because no emulator executes it: whoever opens a model asks for it.
        """
        from llamac.schedules.intrin.hexagon import HexagonHvx as Hvx  # noqa: PLC0415
        from llamac.targets.cpu.entry import Level, entry_source  # noqa: PLC0415
        from llamac.targets.fastrpc.bundle import link_for_phones  # noqa: PLC0415
        from llamac.targets.toolchain import find_toolchain  # noqa: PLC0415

        work = out / "build" / "phone"
        work.mkdir()
        [verified] = self.isas()
        real = Hvx(int(self.version.removeprefix("v")))
        levels = [Level(isa.name, isa.features) for isa in (verified, real)]
        objects = sorted(work.parent.glob("*.o"))
        if real.target != verified.target:
            objects += compile_levels(lowered, [(real, levels[1])], work, progress)
        else:  # v66 has no floats in vectors: both are the same
            levels = levels[:1]
        entry = work / "entry.c"
        source = entry_source(
            lowered.program, identity, levels, self.feature_prefix, self.alignment
        )
        entry.write_text(source, encoding="ascii")
        return link_for_phones(
            find_toolchain(), entry=entry, objects=objects, version=self.version, out=out
        )
