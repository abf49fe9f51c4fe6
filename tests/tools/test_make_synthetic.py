"""Synthetic checkpoints: true layout, distinct data, sane sizes of numbers."""

from __future__ import annotations

import subprocess
import sys
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest

from llamac.compiler.checkpoint import Checkpoint
from llamac.compiler.config import LLAMA_3_2_1B
from llamac.compiler.floats import widen
from llamac.compiler.frontends.meta import from_meta
from llamac.compiler.reference_model import ReferenceModel
from llamac.runtime.tokenizer import read_ranks
from llamac.tools.make_synthetic import (
    FORMS,
    MODELS,
    WEIGHT_STD,
    main,
    make_synthetic,
    synthetic_ranks,
)
from llamac.tools.tiny_tokenizer import write_ranks

SMALL = replace(
    LLAMA_3_2_1B, dim=256, num_heads=8, num_kv_heads=2, head_dim=32, ffn_dim=1024, vocab_size=1024
)


@pytest.fixture(scope="module", params=sorted(FORMS))
def checkpoint(
    request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory
) -> Checkpoint:
    folder = tmp_path_factory.mktemp(request.param)
    make_synthetic(folder, SMALL, FORMS[request.param])
    return from_meta(folder)


def test_the_front_end_reads_it_as_what_it_is(checkpoint: Checkpoint) -> None:
    assert checkpoint.config == SMALL
    assert checkpoint.quant in FORMS.values()
    assert len(read_ranks(checkpoint.tokenizer)) == 1024 - 256


def test_no_two_tensors_hold_the_same_data(checkpoint: Checkpoint) -> None:
    weights = checkpoint.weights
    seen = set()
    for name in weights.names():
        is_tied = name == "output.weight" and checkpoint.quant.form == "float"
        if not (name.endswith("norm.weight") or is_tied):
            data = weights.read(name).tobytes()[:512]
            assert data not in seen, name
            seen.add(data)


def test_weights_have_the_wanted_spread(checkpoint: Checkpoint) -> None:
    name = "layers.1.feed_forward.w2"
    values = widen(checkpoint.weights.read(f"{name}.weight"))
    if checkpoint.quant.form != "float":
        assert values.min() == -8 and values.max() == 7
        values = values * np.repeat(checkpoint.weights.read(f"{name}.scales"), 32, axis=1)
    assert abs(values.std() / WEIGHT_STD - 1) < 0.05


def test_activations_stay_sane_through_all_layers(checkpoint: Checkpoint) -> None:
    logits = ReferenceModel(checkpoint).logits([5, 900, 31, 7])
    assert np.isfinite(logits).all()
    assert 0.1 < logits.std() < 5


def test_equal_arguments_give_equal_files(tmp_path: Path) -> None:
    for name in ("first", "second"):
        make_synthetic(tmp_path / name, replace(SMALL, num_layers=1), FORMS["qlora"])
    first, second = (
        (tmp_path / name / "consolidated.00.pth").read_bytes() for name in ("first", "second")
    )
    assert first == second


def test_made_up_tokens_are_distinct_and_cover_all_bytes() -> None:
    tokens = list(synthetic_ranks(128_000))
    assert len(set(tokens)) == 128_000
    assert tokens[:256] == [bytes([value]) for value in range(256)]


def test_the_command_writes_fewer_layers_and_copies_a_tokenizer(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setitem(MODELS, "1b", SMALL)
    write_ranks(tmp_path / "real", synthetic_ranks(300))
    arguments = ["--model", "1b", "--layers", "1", "-o", str(tmp_path / "out")]
    assert main([*arguments, "--tokenizer", str(tmp_path / "real")]) == 0
    checkpoint = from_meta(tmp_path / "out")
    assert checkpoint.config == replace(SMALL, num_layers=1)
    assert checkpoint.quant == FORMS["spinquant"]
    assert checkpoint.tokenizer.read_bytes() == (tmp_path / "real").read_bytes()
    assert "1b spinquant" in capsys.readouterr().err


@pytest.mark.slow
def test_a_true_1b_layer_has_its_size(tmp_path: Path) -> None:
    command = [sys.executable, "-m", "llamac.tools.make_synthetic", "--layers", "1", "-o", tmp_path]
    subprocess.run(command, check=True, capture_output=True)
    size = (tmp_path / "consolidated.00.pth").stat().st_size
    # Two tables of 128256 x 2048 and one layer of 61 million codes with their scales.
    assert 0.59e9 < size < 0.61e9
