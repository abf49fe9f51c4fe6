"""`llamac tune`: from the command line to records that `llamac compile` uses."""

from __future__ import annotations

import json
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest

from llamac.compiler.tuning.tuner import KernelState
from llamac.runtime.errors import TuningImpossible
from llamac.schedules.intrin.x86 import X86Portable
from llamac.targets.tuning.host import check_level
from llamac.targets.tuning.records import read_records
from llamac.tools.cli import main
from llamac.tools.tune_display import PlainDisplay, cost_text

PORTABLE = ["--level", "x86-64", "--chunks", "8", "--context", "100", "--plain"]


@pytest.fixture(autouse=True)
def folders(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Records and caches of this test's own."""
    monkeypatch.setenv("XDG_DATA_HOME", str(tmp_path / "data"))
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))


@pytest.fixture
def tiny(checkout: Path) -> str:
    """A small checkpoint."""
    return str(checkout / "examples" / "tiny-llama" / "spinquant")


@pytest.fixture
def host() -> None:
    """Skips the test on another machine than x86-64."""
    try:
        check_level(X86Portable())
    except TuningImpossible as error:
        pytest.skip(f"this CPU is no x86-64: {error}")


def test_it_lists_kernels_and_measures_nothing(
    tiny: str, capsys: pytest.CaptureFixture[str], tmp_path: Path
) -> None:
    assert main(["tune", tiny, "--target", "host", "--list", "--json", *PORTABLE]) == 0
    listed = json.loads(capsys.readouterr().out)
    assert all(entry["points"] > 1 and entry["default"] for entry in listed)
    assert not (tmp_path / "data").exists()


@pytest.mark.usefixtures("host")
def test_it_tunes_and_records(
    tiny: str, capsys: pytest.CaptureFixture[str], tmp_path: Path
) -> None:
    """One kernel, really measured; the second run has nothing left to do."""
    command = ["tune", tiny, "--target", "host", "--kernels", "hadamard_quantize_8", *PORTABLE]
    assert main([*command, "--json"]) == 0
    out, err = capsys.readouterr()
    [state] = json.loads(out)
    assert state["trials"] == state["candidates"] == 3
    assert 0 < state["best"] <= state["default"]
    assert "all measured" in err
    file = tmp_path / "data" / "llamac" / "records" / "host.jsonl"
    assert f"new records in {file}" in err
    records = read_records(file).records
    assert {r.status for r in records} == {"ok"}
    assert {r.place.level for r in records} == {"x86-64"}
    assert main(command) == 0
    out, err = capsys.readouterr()
    assert "0 new records" in err
    assert "radix=" in out
    assert read_records(file).records == records


@pytest.mark.usefixtures("host")
def test_damaged_lines_are_reported(
    tiny: str, capsys: pytest.CaptureFixture[str], tmp_path: Path
) -> None:
    """And what was before them is not measured again."""
    file = tmp_path / "mine.jsonl"
    command = ["tune", tiny, "--target", "host", "--kernels", "argmax", "--records", str(file)]
    assert main([*command, *PORTABLE]) == 0
    file.write_bytes(file.read_bytes() + b'{"format": 1, "soc": "ho')
    capsys.readouterr()
    assert main([*command, *PORTABLE]) == 0
    err = capsys.readouterr().err
    assert "1 damaged lines were skipped" in err
    assert "0 new records" in err


@pytest.mark.slow
@pytest.mark.usefixtures("host")
def test_ctrl_c_keeps_what_was_measured(tiny: str, tmp_path: Path) -> None:
    """The process is interrupted in the middle; the file is whole, and the next run resumes."""
    file = tmp_path / "r.jsonl"
    command = [sys.executable, "-m", "llamac.tools.cli", "tune", tiny, "--target", "host"]
    command += ["--kernels", "qmatmul", "--records", str(file), *PORTABLE]
    process = subprocess.Popen(command, stderr=subprocess.PIPE, stdout=subprocess.PIPE, text=True)
    deadline = time.monotonic() + 120
    while time.monotonic() < deadline and not (file.exists() and file.stat().st_size):
        time.sleep(0.1)
    process.send_signal(signal.SIGINT)
    _, err = process.communicate(timeout=60)
    assert process.returncode == 130, err
    assert "interrupted" in err
    kept = read_records(file)
    assert kept.records
    assert kept.torn == 0


@pytest.mark.parametrize(
    ("arguments", "code", "words"),
    [
        ("llama-3.2-1b", 2, "[usage]"),
        ("llama-3.2-1b --target sm9999", 1, "[soc-unknown]"),
        ("llama-3.2-1b --target host --kernels softmax", 1, "[tuning-impossible]"),
        ("llama-3.2-1b --target host --cost packets", 1, "[tuning-impossible]"),
        ("llama-3.2-1b --target sm8650 --cost time", 1, "[tuning-impossible]"),
        ("llama-3.2-1b --target apple-m1", 1, "[toolchain-missing]"),
        ("llama-3.2-1b --target host --trials 0", 2, "[usage]"),
        ("none --target host", 1, "[checkpoint-missing]"),
    ],
)
def test_errors_have_codes(
    arguments: str, code: int, words: str, capsys: pytest.CaptureFixture[str]
) -> None:
    """Whatever is asked that cannot be done."""
    assert main(["tune", *arguments.split()]) == code
    assert f"error{words}" in capsys.readouterr().err


def test_records_of_something_else_are_refused(
    capsys: pytest.CaptureFixture[str], tmp_path: Path
) -> None:
    file = tmp_path / "package.json"
    file.write_text('{"name": "x"}', "utf-8")
    assert main(["tune", "llama-3.2-1b", "--target", "host", "--records", str(file)]) == 1
    assert "error[records-invalid]" in capsys.readouterr().err
    assert file.read_text("utf-8") == '{"name": "x"}'


def test_lines_without_a_terminal(capsys: pytest.CaptureFixture[str]) -> None:
    """When a kernel ends: trials, the best, the model's error, and what is left."""
    display = PlainDisplay(2, sys.stderr)
    state = KernelState("k", points=9, compiled=9, candidates=8, trials=4, budget=6, kind="time_us")
    display.show(state)
    assert capsys.readouterr().err == ""
    state.default, state.best, state.model_error, state.ended = 100.0, 80.0, 0.05, "trials"
    display.show(state)
    err = capsys.readouterr().err
    assert err.startswith("1/2 k: 4 of 6 trials, best 80 us, 20.0 % below the default, model off")
    assert "by 5 %, trials" in err
    assert "left" in err


@pytest.mark.parametrize(
    ("cost", "kind", "text"),
    [
        (0, "time_us", "-"),
        (12.345, "time_us", "12.35 us"),
        (123456, "time_us", "123456 us"),
        (313914.2, "cycles", "313.9 k cycles"),
        (13350260, "packets", "13.35 M packets"),
        (2e9, "instructions", "2 G instructions"),
    ],
)
def test_costs_for_people(cost: float, kind: str, text: str) -> None:
    assert cost_text(cost, kind) == text
