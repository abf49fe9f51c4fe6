"""The script that compares weight schemes, on the example model."""

from __future__ import annotations

from pathlib import Path

import pytest

from llamac.tools.weight_schemes import SCHEMES, main


def test_every_scheme_is_measured(checkout: Path, capsys: pytest.CaptureFixture[str]) -> None:
    folder = str(checkout / "examples" / "tiny-llama" / "spinquant")
    assert main([folder, "--texts", "16"]) == 0
    head, *lines = capsys.readouterr().out.splitlines()
    assert "outputs dB" in head
    figures = {line[:38].strip(): [float(word) for word in line[38:].split()] for line in lines}
    assert list(figures) == list(SCHEMES)
    assert figures["int4 per channel"][0] < 25 < figures["LPBQ"][0] < figures["int8 per channel"][0]
    for bits in ("int8", "int4"):
        alone, compensated = figures[f"{bits} per channel"], figures[f"{bits} per channel, GPTQ"]
        assert compensated[0] < alone[0]  # the weights are further off, the outputs nearer
        assert compensated[1] > alone[1] + 0.2


def test_a_missing_checkpoint_is_reported(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert main([str(tmp_path / "none")]) == 1
    assert "[checkpoint-missing]" in capsys.readouterr().err
