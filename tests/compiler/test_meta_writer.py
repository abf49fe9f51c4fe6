"""Checkpoints that we write have exactly the layout of Meta's."""

from __future__ import annotations

import hashlib
import json
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from numpy.typing import NDArray

from llamac.compiler.config import (
    LLAMA_3_2_1B,
    LLAMA_3_2_3B,
    LlamaConfig,
    LoraConfig,
    QuantConfig,
    RopeScaling,
)
from llamac.compiler.meta_writer import (
    ffn_fields,
    layout,
    params,
    reserve_checkpoint,
    write_checkpoint,
)
from llamac.compiler.quantize import norm_names, quantize_model
from llamac.runtime.errors import TensorInvalid

CONFIG = LlamaConfig(
    dim=64,
    num_layers=2,
    num_heads=4,
    num_kv_heads=2,
    head_dim=16,
    ffn_dim=128,
    vocab_size=96,
    norm_eps=1e-5,
    rope_theta=5e5,
    rope_scaling=RopeScaling(factor=32.0),
)
FORMS = ("float", "ptq", "spinquant", "qlora")
# [outputs, inputs] of the linears of CONFIG, written out: the table of the format, not our code.
SHAPES = {
    "attention.wq": (64, 64),
    "attention.wk": (32, 64),
    "attention.wv": (32, 64),
    "attention.wo": (64, 64),
    "feed_forward.w1": (128, 64),
    "feed_forward.w2": (64, 128),
    "feed_forward.w3": (128, 64),
}


def float_weights(seed: int = 0) -> dict[str, NDArray[np.float32]]:
    rng = np.random.default_rng(seed)
    shapes: dict[str, tuple[int, ...]] = {"tok_embeddings.weight": (96, 64)}
    shapes |= {name: (64,) for name in norm_names(CONFIG)}
    for layer in range(2):
        shapes |= {f"layers.{layer}.{part}.weight": shape for part, shape in SHAPES.items()}
    return {n: rng.standard_normal(s).astype(np.float32) for n, s in shapes.items()}


@pytest.fixture
def tokenizer(tmp_path: Path) -> Path:
    path = tmp_path / "ranks"
    path.write_text("AA== 0\n")
    return path


def write(form: str, folder: Path, tokenizer: Path) -> dict[str, Any]:
    quant, tensors = quantize_model(CONFIG, float_weights(), form)
    write_checkpoint(folder, CONFIG, quant, tensors, tokenizer)
    loaded: dict[str, Any] = torch.load(folder / "consolidated.00.pth", weights_only=True)
    return loaded


