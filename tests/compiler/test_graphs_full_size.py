"""Graphs of the 1B model's shape, random weights: how long they take, and how much memory."""

from __future__ import annotations

import json
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest

MOST_SECONDS, MOST_BYTES = 300, 6_000_000_000
CONFIG = {
    "hidden_size": 2048,
    "intermediate_size": 8192,
    "num_hidden_layers": 16,
    "num_attention_heads": 32,
    "num_key_value_heads": 8,
    "head_dim": 64,
    "vocab_size": 128256,
    "max_position_embeddings": 131072,
    "rms_norm_eps": 1e-5,
    "tie_word_embeddings": True,
    "rope_parameters": {
        "rope_type": "llama3",
        "rope_theta": 500000.0,
        "factor": 32.0,
        "low_freq_factor": 1.0,
        "high_freq_factor": 4.0,
        "original_max_position_embeddings": 8192,
    },
}
pytestmark = pytest.mark.filterwarnings("ignore::FutureWarning", "ignore::DeprecationWarning")


@pytest.fixture(scope="module")
def model(helper: Callable[[str], ModuleType]) -> Any:
    """A LlamaForCausalLM of bfloat16."""
    torch, transformers = (pytest.importorskip(name) for name in ("torch", "transformers"))
    default = torch.get_default_dtype()
    torch.set_default_dtype(torch.bfloat16)
    try:
        made = transformers.LlamaForCausalLM(transformers.LlamaConfig(**CONFIG)).eval()
    finally:
        torch.set_default_dtype(default)
    return helper("compiler/exported_llama").Logits(made).eval()


def compile_and_measure(source: Path, tokenizer: Path, out: Path) -> tuple[float, int]:
    """Seconds and highest anonymous memory of a compilation without verification."""
    report = out.with_suffix(".json")
    command = [sys.executable, "-m", "llamac.tools.cli", "compile", str(source)]
    command += ["--target", "host", "--chunks", "8", "--context", "512", "--no-verify"]
    command += ["--tokenizer", str(tokenizer), "--report", str(report), "-o", str(out)]
    start = time.monotonic()
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    assert "all of them explained" in done.stderr
    seconds = time.monotonic() - start
    return seconds, int(json.loads(report.read_text("utf-8"))["peak_anonymous_bytes"])


@pytest.mark.slow
def test_a_program_of_the_1b_model(model: Any, shared_data: Path, tmp_path: Path) -> None:
    """As transformers has it, tied, in bfloat16."""
    torch = pytest.importorskip("torch")
    count = torch.export.Dim("count", min=2, max=512)
    tokens = torch.zeros(1, 8, dtype=torch.int64)
    program = torch.export.export(model, (tokens,), dynamic_shapes=({1: count},))
    torch.export.save(program, tmp_path / "1b.pt2")
    tokenizer = shared_data / "llama3_tokenizer" / "tokenizer.model"
    seconds, most = compile_and_measure(tmp_path / "1b.pt2", tokenizer, tmp_path / "torch")
    print(f"torch.export: {seconds:.0f} s, {most / 1e6:.0f} MB of anonymous memory")
    assert seconds < MOST_SECONDS and most < MOST_BYTES


@pytest.mark.slow
def test_an_onnx_file_of_the_1b_model(model: Any, shared_data: Path, tmp_path: Path) -> None:
    """As PyTorch's exporter writes it, with its data beside it."""
    pytest.importorskip("onnxscript")
    torch = pytest.importorskip("torch")
    count = torch.export.Dim("count", min=2, max=512)
    tokens = torch.zeros(1, 8, dtype=torch.int64)
    torch.onnx.export(
        model,
        (tokens,),
        tmp_path / "1b.onnx",
        dynamo=True,
        external_data=True,
        dynamic_shapes=({1: count},),
        verbose=False,
    )
    tokenizer = shared_data / "llama3_tokenizer" / "tokenizer.model"
    seconds, most = compile_and_measure(tmp_path / "1b.onnx", tokenizer, tmp_path / "onnx")
    print(f"ONNX: {seconds:.0f} s, {most / 1e6:.0f} MB of anonymous memory")
    assert seconds < MOST_SECONDS and most < MOST_BYTES
