"""The kernels of a model: what there is to tune, from a bundle, a checkpoint, or a name alone."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, fields, is_dataclass
from pathlib import Path
from typing import Any, get_type_hints

from llamac.compiler.checkpoint import Checkpoint, TensorInfo
from llamac.compiler.compile_config import DEFAULT_CONTEXT, CompileConfig
from llamac.compiler.config import (
    LLAMA_3_2_1B,
    LLAMA_3_2_3B,
    LlamaConfig,
    LoraConfig,
    QuantConfig,
)
from llamac.compiler.pipeline import kv_capacity, read_checkpoint
from llamac.runtime.errors import TuningImpossible, UsageError
from llamac.runtime.manifest import MANIFEST_NAME, read_manifest
from llamac.schedules.intrin.isa import Isa
from llamac.targets.base import LowerOptions
from llamac.targets.cpu.kernels import FAMILIES, KernelSpec
from llamac.targets.cpu.target import CpuTarget
from llamac.targets.program import Program, ProgramKernel
from llamac.targets.registry import make_target
from llamac.targets.soc import load_soc
from llamac.targets.tuning.records import same

MODELS: Mapping[str, LlamaConfig] = {
    "llama-3.2-1b": LLAMA_3_2_1B,
    "llama-3.2-3b": LLAMA_3_2_3B,
}
FORMS: Mapping[str, QuantConfig] = {
    "spinquant": QuantConfig("spinquant", hadamard_r4=True),
    "qlora": QuantConfig("qlora", lora=LoraConfig(16, 2.0)),
    "ptq": QuantConfig("ptq"),
    "float": QuantConfig("float"),
}
SHARED = "float"  # the form whose output layer is the embedding table


@dataclass(frozen=True)
class ModelOptions:
    """How a checkpoint or a named model would be compiled; see `CompileConfig` for the words."""

    context_length: int = DEFAULT_CONTEXT
    chunks: tuple[int, ...] = (128, 32, 8)
    scale_dtype: str = "float16"
    kv_dtype: str = "float16"


@dataclass(frozen=True)
class ModelKernels:
    """Kernels of a model on a processor, those with the same family and shape once."""

    target: CpuTarget
    kernels: tuple[KernelSpec, ...]

    def level(self, name: str | None) -> Isa:
        """A level of the target by name, the best one by default.

        Raises:
            UsageError: there is no such level.
        """
        isas = {isa.name: isa for isa in self.target.isas()}
        if name is None:
            return next(iter(isas.values()))
        if name not in isas:
            raise UsageError(
                f"{self.target.soc.name} has no level {name!r}",
                cause=f"its levels are {', '.join(isas)}",
                fix="choose one of them with --level",
            )
        return isas[name]

    def tunable(self, level: Isa, pattern: str = "") -> list[KernelSpec]:
        """Kernels that have a choice of knobs at a level, and a name with `pattern` in it.

        Raises:
            TuningImpossible: there is none.
        """
        found = [spec for spec in self.kernels if len(spec.points(level)) > 1]
        named = [spec for spec in found if pattern in spec.name]
        if not named:
            names = ", ".join(spec.name for spec in found[:4])
            raise TuningImpossible(
                f"there is no kernel to tune for {level.name}"
                + (f" whose name has {pattern!r} in it" if pattern else ""),
                cause=f"those with knobs are {names}, ..." if names else "no generator has knobs",
                fix="give another part of a name with --kernels" if names else "choose a level",
            )
        return named


def model_kernels(
    model: str, soc: str | None, processor: str, options: ModelOptions
) -> ModelKernels:
    """Find the kernels of a model.

    Args:
        model: folder of a bundle or a checkpoint, or a key of MODELS, then perhaps ":" and one of
            FORMS.
        soc: name of a SoC; None: that of the bundle.
        processor: of the SoC, "cpu" or "hvx"; that of a bundle is the bundle's.
        options: for all but bundles.

    Raises:
        UsageError: they do not fit together.
        LlamacError: what reading the model or the SoC raises.
    """
    if (Path(model) / MANIFEST_NAME).is_file():
        return _of_bundle(Path(model), soc)
    if soc is None:
        raise UsageError(
            f"{model} can be tuned for many SoCs",
            cause="only a bundle says for which it is",
            fix="name one with --target (`llamac targets` lists them)",
        )
    plugins = {entry.kind: entry.plugin for entry in load_soc(soc).processors}
    if processor not in plugins:
        raise UsageError(
            f"{soc} has no processor {processor!r}",
            cause=f"its SoC file lists {', '.join(plugins)}",
            fix="choose one of them with --processor",
        )
    target = cpu_target(plugins[processor], soc)
    name, _, form = model.partition(":")
    if name in MODELS:
        checkpoint = _named_model(name, form or "spinquant")
    else:
        checkpoint = read_checkpoint(CompileConfig(Path(model), soc, Path()))
    return ModelKernels(target, _of_checkpoint(checkpoint, target, options))


def cpu_target(plugin: str, soc: str) -> CpuTarget:
    """The target of a SoC's processor, if its kernels can be tuned.

    Raises:
        TuningImpossible: they are another compiler's.
        LlamacError: what loading the SoC or the plug-in raises.
    """
    target = make_target(plugin, load_soc(soc))
    if not isinstance(target, CpuTarget):
        raise TuningImpossible(
            f"{target.name} has nothing to tune",
            cause="its maker's compiler chooses how kernels run",
            fix="tune the cpu, or hvx where the SoC has it (--processor)",
        )
    return target


def _named_model(name: str, form: str) -> Checkpoint:
    from llamac.compiler.meta_writer import layout  # noqa: PLC0415

    if form not in FORMS:
        raise UsageError(
            f"{name} has no form {form!r}",
            cause=f"forms are {', '.join(FORMS)}",
            fix=f"write it like {name}:qlora, or leave the form out for spinquant",
        )
    config, quant = MODELS[name], FORMS[form]
    weights = _Shapes(layout(config, quant))
    return Checkpoint(name, config, quant, weights, Path(), shared_embedding=form == SHARED)


@dataclass(frozen=True)
class _Shapes:
    """Weights that have names, shapes and dtypes only: enough to choose kernels."""

    infos: dict[str, TensorInfo]

    def names(self) -> list[str]:
        """All tensors."""
        return list(self.infos)

    def info(self, name: str) -> TensorInfo:
        """Shape and dtype as a front end gives them: flat scales of tables, float32 norms."""
        info = self.infos[name]
        if name.endswith("norm.weight"):
            return TensorInfo(info.shape, "float32")
        is_column = info.shape[1:] == (1,)
        return TensorInfo(info.shape[:1], info.dtype) if is_column else info

    def read(self, name: str) -> Any:
        """There are no values."""
        raise NotImplementedError(name)


def _of_checkpoint(
    checkpoint: Checkpoint, target: CpuTarget, options: ModelOptions
) -> tuple[KernelSpec, ...]:
    from llamac.compiler.llama import ModelOptions as IrOptions  # noqa: PLC0415
    from llamac.compiler.llama import build_llama  # noqa: PLC0415

    capacity = kv_capacity(options.context_length, options.chunks)
    module = build_llama(checkpoint, IrOptions(capacity, options.chunks, options.kv_dtype))
    module = target.partition(module)
    for transform in target.passes():
        module = transform(module)
    lowered = target.lower(
        module,
        LowerOptions(options.context_length, options.chunks, options.scale_dtype, options.kv_dtype),
    )
    return _different(lowered.kernels.values())


def _of_bundle(bundle: Path, soc: str | None) -> ModelKernels:
    manifest = read_manifest(bundle)
    if soc not in (None, manifest.target.soc):
        raise UsageError(
            f"{bundle} is for {manifest.target.soc}, and --target says {soc}",
            cause="a bundle holds the kernels of one SoC",
            fix="leave out --target, or give the checkpoint instead of the bundle",
        )
    target = cpu_target(manifest.target.plugin, manifest.target.soc)
    program = Program.from_json((bundle / manifest.file("program")).read_text("utf-8"))
    specs = (spec_of(kernel) for kernel in program.kernels if FAMILIES[kernel.family].KNOBS)
    return ModelKernels(target, _different(specs))


def _different(specs: Any) -> tuple[KernelSpec, ...]:
    """One kernel of each family and shape, without what chose its knobs."""
    found: dict[str, KernelSpec] = {}
    for spec in specs:
        plain = KernelSpec(spec.name, spec.family, spec.shape)
        found.setdefault(f"{spec.family} {same(spec.shape_fields())}", plain)
    return tuple(found.values())


def spec_of(kernel: ProgramKernel) -> KernelSpec:
    """A kernel of program.json as what selection chose."""
    shape_class = get_type_hints(FAMILIES[kernel.family].valid)["shape"]
    return KernelSpec(kernel.name, kernel.family, _from_fields(shape_class, kernel.shape))


def _from_fields(kind: Any, values: Mapping[str, Any]) -> Any:
    """A dataclass from its fields as JSON has them."""
    hints = get_type_hints(kind)
    arguments = {}
    for field in fields(kind):
        value = values[field.name]
        if is_dataclass(hints[field.name]):
            value = _from_fields(hints[field.name], value)
        arguments[field.name] = tuple(value) if isinstance(value, list) else value
    return kind(**arguments)
