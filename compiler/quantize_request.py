"""What the user asks of a quantization, and the way from there to a checkpoint on disk."""

from __future__ import annotations

import math
import shutil
from dataclasses import dataclass
from pathlib import Path

from llamac.compiler.blas import single_threaded_blas
from llamac.compiler.bundle import check_space, output_folder, sync_folder
from llamac.compiler.calibration import LEAST_TOKENS
from llamac.compiler.checkpoint import Checkpoint
from llamac.compiler.compile_config import read_text
from llamac.compiler.describe import describe_tokenizer
from llamac.compiler.frontends.recognize import open_checkpoint
from llamac.compiler.meta_writer import PARAMS_FILE, TOKENIZER_FILE, layout
from llamac.compiler.precision import read_precision
from llamac.compiler.progress import Progress
from llamac.compiler.quantize_checkpoint import (
    METHODS,
    Method,
    check_source,
    num_weights,
    quantize_checkpoint,
    windows_of,
)
from llamac.compiler.reference_model import ReferenceModel
from llamac.runtime.errors import UsageError
from llamac.runtime.tokenizer import Tokenizer

EVALUATION_TOKENS = 512
DEFAULT_CALIBRATION_TOKENS = 2048
_BYTES = {"int8": 1, "bfloat16": 2, "float32": 4}


@dataclass(frozen=True)
class QuantizeRequest:
    """How a float model is to be quantized.

    Attributes:
        method: "rtn" or "gptq".
        rotate: by random Hadamard matrices first.
        calibrate: file with text; "gptq" needs it.
        calibration_tokens: of that text, at most.
        evaluate: file with text for the likelihoods; None: the last part of the other one.
        precision: TOML file of layers that stay bfloat16.
    """

    method: str = "rtn"
    rotate: bool = False
    calibrate: Path | None = None
    calibration_tokens: int = DEFAULT_CALIBRATION_TOKENS
    evaluate: Path | None = None
    precision: Path | None = None


@dataclass(frozen=True)
class Likelihood:
    """Mean negative log likelihood, in nats per token, of `tokens` tokens."""

    tokens: int
    before: float
    after: float

    def __str__(self) -> str:
        return (
            f"negative log likelihood of {self.tokens} tokens: {self.before:.4f} nats per token "
            f"before, {self.after:.4f} after"
        )


@dataclass(frozen=True)
class Texts:
    """Tokens to calibrate with and tokens to evaluate on; either may be empty."""

    calibration: list[int]
    evaluation: list[int]
    bos: int | None


def check_request(request: QuantizeRequest) -> None:
    """Refuse what cannot be meant, before anything takes time.

    Raises:
        UsageError: an unknown method, or no text for one that needs it.
    """
    if request.method not in METHODS:
        raise UsageError(
            f"there is no method {request.method!r}",
            cause=f"the methods are {' and '.join(METHODS)}",
            fix="leave it out for rtn, the nearest codes",
        )
    if request.method == "gptq" and request.calibrate is None:
        raise UsageError(
            "the method gptq needs --calibrate FILE",
            cause="it makes the errors of outputs small on inputs that it has seen",
            fix="give a text of some pages, like those that the model will be used on",
        )


