"""The script that compares methods of quantization, on the example model."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest

from llamac.tools.quantization_table import METHODS, main, q4_0


def test_every_method_is_measured(checkout: Path, capsys: pytest.CaptureFixture[str]) -> None:
    folder = str(checkout / "examples" / "tiny-llama" / "bf16")
    assert main([folder, "--texts", "2", "--calibration", "4"]) == 0
    _, head, *lines = capsys.readouterr().out.splitlines()
    assert "nats per token" in head
    figures = {line[:16].strip(): [float(word) for word in line[16:].split()] for line in lines}
    assert list(figures) == ["bfloat16", *METHODS, "Q4_0 (GGUF)"]
    base, none = figures.pop("bfloat16")
    assert none == 0
    for nats, divergence in figures.values():
        assert abs(nats - base) < 0.05
        assert 0 < divergence < 0.02


def test_q4_0_puts_the_largest_magnitude_at_minus_eight() -> None:
    weight = np.zeros((2, 32), np.float32)
    weight[0, 3], weight[0, 4] = 4.0, -2.0
    found = q4_0(weight)
    assert found.scales.tolist() == [[-0.5], [0.0]]
    assert found.codes[0, 3:6].tolist() == [-8, 4, 0]
    np.testing.assert_array_equal(found.dequantize(), weight)


def test_a_missing_checkpoint_is_reported(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert main([str(tmp_path / "none")]) == 1
    assert "[checkpoint-missing]" in capsys.readouterr().err
