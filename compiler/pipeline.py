"""The way of a model from a checkpoint to a bundle; the only place where order is decided.

`compile_bundle` reads top to bottom: each step is a stage with its time and peak memory, and with
`--dump DIR` each stage that has IR writes it there under its number.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Sequence
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

from numpy.typing import NDArray

from llamac.compiler.built_model import opener
from llamac.compiler.bundle import (
    PROGRAM,
    TOKENIZER,
    WEIGHTS,
    artifact_entry,
    bundle_folder,
    check_space,
    remove_build_files,
    sync_folder,
    write_header,
    write_weights,
)
from llamac.compiler.checkpoint import Checkpoint, TensorInfo, scale_check
from llamac.compiler.compile_config import (
    DEFAULT_CONTEXT,
    CompileConfig,
    check_options,
    read_text,
)
from llamac.compiler.config import rope_table
from llamac.compiler.describe import (
    describe_model,
    describe_quantization,
    describe_tokenizer,
    tool_versions,
)
from llamac.compiler.dump import Dump
from llamac.compiler.frontends.recognize import open_checkpoint
from llamac.compiler.placement import Placement, place_processors
from llamac.compiler.progress import Progress, Report
from llamac.runtime.errors import NumericsError
from llamac.runtime.manifest import (
    MANIFEST_NAME,
    FunctionEntry,
    LevelEntry,
    Manifest,
    MemoryPlan,
    TargetEntry,
    TokenizerEntry,
    Verification,
)
from llamac.targets.base import Artifact, Identity, Lowered, LowerOptions, Target
from llamac.targets.program import Program
from llamac.targets.tuning.book import open_book

if TYPE_CHECKING:
    from llamac.compiler.offload import OffloadedModel

POSITION_BLOCK = 64  # positions of the KV cache come in blocks, a tile of attention
PROBE_TOKENS = 16
QUANTIZED = Path("build", "quantized")


@dataclass(frozen=True)
class _Model:
    """What the stages after the graphs share."""

    config: CompileConfig
    placed: Placement
    checkpoint: Checkpoint
    offloaded: OffloadedModel


def compile_bundle(config: CompileConfig, progress: Progress) -> Report:
    """Compile a checkpoint into a bundle at `config.out`.

    Raises:
        LlamacError: one of its classes; nothing is written then.
    """
    # These import TVM.
    from llamac.compiler.llama import ModelOptions, build_llama  # noqa: PLC0415
    from llamac.compiler.offload import (  # noqa: PLC0415
        calibration_tokens,
        offload_layers,
        read_calibration,
    )
    from llamac.compiler.verify import probe_tokens  # noqa: PLC0415

    check_options(config)
    placed = _place(config)
    target = placed.target
    calibration = read_calibration(config, placed)
    text = read_text(config.verify_text) or calibration
    dump = Dump(config.dump)
    with bundle_folder(config.out, config.overwrite) as folder:
        checkpoint = _open_model(config, folder, progress)
        with progress.stage("build the IR"):
            tokenizer = describe_tokenizer(checkpoint, TOKENIZER)
            context = DEFAULT_CONTEXT if config.context_length is None else config.context_length
            options = _lower_options(config, placed, checkpoint, context)
            placed = placed.with_cpu_layers(config.cpu_layers, checkpoint.config.num_layers)
            capacity = kv_capacity(context, config.chunks)
            caches = (placed.kv_dtype, placed.cpu_layers, placed.cpu_kv_dtype)
            module = build_llama(checkpoint, ModelOptions(capacity, config.chunks, *caches))
            dump("composites", module)
        weights = PipelineWeights(checkpoint, capacity)
        offloaded = offload_layers(
            config,
            placed,
            module,
            checkpoint,
            calibration_tokens(config, calibration, tokenizer, checkpoint),
            folder,
            progress,
        )
        model = _Model(config, placed, checkpoint, offloaded)
        with progress.stage("partition and fuse"):
            module = target.partition(offloaded.module)
            for transform in target.passes():
                module = transform(module)
            dump("partitioned", module)
        with progress.stage("choose kernels, plan memory"):
            lowered = target.lower(module, options)
            dump("kernels", lowered.module)
            dump.text("program.json", lowered.program.to_json())
        with progress.stage("pack weights", lowered.program.weights_bytes) as stage:
            payload = _pack_weights(folder, target, lowered.program, weights, options, stage)
            identity = _identity(config, checkpoint, lowered.program, payload, context)
            write_header(folder / WEIGHTS, identity.build_id, lowered.program.weights_bytes)
        with progress.stage("build the library") as stage:
            artifacts = list(target.build(lowered, identity, folder, stage.update))
            artifacts += offloaded.graphs.artifacts if offloaded.graphs else ()
            artifacts += _write_data(folder, checkpoint, lowered.program)
        tokens = probe_tokens(tokenizer, checkpoint, text, PROBE_TOKENS) if config.verify else []
        verification = _verify(model, folder, lowered.program, artifacts, tokens, progress)
        remove_build_files(folder)
        with progress.stage("hash and write the manifest"):
            manifest = _manifest(
                model, tokenizer, lowered, identity, verification, folder, artifacts
            )
            (folder / MANIFEST_NAME).write_text(manifest.to_json(), encoding="utf-8")
            sync_folder(folder)
    notes = (f"{name}: {entry.note}" for name, entry in manifest.files.items() if entry.note)
    progress.report.notes = [*manifest.quantization.notes, *notes]
    progress.report.files = {name: entry.bytes for name, entry in manifest.files.items()}
    return progress.report


def _place(config: CompileConfig) -> Placement:
    dtypes = {"--scales": config.scale_dtype, "--kv-cache": config.kv_dtype}
    return place_processors(
        config.target, config.processors, config.placement, dtypes, config.scheme
    )


def _pack_weights(
    folder: Path,
    target: Target,
    program: Program,
    weights: PipelineWeights,
    options: LowerOptions,
    stage: Any,
) -> str:
    """Write the tensors of weights.bin; returns their hash."""
    check_space(folder, program.weights_bytes + (64 << 20))
    return write_weights(
        folder / WEIGHTS,
        weight_tensors(program),
        program.weights_bytes,
        lambda pack: target.pack(pack, weights, options),
        stage.advance,
    )


def read_checkpoint(config: CompileConfig) -> Checkpoint:
    """Open the model with the front end that knows its form, and the user's adapter for it."""
    checkpoint = open_checkpoint(
        config.model,
        rope_factor=config.rope_factor,
        tokenizer=config.tokenizer,
        requantize=config.requantize,
    )
    if config.lora is None:
        return checkpoint
    from llamac.compiler.lora_adapter import apply_adapter, read_adapter  # noqa: PLC0415

    return apply_adapter(checkpoint, read_adapter(config.lora, checkpoint.config))


