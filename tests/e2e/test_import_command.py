"""`llamac import`: what it says of a model is what a compilation then makes of it."""

from __future__ import annotations

import json
from collections import Counter
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from llamac.compiler.config import LlamaConfig
from llamac.compiler.meta_writer import write_checkpoint
from llamac.compiler.quantize import EMBEDDING, norm_names, quantize_model
from llamac.runtime.manifest import read_manifest
from llamac.tools.cli import main


@pytest.fixture
def report(one_level: str, capsys: pytest.CaptureFixture[str]) -> Callable[..., dict[str, Any]]:
    """Run the command with --json; the exit code must be 0."""

    def run(model: Path, *options: str) -> dict[str, Any]:
        capsys.readouterr()
        assert main(["import", str(model), "--json", "--target", one_level, *options]) == 0
        found: dict[str, Any] = json.loads(capsys.readouterr().out)
        return found

    return run


@pytest.mark.parametrize("form", ["spinquant", "qlora", "bf16"])
def test_the_plan_is_that_of_the_bundle(
    form: str, tiny: Path, compiled: Callable[..., Path], report: Callable[..., dict[str, Any]]
) -> None:
    """Memory, sizes, arithmetic and kernels, without a bundle."""
    found = report(tiny / form, "--chunks", "32,8", "--context", "512")
    bundle = compiled(tiny / form)
    manifest = read_manifest(bundle).to_dict()
    memory = manifest["memory"]
    assert found["memory"]["weights"] == memory["weights_bytes"]
    assert found["memory"]["kv_cache"] == memory["kv_cache_bytes"]
    assert found["memory"]["arena"] == memory["arena_bytes"]
    assert found["memory"]["total"] == sum(
        memory[f"{name}_bytes"] for name in ("weights", "kv_cache", "arena")
    )
    assert found["model"] == manifest["model"]
    del manifest["quantization"]["notes"]
    assert found["quantization"] == manifest["quantization"]
    program = json.loads((bundle / "program.json").read_text("utf-8"))
    families = [kernel["family"] for kernel in program["kernels"]]
    [decode] = [f for f in program["functions"] if f["name"] == "decode"]
    steps = Counter(families[step["kernel"]] for step in decode["steps"])
    assert found["kernels"] == dict(steps)
    assert found["operators"]["attention"] == 4
    assert found["form"] == "Meta" and found["uncovered"] is None


def test_losses_are_told(tiny: Path, report: Callable[..., dict[str, Any]]) -> None:
    found = report(tiny / "spinquant")
    assert "RoPE factor 32 assumed" in found["lost"][0]
    assert found["lost"][-1].endswith("int4 scales are rounded to float16")
    assert "30 tensors are taken from the front end as integer codes" in found["kept"]
    assert not any("scales" in line for line in report(tiny / "bf16")["lost"])


def test_one_line_and_the_whole_report(
    tiny: Path, one_level: str, capsys: pytest.CaptureFixture[str]
) -> None:
    arguments = ["import", str(tiny / "bf16"), "--target", one_level, "--kv-cache", "int8"]
    assert main(arguments) == 0
    [line] = capsys.readouterr().out.splitlines()
    assert "bf16: Meta, llama, 4 layers, bfloat16" in line and "at 8192 positions" in line
    assert main([*arguments, "--report"]) == 0
    printed = capsys.readouterr().out
    for word in ("notes and losses", "operators in decode", "swiglu", "KV cache of 8192 positions"):
        assert word in printed


def test_what_no_kernel_covers_is_said(
    tiny: Path, one_level: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """A vocabulary of 1032 makes no whole blocks of 16 rows."""
    config, rng = LlamaConfig(64, 1, 2, 1, 32, 64, 1032, 1e-5, 1e4, None), np.random.default_rng(0)
    shapes = {f"layers.0.{part}.weight": shape for part, shape in config.linear_shapes().items()}
    shapes[EMBEDDING] = (config.vocab_size, config.dim)
    weights: dict[str, Any] = {n: rng.standard_normal(s, np.float32) for n, s in shapes.items()}
    weights |= {name: np.ones(config.dim, np.float32) for name in norm_names(config)}
    quant, tensors = quantize_model(config, weights, "ptq")
    model = tmp_path / "odd"
    write_checkpoint(model, config, quant, tensors, tiny / "bf16" / "tokenizer.model")
    assert main(["import", str(model), "--target", one_level]) == 1
    assert "; not for one-level: " in capsys.readouterr().out
    assert main(["import", str(model), "--target", one_level, "--report"]) == 1
    printed = capsys.readouterr().out
    assert "not covered" in printed and "no multiple of 16 rows" in printed


def test_a_refused_model_has_its_code(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["import", str(tmp_path / "none"), "--report"]) == 1
    assert "error[checkpoint-missing]" in capsys.readouterr().err
