"""A recognized graph as a checkpoint: what exported programs and ONNX files share.

Tokens are no part of a graph, so a tokenizer is named, or lies beside the file.
"""

from __future__ import annotations

from collections.abc import Iterator
from functools import partial
from pathlib import Path

from llamac.compiler.checkpoint import Checkpoint
from llamac.compiler.frontends.converted import (
    ConvertedWeights,
    Layer,
    conversion_notes,
    is_same_table,
    make_tokenizer,
    read_quant,
)
from llamac.compiler.frontends.forms import FORMS, Stored, linear_forms, table_form
from llamac.compiler.frontends.graph import Graph
from llamac.compiler.frontends.graph_weights import Matrix, stored_matrix, stored_vector
from llamac.compiler.frontends.hf_packed import PackedWeights
from llamac.compiler.frontends.hf_tensors import RowOrder, interleaved_order
from llamac.compiler.frontends.hf_tokenizer import write_tokenizer
from llamac.compiler.frontends.llama_graph import Block, LlamaGraph
from llamac.compiler.frontends.tiktoken_form import check_tokenizer
from llamac.runtime.errors import UsageError

_TURNED = ("attention.wq", "attention.wk")


def checkpoint_of_graph(
    graph: Graph,
    llama: LlamaGraph,
    *,
    name: str,
    tokenizer: Path,
    requantize: bool,
    check_values: bool,
) -> Checkpoint:
    """A recognized graph as a checkpoint.

    Raises:
        ModelUnsupported, TokenizerError: see `from_torch` and `from_onnx`.
    """
    layers = list(_layers(graph, llama, requantize))
    weights = ConvertedWeights(layers, check_values)
    if tokenizer.suffix == ".json":
        write = partial(write_tokenizer, tokenizer, llama.config.vocab_size, {})
        tokenizer = make_tokenizer(weights, write)
    check_tokenizer(tokenizer, llama.config.vocab_size)
    quant = read_quant(layers)
    notes = [_coverage_note(llama)]
    if quant.form != "float":
        notes.append(
            f"inputs of int4 layers become int8 per token, by the rule {quant.activation_rule}"
        )
    return Checkpoint(
        name=name,
        config=llama.config,
        quant=quant,
        weights=weights,
        tokenizer=tokenizer,
        notes=(*notes, *conversion_notes(layers)),
        shared_embedding=is_same_table(layers[0].stored, layers[-1].stored),
    )


def find_tokenizer(folder: Path | None) -> Path:
    """The tokenizer beside a file."""
    for name in ("tokenizer.model", "tokenizer.json"):
        if folder is not None and (folder / name).is_file():
            return folder / name
    raise UsageError(
        "a graph needs --tokenizer FILE",
        cause="a graph begins with tokens, and beside it is no tokenizer.model or tokenizer.json",
        fix="give the model's tokenizer.model or tokenizer.json",
    )


def _layers(graph: Graph, llama: LlamaGraph, requantize: bool) -> Iterator[Layer]:
    """All layers, from the embedding to the output layer."""
    config = llama.config
    table = (config.vocab_size, config.dim)
    order = RowOrder(config.vocab_size)
    every = slice(0, config.vocab_size)
    embedding = stored_matrix(graph, Matrix(llama.embedding, False, table, every, order))
    linear = llama.output.linear
    output = stored_matrix(
        graph, Matrix(linear.weight, linear.is_transposed, table, llama.output.rows, order)
    )
    if is_same_table(embedding, output):
        output = embedding
    yield Layer("tok_embeddings", embedding, table_form(embedding, requantize))
    for number, block in enumerate(llama.blocks):
        yield from _block(graph, llama, number, block, requantize)
    yield Layer("norm", stored_vector(graph, llama.norm.weight, config.dim), FORMS["norm"])
    yield Layer("output", output, table_form(output, requantize))


def _block(
    graph: Graph, llama: LlamaGraph, number: int, block: Block, requantize: bool
) -> Iterator[Layer]:
    """The layers of one block, in the order of use."""
    config, prefix = llama.config, f"layers.{number}."
    for name, norm in (("attention_norm", block.attention_norm), ("ffn_norm", block.ffn_norm)):
        yield Layer(prefix + name, stored_vector(graph, norm.weight, config.dim), FORMS["norm"])
    stored: dict[str, Stored] = {}
    for name, shape in config.linear_shapes().items():
        linear, rows = block.linear[name].linear, block.linear[name].rows
        is_turned = llama.is_half and name in _TURNED
        turn = interleaved_order(shape[0], config.head_dim) if is_turned else None
        order = RowOrder(shape[0], turn)
        matrix = Matrix(linear.weight, linear.is_transposed, shape, rows, order)
        stored[name] = stored_matrix(graph, matrix)
    kept = {
        name: form
        for name, weights in stored.items()
        if isinstance(weights, PackedWeights) and (form := weights.kept_form())
    }
    forms = linear_forms(stored, kept, requantize)
    for name in config.linear_shapes():
        yield Layer(prefix + name, stored[name], forms[name])


def _coverage_note(llama: LlamaGraph) -> str:
    """How much of the graph is explained."""
    count = sum(llama.coverage.values())
    order = "halves of a head" if llama.is_half else "neighbours"
    return (
        f"recognized {llama.config.num_layers} layers in {count} operations of "
        f"{len(llama.coverage)} kinds, all of them explained; {llama.unused} others do not reach "
        f"the logits; RoPE turns {order}"
    )
