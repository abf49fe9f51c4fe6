"""Compare what the methods of `llamac quantize` lose on the example model, beside Q4_0 of GGUF.

    python -m llamac.tools.quantization_table examples/tiny-llama/bf16

A developer's script. Each method is calibrated on stories like those that the model was trained
on, and measured on held-out stories, each read on its own with the arithmetic of a bundle. Q4_0 is
made from the same weights by its rule (the value of the largest magnitude in a group becomes code
-8, scales are float16), with int8 tables as the GGUF front end gives them.
"""

from __future__ import annotations

import argparse
import sys
from collections.abc import Iterator, Sequence
from dataclasses import replace
from itertools import islice
from pathlib import Path
from tempfile import TemporaryDirectory

import numpy as np

from llamac.compiler.checkpoint import Checkpoint
from llamac.compiler.config import QuantConfig
from llamac.compiler.floats import from_bfloat16
from llamac.compiler.frontends.meta import from_meta
from llamac.compiler.layers import LayerWeights
from llamac.compiler.progress import SilentProgress
from llamac.compiler.quantize import (
    EMBEDDING,
    GROUP_SIZE,
    INT4,
    OUTPUT,
    Codes,
    Float32,
    linear_names,
    quantize_int8,
)
from llamac.compiler.quantize_checkpoint import Method, num_weights, quantize_checkpoint, windows_of
from llamac.compiler.reference_model import ReferenceModel
from llamac.runtime.errors import LlamacError
from llamac.runtime.tokenizer import read_ranks
from llamac.tools.make_tiny_model import HELD_OUT_SEED, TRAINING_SEED
from llamac.tools.tiny_corpus import documents
from llamac.tools.tiny_tokenizer import encode_document, make_encoding

METHODS = {
    "rtn": Method(),
    "GPTQ": Method("gptq"),
    "rotated": Method(rotate=True),
    "rotated + GPTQ": Method("gptq", rotate=True),
}


def q4_0(weight: Float32) -> Codes:
    """Quantize by the rule of GGUF's Q4_0.

    Source: `quantize_row_q4_0_ref` of ggml, as tests of the GGUF front end have it.
    """
    groups = weight.reshape(len(weight), -1, GROUP_SIZE)
    largest = np.take_along_axis(groups, np.abs(groups).argmax(-1)[..., None], axis=-1)
    scales = largest / np.float32(INT4.low)
    inverse = np.divide(1, scales, out=np.zeros_like(scales), where=scales != 0)
    codes = np.clip(np.trunc(groups * inverse + np.float32(8.5)), 0, 15) - 8
    stored = scales[..., 0].astype(np.float16).astype(np.float32)
    return Codes(codes.astype(np.int8).reshape(weight.shape), stored)


def as_q4_0(checkpoint: Checkpoint, scratch: Path) -> Checkpoint:
    """The model as a Q4_0 file holds it, with its tensors in a folder."""
    read = checkpoint.weights.read
    for name in linear_names(checkpoint.config):
        codes, scales = q4_0(from_bfloat16(read(f"{name}.weight")))
        np.save(scratch / f"{name}.weight.npy", codes)
        np.save(scratch / f"{name}.scales.npy", scales)
    for name in (EMBEDDING, OUTPUT):
        codes, scales = quantize_int8(from_bfloat16(read(name)))
        np.save(scratch / f"{name}.npy", codes)
        np.save(scratch / f"{name.replace('weight', 'scales')}.npy", scales[:, 0])
    weights = LayerWeights(checkpoint.weights, scratch)
    return replace(checkpoint, weights=weights, quant=QuantConfig("ptq", signed_scales=True))


def made_models(
    checkpoint: Checkpoint, windows: Sequence[Sequence[int]], folder: Path
) -> Iterator[tuple[str, Checkpoint]]:
    """The model, and what each method makes of it."""
    yield "bfloat16", checkpoint
    for name, method in METHODS.items():
        out, scratch = folder / name, folder / f"{name} scratch"
        with SilentProgress().stage(name, num_weights(checkpoint.config)) as stage:
            quantize_checkpoint(checkpoint, method, windows, out, scratch, stage)
        yield name, from_meta(out)
    scratch = folder / "q4_0"
    scratch.mkdir()
    yield "Q4_0 (GGUF)", as_q4_0(checkpoint, scratch)


def stories(checkpoint: Checkpoint, count: int, seed: int) -> list[list[int]]:
    """Plain stories of the example model's corpus, as its tokens."""
    ranks = sorted(read_ranks(checkpoint.tokenizer).items(), key=lambda item: item[1])
    encoding = make_encoding([token for token, _ in ranks], checkpoint.config.vocab_size)
    plain = (document for document in documents(4 * count, seed) if not document[0].role)
    return [encode_document(encoding, story)[0] for story in islice(plain, count)]


def log_likelihoods(checkpoint: Checkpoint, texts: Sequence[Sequence[int]]) -> list[Float32]:
    """Logarithms of all next tokens' probabilities after each token but the last, [T - 1, V]."""
    model, found = ReferenceModel(checkpoint), []
    for tokens in texts:
        logits = model.logits(tokens[:-1])
        logits -= logits.max(-1, keepdims=True)
        logits -= np.log(np.exp(logits).sum(-1, keepdims=True))
        found.append(logits.astype(np.float32))
    return found


def nll(found: Sequence[Float32], texts: Sequence[Sequence[int]]) -> float:
    """Mean negative log likelihood of all tokens after the first of each text."""
    chosen = (
        np.take_along_axis(p, np.array(t[1:])[:, None], 1)
        for p, t in zip(found, texts, strict=True)
    )
    return -float(np.mean(np.concatenate(list(chosen))))


def divergence(wanted: Sequence[Float32], found: Sequence[Float32]) -> float:
    """Mean Kullback-Leibler divergence of the next token's distribution, in nats."""
    parts = [(np.exp(p) * (p - q)).sum(-1) for p, q in zip(wanted, found, strict=True)]
    return float(np.mean(np.concatenate(parts)))


def main(arguments: Sequence[str] | None = None) -> int:
    """Run the command line."""
    parser = argparse.ArgumentParser(prog="llamac.tools.quantization_table", description=__doc__)
    parser.formatter_class = argparse.RawDescriptionHelpFormatter
    parser.add_argument("checkpoint", type=Path, help="a float checkpoint in Meta's layout")
    parser.add_argument("--texts", type=int, default=100, help="stories to measure on")
    parser.add_argument("--calibration", type=int, default=100, help="stories to calibrate on")
    given = parser.parse_args(arguments)
    try:
        checkpoint = from_meta(given.checkpoint)
        calibration = stories(checkpoint, given.calibration, TRAINING_SEED)
        texts = stories(checkpoint, given.texts, HELD_OUT_SEED)
        windows = [window for text in calibration for window in windows_of(text, None)]
        print(f"{sum(map(len, windows))} tokens to calibrate with, {sum(map(len, texts))} measured")
        print(f"{'method':16} {'nats per token':>14} {'divergence':>11}")
        wanted = log_likelihoods(checkpoint, texts)
        with TemporaryDirectory() as folder:
            for name, model in made_models(checkpoint, windows, Path(folder)):
                found = log_likelihoods(model, texts)
                print(f"{name:16} {nll(found, texts):14.4f} {divergence(wanted, found):11.5f}")
    except LlamacError as error:
        print(f"{error}\n  cause: {error.cause}\n  fix: {error.fix}", file=sys.stderr)
        return 1
    return 0


if __name__ == "__main__":
    sys.exit(main())
