"""Folders of Hugging Face all the way: compiled by the command line, and talking like Meta's."""

from __future__ import annotations

import json
import subprocess
from collections.abc import Callable
from pathlib import Path
from types import ModuleType

import pytest

from llamac.compiler.checkpoint import Checkpoint
from llamac.compiler.frontends.meta import from_meta
from llamac.compiler.verify import verify_bundle
from llamac.runtime.manifest import read_manifest

Llamac = Callable[..., subprocess.CompletedProcess[str]]


@pytest.fixture(scope="module")
def layouts(helper: Callable[[str], ModuleType]) -> ModuleType:
    return helper("compiler/hf_layout")


@pytest.fixture(scope="module")
def floats(tiny: Path) -> Checkpoint:
    return from_meta(tiny / "bf16")


def test_a_bfloat16_folder_says_what_metas_files_say(
    layouts: ModuleType,
    floats: Checkpoint,
    tiny: Path,
    llamac: Llamac,
    one_level: str,
    tmp_path: Path,
) -> None:
    """In several files; the bundle has the same library, weights and text."""
    model = layouts.make_layout(floats).write(tmp_path / "Tiny-Llama", shards=3)
    options = ("--target", one_level, "--chunks", "8", "--context", "512", "-o")
    printed = llamac("compile", model, *options, tmp_path / "hf").stderr
    assert "note: 28 linear layers of type BF16: bfloat16, without loss" in printed
    llamac("compile", tiny / "bf16", *options, tmp_path / "meta")
    manifest = read_manifest(tmp_path / "hf")
    assert manifest.model.name == "Tiny-Llama"
    assert manifest.verification.status == "passed"
    for name in ("weights.bin", "program.json", "tokenizer.model"):
        assert (tmp_path / "hf" / name).read_bytes() == (tmp_path / "meta" / name).read_bytes()
    prompt = ("Tell me a story about a fox.", "--max-tokens", "40")
    texts = {llamac("run", tmp_path / name, *prompt).stdout for name in ("hf", "meta")}
    assert len(texts) == 1
    assert "fox" in texts.pop()
    llamac("verify", tmp_path / "hf", model)


@pytest.mark.parametrize("scheme", ["gptq", "awq"])
@pytest.mark.parametrize("requantize", [False, True])
def test_quantized_folders(
    scheme: str,
    requantize: bool,
    layouts: ModuleType,
    helper: Callable[[str], ModuleType],
    floats: Checkpoint,
    compiled: Callable[..., Path],
    tmp_path_factory: pytest.TempPathFactory,
) -> None:
    """GPTQ in groups of 128 is kept; AWQ with zero points is converted. Both are verified twice."""
    packing = helper("compiler/hf_packing")
    encode = packing.gptq(128) if scheme == "gptq" else packing.awq(128, symmetric=False)
    layout = layouts.make_layout(floats, encode)
    layout.config["quantization_config"] = packing.CONFIGS[scheme]
    model = layout.write(tmp_path_factory.mktemp("hf") / scheme)
    bundle = compiled(model, requantize=requantize, chunks=(8,))
    entry = read_manifest(bundle).quantization
    is_int4 = requantize or scheme == "gptq"
    assert entry.weights == ("int4 group-32" if is_int4 else "bfloat16")
    assert entry.embedding.startswith("int8" if requantize else "bfloat16")
    assert verify_bundle(bundle, model).passed
    kernels = json.loads((bundle / "program.json").read_text())["kernels"]
    assert not any("_signed_" in kernel["name"] for kernel in kernels)


def test_a_missing_file_is_an_error_with_advice(
    layouts: ModuleType, floats: Checkpoint, llamac: Llamac, tmp_path: Path
) -> None:
    model = layouts.make_layout(floats).write(tmp_path / "model", shards=2)
    (model / "model-00002-of-00002.safetensors").unlink()
    out = tmp_path / "out"
    printed = llamac("compile", model, "--target", "host", "-o", out, code=1).stderr
    assert "error[checkpoint-missing]" in printed
    assert "model-00002-of-00002.safetensors" in printed
    assert "fix: Fetch this file as well." in printed
    assert not out.exists()
