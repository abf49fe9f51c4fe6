"""The part of a CPU plug-in that is the same for every instruction set."""

from __future__ import annotations

from abc import abstractmethod
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any, ClassVar

from llamac.targets import soc
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

if TYPE_CHECKING:
    from numpy.typing import NDArray
    from tvm.ir import IRModule

    from llamac.schedules.intrin.isa import Isa
    from llamac.targets.cpu.entry import Level

LIBRARY = Path("lib/libmodel.so")
HEADER = Path("include/llamac.h")
RUNTIME_SOURCES = Path(__file__).parents[2] / "runtime" / "c"


class CpuTarget(Target):
    """A CPU: our kernels, one object per feature level, and the C support library.

    A subclass names its levels and the words in which its C sources know features and the system.
    """

    processor: ClassVar[str] = "cpu"
    scale_dtypes: ClassVar[tuple[str, ...]] = ("float16", "bfloat16")
    kv_dtypes: ClassVar[tuple[str, ...]] = ("float16", "int8")
    feature_prefix: ClassVar[str]
    zig_target: ClassVar[str]

    @abstractmethod
    def isas(self) -> Sequence[Isa]:
        """Instruction sets of the levels of this SoC, best first."""

    def levels(self) -> Sequence[soc.Level]:
        """The levels by name and features."""
        return [soc.Level(name=isa.name, features=isa.features) for isa in self.isas()]

    def check(self) -> Sequence[Missing]:
        """A C compiler that can link for the target."""
        from llamac.runtime.errors import ToolchainMissing  # noqa: PLC0415
        from llamac.targets.toolchain import find_toolchain  # noqa: PLC0415

        try:
            find_toolchain()
        except ToolchainMissing as error:
            return (Missing(what=error.message, why=error.cause, fix=error.fix),)
        return ()

    def lower(self, mod: IRModule, options: LowerOptions) -> Lowered:
        """Choose kernels, and plan the places of all tensors."""
        from llamac.targets.cpu.plan import plan_program  # noqa: PLC0415
        from llamac.targets.cpu.selection import select_kernels  # noqa: PLC0415

        selection = select_kernels(mod, options.scale_dtype, self.isas()[0])
        program = plan_program(selection)
        return Lowered(selection.module, program, kernels=selection.kernels)

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
        work.mkdir(parents=True)
        levels = [Level(isa.name, isa.features) for isa in self.isas()]
        objects = self._compile(lowered, levels, work, progress)
        entry = work / "entry.c"
        source = entry_source(lowered.program, identity, levels, self.feature_prefix)
        entry.write_text(source, encoding="ascii")
        progress("link", len(objects), len(objects) + 1)
        sources = [entry, *sorted(RUNTIME_SOURCES.glob("*.c"))]
        artifacts = self.link(sources, objects, out)
        progress("link", len(objects) + 1, len(objects) + 1)
        header = out / HEADER
        header.parent.mkdir(exist_ok=True)
        header.write_bytes((RUNTIME_SOURCES / HEADER.name).read_bytes())
        return [*artifacts, Artifact(HEADER, "header")]

    def link(self, sources: Sequence[Path], objects: Sequence[Path], out: Path) -> list[Artifact]:
        """Link the tables and the support library (C sources) with the kernels: one library."""
        from llamac.targets.toolchain import find_toolchain, link_shared  # noqa: PLC0415

        library = out / LIBRARY
        library.parent.mkdir(parents=True, exist_ok=True)
        link_shared(
            find_toolchain(),
            sources=sources,
            objects=objects,
            include_dirs=[RUNTIME_SOURCES],
            out=library,
            target=self.zig_target,
            soname=LIBRARY.name,
            exports=["llamac_*", "__tvm_ffi_*"],
        )
        return [Artifact(LIBRARY, "library")]

    def _compile(
        self, lowered: Lowered, levels: Sequence[Level], work: Path, progress: Progress
    ) -> list[Path]:
        """Compile every kernel of a program for every level, each into an object file."""
        from llamac.targets.cpu.object_cache import compile_object  # noqa: PLC0415

        objects: list[Path] = []
        total = len(levels) * len(lowered.kernels) + 1
        for isa, level in zip(self.isas(), levels, strict=True):
            for name, spec in lowered.kernels.items():
                progress(f"{name} for {isa.name}", len(objects), total)
                objects.append(work / f"{len(objects)}.o")
                compile_object(spec, isa, name + level.suffix, objects[-1])
        return objects
