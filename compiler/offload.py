"""The layers that an accelerator computes: their form, and the graphs made of them."""

from __future__ import annotations

import hashlib
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from llamac.compiler.checkpoint import Checkpoint
from llamac.compiler.compile_config import CompileConfig, read_text
from llamac.compiler.layers import LayerModel, prepare_layers
from llamac.compiler.llama import ModelOptions, build_llama
from llamac.compiler.placement import Placement
from llamac.compiler.progress import Progress
from llamac.compiler.verify import probe_tokens
from llamac.runtime.errors import UsageError
from llamac.runtime.manifest import Manifest, SchemeEntry, TokenizerEntry
from llamac.targets.base import Layers, Offloaded, Scheme
from llamac.targets.chunk import cut_chunks

_POSITIONS = 64  # of a KV cache where none is needed
LAYERS = Path("build", "layers")
"""Folder in a bundle for weights that were made for a scheme; gone when it is complete."""


@dataclass(frozen=True)
class OffloadedModel:
    """A module with graphs in it.

    Attributes:
        module: what is left for the CPU, and calls of the graphs.
        graphs: that were made; None: there is no accelerator.
        layers: what they were made from.
        scheme: what the manifest says of it.
    """

    module: Any
    graphs: Offloaded | None = None
    layers: LayerModel | None = None
    scheme: SchemeEntry | None = None


def read_calibration(config: CompileConfig, placed: Placement) -> str | None:
    """The text that shows a scheme the ranges of values; None: it needs none.

    Raises:
        UsageError: it is missing, or there is one and nobody needs it.
    """
    is_calibrated = placed.scheme is not None and placed.scheme.is_calibrated
    if is_calibrated and config.calibration is None:
        raise UsageError(
            f"the scheme {placed.scheme.name if placed.scheme else ''} needs --calibrate FILE",
            cause="it computes with integers whose ranges are fixed when a model is compiled",
            fix="give a text of some pages, like those that the model will be used on",
        )
    if config.calibration is not None and not is_calibrated and config.quantize is None:
        raise UsageError(
            "--calibrate has no effect here",
            cause="only schemes with integer activations are calibrated, and --quantize",
            fix="leave it out, or choose such a --scheme: see `llamac targets`",
        )
    return read_text(config.calibration)


def offload_layers(
    config: CompileConfig,
    placed: Placement,
    module: Any,
    checkpoint: Checkpoint,
    tokens: Sequence[int],
    folder: Path,
    progress: Progress,
) -> OffloadedModel:
    """Let the accelerator compile what it takes.

    Args:
        config: what the user asked for.
        placed: who computes what.
        module: the model as composites.
        checkpoint: the model.
        tokens: of the text to calibrate with, empty without.
        folder: of the bundle.
        progress: shows the stages.

    Raises:
        LlamacError: see `prepare_layers` and `Target.offload`.
    """
    accelerator, scheme = placed.accelerator, placed.scheme
    if accelerator is None or scheme is None:
        return OffloadedModel(module)
    names = placed.offloaded(config.chunks)
    layers = LayerModel(scheme, checkpoint)
    if scheme.is_calibrated:
        with progress.stage(f"calibrate {scheme.name}") as stage:
            (folder / LAYERS).mkdir(parents=True)
            layers = prepare_layers(
                checkpoint,
                scheme,
                linear_inputs(module, names[0], placed.cpu_layers),
                tokens,
                folder / LAYERS,
                stage.update,
            )
    with progress.stage(f"compile graphs for {accelerator.processor}") as stage:
        given = Layers(scheme, layers.checkpoint.weights, layers.ranges, placed.cpu_layers)
        graphs = accelerator.offload(module, names, given, folder, stage.update)
    entry = _scheme_entry(scheme, layers, tokens, placed.cpu_layers)
    return OffloadedModel(graphs.module, graphs, layers, entry)


def layers_of_bundle(
    manifest: Manifest,
    checkpoint: Checkpoint,
    text: str | None,
    folder: Path,
    progress: Progress,
) -> LayerModel | None:
    """Make again what a bundle's graphs were made from; None: it has the checkpoint's weights.

    Args:
        manifest: of the bundle.
        checkpoint: the model that it was compiled from.
        text: that it was calibrated with.
        folder: for weights.
        progress: shows the stage.

    Raises:
        UsageError: no text, or another one.
    """
    entry = manifest.scheme
    if entry is None or entry.calibration_sha256 is None:
        return None
    count, tokens = entry.calibration_tokens, list[int]()
    if text is not None:
        tokens = probe_tokens(manifest.tokenizer, checkpoint, text, count)
    if tokens_hash(tokens) != entry.calibration_sha256:
        raise UsageError(
            f"the layers of the scheme {entry.name} can only be verified with the text that they "
            "were calibrated with",
            cause="no text was given" if text is None else f"its first {count} tokens differ",
            fix="give the file of `llamac compile --calibrate` with --calibrate",
        )
    scheme = Scheme(entry.name, entry.summary, entry.weights, is_calibrated=True)
    module = build_llama(checkpoint, ModelOptions(_POSITIONS, (), "float16"))
    with progress.stage(f"calibrate {scheme.name}") as stage:
        inputs = linear_inputs(module, "decode", frozenset(entry.cpu_layers))
        return prepare_layers(checkpoint, scheme, inputs, tokens, folder, stage.update)


def linear_inputs(
    module: Any, function: str, cpu_layers: frozenset[int] = frozenset()
) -> Mapping[str, str]:
    """Labels of the values that linear layers read (`targets/chunk.py`), by the layers' names.

    Those of `cpu_layers` are left out.
    """
    return {
        step.args[1].removesuffix(".weight"): chunk.labels[step.args[0]]
        for chunk in cut_chunks(module, function, 1, cpu_layers)
        for step in chunk.steps
        if step.kind in ("llamac.linear", "llamac.qlinear")
    }


def tokens_hash(tokens: Sequence[int]) -> str:
    """SHA-256 of token ids as little-endian int32."""
    return hashlib.sha256(np.asarray(tokens, "<i4").tobytes()).hexdigest()


def calibration_tokens(
    config: CompileConfig, text: str | None, tokenizer: TokenizerEntry, checkpoint: Checkpoint
) -> list[int]:
    """The tokens of the text to calibrate with, none without text."""
    if text is None:
        return []
    return probe_tokens(tokenizer, checkpoint, text, config.calibration_tokens)


def _scheme_entry(
    scheme: Scheme, layers: LayerModel, tokens: Sequence[int], cpu_layers: frozenset[int]
) -> SchemeEntry:
    return SchemeEntry(
        name=scheme.name,
        summary=scheme.summary,
        weights=scheme.weights,
        calibration_tokens=len(tokens),
        calibration_sha256=tokens_hash(tokens) if tokens else None,
        loss_db={name: round(db, 1) for name, db in layers.loss.items()},
        cpu_layers=tuple(sorted(cpu_layers)),
    )
