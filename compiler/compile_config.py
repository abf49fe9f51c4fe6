"""What the user asks of a compilation, and what of it can be refused before anything takes time."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING

from llamac.runtime.errors import UsageError

if TYPE_CHECKING:
    from llamac.compiler.quantize_request import QuantizeRequest

DEFAULT_CONTEXT = 8192
LARGEST_CONTEXT = 131072  # what Llama 3 was trained for
LARGEST_CHUNK = 1024  # longer ones gain nothing: a chunk of 128 already keeps a CPU busy


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
        cpu_layers: layers that an accelerator leaves to the CPU.
        scheme: name of the accelerator's; None: its first.
        calibration: file with text that shows a scheme the ranges of values.
        calibration_tokens: of that text, at most.
        context_length: positions of the KV cache; None: 8192.
        chunks: prefill lengths, largest first.
        scale_dtype: of int4 group scales, "float16" or "bfloat16".
        kv_dtype: of the KV cache, "float16" or "int8"; None: what the scheme has, else float16.
        rope_factor: overrides the factor of RoPE scaling.
        tokenizer: a tokenizer file instead of the checkpoint's.
        requantize: make int4 of linear layers that no kernel reads as they are (GGUF).
        lora: folder of a LoRA adapter to compile into the model.
        quantize: how to quantize a float model first; None: it is compiled as it is.
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
    cpu_layers: tuple[int, ...] = ()
    scheme: str | None = None
    calibration: Path | None = None
    calibration_tokens: int = 512
    context_length: int | None = None
    chunks: tuple[int, ...] = (128, 32, 8)
    scale_dtype: str = "float16"
    kv_dtype: str | None = None
    rope_factor: float | None = None
    tokenizer: Path | None = None
    requantize: bool = False
    lora: Path | None = None
    quantize: QuantizeRequest | None = None
    name: str | None = None
    verify: bool = True
    verify_text: Path | None = None
    dump: Path | None = None
    overwrite: bool = False
    threads: int = 2
    records: Path | None = None
    require_tuned: bool = False


def check_options(config: CompileConfig) -> None:
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


def read_text(path: Path | None) -> str | None:
    """The text to verify with, read before anything takes time."""
    try:
        return None if path is None else path.read_text(encoding="utf-8")
    except (OSError, UnicodeDecodeError) as error:
        raise UsageError(
            f"the text {path} cannot be read",
            cause=str(error),
            fix="give the path of a text file in UTF-8",
        ) from error
