"""The commands with --emulate on an Arm bundle of the tiny model, each as its own process."""

from __future__ import annotations

import json
import os
import re
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path

import pytest

from llamac.runtime import load
from llamac.targets.emulator import find_emulator

pytestmark = pytest.mark.needs("qemu-aarch64")

PROMPT = "Tell me a story about a fox."
Llamac = Callable[..., subprocess.CompletedProcess[str]]


@pytest.fixture(scope="module")
def board(compiled: Callable[..., Path], tiny: Path) -> Path:
    """The model for a Raspberry Pi 5."""
    return compiled(tiny / "spinquant", target="rpi5")


def test_run_tells_the_story_of_the_host(
    board: Path, compiled: Callable[..., Path], tiny: Path, llamac: Llamac
) -> None:
    """Standard output is equal; standard error names the emulator, the CPU and the kernels."""
    options = (PROMPT, "--max-tokens", "40", "--threads", "2")
    host = llamac("run", compiled(tiny / "spinquant"), *options)
    for cpu, kernels in (("cortex-a76", "dotprod"), ("cortex-a57", "neon")):
        done = llamac("run", board, *options, "--emulate", "--cpu", cpu)
        assert done.stdout == host.stdout
        assert f"spinquant for rpi5, kernels {kernels}, runs under qemu-aarch64" in done.stderr
        assert f"CPU model {cpu}" in done.stderr


def test_bench_and_verify_of_an_emulated_board(board: Path, tiny: Path, llamac: Llamac) -> None:
    """Time by operation, labelled as the emulator's, and the comparison with the reference."""
    options = ("--emulate", "--cpu", "cortex-a76", "--json")
    done = llamac("bench", board, *options, "--threads", "1", "--profile", "--decode-tokens", "2")
    [run] = json.loads(done.stdout)["runs"]
    assert "cortex-a76" in run["emulator"]
    assert any(name.startswith("qmatmul_quads") for name in run["profile_ms"])
    done = llamac("verify", board, tiny / "spinquant", *options, "--tokens", "24")
    report = json.loads(done.stdout)
    assert (report["status"], report["level"]) == ("passed", "dotprod")


def test_the_runner_alone_gives_the_same_tokens(board: Path) -> None:
    """What one pushes to a phone: a program and the weights, without Python."""
    emulator = find_emulator("cortex-a76")
    with load(board, machine=emulator, threads=1) as model, model.session() as session:
        tokens = model.tokenizer.encode(PROMPT, bos=True)
        session.append(tokens)
        expected = []
        for _ in range(12):
            expected.append(session.argmax())
            session.append(expected[-1:])
    ids = ",".join(map(str, tokens))
    command = emulator.command(board / "bin" / "llamac-runner", board / "weights.bin")
    command += ["--tokens", ids, "--decode", "12", "--threads", "2", "--profile"]
    done = subprocess.run(command, capture_output=True, text=True, check=True)
    assert done.stdout == ",".join(map(str, expected)) + "\n"
    assert "kernels dotprod, threads: 2" in done.stderr
    assert "ms  qmatmul_quads" in done.stderr


@pytest.mark.needs("readelf")
def test_the_runner_needs_nothing_of_the_device(board: Path) -> None:
    """No loader, no library; segments fit pages of 16 KiB, as new phones have them."""
    command = ["readelf", "--wide", "--file-header", "--program-headers", "--dynamic"]
    runner = str(board / "bin" / "llamac-runner")
    shown = subprocess.run([*command, runner], capture_output=True, text=True, check=True).stdout
    assert "AArch64" in shown
    assert "INTERP" not in shown and "NEEDED" not in shown
    alignments = re.findall(r"^  LOAD .* (0x[0-9a-f]+)$", shown, re.MULTILINE)
    assert alignments and min(int(text, 16) for text in alignments) >= 0x4000


def test_ctrl_c_ends_a_generation_and_its_emulator(board: Path) -> None:
    """The text so far stays; no process and no core file is left."""
    command = [sys.executable, "-P", "-m", "llamac.tools.cli", "run", str(board), PROMPT]
    process = subprocess.Popen(
        [*command, "--emulate", "--no-chat", "--max-tokens", "8000"],
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
    )
    assert process.stdout is not None
    assert process.stdout.read(20)
    [child] = children(process.pid)
    process.send_signal(signal.SIGINT)
    _, err = process.communicate(timeout=60)
    assert process.returncode in (0, 130, -signal.SIGINT)
    assert "Traceback" not in err
    deadline = time.monotonic() + 10
    while Path(f"/proc/{child}").exists() and time.monotonic() < deadline:
        time.sleep(0.02)
    assert not Path(f"/proc/{child}").exists()


def children(parent: int) -> list[int]:
    """Ids of the processes that a process has started."""
    found = []
    for name in filter(str.isdigit, os.listdir("/proc")):
        try:
            status = Path(f"/proc/{name}/stat").read_text()
        except OSError:  # it has just ended
            continue
        if int(status.rpartition(")")[2].split()[1]) == parent:
            found.append(int(name))
    return found
