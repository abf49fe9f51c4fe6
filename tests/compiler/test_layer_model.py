"""Layers in the form of a scheme: weights, ranges, what they lose, and that they come out again."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest

from llamac.compiler.checkpoint import Checkpoint
from llamac.compiler.frontends.meta import from_meta
from llamac.compiler.layers import LayerModel, prepare_layers
from llamac.compiler.llama import ModelOptions, build_llama
from llamac.compiler.offload import linear_inputs
from llamac.compiler.reference import sqnr_db
from llamac.compiler.reference_model import ReferenceModel
from llamac.runtime.errors import UsageError
from llamac.targets.base import Scheme

TINY = Path(__file__).resolve().parents[2] / "examples" / "tiny-llama"
TOKENS = [int(t) for t in np.random.default_rng(5).integers(1, 200, 64)]


def _ignore(what: str, done: int, total: int) -> None:
    """A progress that nobody watches."""


def _scheme(weights: str) -> Scheme:
    return Scheme(f"a16-{weights}", "", weights, "int16", is_calibrated=True)


def _prepare(checkpoint: Checkpoint, weights: str, folder: Path) -> LayerModel:
    folder.mkdir(exist_ok=True)
    inputs = linear_inputs(build_llama(checkpoint, ModelOptions(64, ())), "decode")
    return prepare_layers(checkpoint, _scheme(weights), inputs, TOKENS, folder, _ignore)


def test_every_linear_layer_reads_a_value() -> None:
    checkpoint = from_meta(TINY / "spinquant")
    inputs = linear_inputs(build_llama(checkpoint, ModelOptions(64, ())), "decode")
    per_layer = (
        "attention.wq attention.wk attention.wv attention.wo "
        "feed_forward.w1 feed_forward.w2 feed_forward.w3"
    ).split()
    layers = range(checkpoint.config.num_layers)
    assert set(inputs) == {f"layers.{i}.{name}" for i in layers for name in per_layer}
    assert inputs["layers.0.attention.wq"] == inputs["layers.0.attention.wk"]
    assert inputs["layers.1.feed_forward.w2"].endswith(".hadamard")


# The least dB of a layer of this model: some dB below what was measured.
@pytest.mark.parametrize(
    ("form", "weights", "least"),
    [
        ("spinquant", "lpbq", 33),
        ("spinquant", "int8", 40),
        ("spinquant", "int4", 18),
        ("qlora", "int8", 40),
        ("bf16", "lpbq", 16),
        ("bf16", "int8", 38),
    ],
)
def test_layers_lose_little(form: str, weights: str, least: float, tmp_path: Path) -> None:
    checkpoint = from_meta(TINY / form)
    model = _prepare(checkpoint, weights, tmp_path)
    assert len(model.loss) == 7 * checkpoint.config.num_layers
    assert min(model.loss.values()) > least
    source = model.checkpoint.weights
    for name in model.loss:
        codes, scales = source.read(f"{name}.weight"), source.read(f"{name}.scales")
        assert codes.dtype == np.int8
        assert scales.dtype == np.float32
        assert source.info(f"{name}.weight").shape == codes.shape
        if weights == "lpbq":
            multipliers = source.read(f"{name}.multipliers")
            rows = source.read(f"{name}.row_scales")
            assert (multipliers >= 1).all()
            assert (multipliers <= 16).all()
            np.testing.assert_allclose(multipliers * rows[:, None].astype(np.float64), scales)
        else:
            assert scales.shape == codes.shape[:1]
    assert source.read("norm.weight").tobytes() == checkpoint.weights.read("norm.weight").tobytes()


def test_the_model_with_new_layers_is_near_the_old_one(tmp_path: Path) -> None:
    checkpoint = from_meta(TINY / "qlora")
    model = _prepare(checkpoint, "int8", tmp_path)
    old, new = (
        ReferenceModel(c, quantize_activations=False).logits(TOKENS)
        for c in (checkpoint, model.checkpoint)
    )
    assert 25 < sqnr_db(old, new) < 80  # near, and not the same weights


def test_weights_and_ranges_are_reproducible(tmp_path: Path) -> None:
    checkpoint = from_meta(TINY / "spinquant")
    first, second = (_prepare(checkpoint, "int8", tmp_path / name) for name in "ab")
    assert first.ranges == second.ranges
    assert first.loss == second.loss
    files = [sorted((tmp_path / name).iterdir()) for name in "ab"]
    assert [path.name for path in files[0]] == [path.name for path in files[1]]
    for a, b in zip(*files, strict=True):
        assert a.read_bytes() == b.read_bytes()


def test_a_scheme_that_keeps_weights_writes_none(tmp_path: Path) -> None:
    checkpoint = from_meta(TINY / "spinquant")
    model = _prepare(checkpoint, "checkpoint", tmp_path)
    assert model.checkpoint is checkpoint
    assert model.ranges
    assert list(tmp_path.iterdir()) == []


def test_a_short_text_is_refused(tmp_path: Path) -> None:
    checkpoint = from_meta(TINY / "spinquant")
    with pytest.raises(UsageError, match="5 tokens is too short"):
        prepare_layers(checkpoint, _scheme("int8"), {}, TOKENS[:5], tmp_path, _ignore)
