"""LoRA adapters of the user as PEFT saves them: adapter_config.json, adapter_model.safetensors.

    y = W x + scale * B (A x)        scale = lora_alpha / r, with rslora lora_alpha / sqrt(r)

A layer of floats takes the adapter in: W + scale * B A in float32, rounded to bfloat16 once. A
layer of int4 codes keeps it as a branch on activations that are not quantized, as Meta's QLoRA
files have one; A and B become bfloat16. There all layers of the blocks get a branch, because layers
that one kernel computes need one form: those that the adapter leaves alone get zeros.

PEFT names layers as Hugging Face does, where the two halves of a head turn together; rows of B of q
and k are put into the order of pairs.
"""

from __future__ import annotations

import math
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from llamac.compiler.blas import single_threaded_blas
from llamac.compiler.checkpoint import Checkpoint, TensorInfo, WeightSource, check_finite
from llamac.compiler.config import LlamaConfig, LoraConfig
from llamac.compiler.floats import from_bfloat16, to_bfloat16
from llamac.compiler.frontends.safetensors_file import parse_json, read_safetensors
from llamac.compiler.quantize import Float32, linear_names
from llamac.runtime.errors import (
    CheckpointMissing,
    ModelUnsupported,
    ParamsInvalid,
    TensorInvalid,
    UsageError,
)

CONFIG_FILE, WEIGHTS_FILE = "adapter_config.json", "adapter_model.safetensors"

_LAYERS = {
    "self_attn.q_proj": "attention.wq",
    "self_attn.k_proj": "attention.wk",
    "self_attn.v_proj": "attention.wv",
    "self_attn.o_proj": "attention.wo",
    "mlp.gate_proj": "feed_forward.w1",
    "mlp.down_proj": "feed_forward.w2",
    "mlp.up_proj": "feed_forward.w3",
}
_NAME = re.compile(
    r"base_model\.model\.model\.layers\.(\d{1,4})\.(\w+\.\w+)\.lora_([AB])(?:\.default)?\.weight"
)
# Fields that change what an adapter means, and the value that changes nothing.
_PLAIN = {
    "bias": "none",
    "use_dora": False,
    "lora_bias": False,
    "fan_in_fan_out": False,
    "rank_pattern": {},
    "alpha_pattern": {},
    "modules_to_save": [],
    "layer_replication": [],
    "trainable_token_indices": [],
    "target_parameters": [],
    "alora_invocation_tokens": [],
    "use_qalora": False,
}
# Ways to begin that also change the weights under the adapter.
_CHANGES_BASE = ("pissa", "olora", "corda", "loftq")
_LARGEST_RANK = 1024


@dataclass(frozen=True)
class Adapter:
    """An adapter in Meta's names and orders.

    Attributes:
        name: of its folder.
        lora: rank and scale.
        pairs: A float32 [rank, K] and B float32 [N, rank] by names of layers.
    """

    name: str
    lora: LoraConfig
    pairs: Mapping[str, tuple[Float32, Float32]]


def read_adapter(folder: Path, config: LlamaConfig) -> Adapter:
    """Read an adapter for a model.

    Raises:
        CheckpointMissing: one of its two files is not there.
        CheckpointUnreadable: a damaged file.
        ParamsInvalid: a field of its configuration is missing or impossible.
        ModelUnsupported: it is more than matrices beside linear layers of the blocks.
        TensorInvalid: a matrix is missing or does not fit the model.
        ValuesInvalid: values that are not finite.
    """
    for name in (CONFIG_FILE, WEIGHTS_FILE):
        if not (folder / name).is_file():
            raise CheckpointMissing(
                f"there is no {name} in {folder}",
                cause="an adapter is a folder that PEFT's save_pretrained wrote",
                fix="name that folder; save an adapter_model.bin anew as safetensors",
            )
    lora = _read_config(folder / CONFIG_FILE)
    tensors, _ = read_safetensors(folder / WEIGHTS_FILE)
    found: dict[str, dict[str, Float32]] = {}
    for name, tensor in tensors.items():
        layer, side = _place(folder, name, config)
        found.setdefault(layer, {})[side] = _values(name, tensor.dtype, tensor.data)
    if not found:
        raise TensorInvalid(
            f"{folder / WEIGHTS_FILE} is empty", cause="nothing was saved", fix="save it anew"
        )
    pairs = {layer: _pair(layer, sides, lora, config) for layer, sides in found.items()}
    return Adapter(folder.resolve().name, lora, pairs)


