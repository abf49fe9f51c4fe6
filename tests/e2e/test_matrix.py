"""`--targets` makes the bundles that `--target` makes, one for each."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

from llamac.runtime.manifest import read_manifest
from llamac.tools.cli import main

ROOT = Path(__file__).parents[2] / "examples" / "tiny-llama"
FAST = ("--no-verify", "--context", "256", "--chunks", "8", "--quiet")
TARGETS = ("host", "rpi5")


def compile_model(out: Path, *options: str, model: str = "spinquant") -> int:
    return main(["compile", str(ROOT / model), *options, "-o", str(out), *FAST])


def digests(bundle: Path) -> dict[str, str]:
    """Of all files, by name."""
    return {name: entry.sha256 for name, entry in read_manifest(bundle).files.items()}


@pytest.mark.parametrize("builder", ["local[1]", "local[2]"])
def test_bundles_are_those_of_each_target_alone(tmp_path: Path, builder: str) -> None:
    """To the last byte, whoever compiled them."""
    both = ("--targets", ",".join(TARGETS), "--builder", builder)
    assert compile_model(tmp_path / "matrix", *both) == 0
    for target in TARGETS:
        assert compile_model(tmp_path / target, "--target", target) == 0
        assert digests(tmp_path / "matrix" / target) == digests(tmp_path / target)


def test_a_quantization_is_done_once(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """And is the same that each would make; nothing of it is left."""
    from llamac.compiler import quantize_request  # noqa: PLC0415

    calls: list[Any] = []
    quantize = quantize_request.quantize_into

    def counted(*arguments: Any) -> Any:
        calls.append(arguments)
        return quantize(*arguments)

    monkeypatch.setattr(quantize_request, "quantize_into", counted)
    options = ("--quantize", "int4")
    several = ("--targets", ",".join(TARGETS), *options)
    assert compile_model(tmp_path / "matrix", *several, model="bf16") == 0
    assert len(calls) == 1
    assert compile_model(tmp_path / "host", "--target", "host", *options, model="bf16") == 0
    found, alone = digests(tmp_path / "matrix" / "host"), digests(tmp_path / "host")
    assert found["weights.bin"] == alone["weights.bin"]
    assert sorted(path.name for path in (tmp_path / "matrix").iterdir()) == sorted(TARGETS)
    assert read_manifest(tmp_path / "matrix" / "host").model.name == "bf16"


def test_one_that_fails_stops_no_other(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """Its error is shown with its name, it leaves nothing, and the exit code says it."""
    (tmp_path / "matrix" / "rpi5").mkdir(parents=True)
    report = tmp_path / "report.json"
    options = ("--targets", "rpi5,host", "--report", str(report))
    assert compile_model(tmp_path / "matrix", *options) == 1
    said = capsys.readouterr().err
    assert "error[output]: rpi5: " in said
    assert "wrote 1 of 2 bundles" in said
    assert (tmp_path / "matrix" / "host" / "manifest.json").is_file()
    assert list((tmp_path / "matrix" / "rpi5").iterdir()) == []
    found = json.loads(report.read_text("utf-8"))
    assert found["rpi5"]["error"]["code"] == "output"
    assert found["host"]["files"]["weights.bin"] > 0


@pytest.mark.parametrize(
    ("options", "word"),
    [
        (("--targets", "host,host"), "twice"),
        (("--targets", "host,nothing"), "nothing"),
        (("--targets", "host", "--target", "host"), "not allowed"),
        ((), "required"),
        (("--targets", "host", "--builder", "cloud"), "no builder"),
    ],
)
def test_wrong_lists(
    tmp_path: Path, options: tuple[str, ...], word: str, capsys: pytest.CaptureFixture[str]
) -> None:
    """Nothing is read or written before they are right."""
    assert compile_model(tmp_path / "matrix", *options) in (1, 2)
    assert word in capsys.readouterr().err
    assert not (tmp_path / "matrix").exists()
