"""Binaries executed by Qualcomm's library for x86-64, against float64 with the same weights."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from llamac.runtime.errors import BundleCorrupt, DeviceError, UsageError
from llamac.runtime.manifest import file_sha256
from llamac.targets.qnn_htp.simulator import run_binary


@pytest.mark.parametrize("form", ["spinquant", "qlora"])
@pytest.mark.parametrize("tokens", [1, 8])
def test_a_layer_computes_what_the_float_model_does(
    form: str, tokens: int, compiled: Any, case_of: Any, decibels: Any
) -> None:
    """58 dB for what flows on, and for the new keys and values; R4 and LoRA are in it."""
    chunk, binary = compiled(form, tokens)
    case = case_of(form, chunk)
    results = run_binary(binary.path, binary.metadata, case.feeds)
    assert results.keys() == case.expected.keys()
    for name, expected in case.expected.items():
        assert results[name].dtype == np.float16
        assert decibels(results[name], expected) >= 58, name


def test_a_damaged_binary_is_not_executed(compiled: Any, case_of: Any, tmp_path: Path) -> None:
    """One flipped bit is found by the hash; Qualcomm's library would take it."""
    chunk, binary = compiled()
    data = bytearray(binary.path.read_bytes())
    data[len(data) // 2] ^= 1
    (tmp_path / "x.bin").write_bytes(data)
    with pytest.raises(BundleCorrupt, match="recorded is"):
        run_binary(tmp_path / "x.bin", binary.metadata, case_of("spinquant", chunk).feeds)


def test_wrong_inputs_are_refused(compiled: Any, case_of: Any) -> None:
    """Names, shapes and dtypes, before Qualcomm's library sees them."""
    chunk, binary = compiled()
    feeds = case_of("spinquant", chunk).feeds
    for wrong in (
        {name: value for name, value in feeds.items() if name != "mask"},
        feeds | {"mask": feeds["mask"][:, 1:]},
        feeds | {"mask": feeds["mask"].astype(np.float32)},
    ):
        with pytest.raises(UsageError, match="the graph's input mask is"):
            run_binary(binary.path, binary.metadata, wrong)


def test_an_error_of_the_library_is_no_answer(compiled: Any, case_of: Any, tmp_path: Path) -> None:
    """A cut-off binary whose hash was taken after the cut: nothing else computes the graph."""
    chunk, binary = compiled()
    cut = tmp_path / "x.bin"
    cut.write_bytes(binary.path.read_bytes()[:-4096])
    metadata = replace(binary.metadata, sha256=file_sha256(cut))
    with pytest.raises(DeviceError, match=r"could not execute x\.bin"):
        run_binary(cut, metadata, case_of("spinquant", chunk).feeds)
