"""LiteRT's plug-in for MediaTek against the recording test double: what it takes, and how."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest

SOCS = ("mt6989", "mt6991", "mt6993")
INT32, INT32_PER_CHANNEL = 4, 9014
INT16, INT8_PER_CHANNEL, INT4_PER_TENSOR, INT4_PER_CHANNEL = 7, 11, 9005, 9011
FULLY_CONNECTED, RESHAPE = 9, 22


@pytest.mark.parametrize("soc", SOCS)
@pytest.mark.parametrize("weights", ["INT8", "INT4"])
def test_every_op_is_taken(
    soc: str,
    weights: str,
    small_tflite: ModuleType,
    run_official_plugin: Callable[..., Any],
    tmp_path: Path,
) -> None:
    """All operations, in one partition, one model that is compiled; int16 stays symmetric."""
    run = run_official_plugin(small_tflite.write_every_op(tmp_path / "m.tflite", weights), soc)
    assert run.returncode == 0, run.text
    assert (run.selected_ops, run.total_ops, run.partitions) == (17, small_tflite.NUM_OPS, 1)
    assert all(model.is_finished for model in run.models)
    model = run.models[-1]
    assert [operand.dims for operand in model.inputs] == [(1, 4, 8)] * 2
    assert {operand.type for operand in model.inputs} == {INT16}
    assert len(run.models) == (2 if soc == "mt6993" else 1)  # version 9 is asked first


@pytest.mark.parametrize(
    ("soc", "weights", "type_", "bias"),
    [
        ("mt6991", "INT8", INT8_PER_CHANNEL, INT32),
        ("mt6993", "INT8", INT8_PER_CHANNEL, INT32_PER_CHANNEL),
        ("mt6991", "INT4", INT4_PER_TENSOR, INT32),  # and the scales are lost
        ("mt6993", "INT4", INT4_PER_CHANNEL, INT32_PER_CHANNEL),
    ],
)
def test_weights_by_version(
    soc: str,
    weights: str,
    type_: int,
    bias: int,
    small_tflite: ModuleType,
    run_official_plugin: Callable[..., Any],
    tmp_path: Path,
) -> None:
    """Channels' scales arrive, except with int4 before version 9; int4 has a byte for each code."""
    run = run_official_plugin(small_tflite.write_every_op(tmp_path / "m.tflite", weights), soc)
    [first, _] = [op for op in run.models[-1].operations if op.code == FULLY_CONNECTED]
    _, weight, offset, _ = first.inputs
    assert (weight.type, weight.dims, weight.bytes) == (type_, (8, 8), 64)
    expected = () if type_ == INT4_PER_TENSOR else tuple(0.01 + 0.001 * i for i in range(8))
    assert weight.scales == pytest.approx(expected, rel=1e-6)
    assert (offset.type, offset.bytes) == (bias, 32)


def test_an_operation_that_the_adapter_does_not_support(
    small_tflite: ModuleType, run_official_plugin: Callable[..., Any], tmp_path: Path
) -> None:
    """From version 9 on the adapter is asked, and its no splits the model."""
    tflite = small_tflite.write_every_op(tmp_path / "m.tflite")
    run = run_official_plugin(tflite, "mt6993", NEURON_DOUBLE_UNSUPPORTED="25")
    assert run.selected_ops == 16


def test_a_failing_compilation(
    small_tflite: ModuleType, run_official_plugin: Callable[..., Any], tmp_path: Path
) -> None:
    tflite = small_tflite.write_every_op(tmp_path / "m.tflite")
    run = run_official_plugin(tflite, "mt6989", NEURON_DOUBLE_FAIL="NeuronCompilation_finish=6")
    assert run.returncode != 0
    assert run.calls[-1].function == "NeuronModel_free"


@pytest.mark.parametrize("soc", SOCS)
@pytest.mark.parametrize(("scheme", "form"), [("a16w8", "spinquant"), ("a16w4", "qlora")])
@pytest.mark.parametrize("tokens", [1, 8])
def test_it_takes_a_whole_layer(
    tokens: int,
    scheme: str,
    form: str,
    soc: str,
    kit: Any,
    run_official_plugin: Callable[..., Any],
    tmp_path: Path,
) -> None:
    """Every operation of our layers, in one partition; with R4, or with a LoRA branch."""
    checkpoint = kit.tiny(form)
    [chunk] = kit.chunks(checkpoint, tokens, 64)[1:2]
    from llamac.targets.neuropilot.emitter import write_chunk  # noqa: PLC0415 (the extra)

    path = tmp_path / "layer.tflite"
    weights = kit.RowWeights(checkpoint, scheme)
    write_chunk(chunk, weights, kit.tiny_ranges(form), scheme, path)
    run = run_official_plugin(path, soc)
    print(f"{soc} {scheme} {form} T={tokens}: {run.selected_ops} of {run.total_ops}")
    assert run.total_ops >= 54
    assert (run.selected_ops, run.partitions) == (run.total_ops, 1)
