"""Adapters of the user: merged exactly, kept as branches, or refused with the reason."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from types import ModuleType
from typing import Any

import numpy as np
import pytest

from llamac.compiler.checkpoint import Checkpoint
from llamac.compiler.floats import from_bfloat16, to_bfloat16
from llamac.compiler.frontends.meta import from_meta
from llamac.compiler.lora_adapter import apply_adapter, read_adapter
from llamac.compiler.progress import SilentProgress
from llamac.compiler.quantize import linear_names
from llamac.compiler.quantize_request import QuantizeRequest, quantize
from llamac.compiler.reference_model import ReferenceModel
from llamac.runtime.errors import (
    CheckpointMissing,
    CheckpointUnreadable,
    LlamacError,
    ModelUnsupported,
    ParamsInvalid,
    TensorInvalid,
    ValuesInvalid,
)

EXAMPLES = Path(__file__).resolve().parents[2] / "examples" / "tiny-llama"
QKV = ["self_attn.q_proj", "self_attn.k_proj", "self_attn.v_proj"]
ALL = [*QKV, "self_attn.o_proj", "mlp.gate_proj", "mlp.up_proj", "mlp.down_proj"]
TOKENS = [1, 40, 300, 77, 512, 9, 200, 640, 33, 800, 5, 150]
RANK = 4


@pytest.fixture(scope="module")
def int4(tmp_path_factory: pytest.TempPathFactory) -> Checkpoint:
    """The example model with the nearest codes."""
    out = tmp_path_factory.mktemp("int4") / "model"
    quantize(EXAMPLES / "bf16", out, QuantizeRequest(), SilentProgress())
    return from_meta(out)


def halves(values: Any, head_dim: int) -> Any:
    """Rows of q or k from pairs that turn together into Hugging Face's halves."""
    heads = values.reshape(-1, head_dim // 2, 2, values.shape[1])
    return heads.transpose(0, 2, 1, 3).reshape(values.shape)


def test_float_layers_take_the_adapter_in(
    tiny_float: Checkpoint, peft_layout: ModuleType, tmp_path: Path
) -> None:
    """In Hugging Face's order of rows, W + scale * B A in float32, rounded once."""
    config = tiny_float.config
    tensors = peft_layout.matrices(config, ["self_attn.q_proj", "mlp.down_proj"], RANK)
    folder = peft_layout.write_adapter(tmp_path / "own", tensors, RANK, lora_alpha=6)
    made = apply_adapter(tiny_float, read_adapter(folder, config))
    assert made.quant == tiny_float.quant
    assert "merged into 8 float layers" in made.notes[-1]
    for name in linear_names(config):
        before, after = (c.weights.read(f"{name}.weight") for c in (tiny_float, made))
        layer, part = name.split(".")[1], name.split(".", 2)[2]
        if part not in ("attention.wq", "feed_forward.w2"):
            np.testing.assert_array_equal(after, before)
            continue
        theirs = next(key for key, value in peft_layout.PARTS.items() if value == part)
        prefix = f"{peft_layout.PREFIX}.{layer}.{theirs}.lora_"
        a, b = (tensors[f"{prefix}{side}.weight"] for side in "AB")
        turn = part == "attention.wq"
        wide = [
            halves(w, config.head_dim) if turn else w for w in map(from_bfloat16, (before, after))
        ]
        merged = to_bfloat16(wide[0] + np.float32(1.5) * (b @ a))
        np.testing.assert_array_equal(to_bfloat16(wide[1]), merged)


def test_codes_keep_it_as_a_branch(
    tiny_float: Checkpoint, int4: Checkpoint, peft_layout: ModuleType, tmp_path: Path
) -> None:
    """The same change of the model as in floats; layers without a branch get zeros."""
    tensors = peft_layout.matrices(int4.config, QKV, RANK, 0.2)
    adapter = read_adapter(peft_layout.write_adapter(tmp_path / "a", tensors, RANK), int4.config)
    made = apply_adapter(int4, adapter)
    assert made.quant.lora == adapter.lora == type(adapter.lora)(RANK, 2.0)
    names = made.weights.names()
    assert sum(name.endswith("adaptor.A.weight") for name in names) == 28
    assert not made.weights.read("layers.0.feed_forward.w1.adaptor.A.weight").any()
    for name in names:
        info = made.weights.info(name)
        assert made.weights.read(name).shape == info.shape
    plain, branch = (ReferenceModel(c).logits(TOKENS) for c in (int4, made))
    merged = ReferenceModel(apply_adapter(tiny_float, adapter)).logits(TOKENS)
    change = np.abs(merged - ReferenceModel(tiny_float).logits(TOKENS)).mean()
    assert np.abs(branch - merged).mean() < 0.3 * change
    assert np.abs(plain - merged).mean() > 0.7 * change


def test_a_branch_stands_behind_that_of_the_file(peft_layout: ModuleType, tmp_path: Path) -> None:
    """A QLoRA model has two branches then; both act."""
    qlora = from_meta(EXAMPLES / "qlora")
    tensors = peft_layout.matrices(qlora.config, ALL, RANK, 0.2)
    folder = peft_layout.write_adapter(tmp_path / "a", tensors, RANK, lora_alpha=2)
    made = apply_adapter(qlora, read_adapter(folder, qlora.config))
    assert qlora.quant.lora is not None and made.quant.lora is not None
    assert made.quant.lora.rank == qlora.quant.lora.rank + RANK
    name = "layers.1.attention.wv"

    def delta(checkpoint: Checkpoint) -> Any:
        a, b = (from_bfloat16(checkpoint.weights.read(f"{name}.adaptor.{s}.weight")) for s in "AB")
        assert checkpoint.quant.lora is not None
        return checkpoint.quant.lora.scale * b @ a

    prefix = f"{peft_layout.PREFIX}.1.self_attn.v_proj.lora_"
    own = 0.5 * tensors[f"{prefix}B.weight"] @ tensors[f"{prefix}A.weight"]
    np.testing.assert_allclose(delta(made) - delta(qlora), own, atol=2e-3)


def test_rslora_divides_by_the_root_and_dtypes_are_read_alike(
    tiny_float: Checkpoint, peft_layout: ModuleType, tmp_path: Path
) -> None:
    tensors = peft_layout.matrices(tiny_float.config, QKV, RANK)
    rounded = {name: from_bfloat16(to_bfloat16(value)) for name, value in tensors.items()}
    bits = {name: to_bfloat16(value) for name, value in tensors.items()}
    made = [
        read_adapter(
            peft_layout.write_adapter(
                tmp_path / f"{i}", given, RANK, use_rslora=True, lora_alpha=8
            ),
            tiny_float.config,
        )
        for i, given in enumerate((rounded, bits))
    ]
    assert made[0].lora.scale == made[1].lora.scale == 4.0
    for name, (a, b) in made[0].pairs.items():
        np.testing.assert_array_equal(a, made[1].pairs[name][0])
        np.testing.assert_array_equal(b, made[1].pairs[name][1])


@pytest.mark.parametrize(
    ("fields", "match"),
    [
        ({"use_dora": True}, "use_dora is True"),
        ({"bias": "all"}, "bias is 'all'"),
        ({"peft_type": "IA3"}, "peft_type is 'IA3'"),
        ({"rank_pattern": {"q_proj": 8}}, "rank_pattern is"),
        ({"modules_to_save": ["lm_head"]}, "modules_to_save is"),
        ({"init_lora_weights": "pissa_niter_4"}, "init_lora_weights is"),
        ({"layer_replication": [[0, 2]]}, "layer_replication is"),
    ],
)
def test_more_than_matrices_is_refused(
    fields: dict[str, Any],
    match: str,
    tiny_float: Checkpoint,
    peft_layout: ModuleType,
    tmp_path: Path,
    check_advice: Callable[[LlamacError], None],
) -> None:
    tensors = peft_layout.matrices(tiny_float.config, QKV, RANK)
    folder = peft_layout.write_adapter(tmp_path / "a", tensors, RANK, **fields)
    with pytest.raises(ModelUnsupported, match=match) as caught:
        read_adapter(folder, tiny_float.config)
    check_advice(caught.value)


def _change_name(name: str) -> Callable[[dict[str, Any]], None]:
    def change(tensors: dict[str, Any]) -> None:
        tensors[name] = tensors.pop(next(iter(tensors)))

    return change


def _change_values(values: Any) -> Callable[[dict[str, Any]], None]:
    def change(tensors: dict[str, Any]) -> None:
        tensors[next(iter(tensors))] = values

    return change


@pytest.mark.parametrize(
    ("change", "kind", "match"),
    [
        (_change_name("base_model.model.lm_head.lora_A.weight"), ModelUnsupported, "lm_head"),
        (
            _change_name("base_model.model.model.layers.9.self_attn.q_proj.lora_A.weight"),
            TensorInvalid,
            "a layer 9",
        ),
        (
            _change_name("base_model.model.model.layers.0.mlp.up_proj.lora_B.weight"),
            TensorInvalid,
            "lora_A of layers.0.attention.wq is missing",
        ),
        (_change_values(np.zeros((8, 128), np.float32)), TensorInvalid, r"is \[8, 128\]"),
        (_change_values(np.zeros((4, 128), np.int8)), TensorInvalid, "is I8"),
        (_change_values(np.full((4, 128), np.nan, np.float32)), ValuesInvalid, "infinite or NaN"),
        (dict.clear, TensorInvalid, "is empty"),
    ],
)
def test_matrices_that_do_not_fit_are_refused(
    change: Callable[[dict[str, Any]], None],
    kind: type[LlamacError],
    match: str,
    tiny_float: Checkpoint,
    peft_layout: ModuleType,
    tmp_path: Path,
    check_advice: Callable[[LlamacError], None],
) -> None:
    tensors = peft_layout.matrices(tiny_float.config, ["self_attn.q_proj"], RANK)
    change(tensors)
    folder = peft_layout.write_adapter(tmp_path / "a", tensors, RANK)
    with pytest.raises(kind, match=match) as caught:
        read_adapter(folder, tiny_float.config)
    check_advice(caught.value)


def test_damaged_files_are_refused(
    tiny_float: Checkpoint, peft_layout: ModuleType, tmp_path: Path
) -> None:
    config = tiny_float.config
    with pytest.raises(CheckpointMissing, match=r"adapter_config\.json"):
        read_adapter(tmp_path, config)
    tensors = peft_layout.matrices(config, QKV, RANK)
    folder = peft_layout.write_adapter(tmp_path / "a", tensors, RANK)
    for r in (0, "4", None, True, 10**6):
        settings = json.loads((folder / "adapter_config.json").read_text("utf-8")) | {"r": r}
        (folder / "adapter_config.json").write_text(json.dumps(settings), "utf-8")
        with pytest.raises(ParamsInvalid, match="r is"):
            read_adapter(folder, config)
    (folder / "adapter_config.json").write_text("{", "utf-8")
    with pytest.raises(CheckpointUnreadable):
        read_adapter(folder, config)
    peft_layout.write_adapter(tmp_path / "a", tensors, RANK)
    content = (folder / "adapter_model.safetensors").read_bytes()
    (folder / "adapter_model.safetensors").write_bytes(content[:-5])
    with pytest.raises(CheckpointUnreadable):
        read_adapter(folder, config)


def test_rotated_models_are_refused(
    peft_layout: ModuleType, tmp_path: Path, check_advice: Callable[[LlamacError], None]
) -> None:
    spinquant = from_meta(EXAMPLES / "spinquant")
    tensors = peft_layout.matrices(spinquant.config, QKV, RANK)
    folder = peft_layout.write_adapter(tmp_path / "a", tensors, RANK)
    with pytest.raises(ModelUnsupported, match="is rotated") as caught:
        apply_adapter(spinquant, read_adapter(folder, spinquant.config))
    check_advice(caught.value)
