"""Whatever is broken in a library or its weights is found, and the guilty operation named."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from llamac.compiler.checkpoint import Checkpoint
from llamac.compiler.config import LoraConfig
from llamac.compiler.verify import VerifyReport, verify_library
from llamac.compiler.verify_steps import SessionMemory
from llamac.runtime import library
from llamac.runtime.errors import NumericsError
from llamac.runtime.library import NativeSession, open_library
from llamac.runtime.manifest import read_manifest
from llamac.targets.program import Program, ProgramTensor

Built = Any  # conftest.py

# -- damaged weights -----------------------------------------------------------------------------


def flip_nibble(data: Any) -> None:
    data.reshape(-1)[data.size // 3] ^= 0x08


def swap_rows(data: Any) -> None:
    """Swap rows 2 and 3 of a block of 16: words of four bytes, 16 rows in a line."""
    rows = data.reshape(-1)[: data.size // data.shape[0]].view(np.uint32).reshape(-1, 16)
    rows[:, [2, 3]] = rows[:, [3, 2]]


def change_scale(data: Any) -> None:
    data.reshape(-1)[data.size // 2] *= 1.02


def change_sum(data: Any) -> None:
    data.reshape(-1)[5] += 1


def exchange_tables(data: Any) -> None:
    """Exchange the cosines of two positions."""
    data[[12, 13]] = data[[13, 12]]


def flip_row(data: Any) -> None:
    """Change a row of the embedding that the probe reads."""
    data.reshape(len(data), -1)[12 * 37 % len(data), 7] ^= 0x10


SPINQUANT_DAMAGE = [
    ("layers.1.attention.wo", "uint8", flip_nibble),
    ("layers.0.feed_forward.w1", "uint8", swap_rows),
    ("layers.0.attention.wq", "float16", change_scale),
    ("layers.1.feed_forward.w2", "float32", change_sum),
    ("layers.1.ffn_norm", "float32", change_scale),
    ("norm", "float32", change_scale),
    ("rope", "float32", exchange_tables),
    ("tok_embeddings", "int8", flip_row),
    ("output", "int8", swap_rows),
    ("output", "int32", change_sum),
]
QLORA_DAMAGE = [
    ("layers.0.attention.wo:lora.a", "uint16", flip_nibble),
    ("layers.1.feed_forward.w2:lora.b", "uint16", flip_nibble),
    ("tok_embeddings", "float32", change_scale),
]


def damage(
    built: Built, folder: Path, layer: str, dtype: str, change: Callable[[Any], None]
) -> tuple[Path, ProgramTensor]:
    """Copy the weights and change one packed tensor: (the copy, the tensor)."""
    layer, _, layout = layer.partition(":")
    [tensor, *_] = [
        t
        for t in built.program.tensors
        if t.pack
        and t.pack.sources[0] == layer
        and t.dtype == dtype
        and t.pack.layout.startswith(layout)
    ]
    weights = folder / "weights.bin"
    shutil.copyfile(built.bundle / "weights.bin", weights)
    data = np.memmap(weights, tensor.dtype, "r+", tensor.offset, tensor.shape)
    change(data)
    data.flush()
    return weights, tensor


def readers(program: Program, tensor: ProgramTensor) -> set[tuple[str, int]]:
    """Steps that read a tensor."""
    index = program.tensors.index(tensor)
    return {
        (f.name, i)
        for f in program.functions
        for i, step in enumerate(f.steps)
        if index in step.operands
    }


def check_damage(
    built: Built, folder: Path, layer: str, dtype: str, change: Callable[[Any], None]
) -> None:
    weights, tensor = damage(built, folder, layer, dtype, change)
    report = built.verify(weights=weights)
    failed = {(o.function, o.step) for o in report.operations if not o.passed}
    assert failed
    assert failed <= readers(built.program, tensor)
    first = min(failed, key=lambda at: (at[0] == "decode", at[1]))
    assert report.first_failure.startswith(f"{first[0]}, step {first[1]}, ")
    if layer != "rope":  # the RoPE table belongs to no layer: the step is named by its cache
        assert layer.partition(":")[0] in report.first_failure
    assert not report.passed


@pytest.mark.parametrize(("layer", "dtype", "change"), SPINQUANT_DAMAGE)
def test_damaged_weights_are_found_where_they_are_read(
    layer: str, dtype: str, change: Any, spinquant: Built, tmp_path: Path
) -> None:
    check_damage(spinquant, tmp_path, layer, dtype, change)


@pytest.mark.parametrize(("layer", "dtype", "change"), QLORA_DAMAGE)
def test_damaged_adaptors_and_shared_tables_are_found(
    layer: str, dtype: str, change: Any, qlora: Built, tmp_path: Path
) -> None:
    check_damage(qlora, tmp_path, layer, dtype, change)


# -- wrong libraries -----------------------------------------------------------------------------


def changed(checkpoint: Checkpoint, **config: Any) -> Checkpoint:
    """The checkpoint with another configuration: to it, the library was built with a wrong one."""
    return replace(checkpoint, config=replace(checkpoint.config, **config))


def failed_families(report: VerifyReport) -> set[str]:
    return {o.family for o in report.operations if not o.passed}


def test_a_wrong_epsilon_is_found_in_the_norms(spinquant: Built) -> None:
    report = spinquant.verify(changed(spinquant.checkpoint, norm_eps=1e-3))
    assert failed_families(report) == {"norm"}
    assert report.first_failure.startswith(
        "prefill_8, step 1, rms_norm_quantize_8x64 (layers.0.attention_norm): scale["
    )


@pytest.mark.parametrize("rope", [{"rope_theta": 1e4}, {"rope_scaling": None}])
def test_a_wrong_rope_table_is_found_in_rope(rope: dict[str, Any], spinquant: Built) -> None:
    report = spinquant.verify(changed(spinquant.checkpoint, **rope))
    assert failed_families(report) == {"rope"}
    assert "(layers.0): q[" in report.first_failure


def test_a_library_without_r4_is_refused_and_w2_is_named(
    without_r4: Built, spinquant: Built
) -> None:
    assert without_r4.verify().passed  # to the checkpoint that does not know R4
    report = without_r4.verify(spinquant.checkpoint)
    failed = [o for o in report.operations if not o.passed]
    assert all("feed_forward.w2" in o.name for o in failed)
    assert len(failed) == 2 * spinquant.checkpoint.config.num_layers
    assert "lacks the Hadamard transform R4" in report.first_failure
    assert report.text.failure  # without the rule, the text alone would tell


def test_an_r4_that_the_checkpoint_does_not_ask_for_is_refused(
    without_r4: Built, spinquant: Built
) -> None:
    report = spinquant.verify(without_r4.checkpoint)
    assert "must not have the Hadamard transform R4" in report.first_failure
    assert report.text.failure


def test_a_lora_branch_of_wrong_factor_or_none_is_refused(qlora: Built, spinquant: Built) -> None:
    quant = qlora.checkpoint.quant
    assert quant.lora is not None
    lora = LoraConfig(quant.lora.rank, 1.9)
    report = qlora.verify(replace(qlora.checkpoint, quant=replace(quant, lora=lora)))
    assert failed_families(report) == {"qmatmul"}
    without = replace(qlora.checkpoint, quant=replace(quant, lora=None))
    assert "must not have a LoRA branch" in qlora.verify(without).first_failure
    with_lora = replace(spinquant.checkpoint.quant, lora=lora)
    report = spinquant.verify(replace(spinquant.checkpoint, quant=with_lora))
    assert "lacks a LoRA branch" in report.first_failure


def test_scales_in_another_dtype_are_found(spinquant: Built) -> None:
    assert failed_families(spinquant.verify(scale_dtype="bfloat16")) == {"qmatmul"}


def test_a_layer_that_is_never_read_is_named(spinquant: Built) -> None:
    """The text may hide it: a narrow model with a branch less can still predict much the same."""

    class More:
        def __init__(self, weights: Any) -> None:
            self.read, self.info, self._names = weights.read, weights.info, weights.names()

        def names(self) -> list[str]:
            return [*self._names, "layers.2.attention.wq.weight"]

    larger = replace(spinquant.checkpoint, weights=More(spinquant.checkpoint.weights))
    report = spinquant.verify(larger)
    assert report.first_failure == "prefill_8 never reads layers.2.attention.wq"


def test_a_memory_plan_that_reuses_a_place_too_early_is_found(
    spinquant: Built, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The residual stream is overwritten between the embedding and the first residual sum."""
    program = spinquant.program
    decode = program.function("decode")
    stream = program.tensors[decode.steps[0].operands[-1]]

    class Overwriting(NativeSession):
        def run_steps(self, function: str, first: int, count: int) -> None:
            super().run_steps(function, first, count)
            if (function, first) == ("decode", 3):
                SessionMemory(self).write(stream, 0)

    monkeypatch.setattr(library, "NativeSession", Overwriting)
    report = spinquant.verify()
    assert "(layers.0.attention.wo)" in report.first_failure
    assert "overwritten since embedding" in report.first_failure


