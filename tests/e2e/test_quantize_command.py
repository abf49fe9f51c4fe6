"""Float models quantized by the command line, compiled, and talking."""

from __future__ import annotations

import re
import subprocess
from collections.abc import Callable
from pathlib import Path

import pytest

from llamac.runtime.manifest import read_manifest
from llamac.tools.tiny_corpus import documents

Llamac = Callable[..., subprocess.CompletedProcess[str]]


@pytest.fixture(scope="module")
def text(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("text") / "pages.txt"
    path.write_text("\n".join(d[0].text for d in documents(120, 5) if not d[0].role), "utf-8")
    return path


def test_a_quantized_model_is_compiled_and_talks(
    tiny: Path, text: Path, llamac: Llamac, one_level: str, tmp_path: Path
) -> None:
    """In two steps and in one: the same weights; one layer stays bfloat16."""
    rules = tmp_path / "layers.toml"
    rules.write_text('"layers.0.attention.*" = "bfloat16"\n', "utf-8")
    how = ("--rotate", "--method", "gptq", "--calibrate", text, "--precision", rules)
    compile_options = ("--target", one_level, "--chunks", "8", "--context", "512")
    model, two, one = (tmp_path / name for name in ("tiny-int4", "two-steps", "one-step"))
    done = llamac("quantize", tiny / "bf16", "-o", model, *how)
    found = re.match(
        r"negative log likelihood of 512 tokens: ([\d.]+) nats per token before, ([\d.]+) after\n$",
        done.stdout,
    )
    assert found is not None, done.stdout
    before, after = map(float, found.groups())
    assert abs(after - before) < 0.1
    llamac("compile", model, *compile_options, "-o", two)
    printed = llamac(
        "compile", tiny / "bf16", "--quantize", "int4", *how, *compile_options, "-o", one
    ).stderr
    assert "note: quantized to int4 when it was compiled (gptq, rotated); negative" in printed
    assert (one / "weights.bin").read_bytes()[256:] == (two / "weights.bin").read_bytes()[256:]
    manifest = read_manifest(one)
    assert manifest.model.name == "bf16"
    assert manifest.verification.status == "passed"
    assert manifest.quantization.weights == "int4 group-32 and bfloat16"
    assert not (one / "build").exists()
    answer = llamac("run", one, "Tell me a story about a fox.", "--max-tokens", "60").stdout
    known = {w for d in documents(2000, 0) for turn in d for w in re.findall(r"\w+", turn.text)}
    words = re.findall(r"\w+", answer)
    assert "fox" in words
    assert len(words) > 25 and sum(word in known for word in words) > 0.95 * len(words), answer


@pytest.mark.parametrize(
    ("options", "said"),
    [
        (("--rotate",), "--rotate has no effect without --quantize int4"),
        (("--quantize", "int4", "--method", "gptq"), "the method gptq needs --calibrate"),
    ],
)
def test_options_that_do_not_fit_are_refused(
    options: tuple[str, ...], said: str, tiny: Path, llamac: Llamac, tmp_path: Path
) -> None:
    arguments = ("--target", "host", "-o", tmp_path / "out", *options)
    assert said in llamac("compile", tiny / "bf16", *arguments, code=2).stderr
    assert list(tmp_path.iterdir()) == []


def test_a_quantized_model_is_not_quantized_again(
    tiny: Path, llamac: Llamac, tmp_path: Path
) -> None:
    said = llamac("quantize", tiny / "spinquant", "-o", tmp_path / "out", code=1).stderr
    assert "error[model-unsupported]: spinquant is quantized already" in said
    assert list(tmp_path.iterdir()) == []
