"""Which front end reads a model: told by what is there, never by a name alone."""

from __future__ import annotations

from pathlib import Path

from llamac.compiler.checkpoint import Checkpoint
from llamac.compiler.frontends.gguf_file import is_gguf
from llamac.compiler.frontends.onnx_form import is_onnx
from llamac.compiler.frontends.pt2_form import is_pt2
from llamac.runtime.errors import UsageError


def is_hf(path: Path) -> bool:
    """Whether a folder holds a model as Hugging Face has it, and none as Meta has it."""
    return (path / "config.json").is_file() and not (path / "params.json").is_file()


def can_requantize(path: Path) -> bool:
    """Whether the form of a model knows the option."""
    return is_gguf(path) or is_hf(path) or is_pt2(path) or is_onnx(path)


def open_checkpoint(
    path: Path,
    *,
    rope_factor: float | None = None,
    tokenizer: Path | None = None,
    requantize: bool = False,
) -> Checkpoint:
    """Open a model with the front end that knows its form.

    Args:
        path: a GGUF file; an archive of torch.export; an ONNX file, or a folder with one; a folder
            of Hugging Face; else a folder or `.pth` file in Meta's layout.
        rope_factor: RoPE scaling factor instead of the model's own.
        tokenizer: a tokenizer file instead of the model's own.
        requantize: make int4 of linear layers that no kernel reads as they are.

    Raises:
        CheckpointError: one of its classes.
        TokenizerError: no tokenizer, a damaged one, or one of another model.
        UsageError: an option that this form does not have.
    """
    if is_gguf(path):
        from llamac.compiler.frontends.gguf import from_gguf  # noqa: PLC0415

        return from_gguf(path, rope_factor=rope_factor, tokenizer=tokenizer, requantize=requantize)
    if is_hf(path):
        from llamac.compiler.frontends.hf import from_hf  # noqa: PLC0415

        return from_hf(path, rope_factor=rope_factor, tokenizer=tokenizer, requantize=requantize)
    if is_pt2(path) or is_onnx(path):
        return _open_graph(path, rope_factor, tokenizer, requantize)
    if requantize:
        raise UsageError(
            f"{path} cannot be quantized anew",
            cause="only other forms than Meta's can, which are compiled as they are",
            fix="leave --requantize out",
        )
    from llamac.compiler.frontends.meta import from_meta  # noqa: PLC0415 (imports torch)

    return from_meta(path, rope_factor=rope_factor, tokenizer=tokenizer)


def _open_graph(
    path: Path, rope_factor: float | None, tokenizer: Path | None, requantize: bool
) -> Checkpoint:
    """Open a form whose angles of RoPE are in its graph; the factor may only be the graph's."""
    if is_onnx(path):
        from llamac.compiler.frontends.onnx_model import from_onnx  # noqa: PLC0415

        checkpoint = from_onnx(path, tokenizer=tokenizer, requantize=requantize)
    else:
        from llamac.compiler.frontends.torch_export import from_torch  # noqa: PLC0415

        checkpoint = from_torch(path, tokenizer=tokenizer, requantize=requantize)
    scaling = checkpoint.config.rope_scaling
    factor = scaling.factor if scaling else None
    if rope_factor not in (None, factor):
        raise UsageError(
            f"--rope-factor {rope_factor:g} cannot be had of {path}",
            cause=f"its graph computes the angles itself, with a factor of {factor or 1:g}",
            fix="leave it out",
        )
    return checkpoint
