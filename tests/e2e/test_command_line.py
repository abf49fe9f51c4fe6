"""The commands of the README on the model of the repository, each as its own process."""

from __future__ import annotations

import json
import re
import signal
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import pytest

Llamac = Callable[..., subprocess.CompletedProcess[str]]
HostBundle = tuple[Path, subprocess.CompletedProcess[str]]


def test_compile_reports_every_stage(host_bundle: HostBundle) -> None:
    """Without a terminal each stage has its lines on standard error; the report has them all."""
    bundle, done = host_bundle
    report = json.loads(bundle.with_suffix(".json").read_text("utf-8"))
    assert done.stdout == ""
    for stage in report["stages"]:
        if stage["depth"] == 0:
            assert f"\n{stage['name']}: {stage['seconds']:.1f} s" in f"\n{done.stderr}"
    assert report["files"]["weights.bin"] == (bundle / "weights.bin").stat().st_size
    assert report["peak_anonymous_bytes"] > 0
    assert done.stderr.endswith(f"wrote {bundle}\n")


def test_compile_keeps_a_bundle_that_is_there(
    tiny: Path, llamac: Llamac, host_bundle: HostBundle
) -> None:
    """Without --force nothing is replaced."""
    bundle, _ = host_bundle
    before = (bundle / "manifest.json").read_bytes()
    done = llamac("compile", tiny / "spinquant", "--target", "host", "-o", bundle, code=1)
    assert done.stderr.startswith("error[output]: ")
    assert (bundle / "manifest.json").read_bytes() == before


def test_ctrl_c_ends_a_generation(host_bundle: HostBundle) -> None:
    """The text so far stays on standard output."""
    command = [sys.executable, "-P", "-m", "llamac.tools.cli", "run", str(host_bundle[0])]
    process = subprocess.Popen(
        [*command, "Once upon a time", "--no-chat", "--max-tokens", "8000"],
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
    )
    assert process.stdout is not None
    assert process.stdout.read(20)
    process.send_signal(signal.SIGINT)
    _, err = process.communicate(timeout=60)
    assert process.returncode in (0, 130, -signal.SIGINT)
    assert err in ("interrupted\n", "")


@pytest.mark.needs("readelf")
def test_the_library_needs_libc_alone(host_bundle: HostBundle) -> None:
    """No TVM, no C++ runtime; relocations do not touch code, segments fit pages of 16 KiB."""
    library = host_bundle[0] / "lib" / "libmodel.so"
    command = ["readelf", "--wide", "--dynamic", "--program-headers", str(library)]
    shown = subprocess.run(command, capture_output=True, text=True, check=True).stdout
    needed = set(re.findall(r"\(NEEDED\).*\[(.*)\]", shown))
    assert "libc.so.6" in needed and needed <= {"libc.so.6", "libm.so.6"}
    assert "TEXTREL" not in shown and "RUNPATH" not in shown and "RPATH" not in shown
    alignments = re.findall(r"^  LOAD .* (0x[0-9a-f]+)$", shown, re.MULTILINE)
    assert alignments and min(int(text, 16) for text in alignments) >= 0x4000


def test_run_gives_the_same_text_twice(llamac: Llamac, host_bundle: HostBundle) -> None:
    """Standard output is text and nothing else; the same prompt gives the same text."""
    bundle, _ = host_bundle
    arguments = ("run", bundle, "Once upon a time", "--max-tokens", "32", "--no-chat")
    first, second = llamac(*arguments), llamac(*arguments, "--threads", "1")
    assert first.stdout == second.stdout
    assert len(first.stdout.split()) > 8
    assert first.stderr == ""


def test_bench_measures(llamac: Llamac, host_bundle: HostBundle) -> None:
    """All figures are there and possible."""
    bundle, _ = host_bundle
    sizes = ("--prompt-tokens", "16", "--decode-tokens", "8", "--rounds", "1", "--threads", "1")
    [run] = json.loads(llamac("bench", bundle, *sizes, "--profile", "--json").stdout)["runs"]
    for name in ("prefill_tokens_per_s", "decode_tokens_per_s", "read_bandwidth_gb_s"):
        assert run[name]["min"] > 0
    assert 0 < run["peak_anonymous_bytes"] <= run["peak_resident_bytes"]
    assert run["weight_bytes_per_token"] > 0
    assert 0 < sum(run["profile_ms"].values())


def test_verify_and_inspect_find_nothing_wrong(
    tiny: Path, llamac: Llamac, host_bundle: HostBundle
) -> None:
    """A fresh bundle passes both, and the doctor calls this machine ready."""
    bundle, _ = host_bundle
    assert "passed" in llamac("verify", bundle, tiny / "spinquant", "--tokens", "16").stdout
    assert "as the manifest says" in llamac("inspect", bundle, "--check").stdout
    assert "ready to compile" in llamac("doctor").stdout
