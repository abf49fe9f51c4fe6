"""Layers by LiteRT's interpreter, against float64 with the same weights and the same cache."""

from __future__ import annotations

from collections.abc import Callable
from functools import cache
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from numpy.typing import NDArray

pytest.importorskip("ai_edge_litert", reason="optional extra: pip install 'llamac[apu]'")

from llamac.runtime.errors import DeviceError, UsageError
from llamac.targets.neuropilot.emitter import QuantizedInterface, write_chunk
from llamac.targets.neuropilot.interpreter import run_model

CAPACITY, NUM_PAST = 64, 20


class Written:
    """A chunk of the tiny model as a file, and one moment of it."""

    def __init__(self, kit: Any, folder: Path, form: str, scheme: str, tokens: int, chunk: Any):
        checkpoint, self.kit, self.chunk = kit.tiny(form), kit, chunk
        self.path = folder / f"{chunk.name}.tflite"
        weights = kit.RowWeights(checkpoint, scheme)
        self.interface: QuantizedInterface = write_chunk(
            chunk, weights, kit.tiny_ranges(form), scheme, self.path
        )
        ids = kit.random_tokens(checkpoint, NUM_PAST + tokens, 0)
        inputs, past = kit.real_inputs(checkpoint, scheme, ids, NUM_PAST)
        x = inputs[chunk.layers[0]]
        self.case = kit.layer_case(checkpoint, scheme, chunk, self.interface, x, past)

    def run(self, **changed: NDArray[np.int16]) -> dict[str, NDArray[np.int16]]:
        """Results, with some of the inputs changed."""
        feeds = self.case.feeds | {name.replace("__", "."): v for name, v in changed.items()}
        return run_model(self.path, feeds)

    def levels(self) -> dict[str, float]:
        """dB of every output."""
        found, made = self.run(), self.interface.tensors
        assert found.keys() == self.case.expected.keys()
        return {
            name: self.kit.sqnr_db(made[name].dequantize(found[name]), expected)
            for name, expected in self.case.expected.items()
        }


@pytest.fixture(scope="module")
def written(kit: Any, tmp_path_factory: pytest.TempPathFactory) -> Callable[..., Written]:
    """A chunk of the tiny model, written once: its form, scheme, tokens, and its first layer."""

    @cache
    def make(form: str, scheme: str, tokens: int, layer: int, num_layers: int = 1) -> Written:
        chunks = kit.chunks(kit.tiny(form), tokens, CAPACITY, num_layers)
        folder = tmp_path_factory.mktemp("layers")
        return Written(kit, folder, form, scheme, tokens, chunks[layer // num_layers])

    return make


@pytest.mark.parametrize("layer", range(4))
@pytest.mark.parametrize("tokens", [1, 8])
@pytest.mark.parametrize("scheme", ["a16w8", "a16w4"])
@pytest.mark.parametrize("form", ["spinquant", "qlora", "bf16"])
def test_every_layer(form: str, scheme: str, tokens: int, layer: int, written: Any) -> None:
    """71 dB in the middle, 65 dB in the first and the last layer; new keys and values 73 dB.

    Most are at 72 to 75 and 67 to 70 dB. What limits them is one rounding: gate * up has rare
    large values in this model, and a scale that holds those leaves the others 67 to 71 dB.
    """
    levels = written(form, scheme, tokens, layer).levels()
    assert levels.pop("hidden_out") >= (71 if layer in (1, 2) else 65)
    assert min(levels.values()) >= 73


@pytest.mark.parametrize("tokens", [1, 8])
@pytest.mark.parametrize("form", ["spinquant", "qlora"])
def test_a_chunk_of_four_layers(form: str, tokens: int, written: Any) -> None:
    """All layers in one file; errors add up."""
    levels = written(form, "a16w8", tokens, 0, 4).levels()
    assert len(levels) == 9
    assert levels["hidden_out"] >= 60
    assert min(levels.values()) >= 60


@pytest.mark.parametrize("tokens", [1, 8])
def test_unused_places_of_the_caches_do_not_matter(tokens: int, written: Any) -> None:
    """Zeros, or the largest codes of both signs: not one bit differs."""
    layer = written("spinquant", "a16w8", tokens, 1)
    expected = layer.run()
    rng = np.random.default_rng(3)
    keys, values = (layer.case.feeds[f"layers.1.{side}_cache"].copy() for side in "kv")
    values[:, NUM_PAST:] = rng.choice([-32768, 32767], values[:, NUM_PAST:].shape)
    rows = keys.swapaxes(2, 3).reshape(values.shape)
    rows[:, NUM_PAST:] = rng.choice([-32768, 32767], rows[:, NUM_PAST:].shape)
    keys = np.ascontiguousarray(rows.reshape(2, -1, 16, 32).swapaxes(2, 3))
    found = layer.run(layers__1__k_cache=keys, layers__1__v_cache=values)
    for name, value in expected.items():
        np.testing.assert_array_equal(found[name], value)


@pytest.mark.parametrize(("side", "place"), [("k", (0, 1, 0, 3)), ("v", (0, NUM_PAST - 1, 0))])
def test_a_used_place_of_the_caches_does_matter(side: str, place: Any, written: Any) -> None:
    """The test above could not fail if the graph looked at no cache."""
    layer = written("spinquant", "a16w8", 1, 1)
    cache = layer.case.feeds[f"layers.1.{side}_cache"].copy()
    cache[place] = 32767
    found = layer.run(**{f"layers__1__{side}_cache": cache})
    assert not np.array_equal(found["hidden_out"], layer.run()["hidden_out"])


def test_values_inside_can_be_seen(written: Any, kit: Any) -> None:
    """By their labels, to find where an error begins."""
    layer = written("spinquant", "a16w8", 8, 1)
    label = "layers.1.feed_forward.w3.swiglu"
    found = run_model(layer.path, layer.case.feeds, [label])[label].astype(np.float64)
    expected = layer.case.inside[label]
    # Its scale is in the file only; the best factor is that scale.
    scale = np.vdot(found, expected) / np.vdot(found, found)
    assert kit.sqnr_db(found * scale, expected) >= 66


def test_wrong_inputs_are_refused(written: Any) -> None:
    """Names, shapes and dtypes, before the interpreter sees them; and values that no graph has."""
    layer = written("spinquant", "a16w8", 1, 1)
    feeds = layer.case.feeds
    for wrong in (
        {name: value for name, value in feeds.items() if name != "mask"},
        feeds | {"mask": feeds["mask"][:, 1:]},
        feeds | {"mask": feeds["mask"].astype(np.int32)},
    ):
        with pytest.raises(UsageError, match="the graph's input mask is"):
            run_model(layer.path, wrong)
    with pytest.raises(UsageError, match="has no value nothing"):
        run_model(layer.path, feeds, ["nothing"])


def test_a_damaged_file_is_an_error(written: Any, tmp_path: Path) -> None:
    """Cut off behind the description: the interpreter's process may end as it likes."""
    layer = written("spinquant", "a16w8", 1, 1)
    data = layer.path.read_bytes()
    (tmp_path / "x.tflite").write_bytes(data[: len(data) // 2])
    with pytest.raises(DeviceError, match=r"could not execute x\.tflite"):
        run_model(tmp_path / "x.tflite", layer.case.feeds)
