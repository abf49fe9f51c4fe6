"""The way of a model from a checkpoint to a bundle; the only place where order is decided.

`compile_bundle` reads top to bottom: each step is a stage with its time and peak memory, and with
`--dump DIR` each stage that has IR writes it there under its number.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, field, replace
from pathlib import Path
from typing import Any

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
from llamac.runtime.errors import NumericsError, UsageError
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
from llamac.targets.base import Artifact, Identity, Lowered, LowerOptions, Offloaded, Target
from llamac.targets.program import Program
from llamac.targets.tuning.book import open_book

DEFAULT_CONTEXT = 8192
LARGEST_CONTEXT = 131072  # what Llama 3 was trained for
LARGEST_CHUNK = 1024  # longer ones gain nothing: a chunk of 128 already keeps a CPU busy
POSITION_BLOCK = 64  # positions of the KV cache come in blocks, a tile of attention
PROBE_TOKENS = 16


@dataclass(frozen=True)
class CompileConfig:
    """What the user asked for.

    Attributes:
        model: folder or file of the checkpoint.
        target: name or path of a SoC file.
        out: folder of the bundle.
        processors: of the SoC: one, or "cpu" and an accelerator that takes the layers.
        placement: which of them computes the layers of a phase, by "prefill" and "decode";
            phases that are not named belong to the accelerator if there is one.
        context_length: positions of the KV cache; None: 8192.
        chunks: prefill lengths, largest first.
        scale_dtype: of int4 group scales, "float16" or "bfloat16".
        kv_dtype: of the KV cache, "float16" or "int8".
        rope_factor: overrides the factor of RoPE scaling.
        tokenizer: a tokenizer file instead of the checkpoint's.
        requantize: make int4 of linear layers that no kernel reads as they are (GGUF).
        name: of the model in the manifest.
        verify: compare the built library with the reference, and refuse to write one that differs.
        verify_text: file with text to verify on.
        dump: folder for the IR after each stage.
        overwrite: replace a bundle that exists.
        threads: for verification.
        records: file of tuning records, instead of the user's folder; shipped ones are below it.
        require_tuned: refuse kernels whose knobs are only defaults.
    """

    model: Path
    target: str
    out: Path
    processors: tuple[str, ...] = ("cpu",)
    placement: Mapping[str, str] = field(default_factory=dict)
    context_length: int | None = None
    chunks: tuple[int, ...] = (128, 32, 8)
    scale_dtype: str = "float16"
    kv_dtype: str = "float16"
    rope_factor: float | None = None
    tokenizer: Path | None = None
    requantize: bool = False
    name: str | None = None
    verify: bool = True
    verify_text: Path | None = None
    dump: Path | None = None
    overwrite: bool = False
    threads: int = 2
    records: Path | None = None
    require_tuned: bool = False


def compile_bundle(config: CompileConfig, progress: Progress) -> Report:
    """Compile a checkpoint into a bundle at `config.out`.

    Raises:
        LlamacError: one of its classes; nothing is written then.
    """
    from llamac.compiler.llama import ModelOptions, build_llama  # noqa: PLC0415 (imports TVM)
    from llamac.compiler.verify import probe_tokens  # noqa: PLC0415

    _check_options(config)
    dtypes = {"--scales": config.scale_dtype, "--kv-cache": config.kv_dtype}
    placed = place_processors(config.target, config.processors, config.placement, dtypes)
    target = placed.target
    text = _read_text(config.verify_text)
    dump = Dump(config.dump)
    with bundle_folder(config.out, config.overwrite) as folder:
        with progress.stage("read the checkpoint"):
            checkpoint = read_checkpoint(config)
            tokenizer = describe_tokenizer(checkpoint, TOKENIZER)
            context = DEFAULT_CONTEXT if config.context_length is None else config.context_length
            options = _lower_options(config, checkpoint, context)
        with progress.stage("build the IR"):
            capacity = kv_capacity(context, config.chunks)
            module = build_llama(checkpoint, ModelOptions(capacity, config.chunks, config.kv_dtype))
            dump("composites", module)
        weights = PipelineWeights(checkpoint, capacity)
        module, graphs = _offload(config, placed, module, weights, folder, progress)
        with progress.stage("partition and fuse"):
            module = target.partition(module)
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
            artifacts += graphs.artifacts if graphs else ()
            remove_build_files(folder)
            artifacts += _write_data(folder, checkpoint, lowered.program)
        verification = Verification(status="skipped")
        if config.verify:
            with progress.stage("verify") as stage:
                tokens = probe_tokens(tokenizer, checkpoint, text, PROBE_TOKENS)
                verification = _verify(
                    config, target, folder, lowered.program, checkpoint, artifacts, tokens, stage
                )
        with progress.stage("hash and write the manifest"):
            manifest = _manifest(
                config,
                checkpoint,
                tokenizer,
                placed,
                (lowered, graphs),
                identity,
                verification,
                folder,
                artifacts,
            )
            (folder / MANIFEST_NAME).write_text(manifest.to_json(), encoding="utf-8")
            sync_folder(folder)
    notes = (f"{name}: {entry.note}" for name, entry in manifest.files.items() if entry.note)
    progress.report.notes = [*manifest.quantization.notes, *notes]
    progress.report.files = {name: entry.bytes for name, entry in manifest.files.items()}
    return progress.report


def _offload(
    config: CompileConfig,
    placed: Placement,
    module: Any,
    weights: PipelineWeights,
    folder: Path,
    progress: Progress,
) -> tuple[Any, Offloaded | None]:
    """Let the accelerator compile what it takes; the module is what is left, with graphs in it."""
    accelerator = placed.accelerator
    if accelerator is None:
        return module, None
    with progress.stage(f"compile graphs for {accelerator.processor}") as stage:
        names = placed.offloaded(config.chunks)
        graphs = accelerator.offload(module, names, weights, folder, stage.update)
    return graphs.module, graphs


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
    """Open the model with the front end that knows its form."""
    return open_checkpoint(
        config.model,
        rope_factor=config.rope_factor,
        tokenizer=config.tokenizer,
        requantize=config.requantize,
    )


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


def _check_options(config: CompileConfig) -> None:
    """Refuse a name, and lengths of context and chunks, that make no bundle."""
    if config.name is not None and not (config.name and config.name.isprintable()):
        raise UsageError(
            f"a model cannot be called {config.name!r}",
            cause="a name is one line of printable characters",
            fix="give another name, or leave it out for that of the checkpoint's folder",
        )
    context, chunks = config.context_length, config.chunks
    if context is not None and not 2 <= context <= LARGEST_CONTEXT:
        raise UsageError(
            f"a context of {context} tokens cannot be compiled",
            cause=f"the KV cache holds 2 to {LARGEST_CONTEXT} tokens",
            fix=f"leave it out for {DEFAULT_CONTEXT}, or give what you need: memory grows with it",
        )
    is_ordered = list(chunks) == sorted(set(chunks), reverse=True)
    if not is_ordered or not all(2 <= chunk <= LARGEST_CHUNK for chunk in chunks):
        raise UsageError(
            f"chunks {','.join(map(str, chunks))} cannot be compiled",
            cause=f"prefill lengths are 2 to {LARGEST_CHUNK}, each once, largest first",
            fix="write them like 128,32,8",
        )


def _read_text(path: Path | None) -> str | None:
    """The text to verify with, read before anything takes time."""
    try:
        return None if path is None else path.read_text(encoding="utf-8")
    except (OSError, UnicodeDecodeError) as error:
        raise UsageError(
            f"the text {path} cannot be read",
            cause=str(error),
            fix="give the path of a text file in UTF-8",
        ) from error


def _lower_options(config: CompileConfig, checkpoint: Checkpoint, context: int) -> LowerOptions:
    check, book = scale_check(checkpoint.quant), open_book(config.records)
    options = (config.chunks, config.scale_dtype, config.kv_dtype, check)
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
    config: CompileConfig,
    target: Target,
    folder: Path,
    program: Program,
    checkpoint: Checkpoint,
    artifacts: list[Artifact],
    tokens: Sequence[int],
    stage: Any,
) -> Verification:
    """Compare what was built with the reference, here or in an emulator.

    Raises:
        NumericsError: an operation, or the whole model, is too far off.
    """
    from llamac.compiler.verify import verify_library  # noqa: PLC0415

    open_model, where = opener(target, folder, artifacts, WEIGHTS)
    if open_model is None:
        return Verification(status="skipped", where=where)
    report = verify_library(
        program,
        open_model,
        checkpoint,
        scale_dtype=config.scale_dtype,
        kv_dtype=config.kv_dtype,
        tokens=tokens,
        threads=config.threads,
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
    config: CompileConfig,
    checkpoint: Checkpoint,
    tokenizer: TokenizerEntry,
    placed: Placement,
    made: tuple[Lowered, Offloaded | None],
    identity: Identity,
    verification: Verification,
    folder: Path,
    artifacts: list[Artifact],
) -> Manifest:
    (lowered, graphs), target = made, placed.target
    program = lowered.program
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
        quantization=describe_quantization(checkpoint, config.scale_dtype, config.kv_dtype, notes),
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
    )
