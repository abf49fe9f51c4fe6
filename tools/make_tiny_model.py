"""Make the example model: train a tiny Llama on our own text, write it in Meta's layouts.

    python -m llamac.tools.make_tiny_model -o examples/tiny-llama

writes `bf16/`, `spinquant/` and `qlora/`, each with `consolidated.00.pth`, `params.json` and
`tokenizer.model`. It takes 15 to 20 minutes on one core. Everything is seeded: the same version
of torch on the same kind of CPU gives the same files.
"""

from __future__ import annotations

import argparse
import sys
from collections.abc import Sequence
from pathlib import Path
from tempfile import TemporaryDirectory

import tiktoken
import torch

from llamac.compiler.config import LLAMA_3_2_ROPE_FACTOR, LlamaConfig, RopeScaling
from llamac.compiler.frontends.meta import from_meta
from llamac.compiler.meta_writer import write_checkpoint
from llamac.compiler.quantize import quantize_model
from llamac.compiler.reference_model import ReferenceModel
from llamac.tools.tiny_corpus import Turn, documents
from llamac.tools.tiny_tokenizer import (
    encode_document,
    encode_prompt,
    make_encoding,
    train_ranks,
    write_ranks,
)
from llamac.tools.tiny_training import Sample, TinyLlama, evaluate, greedy, train

CONFIG = LlamaConfig(
    dim=128,
    num_layers=4,
    num_heads=4,
    num_kv_heads=2,
    head_dim=32,
    ffn_dim=256,
    vocab_size=1024,
    norm_eps=1e-5,
    rope_theta=500000.0,
    rope_scaling=RopeScaling(LLAMA_3_2_ROPE_FACTOR),
)
NUM_RANKS = CONFIG.vocab_size - 16
CONTEXT = 512

# Folder of each checkpoint, and its form.
FOLDERS = {"bf16": "float", "spinquant": "spinquant", "qlora": "qlora"}

TRAINING_SEED, HELD_OUT_SEED = 1, 2
NUM_DOCUMENTS, NUM_HELD_OUT, NUM_FOR_TOKENIZER = 80_000, 300, 4000
NUM_STEPS = 3000
LEARNING_RATE = 4e-3
TOKENS_PER_BATCH = 4096

PLAIN_PROMPTS = ("Once upon a time", "Once there was a brave")
CHAT_PROMPTS = (
    "Tell me a story about a fox.",
    "Tell me a story about a girl named Mia.",
    "Hello!",
    "Why is the sky blue?",
)


def tokenizer_tokens() -> list[bytes]:
    """The tokens of the example model's tokenizer by rank, trained on part of the corpus."""
    texts = (
        turn.text for document in documents(NUM_FOR_TOKENIZER, TRAINING_SEED) for turn in document
    )
    return train_ranks(texts, NUM_RANKS)


def make_samples(encoding: tiktoken.Encoding, count: int, seed: int) -> list[Sample]:
    """Encoded documents that fit into the context."""
    samples = [encode_document(encoding, document) for document in documents(count, seed)]
    return [sample for sample in samples if len(sample[0]) <= CONTEXT]


def train_model(encoding: tiktoken.Encoding, num_steps: int) -> TinyLlama:
    """Train the model and print how it goes."""
    torch.manual_seed(TRAINING_SEED)
    model = TinyLlama(CONFIG, CONTEXT)
    print(f"{sum(weight.numel() for weight in model.parameters())} weights")
    samples = make_samples(encoding, NUM_DOCUMENTS, TRAINING_SEED)
    train(
        model,
        samples,
        num_steps=num_steps,
        learning_rate=LEARNING_RATE,
        tokens_per_batch=TOKENS_PER_BATCH,
        seed=TRAINING_SEED,
        report=print,
    )
    held_out = make_samples(encoding, NUM_HELD_OUT, HELD_OUT_SEED)
    print(f"held-out loss {evaluate(model, held_out):.4f} nats per token")
    return model


def write_forms(folder: Path, model: TinyLlama, tokens: Sequence[bytes]) -> None:
    """Write the three checkpoints, replacing older ones."""
    with TemporaryDirectory() as scratch:
        tokenizer = Path(scratch) / "tokenizer.model"
        write_ranks(tokenizer, tokens)
        for name, form in FOLDERS.items():
            quant, tensors = quantize_model(CONFIG, model.weights(), form)
            write_checkpoint(folder / name, CONFIG, quant, tensors, tokenizer)


def report_forms(folder: Path, encoding: tiktoken.Encoding, num_documents: int = 20) -> None:
    """Print size and negative log likelihood of each checkpoint as the front end reads it."""
    stories = [d for d in documents(NUM_HELD_OUT, HELD_OUT_SEED) if not d[0].role]
    texts = [encode_document(encoding, story)[0] for story in stories[:num_documents]]
    for name in FOLDERS:
        model = ReferenceModel(from_meta(folder / name))
        nll = sum(model.nll(ids) * (len(ids) - 1) for ids in texts)
        size = sum(path.stat().st_size for path in (folder / name).iterdir())
        print(f"{name}: {size} bytes, nll {nll / sum(len(ids) - 1 for ids in texts):.4f}")


def print_samples(model: TinyLlama, encoding: tiktoken.Encoding) -> None:
    """Print greedy text for a few prompts."""
    stop = {encoding.encode_single_token(name) for name in ("<|eot_id|>", "<|end_of_text|>")}
    prompts = [[Turn("", text)] for text in PLAIN_PROMPTS]
    prompts += [[Turn("user", text)] for text in CHAT_PROMPTS]
    for prompt in prompts:
        ids = greedy(model, encode_prompt(encoding, prompt), stop, limit=250)
        print(f"\n> {prompt[0].text}\n{encoding.decode(ids).strip()}")


def main(arguments: Sequence[str] | None = None) -> int:
    """Run the command line."""
    parser = argparse.ArgumentParser(prog="llamac.tools.make_tiny_model", description=__doc__)
    parser.formatter_class = argparse.RawDescriptionHelpFormatter
    parser.add_argument("-o", "--output", type=Path, required=True, help="folder to write")
    parser.add_argument("--steps", type=int, default=NUM_STEPS, help="training steps")
    given = parser.parse_args(arguments)
    # One thread: sums then do not depend on the number of cores, and matrices are small anyway.
    torch.set_num_threads(1)
    tokens = tokenizer_tokens()
    encoding = make_encoding(tokens, CONFIG.vocab_size)
    model = train_model(encoding, given.steps)
    write_forms(given.output, model, tokens)
    report_forms(given.output, encoding)
    print_samples(model, encoding)
    return 0


if __name__ == "__main__":
    sys.exit(main())
