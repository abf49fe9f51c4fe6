"""Front end for a folder of Hugging Face: config.json, *.safetensors and tokenizer.json.

What becomes of a layer depends on how it is stored:

    linear, int4 without zero points      int4 group-32, the file's codes and scales; the scale of a
      in groups of 32 n columns           larger group is repeated
    linear, BF16                          bfloat16, the file's
    linear, others                        bfloat16, or with `requantize` int4 group-32
    embedding, output                     bfloat16; int8 with a scale per row if they were quantized
    norms                                 float32

q, k, v of a layer, and gate and up, are one kernel each, so they are int4 only together. Rows of q
and k are put from Hugging Face's order into Meta's, codes, scales and zero points alike. How much
is lost is measured on some rows of every tensor, and lands in the checkpoint's notes.
"""

from __future__ import annotations

import re
from collections.abc import Iterator
from functools import partial
from pathlib import Path

from llamac.compiler.checkpoint import Checkpoint
from llamac.compiler.config import LlamaConfig
from llamac.compiler.frontends.converted import (
    ConvertedWeights,
    Layer,
    conversion_notes,
    is_same_table,
    make_tokenizer,
    read_quant,
)
from llamac.compiler.frontends.forms import FORMS, Stored, linear_forms, table_form
from llamac.compiler.frontends.hf_config import end_tokens, open_config, read_config
from llamac.compiler.frontends.hf_packed import PackedWeights
from llamac.compiler.frontends.hf_quant import Scheme, read_scheme
from llamac.compiler.frontends.hf_tensors import (
    FLOATS,
    FloatWeights,
    RowOrder,
    TensorTable,
    interleaved_order,
)
from llamac.compiler.frontends.hf_tokenizer import chat_notes, check_ends, write_tokenizer
from llamac.compiler.frontends.meta_params import Fields
from llamac.compiler.frontends.safetensors_file import open_safetensors
from llamac.compiler.frontends.tiktoken_form import check_tokenizer
from llamac.runtime.errors import TensorInvalid

_LINEAR = {
    "attention.wq": "self_attn.q_proj",
    "attention.wk": "self_attn.k_proj",
    "attention.wv": "self_attn.v_proj",
    "attention.wo": "self_attn.o_proj",
    "feed_forward.w1": "mlp.gate_proj",
    "feed_forward.w2": "mlp.down_proj",
    "feed_forward.w3": "mlp.up_proj",
}
_NORMS = {"attention_norm": "input_layernorm", "ffn_norm": "post_attention_layernorm"}
_TURNED = ("attention.wq", "attention.wk")  # by RoPE
_EMBEDDING, _OUTPUT = "model.embed_tokens", "lm_head"


class _Model:
    """The layers of a directory, opened by name.

    Args:
        table: its tensors.
        config: of the model.
        scheme: how layers may be quantized.
    """

    def __init__(self, table: TensorTable, config: LlamaConfig, scheme: Scheme | None) -> None:
        self.table, self.config, self.scheme = table, config, scheme

    def norm(self, module: str) -> Stored:
        """A vector of floats."""
        tensor = self.table.take(f"{module}.weight", FLOATS, (self.config.dim,))
        return FloatWeights(tensor, RowOrder(self.config.dim))

    def matrix(self, module: str, shape: tuple[int, int], is_turned: bool = False) -> Stored:
        """A layer of floats, or a quantized one."""
        turn = interleaved_order(shape[0], self.config.head_dim) if is_turned else None
        order = RowOrder(shape[0], turn)
        if self.scheme is None or f"{module}.weight" in self.table:
            return FloatWeights(self.table.take(f"{module}.weight", FLOATS, shape), order)
        return self.scheme.open(self.table, module, shape, order)

    def layers(self, is_tied: bool, requantize: bool) -> list[Layer]:
        """All layers, from the embedding to the output layer; no tensor is left.

        Raises:
            CheckpointError: one of its classes.
        """
        embedding, output = self.tables(is_tied)
        layers = [Layer("tok_embeddings", embedding, table_form(embedding, requantize))]
        for number in range(self.config.num_layers):
            layers += self.block(number, requantize)
        layers.append(Layer("norm", self.norm("model.norm"), FORMS["norm"]))
        layers.append(Layer("output", output, table_form(output, requantize)))
        self.table.refuse_others()
        return layers

    def block(self, number: int, requantize: bool) -> Iterator[Layer]:
        """The layers of one block, in the order of use."""
        prefix, shapes = f"model.layers.{number}.", self.config.linear_shapes()
        for name, module in _NORMS.items():
            yield Layer(f"layers.{number}.{name}", self.norm(prefix + module), FORMS["norm"])
        stored = {
            name: self.matrix(prefix + module, shapes[name], name in _TURNED)
            for name, module in _LINEAR.items()
        }
        kept = {
            name: form
            for name, weights in stored.items()
            if isinstance(weights, PackedWeights) and (form := weights.kept_form())
        }
        forms = linear_forms(stored, kept, requantize)
        for name in shapes:
            yield Layer(f"layers.{number}.{name}", stored[name], forms[name])

    def tables(self, is_tied: bool) -> tuple[Stored, Stored]:
        """Embedding and output layer; one and the same if they are tied.

        Raises:
            TensorInvalid: they are said to be tied, but differ.
        """
        shape = (self.config.vocab_size, self.config.dim)
        embedding = self.matrix(_EMBEDDING, shape)
        if not is_tied:
            return embedding, self.matrix(_OUTPUT, shape)
        if f"{_OUTPUT}.weight" in self.table:
            output = self.matrix(_OUTPUT, shape)
            if not is_same_table(embedding, output):
                raise TensorInvalid(
                    f"{self.table.files.path}: lm_head.weight is not model.embed_tokens.weight, "
                    "though tie_word_embeddings is true.",
                    cause="config.json belongs to another model, or was edited.",
                    fix="Set tie_word_embeddings to false if the output layer was trained for "
                    "itself.",
                )
        return embedding, embedding


