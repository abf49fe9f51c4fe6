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
import shutil
import tempfile
import weakref
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from llamac.compiler.checkpoint import (
    Checkpoint,
    TensorInfo,
    check_finite,
    check_scales,
    same_values,
)
from llamac.compiler.config import LlamaConfig, QuantConfig
from llamac.compiler.frontends.gguf_blocks import BLOCKS, Q4_0
from llamac.compiler.frontends.gguf_config import ROPE_FREQS, read_config
from llamac.compiler.frontends.gguf_file import GgufFile, GgufTensor, open_gguf
from llamac.compiler.frontends.gguf_forms import FORMS, Form, Loss, measure
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
# Layers of which one kernel computes all.
_FUSED = (
    ("attention.wq", "attention.wk", "attention.wv"),
    ("attention.wo",),
    ("feed_forward.w1", "feed_forward.w3"),
    ("feed_forward.w2",),
)
# A table of int8 is as good as the file's own types from here on: Q6_K has about 36 dB.
_LEAST_TABLE_DB = 30.0


@dataclass(frozen=True)
class _Layer:
    """One layer of the model and the tensor that it comes from."""

    name: str
    tensor: GgufTensor
    form: Form


class GgufWeights:
    """The tensors of one file, converted when they are read (a `WeightSource`).

    Args:
        layers: in the order of use.
        check_values: check scales and floats of every tensor when it is read.
    """

    def __init__(self, layers: Iterable[_Layer], check_values: bool) -> None:
        self._parts = {
            f"{layer.name}.{part}": (layer, part) for layer in layers for part in layer.form.parts
        }
        self._check_values = check_values

    def names(self) -> Sequence[str]:
        """All tensors, in the order of use."""
        return tuple(self._parts)

    def info(self, name: str) -> TensorInfo:
        """Shape and dtype as `read` returns them."""
        layer, part = self._parts[name]
        return layer.form.info(layer.tensor, part)

    def read(self, name: str) -> NDArray[Any]:
        """One tensor; types of the file that no kernel reads are converted here, in pieces."""
        layer, part = self._parts[name]
        array = layer.form.read(layer.tensor, part)
        if self._check_values:
            if part == "scales":
                check_scales(name, array, signed=layer.form.signed)
            elif array.dtype != np.int8:
                check_finite(name, array)
        array.flags.writeable = False
        return array


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
) -> Iterator[_Layer]:
    """The layers of one block, in the order of use."""
    names, shapes = {"attention_norm": "attn_norm", "ffn_norm": "ffn_norm"}, config.linear_shapes()
    for name, stored in names.items():
        tensor = _tensor(file, f"blk.{number}.{stored}.weight", (config.dim,))
        yield _Layer(f"layers.{number}.{name}", tensor, FORMS["norm"])
    tensors = {
        name: _tensor(file, f"blk.{number}.{stored}.weight", shapes[name])
        for name, stored in _LINEAR.items()
    }
    forms: dict[str, Form] = {}
    for group in _FUSED:
        is_int4 = all(
            tensors[name].type_id == Q4_0 or (requantize and shapes[name][1] % 32 == 0)
            for name in group
        )
        for name in group:
            is_exact = tensors[name].type_id == Q4_0
            forms[name] = FORMS[("q4_0" if is_exact else "int4") if is_int4 else "bfloat16"]
    for name in shapes:
        yield _Layer(f"layers.{number}.{name}", tensors[name], forms[name])


def _table_form(tensor: GgufTensor, requantize: bool) -> Form:
    """int8 for a table that was quantized already and loses little."""
    is_float = BLOCKS[tensor.type_id].is_float
    if requantize or (not is_float and measure(tensor, FORMS["int8"]).decibels >= _LEAST_TABLE_DB):
        return FORMS["int8"]
    return FORMS["bfloat16"]


