"""The commands of the README on the model of the repository, each as its own process."""

from __future__ import annotations

import json
import signal
import subprocess
import sys
from pathlib import Path

import pytest

LLAMAC = (sys.executable, "-P", "-m", "llamac.tools.cli")
MODEL = Path(__file__).resolve().parents[2] / "examples" / "tiny-llama" / "spinquant"


def llamac(*arguments: str, code: int = 0) -> subprocess.CompletedProcess[str]:
    """Run a command and check its exit code."""
    done = subprocess.run([*LLAMAC, *arguments], capture_output=True, text=True, check=False)
    assert done.returncode == code, done.stderr
    return done


@pytest.fixture(scope="module")
def model() -> str:
    """The checkpoint that `make demo` compiles."""
    if not MODEL.is_dir():
        pytest.skip(f"missing: {MODEL}")
    return str(MODEL)


@pytest.fixture(scope="module")
def compiled(
    model: str, tmp_path_factory: pytest.TempPathFactory
) -> tuple[str, subprocess.CompletedProcess[str]]:
    """A bundle of it, and what compiling printed."""
    out = tmp_path_factory.mktemp("bundles") / "tiny-host"
    report = out.with_suffix(".json")
    done = llamac("compile", model, "--target", "host", "-o", str(out), "--report", str(report))
    return str(out), done


def test_compile_reports_every_stage(
    compiled: tuple[str, subprocess.CompletedProcess[str]],
) -> None:
    """Without a terminal each stage has its lines on standard error; the report has them all."""
    bundle, done = compiled
    report = json.loads(Path(bundle).with_suffix(".json").read_text("utf-8"))
    assert done.stdout == ""
    for stage in report["stages"]:
        if stage["depth"] == 0:
            assert f"\n{stage['name']}: {stage['seconds']:.1f} s" in f"\n{done.stderr}"
    assert report["files"]["weights.bin"] == (Path(bundle) / "weights.bin").stat().st_size
    assert report["peak_anonymous_bytes"] > 0
    assert done.stderr.endswith(f"wrote {bundle}\n")


def test_compile_keeps_a_bundle_that_is_there(
    model: str, compiled: tuple[str, subprocess.CompletedProcess[str]]
) -> None:
    """Without --force nothing is replaced."""
    bundle, _ = compiled
    before = (Path(bundle) / "manifest.json").read_bytes()
    done = llamac("compile", model, "--target", "host", "-o", bundle, code=1)
    assert done.stderr.startswith("error[output]: ")
    assert (Path(bundle) / "manifest.json").read_bytes() == before


def test_ctrl_c_leaves_nothing(model: str, tmp_path: Path) -> None:
    """Interrupted in the middle, a compilation removes what it wrote."""
    command = [*LLAMAC, "compile", model, "--target", "host", "-o", str(tmp_path / "out")]
    process = subprocess.Popen(command, stderr=subprocess.PIPE, text=True)
    assert process.stderr is not None
    for line in process.stderr:
        if line.startswith("build the library"):
            break
    process.send_signal(signal.SIGINT)
    rest = process.stderr.read()
    process.stderr.close()
    assert process.wait(timeout=60) == 130
    assert rest.endswith("interrupted\n")
    assert list(tmp_path.iterdir()) == []


def test_run_gives_the_same_text_twice(
    compiled: tuple[str, subprocess.CompletedProcess[str]],
) -> None:
    """Standard output is text and nothing else; the same prompt gives the same text."""
    bundle, _ = compiled
    arguments = ("run", bundle, "Once upon a time", "--max-tokens", "32", "--no-chat")
    first, second = llamac(*arguments), llamac(*arguments, "--threads", "1")
    assert first.stdout == second.stdout
    assert len(first.stdout.split()) > 8
    assert first.stderr == ""


def test_bench_measures(compiled: tuple[str, subprocess.CompletedProcess[str]]) -> None:
    """All figures are there and possible."""
    bundle, _ = compiled
    sizes = ("--prompt-tokens", "16", "--decode-tokens", "8", "--rounds", "1", "--threads", "1")
    [run] = json.loads(llamac("bench", bundle, *sizes, "--profile", "--json").stdout)["runs"]
    for name in ("prefill_tokens_per_s", "decode_tokens_per_s", "read_bandwidth_gb_s"):
        assert run[name]["min"] > 0
    assert 0 < run["peak_anonymous_bytes"] <= run["peak_resident_bytes"]
    assert run["weight_bytes_per_token"] > 0
    assert 0 < sum(run["profile_ms"].values())


def test_verify_and_inspect_find_nothing_wrong(
    model: str, compiled: tuple[str, subprocess.CompletedProcess[str]]
) -> None:
    """A fresh bundle passes both, and the doctor calls this machine ready."""
    bundle, _ = compiled
    assert "passed" in llamac("verify", bundle, model, "--tokens", "16").stdout
    assert "as the manifest says" in llamac("inspect", bundle, "--check").stdout
    assert "ready to compile" in llamac("doctor").stdout