def _open_model(config: CompileConfig, folder: Path, progress: Progress) -> Checkpoint:
    """Open the model; quantize it if asked to, into a folder that goes with the build files."""
    with progress.stage("read the checkpoint"):
        checkpoint = read_checkpoint(config)
    if config.quantize is None:
        return checkpoint
    from llamac.compiler.quantize_request import quantize_into  # noqa: PLC0415 (imports torch)

    made, likelihood = quantize_into(folder / QUANTIZED, checkpoint, config.quantize, progress)
    found = f"{likelihood}" if likelihood else "no text to measure the loss on"
    how = f"{config.quantize.method}{', rotated' if config.quantize.rotate else ''}"
    notes = (*checkpoint.notes, f"quantized to int4 when it was compiled ({how}); {found}")
    return replace(made, name=checkpoint.name, notes=notes)


def kv_capacity(context_length: int, chunks: tuple[int, ...]) -> int:
    """Positions in the KV tensors: the context, and room for the padding of a last chunk."""
    return -(-(context_length + max(chunks, default=1)) // POSITION_BLOCK) * POSITION_BLOCK


def weight_tensors(program: Program) -> list[Any]:
    """Tensors of weights.bin in the order of their offsets."""
    return sorted((t for t in program.tensors if t.space == "weights"), key=lambda t: t.offset)


class PipelineWeights:
    """A checkpoint's tensors and the RoPE table that is computed for it."""

    def __init__(self, checkpoint: Checkpoint, capacity: int) -> None:
        self._weights, self._table = checkpoint.weights, rope_table(checkpoint.config, capacity)

    def names(self) -> list[str]:
        """All names."""
        return [*self._weights.names(), "rope.table"]

    def info(self, name: str) -> TensorInfo:
        """Shape and dtype."""
        if name == "rope.table":
            return TensorInfo(self._table.shape, "float32")
        return self._weights.info(name)

    def read(self, name: str) -> NDArray[Any]:
        """The values."""
        return self._table if name == "rope.table" else self._weights.read(name)


def _lower_options(
    config: CompileConfig, placed: Placement, checkpoint: Checkpoint, context: int
) -> LowerOptions:
    check, book = scale_check(checkpoint.quant), open_book(config.records)
    options = (config.chunks, config.scale_dtype, placed.kv_dtype, check)
    return LowerOptions(context, *options, book, config.require_tuned)


def _identity(
    config: CompileConfig, checkpoint: Checkpoint, program: Program, payload: str, context: int
) -> Identity:
    """Name and build id: a hash over the program, the weights and the model's constants."""
    digest = hashlib.sha256(program.to_json().encode())
    digest.update(bytes.fromhex(payload))
    digest.update(json.dumps(asdict(checkpoint.config), sort_keys=True).encode())
    digest.update(json.dumps(tool_versions(), sort_keys=True).encode())
    limits = (checkpoint.config.vocab_size, context, max(config.chunks, default=1))
    return Identity(config.name or checkpoint.name, digest.hexdigest(), *limits)


def _write_data(folder: Path, checkpoint: Checkpoint, program: Program) -> list[Artifact]:
    (folder / TOKENIZER).write_bytes(checkpoint.tokenizer.read_bytes())
    (folder / PROGRAM).write_text(program.to_json(), encoding="utf-8")
    return [
        Artifact(Path(WEIGHTS), "weights"),
        Artifact(Path(TOKENIZER), "tokenizer"),
        Artifact(Path(PROGRAM), "program"),
    ]


def _verify(
    model: _Model,
    folder: Path,
    program: Program,
    artifacts: list[Artifact],
    tokens: Sequence[int],
    progress: Progress,
) -> Verification:
    """Compare what was built with the reference, here or in an emulator.

    Raises:
        NumericsError: an operation, or the whole model, is too far off.
    """
    from llamac.compiler.verify import verify_library  # noqa: PLC0415

    if not model.config.verify:
        return Verification(status="skipped")
    with progress.stage("verify") as stage:
        offloaded = model.offloaded.graphs
        graphs = offloaded.graphs if offloaded else ()
        open_model, where = opener(model.placed.target, folder, artifacts, WEIGHTS, graphs)
        if open_model is None:
            return Verification(status="skipped", where=where)
        report = verify_library(
            program,
            open_model,
            model.checkpoint,
            scale_dtype=model.config.scale_dtype,
            kv_dtype=model.placed.kv_dtype,
            layers=model.offloaded.layers,
            tokens=tokens,
            threads=model.config.threads,
            progress=stage.update,
        )
    if not report.passed:
        raise NumericsError(
            report.first_failure,
            cause="the built library does not compute what the reference computes",
            fix="this is a fault of llamac or of the processor: report it with `--dump`'s files",
        )
    return replace(report.to_manifest(), where=f"{where}, level {report.level}")


def _manifest(
    model: _Model,
    tokenizer: TokenizerEntry,
    lowered: Lowered,
    identity: Identity,
    verification: Verification,
    folder: Path,
    artifacts: list[Artifact],
) -> Manifest:
    config, placed, checkpoint = model.config, model.placed, model.checkpoint
    program, target, graphs = lowered.program, placed.target, model.offloaded.graphs
    notes = (*checkpoint.notes, *lowered.notes, *(graphs.notes if graphs else ()))
    memory = MemoryPlan(
        weights_bytes=program.weights_bytes,
        kv_cache_bytes=program.kv_bytes,
        arena_bytes=program.arena_bytes,
        weight_bytes_per_token=program.weight_bytes_per_token(),
    )
    levels = tuple(LevelEntry(level.name, level.features) for level in target.levels())
    return Manifest(
        build_id=identity.build_id,
        created_with=tool_versions(),
        model=describe_model(checkpoint, identity.model_name, identity.context_length),
        quantization=describe_quantization(checkpoint, config.scale_dtype, placed.kv_dtype, notes),
        tokenizer=tokenizer,
        target=TargetEntry(
            target.soc.name, target.name, config.processors, target.arch, target.os, levels
        ),
        memory=memory,
        functions=tuple(
            FunctionEntry(f.name, f.num_tokens, placed.processor_of(f.name))
            for f in program.functions
        ),
        files={str(artifact.path): artifact_entry(folder, artifact) for artifact in artifacts},
        verification=verification,
        graphs=graphs.graphs if graphs else (),
        scheme=model.offloaded.scheme,
    )
