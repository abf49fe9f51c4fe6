"""What a target plug-in is: one class per processor, found by entry point (`targets/registry.py`).

    partition      passes        lower                        build
    mark what  ──▶ fuse      ──▶ composites become        ──▶ files of the target
    it takes       composites    kernels + packing recipes

Everything here is plain data and one abstract class. TVM is imported for its types only, so that
listing and checking targets stays fast.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, ClassVar, Protocol, TypeAlias

from llamac.runtime.errors import TargetUnknown

if TYPE_CHECKING:
    from numpy.typing import NDArray
    from tvm.ir import IRModule
    from tvm.ir.transform import Pass

    from llamac.runtime.manifest import GraphEntry
    from llamac.schedules.quantized import ValueRange
    from llamac.targets.cpu.kernels import KernelSpec
    from llamac.targets.program import Pack, Program
    from llamac.targets.soc import Level, SoC
    from llamac.targets.tuning.book import RecordBook

GRAPH_ROLE = "graph"
"""Role of the files that an accelerator's graphs are in."""

API_VERSION = 1
"""Version of this interface; a plug-in written for another one is refused."""

Progress: TypeAlias = Callable[[str, int, int], None]
"""Called as `progress(what, done, total)` while a long step runs."""


class TensorLike(Protocol):
    """Shape and dtype of a named tensor of a checkpoint."""

    @property
    def shape(self) -> tuple[int, ...]:
        """Sizes, outermost first."""

    @property
    def dtype(self) -> str:
        """A word of numpy's, or "bfloat16"."""


class WeightReader(Protocol):
    """A checkpoint's tensors by name, one in memory at a time; `bfloat16` is read as uint16."""

    def names(self) -> Sequence[str]:
        """All tensors, in Meta's names."""

    def info(self, name: str) -> TensorLike:
        """Shape and dtype without reading the values."""

    def read(self, name: str) -> NDArray[Any]:
        """The values."""


@dataclass(frozen=True)
class Missing:
    """One thing that `check` did not find: what, why it is needed, how to get it."""

    what: str
    why: str
    fix: str


@dataclass(frozen=True)
class LowerOptions:
    """What the user chose and every target must agree on.

    Attributes:
        context_length: positions the KV cache holds.
        chunks: prefill lengths, largest first.
        scale_dtype: "float16" or "bfloat16", of the int4 group scales.
        kv_dtype: "float16" or "int8".
        check_scales: called with (name, scales) before they are rounded; raises if they do not fit.
        records: where tuned knobs are looked up; None: all kernels get their defaults.
        require_tuned: a kernel of the best level without a record that fits is an error.
    """

    context_length: int
    chunks: tuple[int, ...]
    scale_dtype: str
    kv_dtype: str
    check_scales: Callable[[str, NDArray[Any]], None] | None = None
    records: RecordBook | None = None
    require_tuned: bool = False


@dataclass(frozen=True)
class Scheme:
    """How an accelerator computes layers.

    Attributes:
        name: in options and manifests, "float16" or "a16w4".
        summary: of activations, weights and cache, in words.
        weights: form of the layers' weights, of WEIGHT_FORMS.
        kv_dtype: of the KV cache that its graphs read; None: that of the CPU.
        is_calibrated: it must know the ranges of values, which a text shows.
    """

    name: str
    summary: str
    weights: str = "checkpoint"
    kv_dtype: str | None = None
    is_calibrated: bool = False


WEIGHT_FORMS = ("checkpoint", "lpbq", "int8", "int4")
"""As the checkpoint has them; int4 in groups of 32 whose scales are 1 to 16 times one of the row;
int8 or int4 with one scale for each row."""


@dataclass(frozen=True)
class Layers:
    """The layers of a model in the form of a scheme.

    Attributes:
        scheme: how they are computed.
        weights: all tensors of the model, those of the layers in the scheme's form.
        ranges: of the values inside, by their labels (`targets/chunk.py`), if it is calibrated.
        on_cpu: layers that the accelerator leaves to the CPU.
    """

    scheme: Scheme
    weights: WeightReader
    ranges: Mapping[str, ValueRange]
    on_cpu: frozenset[int] = frozenset()


@dataclass(frozen=True)
class Identity:
    """What a built library says of itself: model name, build id (64 hex digits), limits."""

    model_name: str
    build_id: str
    vocab_size: int
    context_length: int
    max_chunk: int


@dataclass(frozen=True)
class Artifact:
    """A file that a target wrote.

    Attributes:
        path: inside the bundle.
        role: in the manifest.
        flavour: of a library, where there is one for each C library; see FileEntry.
        note: what the user should know of it (printed, and written to the manifest).
    """

    path: Path
    role: str
    flavour: str | None = None
    note: str = ""


@dataclass(frozen=True)
class Lowered:
    """What `lower` makes.

    Attributes:
        module: functions that only call kernels, with the kernels.
        program: the same as data: tensors at fixed places, and steps.
        kernels: how to build each kernel again, for other feature levels.
        notes: what the user should know (printed, and written to the manifest).
    """

    module: IRModule
    program: Program
    kernels: Mapping[str, KernelSpec]
    notes: tuple[str, ...] = ()