def _read_config(path: Path) -> LoraConfig:
    fields = parse_json(path, path.read_bytes())
    if not isinstance(fields, dict) or fields.get("peft_type") != "LORA":
        raise _unsupported(path, "peft_type", fields.get("peft_type") if fields else None, "LORA")
    for name, plain in _PLAIN.items():
        if fields.get(name) and fields[name] != plain:
            raise _unsupported(path, name, fields[name], plain)
    begin = fields.get("init_lora_weights")
    if isinstance(begin, str) and begin.lower().startswith(_CHANGES_BASE):
        raise _unsupported(path, "init_lora_weights", begin, True)
    rank: Any = fields.get("r")
    alpha: Any = fields.get("lora_alpha")
    if type(rank) is not int or not 0 < rank <= _LARGEST_RANK:
        raise _invalid(path, "r", rank, f"a whole number from 1 to {_LARGEST_RANK}")
    if type(alpha) not in (int, float) or not 0 < alpha < 1e6:
        raise _invalid(path, "lora_alpha", alpha, "a number above 0")
    return LoraConfig(rank, alpha / (math.sqrt(rank) if fields.get("use_rslora") else rank))


def _unsupported(path: Path, field: str, found: object, wanted: object) -> ModelUnsupported:
    return ModelUnsupported(
        f"{path}: {field} is {found!r:.80}, only {wanted!r} can be compiled",
        cause="such an adapter is more than two matrices beside each of some linear layers, or "
        "belongs to other weights than the model's",
        fix="merge it with PEFT's merge_and_unload, and compile the model that comes out",
    )


def _invalid(path: Path, field: str, found: object, wanted: str) -> ParamsInvalid:
    return ParamsInvalid(
        f"{path}: {field} is {found!r:.80}, expected {wanted}",
        cause="the adapter's configuration is damaged",
        fix="take the file that belongs to these weights",
    )


def _place(folder: Path, name: str, config: LlamaConfig) -> tuple[str, str]:
    """Layer and side of a tensor: ("layers.0.attention.wq", "A")."""
    match = _NAME.fullmatch(name)
    part = _LAYERS.get(match[2]) if match else None
    if match is None or part is None:
        raise ModelUnsupported(
            f"{folder / WEIGHTS_FILE} holds {name!r:.120}",
            cause="adapters are read for the seven linear layers of Llama's blocks only",
            fix="merge it with PEFT's merge_and_unload, and compile the model that comes out",
        )
    if int(match[1]) >= config.num_layers:
        raise TensorInvalid(
            f"the adapter has a layer {match[1]}, the model has {config.num_layers}",
            cause="the adapter was trained on another model",
            fix="compile it with the model that its configuration names",
        )
    return f"layers.{int(match[1])}.{part}", match[3]


def _values(name: str, dtype: str, data: NDArray[Any]) -> Float32:
    if dtype not in ("F32", "F16", "BF16"):
        raise TensorInvalid(
            f"{name} is {dtype}", cause="adapters hold F32, F16 or BF16", fix="save it anew"
        )
    check_finite(name, data)
    return from_bfloat16(data) if dtype == "BF16" else data.astype(np.float32)


