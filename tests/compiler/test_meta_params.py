"""Meta's `params.json`: the RoPE rule, forms, and every way a field can be wrong."""

from __future__ import annotations

import json
import os
from collections.abc import Callable
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest
import torch

from llamac.compiler.config import QuantConfig, RopeScaling
from llamac.compiler.frontends.meta import from_meta
from llamac.runtime.errors import (
    LlamacError,
    ParamsInvalid,
    UsageError,
)

Refused = Callable[..., LlamacError]


def test_fields_under_model_are_found(write_meta: Callable[..., Path]) -> None:
    folder = write_meta("qlora")
    params = json.loads((folder / "params.json").read_text())
    plain = from_meta(folder)
    (folder / "params.json").write_text(json.dumps({"model": params}))
    nested = from_meta(folder)
    assert (nested.config, nested.quant) == (plain.config, plain.quant)


@pytest.mark.parametrize(
    ("fields", "option", "factor", "note"),
    [
        ({}, None, 32.0, "RoPE factor 32 assumed: use_scaled_rope is true"),
        ({}, 8.0, 8.0, "RoPE factor 8, given by the user"),
        ({"use_scaled_rope": False}, None, None, "use_scaled_rope is false"),
        ({"use_scaled_rope": None}, None, None, "use_scaled_rope is missing"),
        ({"use_scaled_rope": False}, 4.0, 4.0, "RoPE factor 4, given by the user"),
        ({"rope_scaling_factor": 16}, None, 16.0, "RoPE factor 16 from params.json"),
    ],
)
def test_rope_factor_and_its_note(
    fields: dict[str, Any],
    option: float | None,
    factor: float | None,
    note: str,
    write_meta: Callable[..., Path],
    meta_layout: ModuleType,
) -> None:
    checkpoint = from_meta(
        write_meta("float", meta_layout.set_params(**fields)), rope_factor=option
    )
    expected = None if factor is None else RopeScaling(factor)
    assert checkpoint.config.rope_scaling == expected
    assert any(note in text for text in checkpoint.notes)


@pytest.mark.parametrize("factor", [0.5, float("nan"), float("inf"), -1.0])
def test_impossible_rope_factor_is_a_usage_error(
    factor: float, write_meta: Callable[..., Path], refused: Refused
) -> None:
    refused(UsageError, "RoPE factor", write_meta("float"), rope_factor=factor)


@pytest.mark.parametrize("flag", [None, False])
def test_without_spinquant_flag_and_adaptors_the_assumption_is_noted(
    flag: bool | None, write_meta: Callable[..., Path], meta_layout: ModuleType
) -> None:
    checkpoint = from_meta(
        write_meta("spinquant", meta_layout.set_params(quantization_args__spinquant=flag))
    )
    assert checkpoint.quant == QuantConfig("ptq", 32)
    text = "\n".join(checkpoint.notes)
    assert "without R4 assumed" in text
    assert ("missing" if flag is None else "false") in text
    assert "set quantization_args.spinquant to true" in text  # its norm weights are all 1


def test_spinquant_norms_that_are_not_one_are_noted(write_meta: Callable[..., Path]) -> None:
    def spoil(tensors: dict[str, torch.Tensor], params: dict[str, Any]) -> None:
        tensors["layers.1.ffn_norm.weight"][3] = 0.5

    notes = from_meta(write_meta("spinquant", spoil)).notes
    assert any("1 of 5 norm weights" in n and "layers.1.ffn_norm.weight" in n for n in notes)
    assert not any("not all 1" in note for note in from_meta(write_meta("spinquant")).notes)


@pytest.mark.parametrize(
    ("fields", "message"),
    [
        ({"dim": None}, "dim is missing"),
        ({"n_layers": None}, "n_layers is missing"),
        ({"vocab_size": None}, "vocab_size is missing"),
        ({"norm_eps": None}, "norm_eps is missing"),
        ({"rope_theta": None}, "rope_theta is missing"),
        ({"multiple_of": None}, "multiple_of is missing"),
        ({"dim": "64"}, "dim is '64', expected an integer"),
        ({"dim": True}, "dim is True, expected an integer"),
        ({"dim": 64.5}, "dim is 64.5"),
        ({"dim": [[]]}, "dim is a list"),
        ({"n_layers": 0}, "n_layers is 0"),
        ({"n_layers": 10**9}, "num_layers is 1000000000"),
        ({"n_heads": 3}, "n_heads is 3, expected a divisor of dim, which is 64"),
        ({"n_kv_heads": 3}, "n_kv_heads is 3, expected a divisor of n_heads, which is 4"),
        ({"vocab_size": -1}, "vocab_size is -1"),
        ({"norm_eps": 2.0}, "norm_eps is 2.0"),
        ({"norm_eps": float("nan")}, "norm_eps is nan"),
        ({"rope_theta": float("inf")}, "rope_theta is inf"),
        ({"use_scaled_rope": "yes"}, "use_scaled_rope is 'yes', expected true or false"),
        ({"ffn_dim_multiplier": -1}, "ffn_dim_multiplier is -1"),
        ({"quantization_args": None}, "quantization_args is missing"),
        ({"quantization_args__group_size": None}, "quantization_args.group_size is missing"),
        ({"quantization_args__spinquant": 1}, "quantization_args.spinquant is 1"),
        ({"quantization_args__spinquant": True}, "expected false, because .* LoRA"),
        ({"lora_args": None}, "lora_args is missing"),
        ({"lora_args__rank": None}, "lora_args.rank is missing"),
        ({"lora_args__scale": 0}, "lora_args.scale is 0"),
    ],
)
def test_a_bad_field_of_params_is_named(
    fields: dict[str, Any],
    message: str,
    write_meta: Callable[..., Path],
    meta_layout: ModuleType,
    refused: Refused,
) -> None:
    refused(ParamsInvalid, message, write_meta("qlora", meta_layout.set_params(**fields)))


def test_quantization_of_a_float_file_is_a_contradiction(
    write_meta: Callable[..., Path], meta_layout: ModuleType, refused: Refused
) -> None:
    change = meta_layout.set_params(quantization_args={"group_size": 32})
    refused(ParamsInvalid, "quantization_args", write_meta("float", change))


@pytest.mark.parametrize(
    "content", ["", "{", "[]", "3", "nul", "\x00\xff", "[" * 100_000, '{"dim": 1' + "0" * 5000]
)
def test_params_that_are_no_object_are_refused(
    content: str, write_meta: Callable[..., Path], refused: Refused
) -> None:
    folder = write_meta("float")
    (folder / "params.json").write_bytes(content.encode("latin-1"))
    refused(ParamsInvalid, "not a JSON object", folder)


def test_params_of_absurd_size_are_not_read(
    write_meta: Callable[..., Path], refused: Refused
) -> None:
    folder = write_meta("float")
    os.truncate(folder / "params.json", 1 << 32)
    error = refused(ParamsInvalid, "not a JSON object", folder)
    assert "4294967296 bytes" in error.cause
