"""Binaries executed by Qualcomm's library for x86-64, against float64 with the same weights."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from llamac.runtime.digest import file_sha256
from llamac.runtime.errors import BundleCorrupt, DeviceError, UsageError
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


@pytest.mark.parametrize("soc", ["sm8450", "sm8650", "sm8850"])
@pytest.mark.parametrize("tokens", [1, 8])
def test_unused_places_of_the_caches_do_not_matter(
    tokens: int, soc: str, compiled: Any, case_of: Any
) -> None:
    """Zeros or the largest numbers of both signs: not one bit differs."""
    chunk, binary = compiled("spinquant", tokens, soc)
    feeds = case_of("spinquant", chunk).feeds
    k_cache, v_cache = (feeds[f"layers.0.{side}_cache"] for side in "kv")
    rng = np.random.default_rng(3)
    extremes = rng.choice(np.array([-65504, 65504], np.float16), v_cache.shape)
    results = []
    for unused in (np.zeros_like(v_cache), extremes):
        values = np.where(np.arange(64)[:, None] < 20, v_cache, unused)
        # Keys in rows, to change positions 20 and later, and back.
        keys = k_cache.swapaxes(2, 3).reshape(2, 64, 32)
        keys = np.where(np.arange(64)[:, None] < 20, keys, unused)
        blocks = np.ascontiguousarray(keys.reshape(2, 4, 16, 32).swapaxes(2, 3))
        changed = {"layers.0.k_cache": blocks, "layers.0.v_cache": values}
        results.append(run_binary(binary.path, binary.metadata, feeds | changed))
    for name, value in results[0].items():
        np.testing.assert_array_equal(value, results[1][name])


def test_a_used_place_of_the_caches_does_matter(compiled: Any, case_of: Any) -> None:
    """The test above could not fail if the graph looked at no cache."""
    chunk, binary = compiled("spinquant", 1)
    feeds = case_of("spinquant", chunk).feeds
    expected = run_binary(binary.path, binary.metadata, feeds)["hidden_out"]
    for side, place in (("k", (0, 1, 0, 3)), ("v", (0, 19, 0))):
        cache = feeds[f"layers.0.{side}_cache"].copy()
        cache[place] += 8
        found = run_binary(binary.path, binary.metadata, feeds | {f"layers.0.{side}_cache": cache})
        assert not np.array_equal(found["hidden_out"], expected)


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
