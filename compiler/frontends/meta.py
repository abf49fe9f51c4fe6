"""Front end for the files Meta publishes: `consolidated.00.pth`, `params.json`, `tokenizer.model`.

Four forms share one layout: SpinQuant (INT4_EO8), QLoRA (INT4_EO8), plain post-training int4, and
the float originals. Nothing is requantized and nothing but small vectors is copied: what a kernel
later computes with are the very codes and scales of the file.

What Meta documents nowhere (dtype of norm weights, shape of table scales, RoPE factor, range of the
codes) is checked here or when a tensor is read, and lands in the checkpoint's notes.
"""

from __future__ import annotations

import re
from collections.abc import Collection, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
from numpy.typing import NDArray

from llamac.compiler.checkpoint import (
    Checkpoint,
    TensorInfo,
    check_finite,
    check_int4,
    check_scales,
    same_values,
)
from llamac.compiler.config import LlamaConfig, QuantConfig
from llamac.compiler.floats import from_bfloat16
from llamac.compiler.frontends.meta_params import (
    GROUP_SIZE,
    Fields,
    read_config,
    read_lora,
    read_params,
    read_spinquant,
)
from llamac.compiler.frontends.pth import open_pth
from llamac.compiler.frontends.tiktoken_form import check_tokenizer
from llamac.runtime.errors import (
    CheckpointMissing,
    CheckpointUnreadable,
    ModelUnsupported,
    TensorInvalid,
)

if TYPE_CHECKING:
    import torch

_FLOATS = ("bfloat16", "float16", "float32")


@dataclass(frozen=True)
class _Slot:
    """One tensor that a checkpoint must hold.

    Attributes:
        kind: "int4", "int8", "scales", "norm" or "float": decides dtypes and checks of values.
        shape: as `read` returns it.
    """

    kind: str
    shape: tuple[int, ...]

    @property
    def dtypes(self) -> tuple[str, ...]:
        return {"int4": ("int8",), "int8": ("int8",), "scales": ("float32",)}.get(
            self.kind, _FLOATS
        )

    def accepts(self, shape: tuple[int, ...]) -> bool:
        """Whether a stored shape will do: scales of a table may be [V, 1] or [V]."""
        return shape == self.shape or (self.kind == "scales" and shape == (*self.shape, 1))


def _slots(config: LlamaConfig, quant: QuantConfig, floats: Collection[str]) -> dict[str, _Slot]:
    """Return every tensor of the layout by name, in the order of use.

    Args:
        config: of the model.
        quant: of the model.
        floats: layers without scales and adaptors whose weights are floats.
    """
    table_shape = (config.vocab_size, config.dim)
    slots = dict(_table("tok_embeddings", table_shape, quant, floats))
    for layer in range(config.num_layers):
        slots[f"layers.{layer}.attention_norm.weight"] = _Slot("norm", (config.dim,))
        slots[f"layers.{layer}.ffn_norm.weight"] = _Slot("norm", (config.dim,))
        for name, shape in config.linear_shapes().items():
            slots.update(_linear(f"layers.{layer}.{name}", shape, quant, floats))
    slots["norm.weight"] = _Slot("norm", (config.dim,))
    slots.update(_table("output", table_shape, quant, floats))
    return slots


def _float_layers(tensors: Mapping[str, torch.Tensor]) -> frozenset[str]:
    """Layers that a file of mixed precision, or of floats alone, has as floats."""
    layers = (name.removesuffix(".weight") for name in tensors if name.endswith(".weight"))
    return frozenset(
        layer
        for layer in layers
        if _dtype(tensors[f"{layer}.weight"]) in _FLOATS and f"{layer}.scales" not in tensors
    )


def _table(
    name: str, shape: tuple[int, int], quant: QuantConfig, floats: Collection[str]
) -> Iterator[tuple[str, _Slot]]:
    """Slots of the embedding or the output layer: int8, one scale per row."""
    if quant.form == "float" or name in floats:
        yield f"{name}.weight", _Slot("float", shape)
    else:
        yield f"{name}.weight", _Slot("int8", shape)
        yield f"{name}.scales", _Slot("scales", shape[:1])