@dataclass(frozen=True)
class Offloaded:
    """What `offload` makes.

    Attributes:
        module: functions in which every part that was taken is one composite "llamac.graph".
        artifacts: the files of these graphs.
        graphs: what is in them, for the manifest.
        notes: what the user should know (printed, and written to the manifest).
    """

    module: IRModule
    artifacts: tuple[Artifact, ...]
    graphs: tuple[GraphEntry, ...]
    notes: tuple[str, ...] = ()


class Target(ABC):
    """One code generator for one processor of a SoC; stateless, made from a SoC's description.

    Class attributes say what the target can do; the defaults are what a CPU can:

    Attributes:
        name: the plug-in's name, the same as its entry point's, "x86-cpu".
        processor: the kind of processor it serves, "cpu".
        api_version: the version of this interface it was written for.
        activation_rules: ways to quantize activations that it computes.
        scale_dtypes: dtypes of int4 group scales that its kernels read.
        kv_dtypes: dtypes of the KV cache that its kernels read and write.
        emulated_by: the command that runs its code on another machine, "qemu-aarch64", or "".
        is_accelerator: it takes parts of a model with `offload`, and a CPU does the rest; it has no
            kernels, so that `lower`, `pack` and `build` are never called.
    """

    name: ClassVar[str]
    processor: ClassVar[str]
    api_version: ClassVar[int] = API_VERSION
    activation_rules: ClassVar[tuple[str, ...]] = ("torchao",)
    scale_dtypes: ClassVar[tuple[str, ...]] = ("float16",)
    kv_dtypes: ClassVar[tuple[str, ...]] = ("float16",)
    emulated_by: ClassVar[str] = ""
    is_accelerator: ClassVar[bool] = False

    def __init__(self, soc: SoC) -> None:
        if all(processor.plugin != self.name for processor in soc.processors):
            served = ", ".join(f"{p.kind} by {p.plugin}" for p in soc.processors)
            raise TargetUnknown(
                f"the plug-in {self.name!r} serves no processor of {soc.name}",
                cause=f"the SoC file says: {served}",
                fix="choose another SoC, or name the plug-in in a SoC file of your own",
            )
        self.soc = soc

    @property
    def arch(self) -> str:
        """Architecture of the code that it makes, in the words of manifests."""
        return self.soc.arch

    @property
    def os(self) -> str:
        """Operating system that the code needs."""
        return self.soc.os[0]

    def tvm_target(self, level: str = "") -> dict[str, Any]:
        """Return the dict that `tvm.target.Target` takes. Default: empty, TVM makes no code for it.

        Args:
            level: name of one of the SoC's levels, or "" where it has none.
        """
        return {}

    def levels(self) -> Sequence[Level]:
        """Return the feature levels of the library that `build` makes, best first; empty: one."""
        return self.soc.levels

    def check(self) -> Sequence[Missing]:
        """Say what this machine lacks to compile for the target. Empty: ready."""
        return ()

    def partition(self, mod: IRModule) -> IRModule:
        """Mark the composites that this target takes, with `llamac.targets.partition.claim`.

        Default: leave the module as it is. A CPU comes last in the SoC's order and owns all that
        nobody claimed.
        """
        return mod

    def offload(
        self,
        mod: IRModule,
        functions: Sequence[str],
        layers: Layers,
        out: Path,
        progress: Progress,
    ) -> Offloaded:
        """Compile parts of these functions with the processor's own compiler. Accelerators only.

        Args:
            mod: the model as composites.
            functions: names of those to take parts of, "decode".
            layers: in the form of one of its schemes.
            out: folder of the bundle; files go into a folder of the processor's name in it.
            progress: called while it lasts.

        Raises:
            CoverageError: it cannot take this model, or not on this SoC.
            ToolchainMissing, BuildFailed: its compiler is missing or failed.
        """
        raise NotImplementedError(f"{self.name} is no accelerator")

    def schemes(self) -> Sequence[Scheme]:
        """Ways to compute layers on this SoC, the default first. Accelerators only."""
        return ()

    def passes(self) -> Sequence[Pass]:
        """Return passes over the composites it owns (fusion), in order."""
        return ()

    @abstractmethod
    def lower(self, mod: IRModule, options: LowerOptions) -> Lowered:
        """Choose a kernel for each composite, and say how its weights are packed.

        Raises:
            CoverageError: there is no kernel for an operation; it is named with its place.
            TuningMissing: a kernel has no record, and the options want one.
        """

    @abstractmethod
    def pack(
        self, pack: Pack, weights: WeightReader, options: LowerOptions
    ) -> Iterator[NDArray[Any]]:
        """Yield a tensor of weights.bin in consecutive pieces of bounded size.

        Raises:
            ValuesInvalid: values that the layout cannot hold.
        """

    @abstractmethod
    def build(
        self, lowered: Lowered, identity: Identity, out: Path, progress: Progress
    ) -> Sequence[Artifact]:
        """Write the target's files under `out` (and nothing else but `out/build`).

        Raises:
            ToolchainMissing: a tool is not there (`check` says which).
            BuildFailed: a tool ran and failed; its output is in the error.
        """