def _pair(
    layer: str, sides: Mapping[str, Float32], lora: LoraConfig, config: LlamaConfig
) -> tuple[Float32, Float32]:
    """A and B of a layer, checked, rows of B in Meta's order."""
    part = layer.split(".", 2)[2]
    outputs, inputs = config.linear_shapes()[part]
    wanted = {"A": (lora.rank, inputs), "B": (outputs, lora.rank)}
    for side, shape in wanted.items():
        found = sides[side].shape if side in sides else None
        if found != shape:
            raise TensorInvalid(
                f"lora_{side} of {layer} is {list(found) if found else 'missing'}, expected "
                f"{list(shape)}",
                cause="the adapter was trained on another model, or its r is another",
                fix="compile it with the model that its configuration names",
            )
    b = sides["B"]
    if part in ("attention.wq", "attention.wk"):
        halves = b.reshape(-1, 2, config.head_dim // 2, lora.rank)
        b = np.ascontiguousarray(halves.transpose(0, 2, 1, 3)).reshape(b.shape)
    return sides["A"], b


def apply_adapter(
    checkpoint: Checkpoint, adapter: Adapter, *, branch: LoraConfig | None = None
) -> Checkpoint:
    """The model with an adapter: merged into float layers, beside int4 layers.

    Args:
        checkpoint: the model.
        adapter: for it.
        branch: rank and scale that the branches must have, larger than the adapter's own; None:
            what they need.

    Raises:
        ModelUnsupported: the model's weights are rotated.
        UsageError: the adapter does not fit into `branch`.
    """
    if checkpoint.quant.hadamard_r4 or checkpoint.quant.form == "spinquant":
        raise ModelUnsupported(
            f"{checkpoint.name} is rotated, so {adapter.name} does not fit it",
            cause="an adapter is trained on activations that nobody has turned, and a SpinQuant "
            "file does not say by what matrix they are",
            fix="give the bfloat16 model, with --quantize int4 --rotate if it is to be small",
        )
    names = frozenset(checkpoint.weights.names())
    codes = [n for n in linear_names(checkpoint.config) if f"{n}.scales" in names]
    merged = [name for name in adapter.pairs if name not in codes]
    weights = AdaptedWeights(checkpoint, adapter, codes, branch)
    notes = [f"adapter {adapter.name} (rank {adapter.lora.rank}, scale {adapter.lora.scale:g})"]
    if merged:
        notes.append(f"merged into {len(merged)} float layers, rounded to bfloat16")
    quant = checkpoint.quant
    if codes:
        notes.append(f"a branch beside {len(codes)} int4 layers, in bfloat16")
        quant = replace(quant, form="qlora", lora=weights.lora)
    note = "; ".join(notes)
    return replace(checkpoint, weights=weights, quant=quant, notes=(*checkpoint.notes, note))


class AdaptedWeights:
    """The tensors of a model with an adapter; a `WeightSource`.

    Attributes:
        lora: rank and scale of the branches.
    """

    def __init__(
        self,
        checkpoint: Checkpoint,
        adapter: Adapter,
        codes: Sequence[str],
        branch: LoraConfig | None = None,
    ) -> None:
        self._source: WeightSource = checkpoint.weights
        self._config, self._adapter = checkpoint.config, adapter
        self._own = checkpoint.quant.lora
        rank = adapter.lora.rank + (self._own.rank if self._own else 0)
        self.lora = LoraConfig(rank, self._own.scale if self._own else adapter.lora.scale)
        self._free = 0  # ranks that are left over
        if branch is not None:
            self._free = branch.rank - rank
            self.lora = branch
        if self._free < 0 or (self._own and self._own.scale != self.lora.scale):
            raise UsageError(
                f"{adapter.name} does not fit: it needs a rank of {rank}, the branches have "
                f"{self.lora.rank}",
                cause="a bundle's branches have the rank of the adapter that it was compiled with",
                fix="compile the model with the adapter of the largest rank",
            )
        self._branches = {
            f"{name}.adaptor.{side}.weight": (name, side) for name in codes for side in "AB"
        }
        self._merged = {f"{name}.weight" for name in adapter.pairs if name not in codes}

    def names(self) -> Sequence[str]:
        """All tensors; those that are new come last."""
        return list(dict.fromkeys((*self._source.names(), *self._branches)))

    def info(self, name: str) -> TensorInfo:
        """Shape and dtype, without touching the data."""
        if name in self._branches:
            layer, side = self._branches[name]
            outputs, inputs = self._config.linear_shapes()[layer.split(".", 2)[2]]
            shape = (self.lora.rank, inputs) if side == "A" else (outputs, self.lora.rank)
            return TensorInfo(shape, "bfloat16")
        found = self._source.info(name)
        return TensorInfo(found.shape, "bfloat16") if name in self._merged else found

    def read(self, name: str) -> NDArray[Any]:
        """One tensor, merged or stacked."""
        if name in self._branches:
            return self._branch(*self._branches[name])
        values = self._source.read(name)
        if name not in self._merged:
            return values
        wide = from_bfloat16(values) if values.dtype == np.uint16 else values.astype(np.float32)
        a, b = self._adapter.pairs[name.removesuffix(".weight")]
        with single_threaded_blas():
            merged = wide + np.float32(self._adapter.lora.scale) * (b @ a)
        check_finite(name, merged)
        return to_bfloat16(merged)

    def _branch(self, layer: str, side: str) -> NDArray[np.uint16]:
        """One side of a branch, behind that of the checkpoint itself if it has one."""
        outputs, inputs = self._config.linear_shapes()[layer.split(".", 2)[2]]
        rank = self._adapter.lora.rank
        zeros = np.zeros((rank, inputs), np.float32), np.zeros((outputs, rank), np.float32)
        a, b = self._adapter.pairs.get(layer, zeros)
        if side == "A":
            parts, axis = [to_bfloat16(a)], 0
        else:
            share = np.float32(self._adapter.lora.scale / self.lora.scale)
            parts, axis = [to_bfloat16(b * share)], 1
        if self._own is not None:
            own = self._source.read(f"{layer}.adaptor.{side}.weight")
            parts.insert(0, own if own.dtype == np.uint16 else to_bfloat16(own))
        if self._free:
            shape = (self._free, inputs) if side == "A" else (outputs, self._free)
            parts.append(np.zeros(shape, np.uint16))
        return np.ascontiguousarray(np.concatenate(parts, axis))
