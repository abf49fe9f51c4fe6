"""What a model file is, and what becomes of it, without compiling anything.

The model is opened, its composites are covered with kernels of the target and its memory is
planned, exactly as `compile_bundle` does it; nothing is built, packed or written.
"""

from __future__ import annotations

from collections import Counter
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np

from llamac.compiler.checkpoint import Checkpoint, scale_check
from llamac.compiler.compile_config import DEFAULT_CONTEXT, CompileConfig, check_options
from llamac.compiler.describe import describe_model, describe_quantization
from llamac.compiler.floats import round_to
from llamac.compiler.frontends.gguf_file import is_gguf
from llamac.compiler.frontends.onnx_form import is_onnx
from llamac.compiler.frontends.pt2_form import is_pt2
from llamac.compiler.pipeline import kv_capacity, read_checkpoint
from llamac.compiler.placement import place_processors
from llamac.runtime.errors import CoverageError
from llamac.targets.base import LowerOptions
from llamac.targets.tuning.book import open_book


@dataclass(frozen=True)
class Memory:
    """What a session needs on the target, in bytes."""

    context: int
    weights: int
    kv_cache: int
    arena: int

    @property
    def total(self) -> int:
        """All of it."""
        return self.weights + self.kv_cache + self.arena


@dataclass(frozen=True)
class ImportReport:
    """Everything that is known of a model before it is compiled.

    Attributes:
        path: of the file or folder.
        form: of the file: "GGUF", "Hugging Face" or "Meta".
        target: name of the SoC.
        model: sizes, as a manifest has them.
        quantization: the arithmetic, as a manifest has it, without notes.
        kept: parts of the weights that are used as the file has them.
        lost: parts that are rounded or were assumed, each with what is known of the loss.
        operators: how often each composite stands in `decode`.
        kernels: how often each family of kernels covers some of them.
        uncovered: what no kernel covers; None: everything is.
        memory: None if something is not covered.
    """

    path: str
    form: str
    target: str
    model: dict[str, Any]
    quantization: dict[str, Any]
    kept: tuple[str, ...]
    lost: tuple[str, ...]
    operators: dict[str, int]
    kernels: dict[str, int]
    uncovered: str | None
    memory: Memory | None

    def to_json(self) -> dict[str, Any]:
        """The report as JSON values."""
        document = asdict(self)
        if self.memory is not None:
            document["memory"]["total"] = self.memory.total
        return document


def import_report(config: CompileConfig) -> ImportReport:
    """Tell what a model is and what a target makes of it.

    Args:
        config: as for a compilation; only the CPU is looked at, and nothing is written to `out`.

    Raises:
        CheckpointError, TokenizerError: the model is refused.
        TargetError: no such SoC.
    """
    from llamac.compiler.llama import ModelOptions, build_llama  # noqa: PLC0415 (imports TVM)

    check_options(config)
    dtypes = {"--scales": config.scale_dtype, "--kv-cache": config.kv_dtype}
    placed = place_processors(config.target, config.processors, {}, dtypes, None)
    checkpoint = read_checkpoint(config)
    context = config.context_length or DEFAULT_CONTEXT
    model = describe_model(checkpoint, config.name or checkpoint.name, context)
    quantization = asdict(
        describe_quantization(checkpoint, config.scale_dtype, placed.kv_dtype, ())
    )
    del quantization["notes"]
    kept, lost = weights_kept(checkpoint, config.scale_dtype)
    options = ModelOptions(kv_capacity(context, config.chunks), config.chunks, placed.kv_dtype)
    module = build_llama(checkpoint, options)
    report = ImportReport(
        path=str(config.model),
        form=form_of(config.model),
        target=placed.target.soc.name,
        model=asdict(model),
        quantization=quantization,
        kept=tuple(kept),
        lost=tuple(lost),
        operators=_operators(module),
        kernels={},
        uncovered=None,
        memory=None,
    )
    lower_options = LowerOptions(
        context,
        config.chunks,
        config.scale_dtype,
        placed.kv_dtype,
        scale_check(checkpoint.quant),
        open_book(config.records),
        config.require_tuned,
    )
    return _with_plan(report, placed.target, module, lower_options)


def form_of(path: Path) -> str:
    """Whose layout a file or folder has."""
    if is_gguf(path):
        return "GGUF"
    if is_pt2(path):
        return "torch.export"
    if is_onnx(path):
        return "ONNX"
    folder = path if path.is_dir() else path.parent
    return "Hugging Face" if (folder / "config.json").is_file() else "Meta"


def weights_kept(checkpoint: Checkpoint, scale_dtype: str) -> tuple[list[str], list[str]]:
    """Say which parts of the weights are used as they are, and which are not."""
    kept, lost = [], list(checkpoint.notes)
    names = checkpoint.weights.names()
    dtypes = Counter(
        checkpoint.weights.info(name).dtype for name in names if name.endswith(".weight")
    )
    forms = {"int8": "integer codes", "bfloat16": "bfloat16", "float32": "float32 (norms)"}
    for dtype, count in sorted(dtypes.items()):
        if dtype in forms:
            kept.append(f"{count} tensors are taken from the front end as {forms[dtype]}")
        else:
            lost.append(f"{count} tensors of {dtype} are rounded to bfloat16")
    scales = [n for n in names if n.endswith(".scales") and n.startswith("layers.")]
    total, changed = 0, 0
    for name in scales:
        values = checkpoint.weights.read(name)
        total += values.size
        changed += int(np.count_nonzero(round_to(values, scale_dtype) != values))
    if changed:
        lost.append(f"{changed} of {total} int4 scales are rounded to {scale_dtype}")
    elif total:
        kept.append(f"all {total} int4 scales are numbers that {scale_dtype} holds")
    return kept, lost


def _operators(module: Any) -> dict[str, int]:
    from llamac.targets.cpu.composite_calls import entry_functions, read_calls  # noqa: PLC0415

    calls, _, _ = read_calls(module, entry_functions(module)["decode"])
    return dict(sorted(Counter(call.kind for call in calls).items()))


def _with_plan(
    report: ImportReport, target: Any, module: Any, options: LowerOptions
) -> ImportReport:
    """Add what kernel selection and the memory plan say."""
    module = target.partition(module)
    for transform in target.passes():
        module = transform(module)
    try:
        program = target.lower(module, options).program
    except CoverageError as error:
        return replace(report, uncovered=f"{error.message}: {error.cause}")
    steps = program.function("decode").steps
    families = Counter(program.kernels[step.kernel].family for step in steps)
    sizes = program.weights_bytes, program.kv_bytes, program.arena_bytes
    return replace(
        report,
        kernels=dict(sorted(families.items())),
        memory=Memory(options.context_length, *sizes),
    )
