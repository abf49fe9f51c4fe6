"""Compare the weight schemes of NPUs on a checkpoint: what each loses, alone and with GPTQ.

    python -m llamac.tools.weight_schemes examples/tiny-llama/spinquant

A developer's script for the example model. Every linear layer inside the blocks is requantized.
Its inputs come from the float reference on held-out documents: half of them make the sums X^T X,
the other half measure. Decibels are signal to noise beside the checkpoint's own weights and what
they give for the same inputs, as the mean over all layers. A LoRA branch is no part of either,
because it stays as it is.
"""

from __future__ import annotations

import argparse
import sys
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from llamac.compiler.checkpoint import Checkpoint, WeightSource
from llamac.compiler.frontends.meta import from_meta
from llamac.compiler.gptq import HessianSum, compensate_lpbq, compensate_per_channel
from llamac.compiler.llama import ModelOptions, build_llama
from llamac.compiler.offload import linear_inputs
from llamac.compiler.quantize import Codes
from llamac.compiler.reference import Float64, sqnr_db
from llamac.compiler.reference_model import ReferenceModel
from llamac.compiler.requantize import (
    Lpbq,
    PerChannel,
    quantize_lpbq,
    quantize_per_channel,
    weights_of,
)
from llamac.runtime.errors import LlamacError
from llamac.runtime.tokenizer import read_ranks
from llamac.tools.make_tiny_model import HELD_OUT_SEED
from llamac.tools.tiny_corpus import documents
from llamac.tools.tiny_tokenizer import encode_document, make_encoding

Weight = NDArray[Any] | Codes
Scheme = Callable[[Weight, Float64], PerChannel | Lpbq]

SCHEMES: dict[str, Scheme] = {
    "int8 per channel": lambda w, h: quantize_per_channel(w, 8),
    "int8 per channel, GPTQ": lambda w, h: compensate_per_channel(w, h, 8),
    "int8 per channel, GPTQ by activation": lambda w, h: compensate_per_channel(
        w, h, 8, by_activation=True
    ),
    "LPBQ": lambda w, h: quantize_lpbq(w),
    "LPBQ, GPTQ": compensate_lpbq,
    "LPBQ, GPTQ by activation": lambda w, h: compensate_lpbq(w, h, by_activation=True),
    "int4 per channel": lambda w, h: quantize_per_channel(w, 4),
    "int4 per channel, GPTQ": lambda w, h: compensate_per_channel(w, h, 4),
    "int4 per channel, GPTQ by activation": lambda w, h: compensate_per_channel(
        w, h, 4, by_activation=True
    ),
}


@dataclass(frozen=True)
class Loss:
    """What a scheme loses: decibels of weights and of outputs, and the seconds that it took."""

    weights_db: float
    outputs_db: float
    seconds: float


def read_weight(weights: WeightSource, name: str) -> Weight:
    """A linear layer's weight as the checkpoint holds it."""
    stored = weights.read(f"{name}.weight")
    if f"{name}.scales" in weights.names():
        return Codes(stored, weights.read(f"{name}.scales"))
    return stored


def layer_inputs(
    checkpoint: Checkpoint, texts: Sequence[Sequence[int]]
) -> dict[str, list[Float64]]:
    """The inputs of all linear layers inside the blocks, one array for each text."""
    labels = linear_inputs(build_llama(checkpoint, ModelOptions(64, ())), "decode")
    seen: dict[str, list[Float64]] = {label: [] for label in labels.values()}

    def observe(label: str, value: Float64) -> None:
        if label in seen:
            seen[label].append(value)

    model = ReferenceModel(
        checkpoint, kv_dtype="float32", quantize_activations=False, observe=observe
    )
    for tokens in texts:
        model.logits(tokens, all_positions=False)
    return {name: seen[label] for name, label in labels.items()}


def measure(
    scheme: Scheme, weights: Mapping[str, Weight], inputs: Mapping[str, list[Float64]]
) -> Loss:
    """Requantize all layers with the first half of their inputs, measure on the second."""
    weights_db, outputs_db, seconds = [], [], 0.0
    for name, weight in weights.items():
        half = len(inputs[name]) // 2
        total = HessianSum(inputs[name][0].shape[1])
        for x in inputs[name][:half]:
            total.add(x)
        start = time.monotonic()
        found = scheme(weight, total.matrix()).dequantize()
        seconds += time.monotonic() - start
        x, values = np.concatenate(inputs[name][half:]), weights_of(weight)
        weights_db.append(sqnr_db(values, found))
        outputs_db.append(sqnr_db(x @ values.T, x @ found.T))
    return Loss(float(np.mean(weights_db)), float(np.mean(outputs_db)), seconds)


def held_out_texts(checkpoint: Checkpoint, count: int) -> list[list[int]]:
    """Documents that the example model was not trained on, as its tokens."""
    ranks = sorted(read_ranks(checkpoint.tokenizer).items(), key=lambda item: item[1])
    encoding = make_encoding([token for token, _ in ranks], checkpoint.config.vocab_size)
    return [encode_document(encoding, story)[0] for story in documents(count, HELD_OUT_SEED)]


def main(arguments: Sequence[str] | None = None) -> int:
    """Run the command line."""
    parser = argparse.ArgumentParser(prog="llamac.tools.weight_schemes", description=__doc__)
    parser.formatter_class = argparse.RawDescriptionHelpFormatter
    parser.add_argument("checkpoint", type=Path, help="a folder in Meta's layout")
    parser.add_argument("--texts", type=int, default=64, help="documents to run the model on")
    given = parser.parse_args(arguments)
    try:
        checkpoint = from_meta(given.checkpoint)
        inputs = layer_inputs(checkpoint, held_out_texts(checkpoint, given.texts))
    except LlamacError as error:
        print(f"{error}\n  cause: {error.cause}\n  fix: {error.fix}", file=sys.stderr)
        return 1
    weights = {name: read_weight(checkpoint.weights, name) for name in inputs}
    print(f"{'scheme':38} {'weights dB':>10} {'outputs dB':>10} {'s':>6}")
    for name, scheme in SCHEMES.items():
        loss = measure(scheme, weights, inputs)
        print(f"{name:38} {loss.weights_db:10.2f} {loss.outputs_db:10.2f} {loss.seconds:6.1f}")
    return 0


if __name__ == "__main__":
    sys.exit(main())
