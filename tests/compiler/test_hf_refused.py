"""Quantized folders of Hugging Face that are damaged, or in a form that cannot be read."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from llamac.compiler.frontends.hf import from_hf
from llamac.runtime.errors import (
    CheckpointUnreadable,
    LlamacError,
    ModelUnsupported,
    ParamsInvalid,
    TensorInvalid,
    ValuesInvalid,
)

Refused = Callable[..., LlamacError]
Write = Callable[..., Path]


def config_of(**fields: Any) -> Callable[[Any], object]:
    return lambda layout: layout.config["quantization_config"].update(fields)


def group_of(part: str, **fields: Any) -> Callable[[Any], object]:
    def change(layout: Any) -> None:
        group = layout.config["quantization_config"]["config_groups"]["group_0"]
        if part in group and group[part] is not None:
            group[part].update(fields)
        else:
            group[part] = fields

    return change


def spoil(name: str, make: Callable[[np.ndarray], np.ndarray]) -> Callable[[Any], object]:
    def change(layout: Any) -> None:
        tensor = layout.tensors[f"model.layers.1.{name}"]
        layout.tensors[f"model.layers.1.{name}"] = replace(tensor, data=make(tensor.data))

    return change


def drop(name: str) -> Callable[[Any], object]:
    return lambda layout: layout.tensors.pop(f"model.layers.1.{name}")


def kind_of(text: str) -> Callable[[Any], object]:
    def change(layout: Any) -> None:
        layout.metadata = dict.fromkeys(layout.metadata, text)

    return change


def put(place: tuple[int, int], value: Any) -> Callable[[np.ndarray], np.ndarray]:
    def make(data: np.ndarray) -> np.ndarray:
        changed = data.copy()
        changed[place] = value
        return changed

    return make


Int4Tensor = '{"_type": "Int4TilePackedTo4dTensor", "_data": {}}'
UNSUPPORTED: dict[str, tuple[str, str, Callable[[Any], object]]] = {
    "an unknown method": ("gptq", "quant_method is 'hqq'", config_of(quant_method="hqq")),
    "no method": ("gptq", "quant_method is missing", config_of(quant_method=None)),
    "a method that is none": ("gptq", "quant_method is", config_of(quant_method=["gptq"])),
    "GPTQ of 8 bits": ("gptq", "bits is 8", config_of(bits=8)),
    "GPTQ for Marlin": ("gptq", "checkpoint_format", config_of(checkpoint_format="marlin")),
    "GPTQ for Marlin, older": ("gptq", "is_marlin", config_of(is_marlin_format=True)),
    "AWQ of 3 bits": ("awq", "bits is 3", config_of(bits=3)),
    "AWQ for gemv": ("awq", "version is 'gemv'", config_of(version="gemv")),
    "compressed in another way": (
        "compressed-tensors",
        "format is",
        config_of(format="float-quantized"),
    ),
    "a compressed cache": (
        "compressed-tensors",
        "kv_cache_scheme",
        config_of(kv_cache_scheme={"num_bits": 8}),
    ),
    "online rotations": (
        "compressed-tensors",
        "transform_config",
        config_of(transform_config={"config_groups": {"R4": {}}}),
    ),
    "floats of 4 bits": (
        "compressed-tensors",
        "weights.type is 'float'",
        group_of("weights", type="float"),
    ),
    "8 bits": ("compressed-tensors", "num_bits is 8", group_of("weights", num_bits=8)),
    "blocks": ("compressed-tensors", "strategy is", group_of("weights", strategy="block")),
    "activations of 4 bits": (
        "compressed-tensors",
        "input_activations are no dynamic int8",
        group_of("input_activations", num_bits=4, type="int", dynamic=True),
    ),
    "packed for a GPU": ("torchao", "Int4TilePackedTo4dTensor", kind_of(Int4Tensor)),
    "torchao of 3 bits": (
        "torchao",
        "of 'int3'",
        kind_of(
            '{"_type": "IntxUnpackedToInt8Tensor", "_data": {"target_dtype": {"_data": "int3"}}}'
        ),
    ),
    "torchao of nothing": ("torchao", "of no kind", kind_of("{")),
    "torchao of a list": ("torchao", "of no kind", kind_of("[]")),
}


@pytest.mark.parametrize("name", UNSUPPORTED)
def test_other_schemes_are_refused(name: str, write_quantized: Write, refused: Refused) -> None:
    scheme, match, change = UNSUPPORTED[name]
    refused(ModelUnsupported, match, write_quantized(scheme, 32, change))


def test_activations_of_8_bits_are_what_we_compute(write_quantized: Write) -> None:
    change = group_of("input_activations", num_bits=8, type="int", dynamic=True)
    assert from_hf(write_quantized("compressed-tensors", 32, change)).quant.form == "ptq"


UP = "mlp.up_proj"
DAMAGED: dict[str, tuple[str, type[LlamacError], str, Callable[[Any], object]]] = {
    "no codes": ("gptq", TensorInvalid, "qweight is missing", drop(f"{UP}.qweight")),
    "no zeros": ("awq", TensorInvalid, "qzeros is missing", drop(f"{UP}.qzeros")),
    "no scales": ("gptq", TensorInvalid, "scales is missing", drop(f"{UP}.scales")),
    "codes of another shape": (
        "awq",
        TensorInvalid,
        "qweight is I32",
        spoil(f"{UP}.qweight", lambda a: a[:-1]),
    ),
    "scales of another shape": (
        "gptq",
        TensorInvalid,
        "expected scales of groups",
        spoil(f"{UP}.scales", lambda a: a[:-1]),
    ),
    "scales of one axis": (
        "torchao",
        TensorInvalid,
        "expected scales of groups",
        spoil(f"{UP}._weight_scale", lambda a: a.reshape(-1)),
    ),
    "a shape that lies": (
        "compressed-tensors",
        TensorInvalid,
        "weight_shape is",
        spoil(f"{UP}.weight_shape", lambda a: a + 1),
    ),
    "a group that is none": (
        "gptq",
        ValuesInvalid,
        "but there are 4",
        spoil(f"{UP}.g_idx", lambda a: a + 1),
    ),
    "a zero point of 0": (
        "gptq",
        ValuesInvalid,
        "cannot store",
        spoil(f"{UP}.qzeros", put((0, 0), -1)),
    ),
    "a scale of infinity": (
        "gptq",
        ValuesInvalid,
        "scales",
        spoil(f"{UP}.scales", put((0, 3), np.inf)),
    ),
    "codes of more than 4 bits": (
        "torchao",
        ValuesInvalid,
        "codes from",
        spoil(f"{UP}._weight_qdata", put((0, 3), 100)),
    ),
    "another scheme": (
        "gptq",
        TensorInvalid,
        "is missing",
        lambda layout: layout.config["quantization_config"].update(
            quant_method="compressed-tensors", format="pack-quantized", config_groups={}
        ),
    ),
    "no groups": (
        "compressed-tensors",
        ParamsInvalid,
        "config_groups is a list",
        config_of(config_groups=[]),
    ),
    "a scheme that is none": (
        "gptq",
        ParamsInvalid,
        "quantization_config is 'gptq'",
        lambda layout: layout.config.update(quantization_config="gptq"),
    ),
    "no scheme": (
        "gptq",
        TensorInvalid,
        "weight is missing",
        lambda layout: layout.config.pop("quantization_config"),
    ),
}


@pytest.mark.parametrize("name", DAMAGED)
def test_damaged_layers(name: str, write_quantized: Write, refused: Refused) -> None:
    scheme, kind, match, change = DAMAGED[name]
    refused(kind, match, write_quantized(scheme, 32, change))


def test_a_file_that_is_cut(write_quantized: Write, refused: Refused) -> None:
    path = write_quantized("awq") / "model.safetensors"
    path.write_bytes(path.read_bytes()[:-100])
    refused(CheckpointUnreadable, "100 bytes behind", path.parent)
