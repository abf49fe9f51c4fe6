"""Write a Llama 3.2 checkpoint of true shapes and random weights, in Meta's layout.

For measuring time and memory without a gated download: every byte that a real file has is there
and random, so nothing can be shared or compressed away. The text it generates is noise.

    python -m llamac.tools.make_synthetic --model 1b --form spinquant -o DIR

The tokenizer is made up too: 128000 distinct byte strings in tiktoken form (`--tokenizer FILE`
copies a real one).
"""

from __future__ import annotations

import argparse
import itertools
import sys
import tempfile
from collections.abc import Iterator, Sequence
from dataclasses import replace
from functools import cache
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from llamac.compiler.config import LLAMA_3_2_1B, LLAMA_3_2_3B, LlamaConfig, LoraConfig, QuantConfig
from llamac.compiler.floats import to_bfloat16
from llamac.compiler.meta_writer import reserve_checkpoint
from llamac.tools.tiny_tokenizer import write_ranks

MODELS = {"1b": LLAMA_3_2_1B, "3b": LLAMA_3_2_3B}
FORMS = {
    "spinquant": QuantConfig("spinquant", hadamard_r4=True),
    "qlora": QuantConfig("qlora", lora=LoraConfig(rank=16, scale=2.0)),
    "ptq": QuantConfig("ptq"),
    "bf16": QuantConfig("float"),
}
NUM_SPECIAL_TOKENS = 256

# With normed inputs (rms 1) and K columns, outputs have an rms of 0.02 * sqrt(K): about 1 for
# all linears of both models. Branches then add about 1 to the residual stream per layer, and
# logits stay near 1.
WEIGHT_STD = 0.02
LORA_STD = 0.01

_BLOCK_BYTES = 16 << 20


@cache
def gaussian_table(size: int, std: float) -> NDArray[np.float64]:
    """`size` quantiles of a normal distribution: a uniform random index draws from it.

    Args:
        size: entries; a power of two lets random bits index the table.
        std: standard deviation.
    """
    # The normal quantile function has no closed form; invert its integral on a fine grid.
    grid = np.linspace(-6.0, 6.0, 1 << 16)
    cumulative = np.cumsum(np.exp(-0.5 * grid**2))
    middles = (np.arange(size) + 0.5) / size * cumulative[-1]
    quantiles: NDArray[np.float64] = np.interp(middles, cumulative, grid)
    return quantiles * std


@cache
def int_table(levels: int) -> tuple[NDArray[np.int8], float]:
    """Int codes of a normal distribution for every random byte, and their scale.

    Args:
        levels: the largest code; the smallest is one below its negative.

    Returns:
        int8 [256], and the scale with which values have the standard deviation WEIGHT_STD.
    """
    table = gaussian_table(256, 1.0)
    codes = np.clip(np.rint(table * ((levels + 0.6) / table[-1])), -levels - 1, levels)
    return codes.astype(np.int8), WEIGHT_STD / float(codes.std())


def fill(name: str, target: NDArray[Any], rng: np.random.Generator) -> None:
    """Fill one tensor in place, a block at a time.

    Args:
        name: Meta's name; tells what the tensor is.
        target: int8, float32, or bfloat16 as its bits in uint16.
        rng: source of random bits.
    """
    flat = target.reshape(-1)
    is_table = name.startswith(("tok_embeddings", "output"))
    codes, scale = int_table(127 if is_table else 7)
    if name.endswith("norm.weight"):
        flat[:] = to_bfloat16(1.0)
        return
    std = LORA_STD if "adaptor" in name else WEIGHT_STD
    bits = to_bfloat16(gaussian_table(1 << 16, std))
    step = _BLOCK_BYTES // flat.itemsize
    for start in range(0, flat.size, step):
        block = flat[start : start + step]
        if block.dtype == np.int8:
            np.take(codes, rng.integers(0, 256, block.size, np.uint8), out=block)
        elif block.dtype == np.float32:
            block[:] = scale * (0.75 + 0.5 * rng.random(block.size, np.float32))
        else:
            np.take(bits, rng.integers(0, 1 << 16, block.size, np.uint16), out=block)


def synthetic_ranks(count: int) -> Iterator[bytes]:
    """Distinct byte strings for a tokenizer file: all single bytes, then pairs, then triples.

    Longer ones are made of lower-case letters, so that noise prints as letters.
    """
    letters = [bytes([value]) for value in b"abcdefghijklmnopqrstuvwxyz"]
    spaced = (
        b" " + b"".join(rest) for n in (1, 2, 3) for rest in itertools.product(letters, repeat=n)
    )
    plain = (b"".join(word) for n in (2, 3, 4) for word in itertools.product(letters, repeat=n))
    single = (bytes([value]) for value in range(256))
    return itertools.islice(itertools.chain(single, spaced, plain), count)


def make_synthetic(
    folder: Path, config: LlamaConfig, quant: QuantConfig, tokenizer: Path | None = None
) -> None:
    """Write the checkpoint; the same arguments give the same bytes.

    Args:
        folder: made if missing.
        config: shapes.
        quant: form.
        tokenizer: file to copy; None makes one up.
    """
    rng = np.random.Generator(np.random.SFC64(0))
    with tempfile.TemporaryDirectory() as scratch:
        if tokenizer is None:
            tokenizer = Path(scratch) / "tokenizer.model"
            write_ranks(tokenizer, synthetic_ranks(config.vocab_size - NUM_SPECIAL_TOKENS))
        with reserve_checkpoint(folder, config, quant, tokenizer) as tensors:
            for name, target in tensors.items():
                fill(name, target, rng)


def main(arguments: Sequence[str] | None = None) -> int:
    """Run the command line."""
    parser = argparse.ArgumentParser(prog="llamac.tools.make_synthetic", description=__doc__)
    parser.formatter_class = argparse.RawDescriptionHelpFormatter
    parser.add_argument("--model", choices=MODELS, default="1b")
    parser.add_argument("--form", choices=FORMS, default="spinquant")
    parser.add_argument("-o", "--output", type=Path, required=True, help="folder to write")
    parser.add_argument("--layers", type=int, help="fewer layers than the real model")
    parser.add_argument("--tokenizer", type=Path, help="a real tokenizer.model to copy")
    given = parser.parse_args(arguments)
    config = MODELS[given.model]
    if given.layers is not None:
        config = replace(config, num_layers=given.layers)
    make_synthetic(given.output, config, FORMS[given.form], given.tokenizer)
    size = (given.output / "consolidated.00.pth").stat().st_size
    print(f"{given.output}: {given.model} {given.form}, {size / 1e9:.3f} GB", file=sys.stderr)
    return 0


if __name__ == "__main__":
    sys.exit(main())
