"""Write checkpoints in the layout of Meta's Llama 3.2 files: .pth, params.json, tokenizer.

`layout` says which tensors a checkpoint of a form has; `write_checkpoint` writes them from memory,
`reserve_checkpoint` makes a file of the right size whose tensors are filled in place afterwards,
so that a model larger than memory can be written.

With the same version of torch, equal tensors give equal bytes: `torch.save` stores no time and no
path, and its records follow the order of `layout`. Two things would change the bytes: another
file name (its stem is part of every record's name, so it is always `consolidated.00.pth`), and
another version of torch (its pickle and its version record).
"""

from __future__ import annotations

import json
import mmap
import shutil
from collections.abc import Collection, Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch._subclasses.fake_tensor import FakeTensorMode

from llamac.compiler.checkpoint import TensorInfo
from llamac.compiler.config import LLAMA_3_2_ROPE_FACTOR, LlamaConfig, QuantConfig
from llamac.compiler.quantize import EMBEDDING, OUTPUT, norm_names
from llamac.runtime.errors import TensorInvalid

CHECKPOINT_FILE = "consolidated.00.pth"
PARAMS_FILE = "params.json"
TOKENIZER_FILE = "tokenizer.model"

_TORCH_DTYPES = {
    "int8": torch.int8,
    "float32": torch.float32,
    "bfloat16": torch.bfloat16,
}
_NUMPY_DTYPES = {"int8": np.int8, "float32": np.float32, "bfloat16": np.uint16}


def layout(
    config: LlamaConfig, quant: QuantConfig, floats: Collection[str] = ()
) -> dict[str, TensorInfo]:
    """Names, shapes and dtypes of all tensors of a checkpoint, in the order of the file.

    A float checkpoint lists `output.weight` beside `tok_embeddings.weight`; when the model is
    tied, both names share one storage in the file.

    Args:
        config: of the model.
        quant: of the model.
        floats: layers of a quantized model that stay bfloat16. Meta's own files have none.

    Source: load hooks of llama-models, checked against the published sizes of Meta's files.
    """
    entries = _table_layout("tok_embeddings", config, quant, floats)
    for layer in range(config.num_layers):
        for part, shape in config.linear_shapes().items():
            entries |= _linear_layout(f"layers.{layer}.{part}", shape, quant, floats)
    entries |= {name: TensorInfo((config.dim,), "bfloat16") for name in norm_names(config)}
    return entries | _table_layout("output", config, quant, floats)


def _table_layout(
    name: str, config: LlamaConfig, quant: QuantConfig, floats: Collection[str]
) -> dict[str, TensorInfo]:
    shape = (config.vocab_size, config.dim)
    if quant.form == "float" or name in floats:
        return {f"{name}.weight": TensorInfo(shape, "bfloat16")}
    return {
        f"{name}.weight": TensorInfo(shape, "int8"),
        f"{name}.scales": TensorInfo((config.vocab_size, 1), "float32"),
    }


