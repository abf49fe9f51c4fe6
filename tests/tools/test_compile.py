"""`llamac compile` and `llamac verify`: how their arguments reach the compiler, what they print."""

from __future__ import annotations

import json
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import pytest

from llamac.compiler import pipeline, verify
from llamac.compiler.progress import Progress, Report
from llamac.compiler.verify import VerifyReport
from llamac.compiler.verify_steps import OperationResult
from llamac.compiler.verify_text import TextResult
from llamac.tools.cli import main


@dataclass
class Compiler:
    """Stands for the pipeline: keeps the configuration, makes a report."""

    configs: list[Any] = field(default_factory=list)

    def compile_bundle(self, config: Any, progress: Progress) -> Report:
        self.configs.append(config)
        with progress.stage("pack weights"):
            pass
        progress.report.notes.append("assumed a RoPE factor of 32")
        progress.report.files["weights.bin"] = 2048
        return progress.report


@pytest.fixture
def compiler(monkeypatch: pytest.MonkeyPatch) -> Compiler:
    """Takes the place of the pipeline's function; the configuration is the real one."""
    found = Compiler()
    monkeypatch.setattr(pipeline, "compile_bundle", found.compile_bundle)
    return found


def test_compile_passes_its_defaults(compiler: Compiler) -> None:
    """Without options: this CPU, float16, verified, an existing bundle is kept."""
    assert main(["compile", "model", "--target", "host", "-o", "out"]) == 0
    [config] = compiler.configs
    assert vars(config) == {
        "model": Path("model"),
        "target": "host",
        "out": Path("out"),
        "processors": ("cpu",),
        "placement": {},
        "context_length": None,
        "chunks": (128, 32, 8),
        "scale_dtype": "float16",
        "kv_dtype": None,
        "rope_factor": None,
        "tokenizer": None,
        "name": None,
        "verify": True,
        "verify_text": None,
        "dump": None,
        "overwrite": False,
        "threads": 2,
        "records": None,
        "require_tuned": False,
        "cpu_layers": (),
        "scheme": None,
        "calibration": None,
        "calibration_tokens": 512,
        "requantize": False,
        "lora": None,
        "quantize": None,
    }


def test_compile_passes_its_options(compiler: Compiler, tmp_path: Path) -> None:
    """Every option reaches the configuration."""
    options = (
        "--processors htp,cpu --place prefill=htp --context 4096 --chunks 64,8 --scales bfloat16 "
        "--kv-cache int8 --rope-factor 32 --tokenizer t.model --name n --no-verify --requantize "
        "--scheme a16w4 --cpu-layers 0,14-15 --calibrate c.txt --calibration-tokens 64 "
        "--lora adapter --verify-text v.txt --dump ir --records r.jsonl --require-tuned "
        f"--force --threads 1 --report {tmp_path / 'report.json'}"
    )
    assert main(["compile", "model", "--target", "sm8650", "-o", "out", *options.split()]) == 0
    [config] = compiler.configs
    assert vars(config) == {
        "model": Path("model"),
        "target": "sm8650",
        "out": Path("out"),
        "processors": ("htp", "cpu"),
        "placement": {"prefill": "htp"},
        "context_length": 4096,
        "chunks": (64, 8),
        "scale_dtype": "bfloat16",
        "kv_dtype": "int8",
        "rope_factor": 32.0,
        "tokenizer": Path("t.model"),
        "name": "n",
        "verify": False,
        "verify_text": Path("v.txt"),
        "dump": Path("ir"),
        "overwrite": True,
        "threads": 1,
        "records": Path("r.jsonl"),
        "require_tuned": True,
        "cpu_layers": (0, 14, 15),
        "scheme": "a16w4",
        "calibration": Path("c.txt"),
        "calibration_tokens": 64,
        "requantize": True,
        "lora": Path("adapter"),
        "quantize": None,
    }
    report = json.loads((tmp_path / "report.json").read_text("utf-8"))
    assert report["notes"] == ["assumed a RoPE factor of 32"]


@pytest.mark.usefixtures("compiler")
def test_compile_reports_on_standard_error(capsys: pytest.CaptureFixture[str]) -> None:
    """Stages, notes and sizes are shown, with --quiet the end only; standard output is empty."""
    arguments = ["compile", "model", "--target", "host", "-o", "out"]
    assert main(arguments) == 0
    out, err = capsys.readouterr()
    assert out == ""
    assert "pack weights ..." in err
    assert "note: assumed a RoPE factor of 32" in err
    assert "out/weights.bin: 2.0 KiB" in err
    assert main([*arguments, "--quiet"]) == 0
    assert capsys.readouterr() == ("", "wrote out\n")


@pytest.mark.usefixtures("compiler")
def test_a_report_that_cannot_be_written_is_an_error(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """The report's path is the user's: a missing folder gets the usual three lines."""
    report = tmp_path / "missing" / "report.json"
    arguments = ["compile", "model", "--target", "host", "-o", "out", "--report", str(report)]
    assert main(arguments) == 1
    assert f"error[output]: {report} cannot be written" in capsys.readouterr().err


@pytest.mark.parametrize(("passed", "code", "word"), [(True, 0, "passed"), (False, 1, "FAILED")])
def test_verify_says_by_its_exit_code_whether_it_passed(
    passed: bool,
    code: int,
    word: str,
    monkeypatch: pytest.MonkeyPatch,
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
) -> None:
    """The table names each operation; the text and the number of tokens reach the comparison."""
    calls = []

    def step(sqnr_db: float, max_error: float, failure: str = "") -> OperationResult:
        return OperationResult("a", "decode", 0, "norm_1x8", "norm", sqnr_db, max_error, 0, failure)

    operations = (step(121.5, 1e-7), step(130.0, 2e-7, "" if passed else "codes differ"))
    text_result = TextResult(9, 1.25, 1.26, 0.975, 0.1, 40.0, 0.1, least_sqnr_db=10.0)

    def verify_bundle(*arguments: Any, **options: Any) -> VerifyReport:
        calls.append((*arguments[:4], options))
        return VerifyReport("avx2", operations, text_result)

    monkeypatch.setattr(verify, "verify_bundle", verify_bundle)
    text = tmp_path / "story.txt"
    text.write_text("Once upon", "utf-8")
    arguments = ["verify", "out", "model", "--text", str(text), "--tokens", "9", "--level", "avx2"]
    assert main([*arguments, "--all-functions", "--threads", "1"]) == code
    options = {"threads": 1, "level": "avx2", "all_functions": True}
    options |= dict.fromkeys(("machine", "calibration", "lora"))
    assert calls == [(Path("out"), Path("model"), "Once upon", 9, options)]
    printed = capsys.readouterr().out
    assert "decode: norm_1x8  2      121.5    2e-07" in printed
    assert "97.5 %" in printed
    assert word in printed
    assert ("codes differ" in printed) != passed
    assert main(["verify", "out", "model", "--json"]) == code
    assert json.loads(capsys.readouterr().out)["status"] == word.lower()


def test_verify_needs_a_readable_text(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """A text that is not UTF-8 is refused before anything heavy is loaded."""
    text = tmp_path / "story.txt"
    text.write_bytes(b"\xff\xfe")
    assert main(["verify", "out", "model", "--text", str(text)]) == 2
    assert "cannot be read" in capsys.readouterr().err