def read_texts(checkpoint: Checkpoint, request: QuantizeRequest) -> Texts:
    """Encode the texts; without one to evaluate on, the last part of the other is kept for that.

    Raises:
        UsageError: a text cannot be read or is too short.
        TokenizerError: the tokenizer is damaged.
    """
    entry = describe_tokenizer(checkpoint, TOKENIZER_FILE)
    tokenizer = Tokenizer(checkpoint.tokenizer, entry, vocab_size=checkpoint.config.vocab_size)

    def encode(path: Path | None) -> list[int]:
        return tokenizer.encode(read_text(path) or "", bos=False)

    seen, held_out = encode(request.calibrate), encode(request.evaluate)[:EVALUATION_TOKENS]
    if request.evaluate is None:
        count = min(EVALUATION_TOKENS, len(seen) // 4)
        seen, held_out = seen[: len(seen) - count], seen[len(seen) - count :]
    if request.method == "gptq" and len(seen) < LEAST_TOKENS:
        raise UsageError(
            f"{request.calibrate} has {len(seen)} tokens to calibrate with",
            cause=f"GPTQ needs {LEAST_TOKENS} at least; a few thousand are good",
            fix="give a text of some pages",
        )
    return Texts(seen[: request.calibration_tokens], held_out, entry.bos_id)


def quantize_into(
    folder: Path, checkpoint: Checkpoint, request: QuantizeRequest, progress: Progress
) -> tuple[Checkpoint, Likelihood | None]:
    """Write a checkpoint into a folder of its own, and compare it with the float model.

    Args:
        folder: made; whoever calls sees to it that it goes away when this fails.
        checkpoint: the float model.
        request: how.
        progress: shows the stages.

    Returns:
        What was written, opened, and the likelihoods where there is a text.

    Raises:
        LlamacError: see `check_request`, `read_precision`, `read_texts`, `quantize_checkpoint`.
    """
    check_request(request)
    check_source(checkpoint)
    floats = frozenset[str]()
    if request.precision is not None:
        floats = read_precision(request.precision, checkpoint.config, rotate=request.rotate)
    method = Method(request.method, request.rotate, floats)
    texts = read_texts(checkpoint, request)
    folder.mkdir(parents=True, exist_ok=True)
    check_space(folder, 2 * _size_of(checkpoint, method) + (16 << 20))
    windows = windows_of(texts.calibration, texts.bos)
    scratch = folder / "scratch"
    name = f"quantize ({request.method}{', rotated' if request.rotate else ''})"
    with progress.stage(name, num_weights(checkpoint.config)) as stage:
        quantize_checkpoint(checkpoint, method, windows, folder, scratch, stage)
    shutil.rmtree(scratch)
    factor = checkpoint.config.rope_scaling.factor if checkpoint.config.rope_scaling else None
    written = open_checkpoint(folder, rope_factor=factor)
    return written, _compare(checkpoint, written, texts, progress)


def _size_of(checkpoint: Checkpoint, method: Method) -> int:
    entries = layout(checkpoint.config, method.quant, method.floats).values()
    return sum(_BYTES[info.dtype] * math.prod(info.shape) for info in entries)


@single_threaded_blas()
def _compare(
    before: Checkpoint, after: Checkpoint, texts: Texts, progress: Progress
) -> Likelihood | None:
    tokens = texts.evaluation if texts.bos is None else [texts.bos, *texts.evaluation]
    if len(texts.evaluation) < 2:
        return None
    found = []
    with progress.stage("evaluate", total=2) as stage:
        for model, name in ((before, "float model"), (after, "quantized model")):
            found.append(ReferenceModel(model).nll(tokens))
            stage.advance(note=name)
    return Likelihood(len(tokens) - 1, *found)


def quantize(
    model: Path,
    out: Path,
    request: QuantizeRequest,
    progress: Progress,
    *,
    rope_factor: float | None = None,
    tokenizer: Path | None = None,
    overwrite: bool = False,
) -> Likelihood | None:
    """Quantize a float model into a folder that appears when it is complete.

    Args:
        model: anything that `open_checkpoint` reads.
        out: the folder, in Meta's layout.
        request: how.
        progress: shows the stages and keeps notes and sizes of files in its report.
        rope_factor: instead of the model's own.
        tokenizer: file instead of the model's own.
        overwrite: replace a checkpoint that is there.

    Raises:
        LlamacError: one of its classes; nothing is written then.
    """
    check_request(request)
    with output_folder(out, overwrite, PARAMS_FILE, "checkpoint") as folder:
        with progress.stage("read the checkpoint"):
            checkpoint = open_checkpoint(model, rope_factor=rope_factor, tokenizer=tokenizer)
        _, likelihood = quantize_into(folder, checkpoint, request, progress)
        sync_folder(folder)
        progress.report.notes = [*checkpoint.notes]
        progress.report.files = {path.name: path.stat().st_size for path in folder.iterdir()}
    return likelihood
