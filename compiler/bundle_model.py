"""The model that a bundle was compiled from, opened as it was opened then."""

from __future__ import annotations

from pathlib import Path

from llamac.compiler.checkpoint import Checkpoint
from llamac.compiler.describe import describe_model, describe_quantization
from llamac.compiler.frontends.recognize import can_requantize, open_checkpoint
from llamac.compiler.lora_adapter import apply_adapter, read_adapter
from llamac.runtime.errors import UsageError
from llamac.runtime.manifest import Manifest


def open_bundle_model(bundle: Path, manifest: Manifest, model: Path) -> Checkpoint:
    """Open a model with the options that a bundle's manifest records.

    Args:
        bundle: its folder.
        manifest: of the bundle.
        model: folder or file of the checkpoint.

    Raises:
        CheckpointError: it cannot be read.
    """
    scaling, stored = manifest.model.rope_scaling, manifest.quantization
    # A model that has these forms by itself is read in the same way with the option.
    all_codes = ("int4 group-32", "int8 per channel", "int8 per channel")
    was_requantized = (stored.weights, stored.embedding, stored.output) == all_codes
    return open_checkpoint(
        model,
        rope_factor=scaling.factor if scaling else None,
        tokenizer=bundle / manifest.file("tokenizer"),
        requantize=was_requantized and can_requantize(model),
    )


def open_same_model(bundle: Path, manifest: Manifest, model: Path, lora: Path | None) -> Checkpoint:
    """Open a model, with an adapter if there is one, and compare it with a bundle's manifest.

    Raises:
        UsageError: it is another one.
        CheckpointError: the model or the adapter cannot be read.
    """
    checkpoint, stored = open_bundle_model(bundle, manifest, model), manifest.quantization
    if lora is not None:
        checkpoint = apply_adapter(checkpoint, read_adapter(lora, checkpoint.config))
    names = (manifest.model.name, manifest.model.context_length)
    expected = describe_quantization(checkpoint, stored.scale_dtype, stored.kv_cache, stored.notes)
    for what, of_bundle, of_model in (
        ("architecture", manifest.model, describe_model(checkpoint, *names)),
        ("quantization", stored, expected),
    ):
        if of_bundle != of_model:
            raise UsageError(
                f"the {what} of {model} is not that of the bundle {bundle}",
                cause=f"the model has {of_model}, the bundle {of_bundle}",
                fix="give the model that the bundle was compiled from, and its adapter with --lora",
            )
    return checkpoint
