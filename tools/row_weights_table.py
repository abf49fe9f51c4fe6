"""What weights with one scale for each row lose in likelihood: alone, made good, and turned.

    python -m llamac.tools.row_weights_table examples/tiny-llama/bf16
    python -m llamac.tools.row_weights_table examples/tiny-llama/spinquant
    python -m llamac.tools.llama2c float stories260K.bin tok512.bin stories
    python -m llamac.tools.row_weights_table stories --own-text

A developer's script for the example model. The APU of MediaTek takes no groups, so every linear
layer inside the blocks gets int8 or int4 codes with a scale for each row: the nearest ones, or ones
whose errors are made good by the weights that follow (`compiler/gptq.py`). A float model is also
turned beforehand by R1, R2 and R4, as SpinQuant does but without training. Calibrated on stories
like those of the training, measured on held-out ones, each read on its own; with --own-text on
texts that the model itself makes up, for models with a vocabulary of their own. Activations are not
quantized: with 16 bits they cost next to nothing (docs/targets/mediatek.md).
"""

from __future__ import annotations

import argparse
import sys
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from tempfile import TemporaryDirectory

import numpy as np

from llamac.compiler.checkpoint import Checkpoint
from llamac.compiler.describe import describe_tokenizer
from llamac.compiler.frontends.meta import from_meta
from llamac.compiler.gptq import HessianSum, compensate_per_channel
from llamac.compiler.layers import LayerWeights
from llamac.compiler.llama import ModelOptions, build_llama
from llamac.compiler.offload import linear_inputs
from llamac.compiler.reference import Float64
from llamac.compiler.reference_model import ReferenceModel
from llamac.compiler.requantize import quantize_per_channel
from llamac.compiler.walsh_rotation import rotate_checkpoint
from llamac.runtime.errors import LlamacError
from llamac.tools.make_tiny_model import HELD_OUT_SEED, TRAINING_SEED
from llamac.tools.quantization_table import stories
from llamac.tools.weight_schemes import read_weight

Texts = Sequence[Sequence[int]]
TEXT_TOKENS = 150
"""Of a text that a model makes up."""


def turned_models(checkpoint: Checkpoint) -> Iterator[tuple[str, Checkpoint]]:
    """The model as it is, and a float one turned."""
    yield "as it is", checkpoint
    if checkpoint.quant.form == "float":
        yield "turned", rotate_checkpoint(checkpoint, r4=True)


def own_texts(checkpoint: Checkpoint, count: int, seed: int) -> list[list[int]]:
    """Texts of the model: every token drawn with its probability, after the one that begins."""
    bos = describe_tokenizer(checkpoint, checkpoint.tokenizer.name).bos_id or 0
    generator, model = np.random.default_rng(seed), model_of(checkpoint)

    def draw(logits: Float64) -> int:
        weights = np.exp(logits - logits.max())
        return int(generator.choice(len(logits), p=weights / weights.sum()))

    return [[bos, *model.generate([bos], TEXT_TOKENS, draw)] for _ in range(count)]


def input_sums(checkpoint: Checkpoint, texts: Texts) -> dict[str, Float64]:
    """X^T X of the inputs of every linear layer inside the blocks, by the layer's name."""
    labels = linear_inputs(build_llama(checkpoint, ModelOptions(64, ())), "decode")
    sums: dict[str, HessianSum] = {}

    def observe(label: str, value: Float64) -> None:
        if label in wanted:
            sums.setdefault(label, HessianSum(value.shape[-1])).add(value)

    wanted, model = set(labels.values()), model_of(checkpoint, observe)
    for tokens in texts:
        model.logits(tokens, all_positions=False)
    matrices = {label: total.matrix() for label, total in sums.items()}
    return {name: matrices[label] for name, label in labels.items()}


def model_of(checkpoint: Checkpoint, observe: object = None) -> ReferenceModel:
    """The reference of an APU's arithmetic but for its rounding of activations."""
    return ReferenceModel(
        checkpoint,
        kv_dtype="float32",
        quantize_activations=False,
        observe=observe,  # type: ignore[arg-type]
    )


def with_rows(
    checkpoint: Checkpoint, sums: Mapping[str, Float64], bits: int, folder: Path, *, is_good: bool
) -> Checkpoint:
    """The model with codes by rows; `is_good`: errors are made good."""
    for name, matrix in sums.items():
        weight = read_weight(checkpoint.weights, name)
        made = (
            compensate_per_channel(weight, matrix, bits)
            if is_good
            else quantize_per_channel(weight, bits)
        )
        np.save(folder / f"{name}.weight.npy", made.codes)
        np.save(folder / f"{name}.scales.npy", made.scales)
    return replace(checkpoint, weights=LayerWeights(checkpoint.weights, folder))


def nats(checkpoint: Checkpoint, texts: Texts) -> float:
    """Mean negative log likelihood of all tokens after the first of each text."""
    model, counts = model_of(checkpoint), [len(tokens) - 1 for tokens in texts]
    return float(np.average([model.nll(tokens) for tokens in texts], weights=counts))


def main(arguments: Sequence[str] | None = None) -> int:
    """Run the command line."""
    parser = argparse.ArgumentParser(prog="llamac.tools.row_weights_table", description=__doc__)
    parser.formatter_class = argparse.RawDescriptionHelpFormatter
    parser.add_argument("checkpoint", type=Path, help="a folder in Meta's layout")
    parser.add_argument("--texts", type=int, default=50, help="stories to measure on")
    parser.add_argument("--calibration", type=int, default=50, help="stories to calibrate on")
    parser.add_argument("--own-text", action="store_true", help="the model makes up the texts")
    given = parser.parse_args(arguments)
    try:
        checkpoint = from_meta(given.checkpoint)
        make = own_texts if given.own_text else stories
        calibration = make(checkpoint, given.calibration, TRAINING_SEED)
        texts = make(checkpoint, given.texts, HELD_OUT_SEED)
        print(f"{sum(map(len, calibration))} tokens to calibrate with, ", end="")
        print(f"{sum(map(len, texts))} measured")
        print(f"{'model':10} {'weights':22} {'nats per token':>14} {'loss':>7}")
        for turn, model in turned_models(checkpoint):
            show(turn, model, calibration, texts)
    except LlamacError as error:
        print(f"{error}\n  cause: {error.cause}\n  fix: {error.fix}", file=sys.stderr)
        return 1
    return 0


def show(turn: str, model: Checkpoint, calibration: Texts, texts: Texts) -> None:
    """Print the rows of one model; the loss is beside its own weights."""
    own, sums = nats(model, texts), input_sums(model, calibration)
    print(f"{turn:10} {'its own':22} {own:14.4f}")
    for bits in (8, 4):
        for is_good in (False, True):
            with TemporaryDirectory() as folder:
                made = with_rows(model, sums, bits, Path(folder), is_good=is_good)
                found = nats(made, texts)
            weights = f"int{bits}, {'made good' if is_good else 'nearest'}"
            print(f"{turn:10} {weights:22} {found:14.4f} {100 * (found / own - 1):6.2f}%")


if __name__ == "__main__":
    sys.exit(main())
