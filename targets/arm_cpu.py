"""64-bit Arm CPUs of phones and boards: one library with a set of kernels per feature level.

The levels of a SoC follow from what its clusters say: plain NEON and dotprod are always there, so
that a bundle also runs on older members of its family; i8mm and SME are there if a cluster has
them, others if the SoC file lists its levels. The library picks the best level that CPU and
operating system really offer.
"""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any, ClassVar

from llamac.targets.base import Artifact, Identity, Lowered, Missing, Progress
from llamac.targets.cpu.target import RUNTIME_SOURCES, CpuTarget, support_sources

if TYPE_CHECKING:
    from llamac.schedules.intrin.isa import Isa
    from llamac.targets.program import Program

ALWAYS = frozenset({"neon", "dotprod"})
IF_PRESENT = frozenset({"i8mm", "sme"})
# Phones that show SVE have vectors of 128 bits, for which NEON is as fast.
IF_LISTED = frozenset({"sve"})

# glibc 2.28 is that of Debian 10 and of all later systems; musl has one version of each symbol.
LINUX_TARGETS = {"glibc": "aarch64-linux-gnu.2.28", "musl": "aarch64-linux-musl"}


class ArmCpu(CpuTarget):
    """AArch64 under Linux and Android."""

    name: ClassVar[str] = "arm-cpu"
    feature_prefix: ClassVar[str] = "LLAMAC_ARM_"
    emulated_by: ClassVar[str] = "qemu-aarch64"
    systems: ClassVar[tuple[str, ...]] = ("linux", "android")
    known_levels: ClassVar[frozenset[str]] = ALWAYS | IF_PRESENT | IF_LISTED
    flavours: ClassVar[tuple[str, ...]] = ("android", "glibc", "musl")

    def tvm_target(self, level: str = "") -> dict[str, Any]:
        """TVM target of a level; the best one by default."""
        isas = self.isas()
        return dict(next((isa for isa in isas if isa.name == level), isas[0]).target)

    def isas(self) -> Sequence[Isa]:
        """Instruction sets of the SoC's levels, best first."""
        from llamac.schedules.intrin.arm import scheduling_model  # noqa: PLC0415
        from llamac.schedules.intrin.arm_levels import ARM_LEVELS  # noqa: PLC0415

        if self.soc.levels:
            wanted = {level.name for level in self.soc.levels}
        else:
            features = {feature for cluster in self.soc.clusters for feature in cluster.features}
            wanted = {*ALWAYS, *(IF_PRESENT & features)}
        model = scheduling_model(self.soc.clusters[0].mcpu)
        return [isa.scheduled_for(model) for isa in ARM_LEVELS if isa.name in wanted]

    def check(self) -> Sequence[Missing]:
        """A C compiler that can link for the target, and the NDK if the user names one."""
        from llamac.runtime.errors import ToolchainMissing  # noqa: PLC0415
        from llamac.targets.bionic import find_ndk  # noqa: PLC0415

        missing = list(super().check())
        try:
            find_ndk()
        except ToolchainMissing as error:
            why = f"{error.message}: {error.cause}"
            missing.append(Missing(what="a usable Android NDK", why=why, fix=error.fix))
        return missing

    def build(
        self, lowered: Lowered, identity: Identity, out: Path, progress: Progress
    ) -> Sequence[Artifact]:
        """Add the library that executes graphs here, if there are any (`emulation_library.py`)."""
        from llamac.targets.emulation_library import build_emulation  # noqa: PLC0415

        artifacts = super().build(lowered, identity, out, progress)
        if not lowered.program.graphs():
            return artifacts
        return [*artifacts, build_emulation(lowered, identity, out, progress)]

    def link(
        self, program: Program, entry: Path, objects: Sequence[Path], out: Path
    ) -> list[Artifact]:
        """One library for each C library, and the static runner.

        A static program cannot load the libraries that execute graphs: then there is no runner.
        """
        from llamac.targets.bionic import link_for_bionic  # noqa: PLC0415
        from llamac.targets.runner_program import RUNNER, RUNNER_ROLE, link_runner  # noqa: PLC0415
        from llamac.targets.toolchain import find_toolchain, link_shared  # noqa: PLC0415

        toolchain = find_toolchain()
        libraries = {flavour: out / "lib" / flavour / "libmodel.so" for flavour in self.flavours}
        for library in libraries.values():
            library.parent.mkdir(parents=True)
        inputs: dict[str, Any] = {
            "sources": support_sources(entry, program),
            "objects": objects,
            "include_dirs": [RUNTIME_SOURCES],
            "soname": "libmodel.so",
            "exports": ["llamac_*", "__tvm_ffi_*"],
        }
        note = link_for_bionic(toolchain, out=libraries["android"], **inputs)
        for flavour, target in LINUX_TARGETS.items():
            link_shared(toolchain, out=libraries[flavour], target=target, **inputs)
        notes = {"android": note}
        artifacts = [
            Artifact(path.relative_to(out), "library", flavour, notes.get(flavour, ""))
            for flavour, path in libraries.items()
        ]
        if program.graphs():
            return artifacts
        runner = out / RUNNER
        runner.parent.mkdir(exist_ok=True)
        link_runner(toolchain, entry=entry, objects=objects, arch=self.soc.arch, out=runner)
        return [*artifacts, Artifact(RUNNER, RUNNER_ROLE)]
