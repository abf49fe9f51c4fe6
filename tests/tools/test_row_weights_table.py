"""The script that tells what weights by rows lose in likelihood, on the example model."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest

from llamac.compiler.frontends.meta import from_meta
from llamac.compiler.requantize import weights_of
from llamac.tools.quantization_table import stories
from llamac.tools.row_weights_table import input_sums, main, with_rows
from llamac.tools.weight_schemes import read_weight


def run(capsys: pytest.CaptureFixture[str], *arguments: object) -> dict[tuple[str, str], float]:
    """Nats per token by model and weights."""
    assert main([*map(str, arguments), "--texts", "6", "--calibration", "6"]) == 0
    _, head, *lines = capsys.readouterr().out.splitlines()
    assert "nats per token" in head
    return {(line[:10].strip(), line[11:33].strip()): float(line[33:].split()[0]) for line in lines}


def test_a_float_model_is_also_turned(checkout: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """Turning changes nothing, and int8 loses next to nothing."""
    nats = run(capsys, checkout / "examples" / "tiny-llama" / "bf16")
    assert {model for model, _ in nats} == {"as it is", "turned"} and len(nats) == 10
    own = nats["as it is", "its own"]
    assert nats["turned", "its own"] == pytest.approx(own, abs=1e-3)
    for model in ("as it is", "turned"):
        for made in ("nearest", "made good"):
            assert nats[model, f"int8, {made}"] == pytest.approx(own, rel=0.005)
            assert nats[model, f"int4, {made}"] == pytest.approx(own, rel=0.05)


@pytest.mark.parametrize(("bits", "limit"), [(8, 127), (4, 7)])
def test_errors_are_made_good_on_the_texts(
    bits: int, limit: int, checkout: Path, tmp_path: Path
) -> None:
    """The weights are further off, and what comes out of the layers is nearer."""
    checkpoint = from_meta(checkout / "examples" / "tiny-llama" / "spinquant")
    sums = input_sums(checkpoint, stories(checkpoint, 3, 5))
    name = "layers.1.feed_forward.w2"
    weight, matrix, errors = weights_of(read_weight(checkpoint.weights, name)), sums[name], []
    for is_good in (False, True):
        folder = tmp_path / str(is_good)
        folder.mkdir()
        made = with_rows(checkpoint, {name: matrix}, bits, folder, is_good=is_good).weights
        codes, scales = made.read(f"{name}.weight"), made.read(f"{name}.scales")
        assert -limit - 1 <= codes.min() and codes.max() == limit and len(scales) == len(weight)
        errors.append(weight - codes * scales.astype(np.float64)[:, None])
    (nearest, good) = (float(np.einsum("nk,kj,nj->", e, matrix, e)) for e in errors)
    assert good < 0.9 * nearest
    assert np.linalg.norm(errors[1]) > np.linalg.norm(errors[0])


def test_texts_that_the_model_makes_up(checkout: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """Drawn with the model's own probabilities, so that its own weights predict them best."""
    nats = run(capsys, checkout / "examples" / "tiny-llama" / "spinquant", "--own-text")
    assert {model for model, _ in nats} == {"as it is"}
    assert min(nats, key=lambda key: nats[key])[1] != "int4, nearest"


def test_a_missing_checkpoint_is_reported(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert main([str(tmp_path / "none")]) == 1
    assert "[checkpoint-missing]" in capsys.readouterr().err
