"""The part of a CPU plug-in that is the same for every instruction set."""

from __future__ import annotations

from abc import abstractmethod
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any, ClassVar

from llamac.runtime.errors import SocInvalid, ToolchainMissing
from llamac.targets.base import (
    Artifact,
    Identity,
    Lowered,
    LowerOptions,
    Missing,
    Progress,
    Target,
    WeightReader,
)
from llamac.targets.program import Pack
from llamac.targets.soc import Level as SocLevel
from llamac.targets.soc import SoC

if TYPE_CHECKING:
    from numpy.typing import NDArray
    from tvm.ir import IRModule

    from llamac.schedules.intrin.isa import Isa
    from llamac.targets.cpu.entry import Level
    from llamac.targets.program import Program

LIBRARY = Path("lib/libmodel.so")
HEADER = Path("include/llamac.h")
RUNTIME_SOURCES = Path(__file__).parents[2] / "runtime" / "c"


class CpuTarget(Target):
    """A CPU: our kernels, one object per feature level, and the C support library.

    A subclass names its levels and the words in which its C sources know features and the system.

    Attributes:
        feature_prefix: begins the names of CPU features in the C sources.
        zig_target: what the library is linked for.
        systems: operating systems that it links libraries for.
        known_levels: names of levels that a SoC file may list; empty: any.
    """

    processor: ClassVar[str] = "cpu"
    scale_dtypes: ClassVar[tuple[str, ...]] = ("float16", "bfloat16")
    kv_dtypes: ClassVar[tuple[str, ...]] = ("float16", "int8")
    feature_prefix: ClassVar[str]
    zig_target: ClassVar[str]
    systems: ClassVar[tuple[str, ...]] = ("linux",)
    known_levels: ClassVar[frozenset[str]] = frozenset()

    def __init__(self, soc: SoC) -> None:
        super().__init__(soc)
        for index, level in enumerate(soc.levels):
            if self.known_levels and level.name not in self.known_levels:
                raise SocInvalid(
                    f"{soc.name}: levels[{index}].name: expected one of "
                    f"{', '.join(sorted(self.known_levels))}, found {level.name!r}",
                    cause=f"the plug-in {self.name} has no kernels for a level of that name",
                    fix="correct the name in the SoC file, or leave the level out",
                )

    @abstractmethod
    def isas(self) -> Sequence[Isa]:
        """Instruction sets of the levels of this SoC, best first."""

    @property
    def tuned_core(self) -> str:
        """The core that kernels are tuned for, in the words of records."""
        return self.soc.clusters[0].core

    @property
    def alignment(self) -> int:
        """Bytes to which every tensor is aligned, so that all levels can read it."""
        return max(isa.alignment for isa in self.isas())

    def levels(self) -> Sequence[SocLevel]:
        """The levels by name and features."""
        return [SocLevel(name=isa.name, features=isa.features) for isa in self.isas()]

    def check(self) -> Sequence[Missing]:
        """A system that libraries are linked for, and a C compiler that can do it."""
        from llamac.targets.toolchain import find_toolchain  # noqa: PLC0415

        if not set(self.systems) & set(self.soc.os):
            return (self._no_flavour(),)
        try:
            find_toolchain()
        except ToolchainMissing as error:
            return (Missing(what="a C compiler", why=error.cause, fix=error.fix),)
        return ()

    def _no_flavour(self) -> Missing:
        """Why a SoC is data only; libraries of Apple's systems are Mach-O and need their SDK."""
        here, there = " and ".join(self.systems), " and ".join(self.soc.os)
        return Missing(
            what=f"a library flavour for {there}",
            why=f"it links libraries for {here} alone, so that the SoC file of {self.soc.name} "
            "is data: its figures and the roofline of `llamac targets`",
            fix=f"choose a SoC that runs {' or '.join(self.systems)} (`llamac targets`)",
        )

    def lower(self, mod: IRModule, options: LowerOptions) -> Lowered:
        """Choose kernels and their knobs, and plan the places of all tensors.

        The notes say where the knobs of the best level came from.
        """
        from llamac.targets.cpu.kernels import tunable_kernels  # noqa: PLC0415
        from llamac.targets.cpu.knobs import KnobChooser, check_all_tuned, summary  # noqa: PLC0415
        from llamac.targets.cpu.plan import plan_program  # noqa: PLC0415
        from llamac.targets.cpu.selection import select_kernels  # noqa: PLC0415

        isa = self.isas()[0]
        chooser = None
        if options.records is not None:
            chooser = KnobChooser(self.soc.name, self.tuned_core, options.records)
        selection = select_kernels(mod, options.scale_dtype, isa, chooser)
        program = plan_program(selection, self.alignment)
        kernels = tunable_kernels(selection.kernels, isa)
        if options.require_tuned:
            check_all_tuned(kernels, isa.name)
        notes = () if options.records is None else (summary(kernels), *options.records.notes())
        return Lowered(selection.module, program, kernels=selection.kernels, notes=notes)

    def pack(
        self, pack: Pack, weights: WeightReader, options: LowerOptions
    ) -> Iterator[NDArray[Any]]:
        """Yield the pieces of a packed tensor."""
        from llamac.targets.cpu.packing import Packer  # noqa: PLC0415

        return Packer(weights, options.scale_dtype, options.check_scales).pack(pack)

    def build(
        self, lowered: Lowered, identity: Identity, out: Path, progress: Progress
    ) -> Sequence[Artifact]:
        """Compile all kernels for all levels, and link them with the entry file."""
        from llamac.targets.cpu.entry import Level, entry_source  # noqa: PLC0415

        work = out / "build"
        work.mkdir(parents=True, exist_ok=True)
        levels = [Level(isa.name, isa.features) for isa in self.isas()]
        pairs = list(zip(self.isas(), levels, strict=True))
        objects = compile_levels(lowered, pairs, work, progress)
        entry = work / "entry.c"
        source = entry_source(
            lowered.program, identity, levels, self.feature_prefix, self.alignment
        )
        entry.write_text(source, encoding="ascii")
        progress("link", len(objects), len(objects) + 1)
        artifacts = self.link(lowered.program, entry, objects, out)
        progress("link", len(objects) + 1, len(objects) + 1)
        header = out / HEADER
        header.parent.mkdir(exist_ok=True)
        header.write_bytes((RUNTIME_SOURCES / HEADER.name).read_bytes())
        return [*artifacts, Artifact(HEADER, "header")]

    def link(
        self, program: Program, entry: Path, objects: Sequence[Path], out: Path
    ) -> list[Artifact]:
        """Link the tables (entry.c) and the support library with the kernels: one library."""
        from llamac.targets.toolchain import find_toolchain, link_shared  # noqa: PLC0415

        library = out / LIBRARY
        library.parent.mkdir(parents=True, exist_ok=True)
        link_shared(
            find_toolchain(),
            sources=support_sources(entry, program),
            objects=objects,
            include_dirs=[RUNTIME_SOURCES],
            out=library,
            target=self.zig_target,
            soname=LIBRARY.name,
            exports=["llamac_*", "__tvm_ffi_*"],
        )
        return [Artifact(LIBRARY, "library")]