def test_a_result_that_is_no_number_is_a_failure(
    spinquant: Built, monkeypatch: pytest.MonkeyPatch
) -> None:
    program = spinquant.program
    decode = program.function("decode")

    class Nan(NativeSession):
        def run_steps(self, function: str, first: int, count: int) -> None:
            super().run_steps(function, first, count)
            if (function, first) == ("decode", 2):
                result = program.tensors[decode.steps[2].operands[-1]]
                values = SessionMemory(self).read(result).copy()
                values[0, 5] = np.nan
                SessionMemory(self).write(result, values)

    monkeypatch.setattr(library, "NativeSession", Nan)
    report = spinquant.verify()
    assert "decode, step 2, " in report.first_failure
    assert "result[0, 5] is nan" in report.first_failure
    json.dumps(report.to_json(), allow_nan=False)


def test_a_kernel_of_an_unknown_family_cannot_be_verified(spinquant: Built) -> None:
    program = spinquant.program
    renamed = tuple(replace(k, family="magic") for k in program.kernels)
    manifest = read_manifest(spinquant.bundle)
    with pytest.raises(NumericsError, match="magic"):
        verify_library(
            replace(program, kernels=renamed),
            partial(
                open_library,
                spinquant.bundle / manifest.file("library"),
                spinquant.bundle / manifest.file("weights"),
            ),
            spinquant.checkpoint,
            scale_dtype="float16",
            kv_dtype="float16",
            tokens=spinquant.tokens,
        )