def _linear(
    name: str, shape: tuple[int, int], quant: QuantConfig, floats: Collection[str]
) -> Iterator[tuple[str, _Slot]]:
    """Slots of one linear layer of a block: int4, one scale per row and group of columns."""
    num_rows, num_columns = shape
    if quant.form == "float" or name in floats:
        yield f"{name}.weight", _Slot("float", shape)
        return
    yield f"{name}.weight", _Slot("int4", shape)
    yield f"{name}.scales", _Slot("scales", (num_rows, num_columns // quant.group_size))
    if quant.lora is not None:
        yield f"{name}.adaptor.A.weight", _Slot("float", (quant.lora.rank, num_columns))
        yield f"{name}.adaptor.B.weight", _Slot("float", (num_rows, quant.lora.rank))


def _view(tensor: torch.Tensor) -> NDArray[Any]:
    """A tensor as a read-only array over the same memory; bfloat16 as its bits."""
    import torch  # noqa: PLC0415 (already loaded by whoever made the tensor)

    bits = tensor.contiguous()  # a copy only for strided tensors, which Meta does not write
    array = (bits.view(torch.uint16) if bits.dtype == torch.bfloat16 else bits).numpy()
    array.flags.writeable = False
    return array


class MetaWeights:
    """The tensors of one checkpoint, read from the mapped file (a `WeightSource`)."""

    def __init__(
        self, tensors: Mapping[str, torch.Tensor], slots: Mapping[str, _Slot], check_values: bool
    ) -> None:
        self._tensors = tensors
        self._slots = slots
        self._check_values = check_values

    def names(self) -> Sequence[str]:
        """All tensors, in the order of use."""
        return tuple(self._slots)

    def info(self, name: str) -> TensorInfo:
        """Shape and dtype as `read` returns them."""
        slot = self._slots[name]
        is_norm = slot.kind == "norm"
        return TensorInfo(slot.shape, "float32" if is_norm else _dtype(self._tensors[name]))

    def read(self, name: str) -> NDArray[Any]:
        """One tensor; its values are checked here, while they are in the cache anyway."""
        slot = self._slots[name]
        array = _view(self._tensors[name]).reshape(slot.shape)
        if self._check_values:
            _check_values(name, slot, array)
        if slot.kind == "norm":
            array = from_bfloat16(array) if array.dtype == np.uint16 else array.astype(np.float32)
            array.flags.writeable = False
        return array


def _check_values(name: str, slot: _Slot, array: NDArray[Any]) -> None:
    if slot.kind == "int4":
        check_int4(name, array)
    elif slot.kind == "scales":
        check_scales(name, array)
    elif slot.kind != "int8":
        check_finite(name, array)


def _dtype(tensor: torch.Tensor) -> str:
    return str(tensor.dtype).removeprefix("torch.")


def _read_quant(params: Fields, names: Iterable[str]) -> tuple[QuantConfig, list[str]]:
    """Tell which form the file has, from its tensors' names and params.json together."""
    names = list(names)
    if not any(name.endswith(".scales") for name in names):
        if params.has("quantization_args"):
            raise params.error("quantization_args", "none, because the .pth holds float weights")
        tied = "output.weight" not in names
        return QuantConfig("float"), ["no output.weight: the embedding is used (tied)"] * tied
    spinquant = read_spinquant(params)
    has_lora = params.has("lora_args") or any(".adaptor." in name for name in names)
    if spinquant and has_lora:
        raise params.section("quantization_args").error(
            "spinquant", "false, because the checkpoint has LoRA adaptors"
        )
    if spinquant:
        return QuantConfig("spinquant", GROUP_SIZE, hadamard_r4=True), []
    if has_lora:
        return QuantConfig("qlora", GROUP_SIZE, lora=read_lora(params)), []
    state = "missing" if spinquant is None else "false"
    note = f"plain int4 without R4 assumed: spinquant is {state} in params.json, no LoRA adaptors"
    return QuantConfig("ptq", GROUP_SIZE), [note]


def _check_supported(config: LlamaConfig, quant: QuantConfig) -> None:
    """Refuse sizes that the quantized arithmetic is not defined for."""
    if quant.form == "float":
        return
    for name, (_, num_columns) in config.linear_shapes().items():
        if num_columns % quant.group_size:
            raise ModelUnsupported(
                f"{name} has {num_columns} columns, not a multiple of {quant.group_size}.",
                cause="Every int4 scale covers a whole group of columns.",
                fix="Pad the layer with zeros to whole groups before quantizing it.",
            )
    if quant.hadamard_r4 and config.ffn_dim & (config.ffn_dim - 1):
        raise ModelUnsupported(
            f"SpinQuant's R4 cannot be applied: ffn_dim is {config.ffn_dim}, no power of two.",
            cause="The checkpoint's w2 was rotated by a Hadamard matrix that must be undone in "
            "every layer; without it the model's output is noise.",
            fix="Use the QLoRA or BF16 form of this model.",
        )


def _check_tensors(
    tensors: Mapping[str, torch.Tensor], slots: Mapping[str, _Slot], ffn_dim: int
) -> None:
    """Compare the file's tensors with the layout: none missing, none extra, all of right form."""
    missing = [name for name in slots if name not in tensors]
    if missing:
        more = f" (and {len(missing) - 1} more)" if len(missing) > 1 else ""
        raise TensorInvalid(
            f"The checkpoint lacks {missing[0]}{more}.",
            cause="The file is incomplete, or its params.json belongs to another model.",
            fix="Fetch the .pth file and params.json again, both from the same place.",
        )
    for name, slot in slots.items():
        shape, dtype = tuple(tensors[name].shape), _dtype(tensors[name])
        if dtype not in slot.dtypes or not slot.accepts(shape):
            width = f" (multiple_of and ffn_dim_multiplier give an ffn_dim of {ffn_dim})"
            raise TensorInvalid(
                f"{name} is {dtype} {list(shape)}, "
                f"expected {' or '.join(slot.dtypes)} {list(slot.shape)}.",
                cause="params.json and the .pth file belong to different models, or one of them "
                f"is damaged{width if '.feed_forward.' in name else ''}.",
                fix="Fetch the .pth file and params.json again, both from the same place.",
            )
    for name, tensor in tensors.items():
        if name not in slots and not _is_harmless(name, tensor, slots):
            raise TensorInvalid(
                f"The checkpoint holds {name!r:.80}, which its form does not have.",
                cause="The model has parts that llamac does not know, or more layers than "
                "params.json says. Leaving a tensor out would change the results.",
                fix="Check that params.json belongs to this .pth file.",
            )


def _is_harmless(name: str, tensor: torch.Tensor, slots: Mapping[str, _Slot]) -> bool:
    """Whether an extra tensor carries no information: zero points that are 0, RoPE's constants."""
    if name == "rope.freqs":
        return True
    is_zero_point = name.endswith(".zeros") and name.removesuffix("zeros") + "scales" in slots
    return is_zero_point and _dtype(tensor) in ("int8", *_FLOATS) and not tensor.any()


def _is_shared(weights: Mapping[str, torch.Tensor]) -> bool:
    """Whether output and embedding table are equal; the small scales decide most cases at once."""
    if ("tok_embeddings.scales" in weights) != ("output.scales" in weights):
        return False
    pairs = [
        (weights[f"tok_embeddings.{part}"], weights[f"output.{part}"])
        for part in ("scales", "weight")
        if f"output.{part}" in weights
    ]
    return all(a is b or same_values(_view(a.squeeze(-1)), _view(b.squeeze(-1))) for a, b in pairs)


def _open_weights(
    tensors: dict[str, torch.Tensor], config: LlamaConfig, quant: QuantConfig, check_values: bool
) -> MetaWeights:
    """Check the tensors against the layout; a tied output layer becomes a second name."""
    if quant.form == "float" and "tok_embeddings.weight" in tensors:
        tensors.setdefault("output.weight", tensors["tok_embeddings.weight"])
    slots = _slots(config, quant, _float_layers(tensors))
    _check_tensors(tensors, slots, config.ffn_dim)
    return MetaWeights(tensors, slots, check_values)


def _norm_notes(
    weights: MetaWeights, tensors: Mapping[str, torch.Tensor], quant: QuantConfig
) -> list[str]:
    """Note how norm weights are stored, and whether that fits the form."""
    norms = [name for name in weights.names() if name.endswith("norm.weight")]
    dtypes = {_dtype(tensors[name]) for name in norms}
    others = [name for name in norms if (weights.read(name) != 1).any()]
    notes = [f"norm weights are stored as {' and '.join(sorted(dtypes))}, computed in float32"]
    if quant.form == "spinquant" and others:
        notes.append(
            f"{len(others)} of {len(norms)} norm weights are not all 1, as SpinQuant would leave "
            f"them (first: {others[0]}); they are applied as stored"
        )
    if quant.form == "ptq" and not others:
        notes.append(
            "all norm weights are 1, as SpinQuant leaves them: if the output is noise, set "
            "quantization_args.spinquant to true"
        )
    return notes


def _find_pth(path: Path) -> Path:
    """The one weight file that `path` means."""
    try:
        if path.is_file():
            folder, found = path.parent, [path]
        else:
            folder = path
            found = sorted(path.glob("consolidated.*.pth")) or sorted(path.glob("*.pth"))
        shards = sorted(folder.glob("consolidated.*.pth"))
    except OSError as error:
        raise CheckpointUnreadable(
            f"{path} cannot be read.",
            cause=f"The system said: {error.strerror}.",
            fix="Check the path and its permissions.",
        ) from error
    if not found:
        raise CheckpointMissing(
            f"There is no checkpoint at {path}.",
            cause="It is neither a .pth file nor a folder that holds one.",
            fix="Name the folder that holds consolidated.00.pth, params.json and tokenizer.model.",
        )
    if len(found) > 1 or (found[0] in shards and len(shards) > 1):
        files = found if len(found) > 1 else shards
        raise ModelUnsupported(
            f"{folder} holds {len(files)} .pth files: {files[0].name}, {files[1].name}"
            f"{', ...' if len(files) > 2 else ''}.",
            cause="Models cut into several files (model parallel) cannot be read.",
            fix="Name one complete .pth file, or use the 1B or 3B model, which have one file.",
        )
    return found[0]


def _model_name(pth: Path) -> str:
    """The folder's name, made fit for file names; Hugging Face keeps Meta's files in `original`."""
    folder = pth.resolve().parent
    name = folder.parent.name if folder.name == "original" else folder.name
    return re.sub(r"[^A-Za-z0-9._+-]+", "-", name).strip("-.") or "model"


def from_meta(
    path: Path,
    *,
    rope_factor: float | None = None,
    tokenizer: Path | None = None,
    check_values: bool = True,
) -> Checkpoint:
    """Open a checkpoint in Meta's own layout; tensors stay on disk until they are read.

    Args:
        path: the folder, or the `.pth` file with `params.json` and `tokenizer.model` beside it.
        rope_factor: RoPE scaling factor; by default 32 where the model scales RoPE at all.
        tokenizer: another tokenizer file in tiktoken form.
        check_values: check codes, scales and floats of every tensor when it is read.

    Raises:
        CheckpointError: one of its classes; see `llamac.runtime.errors`. Values are checked when
            `read` is called, everything else here.
        TokenizerError: no tokenizer, a damaged one, or one of another model.
        UsageError: `rope_factor` below 1.
    """
    pth = _find_pth(Path(path))
    params = read_params(pth.parent / "params.json")
    config, notes = read_config(params, rope_factor)
    tokenizer = tokenizer or pth.parent / "tokenizer.model"
    check_tokenizer(tokenizer, config.vocab_size)
    tensors = open_pth(pth)
    quant, form_notes = _read_quant(params, tensors)
    _check_supported(config, quant)
    weights = _open_weights(tensors, config, quant, check_values)
    return Checkpoint(
        name=_model_name(pth),
        config=config,
        quant=quant,
        weights=weights,
        tokenizer=tokenizer,
        notes=(*notes, *form_notes, *_norm_notes(weights, tensors, quant)),
        shared_embedding=_is_shared(tensors),
    )
