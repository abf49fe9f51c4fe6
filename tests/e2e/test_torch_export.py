"""Exported programs all the way: the example model from PyTorch says what Meta's files say."""

from __future__ import annotations

import subprocess
from collections.abc import Callable
from pathlib import Path
from types import ModuleType

import pytest
import torch

from llamac.compiler.frontends.meta import from_meta
from llamac.runtime.manifest import read_manifest

Llamac = Callable[..., subprocess.CompletedProcess[str]]
pytestmark = pytest.mark.filterwarnings("ignore::FutureWarning", "ignore::DeprecationWarning")


@pytest.fixture(scope="module")
def exported(
    helper: Callable[[str], ModuleType], tiny: Path, tmp_path_factory: pytest.TempPathFactory
) -> Path:
    """The example model of bfloat16 as transformers has it, exported and saved."""
    transformers = pytest.importorskip("transformers")
    folder = tmp_path_factory.mktemp("exported")
    hf = helper("compiler/hf_layout").make_layout(from_meta(tiny / "bf16")).write(folder / "hf")
    model = transformers.LlamaForCausalLM.from_pretrained(hf, dtype=torch.bfloat16).eval()
    count = torch.export.Dim("count", min=2, max=512)
    tokens = torch.zeros(1, 8, dtype=torch.int64)
    logits = helper("compiler/exported_llama").Logits(model)
    program = torch.export.export(logits, (tokens,), dynamic_shapes=({1: count},))
    torch.export.save(program, folder / "tiny.pt2")
    (folder / "tokenizer.json").write_bytes((hf / "tokenizer.json").read_bytes())
    return folder / "tiny.pt2"


def test_the_same_bundle_as_from_metas_files(
    exported: Path, tiny: Path, llamac: Llamac, one_level: str, tmp_path: Path
) -> None:
    """The same program and the same weights to the bit, so the same text."""
    options = ("--target", one_level, "--chunks", "8", "--context", "512", "-o")
    printed = llamac("compile", exported, *options, tmp_path / "torch").stderr
    assert "all of them explained" in printed and "bfloat16, without loss" in printed
    llamac("compile", tiny / "bf16", *options, tmp_path / "meta")
    assert read_manifest(tmp_path / "torch").verification.status == "passed"
    for name in ("weights.bin", "program.json", "tokenizer.model"):
        ours, metas = (tmp_path / made / name for made in ("torch", "meta"))
        assert ours.read_bytes() == metas.read_bytes(), name
    llamac("verify", tmp_path / "torch", exported)
    text = llamac("run", tmp_path / "torch", "Tell me a story about a fox.", "--max-tokens", "30")
    assert "fox" in text.stdout


def test_it_is_quantized_and_reported_like_other_floats(
    exported: Path, llamac: Llamac, one_level: str, tmp_path: Path
) -> None:
    report = llamac("import", exported, "--report", "--target", one_level).stdout
    assert "torch.export" in report and "all of them explained" in report
    options = ("--target", one_level, "--chunks", "8", "--context", "128")
    out = tmp_path / "int4"
    llamac("compile", exported, *options, "--quantize", "int4", "-o", out)
    manifest = read_manifest(out)
    assert manifest.quantization.weights.startswith("int4")
    assert manifest.verification.status == "passed"
