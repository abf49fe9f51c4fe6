"""ONNX models all the way: onnxruntime-genai's of the example model, compiled and talking."""

from __future__ import annotations

import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from types import ModuleType

import pytest

from llamac.compiler.frontends.meta import from_meta
from llamac.runtime.manifest import read_manifest

Llamac = Callable[..., subprocess.CompletedProcess[str]]


@pytest.fixture(scope="module")
def build(
    helper: Callable[[str], ModuleType], tiny: Path, tmp_path_factory: pytest.TempPathFactory
) -> Callable[[str], Path]:
    """What the model builder makes of it, by precision."""
    pytest.importorskip("onnxruntime_genai")
    folder = tmp_path_factory.mktemp("genai")
    hf = helper("compiler/hf_layout").make_layout(from_meta(tiny / "bf16")).write(folder / "hf")

    def make(precision: str) -> Path:
        command = [sys.executable, "-m", "onnxruntime_genai.models.builder"]
        command += ["-i", str(hf), "-o", str(folder / precision), "-p", precision]
        command += ["-e", "cpu", "-c", str(folder / "cache")]
        subprocess.run(command, capture_output=True, check=True)
        return folder / precision

    return make


def test_the_same_bundle_as_from_metas_files(
    build: Callable[[str], Path], tiny: Path, llamac: Llamac, one_level: str, tmp_path: Path
) -> None:
    """The same program and the same weights to the bit."""
    options = ("--target", one_level, "--chunks", "8", "--context", "512", "-o")
    printed = llamac("compile", build("fp32"), *options, tmp_path / "onnx").stderr
    assert "all of them explained" in printed
    llamac("compile", tiny / "bf16", *options, tmp_path / "meta")
    for name in ("weights.bin", "program.json", "tokenizer.model"):
        ours, metas = (tmp_path / made / name for made in ("onnx", "meta"))
        assert ours.read_bytes() == metas.read_bytes(), name


def test_int4_runs_and_is_verified(
    build: Callable[[str], Path], llamac: Llamac, one_level: str, tmp_path: Path
) -> None:
    model, out = build("int4"), tmp_path / "out"
    report = llamac("import", model, "--report", "--target", one_level).stdout
    assert "ONNX" in report and "int4 group-32, without loss" in report
    options = ("--target", one_level, "--chunks", "8", "--context", "256")
    llamac("compile", model / "model.onnx", *options, "-o", out)
    assert read_manifest(out).verification.status == "passed"
    text = llamac("run", out, "Tell me a story about a fox.", "--max-tokens", "30").stdout
    assert "fox" in text
    llamac("verify", out, model)