def _has_wide_scales(layer: Layer) -> bool:
    """Whether a layer keeps codes whose scales have more bits than a bundle stores."""
    stored = layer.stored
    return layer.form.is_int4 and isinstance(stored, PackedWeights) and stored.scale_dtype == "F32"


def _model_name(folder: Path) -> str:
    """The folder's name, made fit for file names; the cache of the hub has it further up."""
    found = folder.resolve()
    name = found.name
    if found.parent.name == "snapshots":  # models--meta-llama--Llama-3.2-1B/snapshots/<commit>
        name = found.parent.parent.name.rpartition("--")[2]
    return re.sub(r"[^A-Za-z0-9._+-]+", "-", name).strip("-.") or "model"


def _find_tokenizer(
    folder: Path, fields: Fields, config: LlamaConfig, weights: ConvertedWeights
) -> Path:
    """Write the directory's tokenizer in tiktoken form, or take the file that is in it."""
    source, ends = folder / "tokenizer.json", end_tokens(folder, fields)
    if source.is_file():
        return make_tokenizer(weights, partial(write_tokenizer, source, config.vocab_size, ends))
    return folder / "tokenizer.model"


def from_hf(
    path: Path,
    *,
    rope_factor: float | None = None,
    tokenizer: Path | None = None,
    requantize: bool = False,
    check_values: bool = True,
) -> Checkpoint:
    """Open a directory of Hugging Face; tensors stay on disk until they are read.

    Args:
        path: of the directory.
        rope_factor: RoPE scaling factor; by default what config.json says.
        tokenizer: a tokenizer file in tiktoken form instead of the directory's own.
        requantize: make linear layers int4 and tables int8 whatever the files have: small and
            fast, with a loss that the notes tell.
        check_values: check scales and floats of every tensor when it is read.

    Raises:
        CheckpointError: one of its classes; see `llamac.runtime.errors`. Values are checked when
            `read` is called, everything else here.
        TokenizerError: no tokenizer, a damaged one, or one that is not Llama 3's.
        UsageError: `rope_factor` below 1.
    """
    folder = Path(path)
    fields = open_config(folder)
    config, notes = read_config(fields, rope_factor)
    is_tied = bool(fields.boolean("tie_word_embeddings"))
    model = _Model(TensorTable(open_safetensors(folder)), config, read_scheme(fields))
    layers = model.layers(is_tied, requantize)
    weights = ConvertedWeights(layers, check_values)
    tokenizer = tokenizer or _find_tokenizer(folder, fields, config, weights)
    num_special = check_tokenizer(tokenizer, config.vocab_size)
    check_ends(end_tokens(folder, fields), config.vocab_size - num_special)
    quant = read_quant(layers)
    if quant.form != "float":
        rule = quant.activation_rule
        notes.append(f"inputs of int4 layers become int8 per token, by the rule {rule}")
        if any(_has_wide_scales(layer) for layer in layers):
            notes.append("float32 scales are rounded to the dtype of --scales when they are packed")
    if is_tied:
        notes.append("the embedding is the output layer, too (tied)")
    return Checkpoint(
        name=_model_name(folder),
        config=config,
        quant=quant,
        weights=weights,
        tokenizer=tokenizer,
        notes=(*notes, *chat_notes(folder), *conversion_notes(layers)),
        shared_embedding=is_same_table(layers[0].stored, layers[-1].stored),
    )
