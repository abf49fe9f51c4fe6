"""Layers of the 1B model's shape: how exact they are, and what all of them cost to write."""

from __future__ import annotations

import time
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from numpy.typing import NDArray

pytest.importorskip("ai_edge_litert", reason="optional extra: pip install 'llamac[apu]'")

from llamac.compiler.calibration import calibrate
from llamac.compiler.frontends.meta import from_meta
from llamac.compiler.progress import anonymous_bytes
from llamac.targets.neuropilot.emitter import write_chunk
from llamac.targets.neuropilot.interpreter import run_model
from llamac.targets.neuropilot.shards import layer_weight_bytes, layers_per_chunk
from llamac.tools.make_synthetic import main as make_synthetic

CAPACITY, NUM_PAST = 512, 300


@pytest.fixture(scope="module")
def three_layers(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A checkpoint with random weights."""
    folder = tmp_path_factory.mktemp("synthetic")
    assert make_synthetic(["--model", "1b", "--layers", "3", "-o", str(folder)]) == 0
    return folder


@pytest.mark.slow
@pytest.mark.parametrize("scheme", ["a16w8", "a16w4"])
@pytest.mark.parametrize("tokens", [1, 128])
def test_layers_of_the_1b_model(
    scheme: str, tokens: int, three_layers: Path, kit: Any, tmp_path: Path
) -> None:
    """After 300 tokens; ranges from 512 other tokens and the weights before they are rounded.

    Random weights look at all 300 tokens alike. Then SOFTMAX, whose result has steps of 2^-15,
    leaves 53 dB of what attention adds. In the first layer this is most of the stream (random
    embeddings are small), in the second a tenth, in the third less.
    """
    checkpoint = from_meta(three_layers)
    ranges = kit.ranges_of(checkpoint)
    ids = kit.random_tokens(checkpoint, NUM_PAST + tokens, 0)
    inputs, past = kit.real_inputs(checkpoint, scheme, ids, NUM_PAST)
    least = {0: 49.0, 1: 69.5, 2: 72.0 if scheme == "a16w8" else 71.0}
    for chunk in kit.chunks(checkpoint, tokens, CAPACITY):
        [layer] = chunk.layers
        path = tmp_path / f"{chunk.name}.tflite"
        interface = write_chunk(chunk, kit.RowWeights(checkpoint, scheme), ranges, scheme, path)
        case = kit.layer_case(checkpoint, scheme, chunk, interface, inputs[layer], past)
        found = run_model(path, case.feeds)
        for name, expected in case.expected.items():
            level = kit.sqnr_db(interface.tensors[name].dequantize(found[name]), expected)
            print(f"{scheme} T={tokens} {name}: {level:.1f} dB")
            assert level >= (least[layer] if name == "hidden_out" else 75)


class CheapWeights:
    """Codes of the checkpoint as they are, with any scales: nothing is searched or widened.

    Memory is looked at whenever the emitter asks for a tensor.
    """

    def __init__(self, weights: Any) -> None:
        self.names, self.info, self._weights = weights.names, weights.info, weights
        self.peak = 0

    def read(self, name: str) -> NDArray[Any]:
        self.peak = max(self.peak, anonymous_bytes())
        values = self._weights.read(name)
        if name.endswith(".scales"):
            return np.ascontiguousarray(values.mean(axis=1))
        return np.asarray(values)


@pytest.mark.slow
@pytest.mark.parametrize(("scheme", "megabytes"), [("a16w8", 245), ("a16w4", 124)])
def test_a_file_holds_one_weight_in_memory(
    scheme: str, megabytes: int, kit: Any, tmp_path: Path
) -> None:
    """Four layers of the 1B model; four such files are the whole."""
    folder = tmp_path / "model"
    assert make_synthetic(["--model", "1b", "--layers", "4", "-o", str(folder)]) == 0
    checkpoint = from_meta(folder)
    weight_bytes = layer_weight_bytes(checkpoint.weights, scheme)
    assert layers_per_chunk(weight_bytes, 16) == 4
    ranges = calibrate(checkpoint, kit.random_tokens(checkpoint, 16, 7), lambda *_: None)
    [chunk] = kit.chunks(checkpoint, 128, 1024, 4)
    weights, path = CheapWeights(checkpoint.weights), tmp_path / "x.tflite"
    before, start = anonymous_bytes(), time.monotonic()
    write_chunk(chunk, weights, ranges, scheme, path)
    seconds = time.monotonic() - start
    print(f"{scheme}: {path.stat().st_size} bytes, {seconds:.1f} s, {weights.peak - before} more")
    assert abs(path.stat().st_size / 1e6 - megabytes) < 2
    assert weights.peak - before < 80e6
    assert seconds < 60