def compile_levels(
    lowered: Lowered, levels: Sequence[tuple[Isa, Level]], work: Path, progress: Progress
) -> list[Path]:
    """Compile every kernel of a program for every level, each into an object file in `work`."""
    from llamac.schedules.graph import FAMILY  # noqa: PLC0415
    from llamac.targets.cpu.object_cache import compile_object  # noqa: PLC0415

    objects: list[Path] = []
    kernels = {name: spec for name, spec in lowered.kernels.items() if spec.family != FAMILY}
    total = len(levels) * len(kernels) + 1
    for isa, level in levels:
        for name, spec in kernels.items():
            progress(f"{name} for {isa.name}", len(objects), total)
            objects.append(work / f"{len(objects)}.o")
            compile_object(spec, isa, name + level.suffix, objects[-1])
    return objects


def support_sources(entry: Path, program: Program, *, is_emulation: bool = False) -> list[Path]:
    """C files of a library: the tables, the support library, and what calls graphs if needed.

    Args:
        entry: the tables.
        program: that they are of.
        is_emulation: graphs are executed by what stands in for the accelerator.
    """
    from llamac.targets.cpu.entry_graphs import runner_of  # noqa: PLC0415 (imports TVM)

    runner = runner_of(program.graphs(), is_emulation=is_emulation)
    graphs = (RUNTIME_SOURCES / runner.folder).glob("*.c") if runner else ()
    return [entry, *sorted(RUNTIME_SOURCES.glob("*.c")), *sorted(graphs)]
