"""RMSNorm of int16 codes against the exact one of the same codes."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest

pytest.importorskip("ai_edge_litert", reason="optional extra: pip install 'llamac[apu]'")

from llamac.compiler import reference
from llamac.schedules.quantized import Quantization, ValueRange
from llamac.targets.neuropilot.interpreter import run_model
from llamac.targets.neuropilot.norm import NormRanges, rms_norm
from llamac.targets.neuropilot.operations import Operations
from llamac.targets.neuropilot.tflite_file import TfliteFile

EPS = 1e-5


def span(values: Any) -> ValueRange:
    """The range of values."""
    return ValueRange(float(np.min(values)), float(np.max(values)))


def levels(x: Any, folder: Path, kit: Any, seen: slice = slice(None)) -> tuple[float, float]:
    """dB of all tokens and of the worst one; only those of `seen` were seen before."""
    gamma = np.linspace(0.5, 1.5, x.shape[1], dtype=np.float32)
    made = Quantization.symmetric(span(x), "int16")
    codes = made.quantize(x)
    x = made.dequantize(codes)
    expected = reference.rms_norm(x, gamma, EPS)
    square = np.mean(x * x, axis=1, keepdims=True)
    ranges = NormRanges(span(square[seen]), span(x / np.sqrt(square)).largest)
    result = Quantization.symmetric(span(expected), "int16")
    with TfliteFile(folder / "x.tflite", "norm") as file:
        value = file.input("x", x.shape, made.scale)
        file.output(rms_norm(Operations(file), value, gamma, EPS, ranges, result.scale), "y")
    found = result.dequantize(run_model(folder / "x.tflite", {"x": codes})["y"])
    rows = [kit.sqnr_db(*row) for row in zip(found, expected, strict=True)]
    return kit.sqnr_db(found, expected), min(rows)


@pytest.mark.parametrize("size", [1.0, 3e-3, 1e-3], ids=["large", "near eps", "below eps"])
@pytest.mark.parametrize(
    ("ratio", "least", "worst"),
    [(1, 75, 74), (3, 78, 74), (10, 79, 72), (30, 77, 71), (100, 74, 65), (300, 66, 55)],
)
def test_tokens_of_any_size_keep_their_bits(
    ratio: float, least: float, worst: float, size: float, tmp_path: Path, kit: Any
) -> None:
    """The smallest tokens stay above what the codes of x leave of them: 50 dB at a ratio of 100."""
    x = np.random.default_rng(1).standard_normal((16, 2048))
    x *= size * np.geomspace(1, ratio, 16)[:, None]
    found = levels(x, tmp_path, kit)
    assert found[0] >= least
    assert found[1] >= worst


def test_one_huge_value_does_not_drown_the_others(tmp_path: Path, kit: Any) -> None:
    """200 times the rest. Rounding every square would lose 5 % of the sum, and leave 32 dB.

    The step of a scale that holds the huge value leaves the rest about 65 dB.
    """
    x = np.random.default_rng(2).standard_normal((4, 2048))
    x[:, 7] = 200
    assert levels(x, tmp_path, kit)[0] >= 60


def test_tokens_that_nobody_saw(tmp_path: Path, kit: Any) -> None:
    """Those that are 1.2 times as long as any that was seen, or half as long."""
    x = np.random.default_rng(3).standard_normal((4, 512)) * np.array([[1.2], [1], [1], [0.5]])
    assert levels(x, tmp_path, kit, slice(1, 3))[1] >= 72


def test_an_empty_token_is_empty(tmp_path: Path) -> None:
    """Padding may be all zeros."""
    ranges = NormRanges(ValueRange(0.0, 1.0), 4.0)
    with TfliteFile(tmp_path / "x.tflite", "norm") as file:
        value = file.input("x", (2, 64), 1e-4)
        gamma = np.ones(64, np.float32)
        file.output(rms_norm(Operations(file), value, gamma, EPS, ranges, 1e-4), "y")
    codes = np.zeros((2, 64), np.int16)
    assert not run_model(tmp_path / "x.tflite", {"x": codes})["y"].any()