def _layers(file: GgufFile, config: LlamaConfig, requantize: bool) -> list[_Layer]:
    """All layers, in the order of use; an output layer that is missing is the embedding."""
    shape = (config.vocab_size, config.dim)
    embedding = _tensor(file, "token_embd.weight", shape)
    output = _tensor(file, "output.weight", shape) if "output.weight" in file.tensors else embedding
    layers = [_Layer("tok_embeddings", embedding, _table_form(embedding, requantize))]
    for number in range(config.num_layers):
        layers += _block_layers(file, config, number, requantize)
    layers.append(_Layer("norm", _tensor(file, "output_norm.weight", (config.dim,)), FORMS["norm"]))
    layers.append(_Layer("output", output, _table_form(output, requantize)))
    _refuse_others(file, layers)
    return layers


def _refuse_others(file: GgufFile, layers: Sequence[_Layer]) -> None:
    """Refuse tensors that the model would be computed without."""
    known = {ROPE_FREQS, *(layer.tensor.name for layer in layers)}
    for name in file.tensors:
        if name not in known:
            raise TensorInvalid(
                f"{file.path} holds {name!r:.80}, which a plain Llama does not have.",
                cause="The model has parts that llamac does not know (biases, experts, adaptors), "
                "or more layers than its metadata say.",
                fix="Leaving a tensor out would change the results; use another model.",
            )


def _read_quant(layers: Sequence[_Layer]) -> QuantConfig:
    """Which arithmetic the layers need."""
    forms = [layer.form for layer in layers]
    if not any(form.is_int4 for form in forms):
        return QuantConfig("float")
    return QuantConfig("ptq", signed_scales=any(form.signed for form in forms))


def _notes(layers: Sequence[_Layer]) -> Iterator[str]:
    """What became of the tensors of each type, and how much it loses."""
    losses: dict[tuple[str, str, Form], list[Loss]] = {}
    is_tied = layers[0].tensor is layers[-1].tensor
    for layer in layers[:-1] if is_tied else layers:
        if layer.form is FORMS["norm"]:
            continue
        what = "linear layers" if layer.name.startswith("layers.") else layer.name
        losses.setdefault((what, layer.tensor.type, layer.form), []).append(
            measure(layer.tensor, layer.form)
        )
    for (what, kind, form), parts in losses.items():
        total = sum(parts[1:], parts[0])
        count = f"{len(parts)} {what}" if what == "linear layers" else what
        loss = f"{total.decibels:.1f} dB of signal to noise" if total.noise else "no loss"
        where = (
            "without loss" if kind in form.exact_for else f"{loss} on the rows that were measured"
        )
        yield f"{count} of type {kind}: {form.title}, {where}"


def _make_tokenizer(file: GgufFile, vocab_size: int, weights: GgufWeights) -> Path:
    """Write the tokenizer into a folder that lives as long as the weights."""
    folder = tempfile.mkdtemp(prefix="llamac-")
    weakref.finalize(weights, shutil.rmtree, folder, ignore_errors=True)
    path = Path(folder) / "tokenizer.model"
    write_tokenizer(file, vocab_size, path)
    return path


def _is_shared(file: GgufFile, layers: Sequence[_Layer]) -> bool:
    """Whether output and embedding are one tensor, or equal."""
    first, last = layers[0].tensor, layers[-1].tensor
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
    layers = _layers(file, config, requantize)
    weights = GgufWeights(layers, check_values)
    if tokenizer is None:
        tokenizer = _make_tokenizer(file, config.vocab_size, weights)
    check_tokenizer(tokenizer, config.vocab_size)
    if "output.weight" not in file.tensors:
        notes.append("no output.weight: the embedding is used (tied)")
    return Checkpoint(
        name=re.sub(r"[^A-Za-z0-9._+-]+", "-", file.path.resolve().stem).strip("-.") or "model",
        config=config,
        quant=_read_quant(layers),
        weights=weights,
        tokenizer=tokenizer,
        notes=(*notes, *_notes(layers)),
        shared_embedding=_is_shared(file, layers),
    )
