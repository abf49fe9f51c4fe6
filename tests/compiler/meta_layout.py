"""Write tiny random checkpoints in Meta's layouts, for tests of readers (not models that talk)."""

from __future__ import annotations

import base64
import json
import zipfile
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch

from llamac.compiler.config import LlamaConfig, RopeScaling

FORMS = ("spinquant", "qlora", "ptq", "float")
LORA_RANK = 4
LORA_SCALE = 2.0

TINY = LlamaConfig(
    dim=64,
    num_layers=2,
    num_heads=4,
    num_kv_heads=2,
    head_dim=16,
    ffn_dim=256,
    vocab_size=96,
    norm_eps=1e-5,
    rope_theta=500000.0,
    rope_scaling=RopeScaling(32.0),
)
SMALLEST = replace(TINY, dim=32, num_layers=1, num_heads=2, num_kv_heads=1, vocab_size=8)

Tensors = dict[str, torch.Tensor]
Params = dict[str, Any]


def make_params(config: LlamaConfig, form: str) -> Params:
    """`params.json` of a form; `multiple_of` alone makes the feed-forward width."""
    params: Params = {
        "dim": config.dim,
        "n_layers": config.num_layers,
        "n_heads": config.num_heads,
        "n_kv_heads": config.num_kv_heads,
        "vocab_size": config.vocab_size,
        "multiple_of": config.ffn_dim,
        "norm_eps": config.norm_eps,
        "rope_theta": config.rope_theta,
        "use_scaled_rope": config.rope_scaling is not None,
    }
    if form != "float":
        params["quantization_args"] = {
            "scheme": "int4_weight_int8_dynamic_activation",
            "group_size": 32,
            "spinquant": form == "spinquant",
        }
    if form == "qlora":
        params["lora_args"] = {"rank": LORA_RANK, "scale": LORA_SCALE}
    return params


class _Random:
    """Random tensors of the dtypes that checkpoints hold."""

    def __init__(self, seed: int) -> None:
        self.generator = torch.Generator().manual_seed(seed)

    def codes(self, shape: tuple[int, ...], low: int, high: int) -> torch.Tensor:
        return torch.randint(low, high + 1, shape, dtype=torch.int8, generator=self.generator)

    def scales(self, shape: tuple[int, ...]) -> torch.Tensor:
        return 0.001 + 0.01 * torch.rand(shape, generator=self.generator)

    def floats(self, shape: tuple[int, ...], dtype: torch.dtype) -> torch.Tensor:
        return (0.05 * torch.randn(shape, generator=self.generator)).to(dtype)


def make_tensors(
    config: LlamaConfig, form: str, *, seed: int = 0, dtype: torch.dtype = torch.bfloat16
) -> Tensors:
    """All tensors of a form; `dtype` is that of norms, adaptors and float weights."""
    random = _Random(seed)
    tensors: Tensors = {}
    for name in ("tok_embeddings", "output"):
        shape = (config.vocab_size, config.dim)
        if form == "float":
            tensors[f"{name}.weight"] = random.floats(shape, dtype)
        else:
            tensors[f"{name}.weight"] = random.codes(shape, -128, 127)
            tensors[f"{name}.scales"] = random.scales((config.vocab_size, 1))
    ones = torch.ones(config.dim, dtype=dtype)
    norm = ones if form == "spinquant" else ones + random.floats((config.dim,), dtype)
    tensors["norm.weight"] = norm.clone()
    for layer in range(config.num_layers):
        prefix = f"layers.{layer}."
        tensors[f"{prefix}attention_norm.weight"] = norm.clone()
        tensors[f"{prefix}ffn_norm.weight"] = norm.clone()
        for name, (rows, columns) in config.linear_shapes().items():
            linear = f"{prefix}{name}"
            if form == "float":
                tensors[f"{linear}.weight"] = random.floats((rows, columns), dtype)
                continue
            tensors[f"{linear}.weight"] = random.codes((rows, columns), -8, 7)
            tensors[f"{linear}.scales"] = random.scales((rows, columns // 32))
            if form == "qlora":
                a_shape, b_shape = (LORA_RANK, columns), (rows, LORA_RANK)
                tensors[f"{linear}.adaptor.A.weight"] = random.floats(a_shape, dtype)
                tensors[f"{linear}.adaptor.B.weight"] = random.floats(b_shape, dtype)
    return tensors


Change = Callable[[Tensors, Params], object]


def set_params(**fields: Any) -> Change:
    """Set fields of params.json; None removes one; "a__b" is field b of section a."""

    def change(tensors: Tensors, params: Params) -> None:
        for name, value in fields.items():
            *sections, field = name.split("__")
            target = params[sections[0]] if sections else params
            if value is None:
                del target[field]
            else:
                target[field] = value

    return change


def set_tensor(name: str, make: Callable[[torch.Tensor], torch.Tensor]) -> Change:
    """Replace one tensor by what `make` makes of it."""

    def change(tensors: Tensors, params: Params) -> None:
        tensors[name] = make(tensors[name])

    return change


def write_tokenizer(path: Path, num_ranks: int) -> None:
    """A tokenizer in tiktoken form whose tokens mean nothing."""
    tokens = (str(rank).encode() for rank in range(num_ranks))
    lines = (f"{base64.b64encode(token).decode()} {i}\n" for i, token in enumerate(tokens))
    path.write_text("".join(lines))


def write_checkpoint(
    folder: Path,
    form: str,
    *,
    config: LlamaConfig = TINY,
    change: Change | None = None,
    dtype: torch.dtype = torch.bfloat16,
) -> Path:
    """Write a checkpoint; `change` may spoil its tensors and parameters before that."""
    folder.mkdir(parents=True, exist_ok=True)
    tensors, params = make_tensors(config, form, dtype=dtype), make_params(config, form)
    if change is not None:
        change(tensors, params)
    torch.save(tensors, folder / "consolidated.00.pth")
    (folder / "params.json").write_text(json.dumps(params))
    write_tokenizer(folder / "tokenizer.model", config.vocab_size)
    return folder


def replace_pickle(path: Path, data: bytes) -> None:
    """Write a torch archive whose pickle is `data`."""
    with zipfile.ZipFile(path) as old:
        records = {entry.filename: old.read(entry) for entry in old.infolist()}
    with zipfile.ZipFile(path, "w") as new:
        for name, content in records.items():
            new.writestr(name, data if name.endswith("/data.pkl") else content)