def expected_table(form: str) -> dict[str, tuple[torch.dtype, tuple[int, ...]]]:
    """Section 1.2 of the format notes, for CONFIG."""
    plain = form == "float"
    table = torch.bfloat16 if plain else torch.int8
    expected: dict[str, tuple[torch.dtype, tuple[int, ...]]] = {}
    for name in ("tok_embeddings", "output"):
        expected[f"{name}.weight"] = (table, (96, 64))
        if not plain:
            expected[f"{name}.scales"] = (torch.float32, (96, 1))
    norms = ["norm", *(f"layers.{i}.{k}_norm" for i in (0, 1) for k in ("attention", "ffn"))]
    expected |= {f"{name}.weight": (torch.bfloat16, (64,)) for name in norms}
    for name, (n, k) in ((f"layers.{i}.{p}", s) for i in (0, 1) for p, s in SHAPES.items()):
        expected[f"{name}.weight"] = (table, (n, k))
        if not plain:
            expected[f"{name}.scales"] = (torch.float32, (n, k // 32))
        if form == "qlora":
            expected[f"{name}.adaptor.A.weight"] = (torch.bfloat16, (16, k))
            expected[f"{name}.adaptor.B.weight"] = (torch.bfloat16, (n, 16))
    return expected


@pytest.mark.parametrize("form", FORMS)
def test_files_hold_exactly_the_table_of_the_format(
    form: str, tmp_path: Path, tokenizer: Path
) -> None:
    loaded = write(form, tmp_path / form, tokenizer)
    assert {n: (t.dtype, tuple(t.shape)) for n, t in loaded.items()} == expected_table(form)
    assert sorted(path.name for path in (tmp_path / form).iterdir()) == [
        "consolidated.00.pth",
        "params.json",
        "tokenizer.model",
    ]
    assert (tmp_path / form / "tokenizer.model").read_text() == "AA== 0\n"
    fields = json.loads((tmp_path / form / "params.json").read_text())
    assert fields["dim"] == 64 and ("quantization_args" in fields) == (form != "float")


@pytest.mark.parametrize("form", FORMS)
def test_values_come_back_bit_by_bit(form: str, tmp_path: Path, tokenizer: Path) -> None:
    loaded = write(form, tmp_path, tokenizer)
    _, tensors = quantize_model(CONFIG, float_weights(), form)
    for name, value in tensors.items():
        stored = loaded[name]
        bits = stored.view(torch.uint16) if stored.dtype == torch.bfloat16 else stored
        np.testing.assert_array_equal(bits.numpy(), value, err_msg=name)


def test_a_tied_float_model_stores_its_table_once(tmp_path: Path, tokenizer: Path) -> None:
    loaded = write("float", tmp_path, tokenizer)
    assert loaded["output.weight"].data_ptr() == loaded["tok_embeddings.weight"].data_ptr()


@pytest.mark.parametrize("form", FORMS)
def test_equal_tensors_give_equal_bytes(form: str, tmp_path: Path, tokenizer: Path) -> None:
    digests = set()
    for folder in (tmp_path / "first", tmp_path / "second"):
        write(form, folder, tokenizer)
        files = sorted(folder.iterdir())
        digests.add(hashlib.sha256(b"".join(path.read_bytes() for path in files)).hexdigest())
    assert len(digests) == 1


def test_params_of_each_form() -> None:
    sizes = {
        "dim": 64,
        "n_layers": 2,
        "n_heads": 4,
        "n_kv_heads": 2,
        "vocab_size": 96,
        "ffn_dim_multiplier": 0.75,
        "multiple_of": 128,
        "norm_eps": 1e-5,
        "rope_theta": 5e5,
        "use_scaled_rope": True,
    }
    scheme = {"scheme": "int4_weight_int8_dynamic_activation", "group_size": 32}
    spinquant = QuantConfig("spinquant", hadamard_r4=True)
    qlora = QuantConfig("qlora", lora=LoraConfig(16, 2.0))
    assert params(CONFIG, QuantConfig("float")) == sizes
    assert params(CONFIG, QuantConfig("ptq")) == sizes | {"quantization_args": scheme}
    assert params(CONFIG, spinquant) == sizes | {"quantization_args": scheme | {"spinquant": True}}
    assert params(CONFIG, qlora) == sizes | {
        "quantization_args": scheme,
        "lora_args": {"rank": 16, "scale": 2.0},
    }
    unscaled = replace(CONFIG, rope_scaling=None)
    assert params(unscaled, QuantConfig("float"))["use_scaled_rope"] is False


@pytest.mark.parametrize(
    ("config", "fields"), [(LLAMA_3_2_1B, (1.5, 256)), (LLAMA_3_2_3B, (1.0, 256))]
)
def test_feed_forward_fields_equal_those_of_meta(
    config: LlamaConfig, fields: tuple[float, int]
) -> None:
    assert ffn_fields(config) == fields


@pytest.mark.parametrize("dim", [64, 96, 128, 2048])
@pytest.mark.parametrize("ffn_dim", [37, 172, 256, 352, 512, 8192])
def test_feed_forward_fields_give_back_the_width(dim: int, ffn_dim: int) -> None:
    multiplier, multiple_of = ffn_fields(replace(CONFIG, dim=dim, ffn_dim=ffn_dim))
    hidden = int(multiplier * int(2 * (4 * dim) / 3))
    assert multiple_of * ((hidden + multiple_of - 1) // multiple_of) == ffn_dim


@pytest.mark.parametrize(
    ("form", "gibibytes"), [("spinquant", 1.510), ("qlora", 1.531), ("float", 2.302)]
)
def test_the_layout_of_1b_has_the_published_size(form: str, gibibytes: float) -> None:
    quant = {
        "spinquant": QuantConfig("spinquant", hadamard_r4=True),
        "qlora": QuantConfig("qlora", lora=LoraConfig(16, 2.0)),
        "float": QuantConfig("float"),
    }[form]
    entries = layout(LLAMA_3_2_1B, quant)
    if form == "float":
        entries.pop("output.weight")
    widths = {"int8": 1, "bfloat16": 2, "float32": 4}
    total = sum(int(np.prod(info.shape)) * widths[info.dtype] for info in entries.values())
    assert round(total / 2**30, 3) == gibibytes


@pytest.mark.parametrize(
    ("name", "change", "message"),
    [
        ("norm.weight", None, "missing tensors .'norm.weight'"),
        ("extra.weight", np.zeros(3, np.int8), "unknown tensors .'extra.weight'"),
        ("norm.weight", np.zeros(64, np.float32), "norm.weight is float32"),
        ("layers.0.attention.wq.weight", np.zeros((64, 32), np.int8), r"\(64, 32\), not int8"),
    ],
)
def test_tensors_of_another_layout_are_refused(
    name: str, change: NDArray[Any] | None, message: str, tmp_path: Path, tokenizer: Path
) -> None:
    quant, tensors = quantize_model(CONFIG, float_weights(), "ptq")
    changed = {**tensors, name: change} if change is not None else dict(tensors)
    if change is None:
        del changed[name]
    with pytest.raises(TensorInvalid, match=message):
        write_checkpoint(tmp_path / "out", CONFIG, quant, changed, tokenizer)
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize("form", FORMS)
def test_a_reserved_file_filled_in_place_reads_like_a_written_one(
    form: str, tmp_path: Path, tokenizer: Path
) -> None:
    written = write(form, tmp_path / "written", tokenizer)
    quant, tensors = quantize_model(CONFIG, float_weights(), form)
    with reserve_checkpoint(tmp_path / "filled", CONFIG, quant, tokenizer) as targets:
        assert targets.keys() == tensors.keys()
        for name, target in targets.items():
            target[...] = tensors[name]
    filled = torch.load(tmp_path / "filled" / "consolidated.00.pth", weights_only=True)
    assert list(filled) == list(written)
    assert all(torch.equal(filled[name], written[name]) for name in written)
