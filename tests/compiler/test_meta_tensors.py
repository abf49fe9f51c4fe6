"""Tensors that are missing, extra, of wrong shape or dtype, or hold bad values."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from types import ModuleType
from typing import Any

import numpy as np
import pytest
import torch

from llamac.compiler.checkpoint import (
    Checkpoint,
)
from llamac.compiler.frontends.meta import from_meta
from llamac.runtime.errors import (
    LlamacError,
    ModelUnsupported,
    TensorInvalid,
    ValuesInvalid,
)

Refused = Callable[..., LlamacError]
ReadAll = Callable[[Checkpoint], dict[str, np.ndarray]]

FORMS = ("spinquant", "qlora", "ptq", "float")


WQ = "layers.1.attention.wq"


@pytest.mark.parametrize(
    ("name", "make", "expected", "found"),
    [
        (f"{WQ}.weight", lambda t: t[:-1], "int8 [64, 64]", "int8 [63, 64]"),
        (f"{WQ}.weight", lambda t: t.flatten(), "int8 [64, 64]", "int8 [4096]"),
        (f"{WQ}.weight", lambda t: t.float(), "int8 [64, 64]", "float32 [64, 64]"),
        (f"{WQ}.weight", lambda t: t.to(torch.uint8), "int8 [64, 64]", "uint8 [64, 64]"),
        (f"{WQ}.scales", lambda t: t.bfloat16(), "float32 [64, 2]", "bfloat16 [64, 2]"),
        (f"{WQ}.scales", lambda t: t[:, :1], "float32 [64, 2]", "float32 [64, 1]"),
        ("output.scales", lambda t: t.t(), "float32 [96]", "float32 [1, 96]"),
        ("norm.weight", lambda t: t.to(torch.int8), "bfloat16 or float16 or", "int8 [64]"),
        (f"{WQ}.adaptor.A.weight", lambda t: t[:3], "[4, 64]", "bfloat16 [3, 64]"),
        (f"{WQ}.adaptor.B.weight", lambda t: t.t(), "[64, 4]", "bfloat16 [4, 64]"),
    ],
)
def test_wrong_shape_or_dtype_names_tensor_expected_and_found(
    name: str,
    make: Callable[[torch.Tensor], torch.Tensor],
    expected: str,
    found: str,
    write_meta: Callable[..., Path],
    meta_layout: ModuleType,
    refused: Refused,
) -> None:
    error = refused(
        TensorInvalid, "expected", write_meta("qlora", meta_layout.set_tensor(name, make))
    )
    assert error.message.startswith(f"{name} is {found}, expected ")
    assert expected in error.message


@pytest.mark.parametrize("form", FORMS)
def test_each_missing_tensor_is_named(
    form: str, write_meta: Callable[..., Path], meta_layout: ModuleType, refused: Refused
) -> None:
    config = meta_layout.SMALLEST
    optional = {"output.weight"} if form == "float" else set()
    for name in set(meta_layout.make_tensors(config, form)) - optional:
        folder = write_meta(form, lambda t, p, name=name: t.pop(name), config=config)
        refused(TensorInvalid, f"lacks {name}[.]", folder)


def test_a_missing_layer_is_counted(
    write_meta: Callable[..., Path], meta_layout: ModuleType, refused: Refused
) -> None:
    refused(
        TensorInvalid,
        r"lacks layers\.2.*\(and 15 more\)",
        write_meta("ptq", meta_layout.set_params(n_layers=3)),
    )


@pytest.mark.parametrize(
    ("name", "tensor"),
    [
        ("layers.0.attention.wq.bias", torch.zeros(64)),
        ("layers.2.ffn_norm.weight", torch.zeros(64)),
        ("output.zeros", torch.ones(96)),
        ("layers.0.attention.wk.zeros", torch.tensor([0, 0, 1], dtype=torch.int8)),
        ("nothing.zeros", torch.zeros(3)),
        (f"{WQ}.adaptor.C.weight", torch.zeros(3)),
        ("\ud800\x1b[31m", torch.zeros(3)),
    ],
)
def test_unknown_tensors_are_refused_by_name(
    name: str, tensor: torch.Tensor, write_meta: Callable[..., Path], refused: Refused
) -> None:
    folder = write_meta("qlora", lambda t, p: t.update({name: tensor}))
    error = refused(TensorInvalid, "does not have", folder)
    assert repr(name) in error.message


def test_wrong_ffn_width_blames_the_fields_that_give_it(
    write_meta: Callable[..., Path], meta_layout: ModuleType, refused: Refused
) -> None:
    error = refused(
        TensorInvalid, "feed_forward", write_meta("ptq", meta_layout.set_params(multiple_of=512))
    )
    assert "multiple_of and ffn_dim_multiplier" in error.cause


def test_r4_needs_a_power_of_two(
    write_meta: Callable[..., Path], meta_layout: ModuleType, refused: Refused, read_all: ReadAll
) -> None:
    config = replace(meta_layout.TINY, ffn_dim=192)
    refused(ModelUnsupported, "R4 cannot be applied", write_meta("spinquant", config=config))
    assert read_all(from_meta(write_meta("ptq", config=config)))


def test_columns_must_fill_groups(
    write_meta: Callable[..., Path], meta_layout: ModuleType, refused: Refused, read_all: ReadAll
) -> None:
    config = replace(meta_layout.TINY, ffn_dim=176)
    refused(ModelUnsupported, "not a multiple of 32", write_meta("ptq", config=config))
    assert read_all(from_meta(write_meta("float", config=config)))


@pytest.mark.parametrize(
    "fields", [{"quantization_args__group_size": 256}, {"quantization_args__scheme": "nf4"}]
)
def test_other_quantizations_are_unsupported(
    fields: dict[str, Any],
    write_meta: Callable[..., Path],
    meta_layout: ModuleType,
    refused: Refused,
) -> None:
    refused(
        ModelUnsupported, "group_size", write_meta("spinquant", meta_layout.set_params(**fields))
    )


def fill(index: tuple[int, ...], value: float) -> Callable[[torch.Tensor], torch.Tensor]:
    def make(tensor: torch.Tensor) -> torch.Tensor:
        tensor[index] = value
        return tensor

    return make


@pytest.mark.parametrize(
    ("form", "name", "index", "value"),
    [
        ("spinquant", f"{WQ}.weight", (63, 63), 8),
        ("spinquant", f"{WQ}.weight", (0, 0), -9),
        ("spinquant", f"{WQ}.scales", (63, 1), 0.0),
        ("spinquant", f"{WQ}.scales", (0, 0), -0.1),
        ("spinquant", f"{WQ}.scales", (5, 1), float("nan")),
        ("spinquant", "output.scales", (5, 0), float("inf")),
        ("spinquant", "norm.weight", (5,), float("nan")),
        ("qlora", f"{WQ}.adaptor.A.weight", (0, 5), float("inf")),
        ("float", f"{WQ}.weight", (63, 63), float("nan")),
    ],
)
def test_bad_values_are_found_on_read_unless_told_not_to(
    form: str,
    name: str,
    index: tuple[int, ...],
    value: float,
    write_meta: Callable[..., Path],
    meta_layout: ModuleType,
    refused: Refused,
    read_all: ReadAll,
) -> None:
    folder = write_meta(form, meta_layout.set_tensor(name, fill(index, value)))
    error = refused(ValuesInvalid, "expected", folder)
    assert error.message.startswith(name)
    assert read_all(from_meta(folder, check_values=False))


def test_values_are_not_read_at_open(
    write_meta: Callable[..., Path], meta_layout: ModuleType
) -> None:
    weights = from_meta(
        write_meta("ptq", meta_layout.set_tensor(f"{WQ}.weight", fill((0, 0), 99)))
    ).weights
    weights.read("layers.0.attention.wq.weight")
    with pytest.raises(ValuesInvalid):
        weights.read(f"{WQ}.weight")