def _linear_layout(
    name: str, shape: tuple[int, int], quant: QuantConfig, floats: Collection[str]
) -> dict[str, TensorInfo]:
    if quant.form == "float" or name in floats:
        return {f"{name}.weight": TensorInfo(shape, "bfloat16")}
    outputs, inputs = shape
    entries = {
        f"{name}.weight": TensorInfo(shape, "int8"),
        f"{name}.scales": TensorInfo((outputs, inputs // quant.group_size), "float32"),
    }
    if quant.lora is not None:
        rank = quant.lora.rank
        entries[f"{name}.adaptor.A.weight"] = TensorInfo((rank, inputs), "bfloat16")
        entries[f"{name}.adaptor.B.weight"] = TensorInfo((outputs, rank), "bfloat16")
    return entries


def params(config: LlamaConfig, quant: QuantConfig) -> dict[str, Any]:
    """The content of `params.json`.

    It has no field for the RoPE factor (readers know it) nor for the feed-forward width, which
    follows from two others. A RoPE factor other than that of Llama 3.2 is written all the same, for
    our own reader.
    """
    multiplier, multiple_of = ffn_fields(config)
    fields: dict[str, Any] = {
        "dim": config.dim,
        "n_layers": config.num_layers,
        "n_heads": config.num_heads,
        "n_kv_heads": config.num_kv_heads,
        "vocab_size": config.vocab_size,
        "ffn_dim_multiplier": multiplier,
        "multiple_of": multiple_of,
        "norm_eps": config.norm_eps,
        "rope_theta": config.rope_theta,
        "use_scaled_rope": config.rope_scaling is not None,
    }
    scaling = config.rope_scaling
    if scaling is not None and scaling.factor != LLAMA_3_2_ROPE_FACTOR:
        fields["rope_scaling_factor"] = scaling.factor
    if quant.form != "float":
        fields["quantization_args"] = {
            "scheme": "int4_weight_int8_dynamic_activation",
            "group_size": quant.group_size,
        }
    if quant.form == "spinquant":
        fields["quantization_args"]["spinquant"] = True
    if quant.lora is not None:
        fields["lora_args"] = {"rank": quant.lora.rank, "scale": quant.lora.scale}
    return fields


def ffn_fields(config: LlamaConfig) -> tuple[float, int]:
    """(ffn_dim_multiplier, multiple_of) from which Meta's rule makes the feed-forward width.

    The rule: `multiple_of * ceil(int(int(8 * dim / 3) * multiplier) / multiple_of)`.
    """
    base = int(2 * 4 * config.dim / 3)
    multiple_of = min(256, config.ffn_dim & -config.ffn_dim)
    # Meta's own multipliers are round numbers (1.5 and 1.0), so round ones are tried first.
    for multiplier in (int(config.ffn_dim / base * 4) / 4, config.ffn_dim / base):
        if -(-int(base * multiplier) // multiple_of) * multiple_of == config.ffn_dim:
            return multiplier, multiple_of
    return config.ffn_dim / base, config.ffn_dim


def write_checkpoint(
    folder: Path,
    config: LlamaConfig,
    quant: QuantConfig,
    tensors: Mapping[str, NDArray[Any]],
    tokenizer: Path,
    floats: Collection[str] = (),
) -> None:
    """Write a checkpoint folder as Meta publishes them.

    Args:
        folder: made if missing; files of the same names are replaced.
        config: of the model.
        quant: of the model.
        tensors: all that `layout` names, bfloat16 as its bits in uint16. A float model may leave
            out `output.weight`: it is tied.
        tokenizer: file in tiktoken form, copied.
        floats: see `layout`.

    Raises:
        TensorInvalid: a tensor is missing, unknown, or of wrong shape or dtype.
    """
    expected = layout(config, quant, floats)
    given = dict(tensors)
    if quant.form == "float":
        given.setdefault(OUTPUT, given[EMBEDDING])
    _check_names(expected, given)
    # Two names of one array become one storage in the file, as in a tied model of Meta's.
    as_torch = {
        id(given[name]): _to_torch(name, given[name], info) for name, info in expected.items()
    }
    _write_side_files(folder, config, quant, tokenizer)
    torch.save({name: as_torch[id(given[name])] for name in expected}, folder / CHECKPOINT_FILE)


def _check_names(expected: Mapping[str, object], given: Mapping[str, object]) -> None:
    missing, unknown = expected.keys() - given.keys(), given.keys() - expected.keys()
    if missing or unknown:
        raise TensorInvalid(
            f"missing tensors {sorted(missing)[:3]}, unknown tensors {sorted(unknown)[:3]}",
            cause="the tensors do not belong to this configuration and form",
            fix="make them with quantize_model() from the same configuration",
        )


def _to_torch(name: str, value: NDArray[Any], info: TensorInfo) -> torch.Tensor:
    if value.shape != info.shape or value.dtype != _NUMPY_DTYPES[info.dtype]:
        raise TensorInvalid(
            f"{name} is {value.dtype} {value.shape}, not {info.dtype} {info.shape}",
            cause="the tensors do not belong to this configuration and form",
            fix="make them with quantize_model() from the same configuration",
        )
    return torch.from_numpy(np.ascontiguousarray(value)).view(_TORCH_DTYPES[info.dtype])


def _write_side_files(
    folder: Path, config: LlamaConfig, quant: QuantConfig, tokenizer: Path
) -> None:
    folder.mkdir(parents=True, exist_ok=True)
    (folder / PARAMS_FILE).write_text(json.dumps(params(config, quant), indent=2) + "\n")
    target = folder / TOKENIZER_FILE
    if not (target.exists() and target.samefile(tokenizer)):
        shutil.copyfile(tokenizer, target)


@contextmanager
def reserve_checkpoint(
    folder: Path, config: LlamaConfig, quant: QuantConfig, tokenizer: Path
) -> Iterator[dict[str, NDArray[Any]]]:
    """Write a checkpoint of zeros and hand out its tensors to fill, mapped from the file.

    What is written into the arrays goes to the file's pages and needs no memory of its own. The
    zip's checksums are those of the empty records; torch does not read them.

    Args:
        folder: made if missing; files of the same names are replaced.
        config: of the model.
        quant: of the model.
        tokenizer: file in tiktoken form, copied.

    Yields:
        Arrays by name, bfloat16 as its bits in uint16. A float model is tied: no `output.weight`.
    """
    _write_side_files(folder, config, quant, tokenizer)
    path = folder / CHECKPOINT_FILE
    with FakeTensorMode():
        made = {
            name: torch.empty(info.shape, dtype=_TORCH_DTYPES[info.dtype])
            for name, info in layout(config, quant).items()
        }
    if quant.form == "float":
        made[OUTPUT] = made[EMBEDDING]
    with torch.serialization.skip_data(materialize_fake_tensors=True):
        torch.save(made, path)
    with torch.serialization.set_default_mmap_options(mmap.MAP_SHARED):
        loaded = torch.load(path, mmap=True, weights_only=True)
    if quant.form == "float":
        del loaded[OUTPUT]
    yield {name: _to_numpy(tensor) for name, tensor in loaded.items()}


def _to_numpy(tensor: torch.Tensor) -> NDArray[Any]:
    bits = tensor.view(torch.uint16) if tensor.dtype == torch.bfloat16 else tensor
    return bits.numpy()
