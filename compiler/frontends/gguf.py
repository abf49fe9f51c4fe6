"""Front end for GGUF, llama.cpp's files: one file with the model, its sizes and its tokenizer.

What becomes of a tensor depends on its type:

    linear, Q4_0            int4 group-32, the file's codes and scales; scales may be negative
    linear, others          bfloat16, or with `requantize` int4 group-32
    embedding, output       int8 with a scale per row if that is nearly exact, else bfloat16
    norms                   float32

q, k, v of a layer, and gate and up, are one kernel each, so they are int4 only together. Only the
first line is exact for types that are no floats; how much the others lose is measured on some rows
of every tensor, and lands in the checkpoint's notes. Rows of q and k stand in interleaved-pair
order already: llama.cpp's converter reorders them for this architecture.
"""

from __future__ import annotations

import re
from collections.abc import Iterator, Sequence
from functools import partial
from pathlib import Path

from llamac.compiler.checkpoint import Checkpoint, same_values
from llamac.compiler.config import LlamaConfig
from llamac.compiler.frontends.converted import (
    ConvertedWeights,
    Layer,
    conversion_notes,
    make_tokenizer,
    read_quant,
)
from llamac.compiler.frontends.forms import FORMS, linear_forms, table_form
from llamac.compiler.frontends.gguf_blocks import BLOCKS, Q4_0
from llamac.compiler.frontends.gguf_config import ROPE_FREQS, read_config
from llamac.compiler.frontends.gguf_file import GgufFile, GgufTensor, open_gguf
from llamac.compiler.frontends.gguf_tokenizer import write_tokenizer
from llamac.compiler.frontends.tiktoken_form import check_tokenizer
from llamac.runtime.errors import ModelUnsupported, TensorInvalid

_LINEAR = {
    "attention.wq": "attn_q",
    "attention.wk": "attn_k",
    "attention.wv": "attn_v",
    "attention.wo": "attn_output",
    "feed_forward.w1": "ffn_gate",
    "feed_forward.w2": "ffn_down",
    "feed_forward.w3": "ffn_up",
}


def _tensor(file: GgufFile, name: str, shape: tuple[int, ...]) -> GgufTensor:
    """A tensor that must be there, in a form that can be decoded."""
    tensor = file.tensors.get(name)
    if tensor is None or tensor.shape != shape:
        found = "missing" if tensor is None else f"{tensor.type} {list(tensor.shape)}"
        raise TensorInvalid(
            f"{file.path}: {name} is {found}, expected shape {list(shape)}.",
            cause="The file is incomplete, or its metadata belong to another model.",
            fix="Fetch the file again.",
        )
    if tensor.data is None:
        types = ", ".join(block.name for block in BLOCKS.values())
        raise ModelUnsupported(
            f"{file.path}: {name} is of type {tensor.type}.",
            cause=f"llamac decodes {types}.",
            fix="Use a file in one of these types; Q4_0 is kept as it is and is the fastest.",
        )
    return tensor


def _block_layers(
    file: GgufFile, config: LlamaConfig, number: int, requantize: bool
) -> Iterator[Layer]:
    """The layers of one block, in the order of use."""
    names, shapes = {"attention_norm": "attn_norm", "ffn_norm": "ffn_norm"}, config.linear_shapes()
    for name, stored in names.items():
        tensor = _tensor(file, f"blk.{number}.{stored}.weight", (config.dim,))
        yield Layer(f"layers.{number}.{name}", tensor, FORMS["norm"])
    tensors = {
        name: _tensor(file, f"blk.{number}.{stored}.weight", shapes[name])
        for name, stored in _LINEAR.items()
    }
    kept = {name: "signed int4" for name, tensor in tensors.items() if tensor.type_id == Q4_0}
    forms = linear_forms(tensors, kept, requantize)
    for name in shapes:
        yield Layer(f"layers.{number}.{name}", tensors[name], forms[name])


def _tables(file: GgufFile, config: LlamaConfig) -> tuple[GgufTensor, GgufTensor]:
    """Embedding and output layer; an output layer that is missing is the embedding."""
    shape = (config.vocab_size, config.dim)
    embedding = _tensor(file, "token_embd.weight", shape)
    is_tied = "output.weight" not in file.tensors
    return embedding, embedding if is_tied else _tensor(file, "output.weight", shape)


def _layers(
    file: GgufFile, config: LlamaConfig, tables: tuple[GgufTensor, GgufTensor], requantize: bool
) -> list[Layer]:
    """All layers, in the order of use."""
    embedding, output = tables
    layers = [Layer("tok_embeddings", embedding, table_form(embedding, requantize))]
    for number in range(config.num_layers):
        layers += _block_layers(file, config, number, requantize)
    layers.append(Layer("norm", _tensor(file, "output_norm.weight", (config.dim,)), FORMS["norm"]))
    layers.append(Layer("output", output, table_form(output, requantize)))
    _refuse_others(file, layers)
    return layers


def _refuse_others(file: GgufFile, layers: Sequence[Layer]) -> None:
    """Refuse tensors that the model would be computed without."""
    known = {ROPE_FREQS, *(layer.stored.name for layer in layers)}
    for name in file.tensors:
        if name not in known:
            raise TensorInvalid(
                f"{file.path} holds {name!r:.80}, which a plain Llama does not have.",
                cause="The model has parts that llamac does not know (biases, experts, adaptors), "
                "or more layers than its metadata say.",
                fix="Leaving a tensor out would change the results; use another model.",
            )


def _is_shared(first: GgufTensor, last: GgufTensor) -> bool:
    """Whether output and embedding are one tensor, or equal."""
    if first is last:
        return True
    if first.type_id != last.type_id or first.data is None or last.data is None:
        return False
    return same_values(first.data, last.data)


def from_gguf(
    path: Path,
    *,
    rope_factor: float | None = None,
    tokenizer: Path | None = None,
    requantize: bool = False,
    check_values: bool = True,
) -> Checkpoint:
    """Open a GGUF file; tensors stay on disk until they are read.

    Args:
        path: of the file.
        rope_factor: RoPE scaling factor; by default what the file says.
        tokenizer: a tokenizer file in tiktoken form instead of the file's own.
        requantize: make linear layers int4 and tables int8 whatever the file has: small and fast,
            with a loss that the notes tell.
        check_values: check scales and floats of every tensor when it is read.

    Raises:
        CheckpointError: one of its classes; see `llamac.runtime.errors`. Values are checked when
            `read` is called, everything else here.
        TokenizerError: no tokenizer, a damaged one, or one that is not Llama 3's.
        UsageError: `rope_factor` below 1.
    """
    file = open_gguf(Path(path))
    config, notes = read_config(file, rope_factor)
    embedding, output = tables = _tables(file, config)
    layers = _layers(file, config, tables, requantize)
    weights = ConvertedWeights(layers, check_values)
    if tokenizer is None:
        tokenizer = make_tokenizer(weights, partial(write_tokenizer, file, config.vocab_size))
    check_tokenizer(tokenizer, config.vocab_size)
    if "output.weight" not in file.tensors:
        notes.append("no output.weight: the embedding is used (tied)")
    return Checkpoint(
        name=re.sub(r"[^A-Za-z0-9._+-]+", "-", file.path.resolve().stem).strip("-.") or "model",
        config=config,
        quant=read_quant(layers),
        weights=weights,
        tokenizer=tokenizer,
        notes=(*notes, *conversion_notes(layers)),
        shared_embedding=_is_shared(embedding, output),
    )
