"""Commands with --emulate: what they print, what they refuse; Ctrl-C leaves nothing."""

from __future__ import annotations

import json
import os
import shlex
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path

import pytest

from llamac.tools.cli import main

LLAMAC = (sys.executable, "-P", "-m", "llamac.tools.cli")


@pytest.fixture(autouse=True)
def no_choice(monkeypatch: pytest.MonkeyPatch) -> None:
    """Tests choose for themselves."""
    monkeypatch.delenv("QEMU_CPU", raising=False)
    monkeypatch.delenv("LLAMAC_QEMU", raising=False)


# -- run -----------------------------------------------------------------------------------------


@pytest.mark.needs("qemu-aarch64")
def test_run_prints_the_text_and_says_where_it_ran(
    arm_bundle: Path, bundle: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """Standard output is what the host's own bundle gives; standard error says what ran where."""
    arguments = ["the user", "--no-chat", "--max-tokens", "12"]
    assert main(["run", str(bundle), *arguments]) == 0
    expected = capsys.readouterr().out
    emulated = ["run", str(arm_bundle), *arguments, "--emulate", "--cpu", "cortex-a76"]
    assert main([*emulated, "--stats"]) == 0
    out, err = capsys.readouterr()
    assert out == expected
    assert "chain for armv8, kernels portable, runs under qemu-aarch64 " in err
    assert "CPU model cortex-a76; speeds are the emulator's" in err
    assert "evaluate the prompt ..." in err
    assert "kernels portable" in err
    assert main(["--quiet", *emulated]) == 0
    assert capsys.readouterr() == (expected, "")


@pytest.mark.needs("qemu-aarch64")
def test_run_prints_the_command_for_a_device(
    arm_bundle: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    """The runner gets the same ids, and makes the same text of them."""
    arguments = [
        "run",
        str(arm_bundle),
        "the user",
        "--max-tokens",
        "9",
        "--emulate",
        "--threads=1",
    ]
    assert main([*arguments, "--device-command"]) == 0
    out, err = capsys.readouterr()
    [line] = [line for line in err.splitlines() if line.startswith("./llamac-runner weights.bin ")]
    monkeypatch.chdir(arm_bundle)
    command = shlex.split(line.replace("./llamac-runner", "bin/llamac-runner"))
    done = subprocess.run(["qemu-aarch64", *command], capture_output=True, check=True)
    assert done.stdout.decode("utf-8", "replace") == out


@pytest.mark.needs("qemu-aarch64")
def test_run_refuses_what_the_emulated_cpu_cannot(
    arm_bundle: Path, bundle: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """Each with its code, and nothing on standard output."""
    cases = {
        ("run", str(arm_bundle), "Hi"): "cpu-unsupported",
        ("run", str(bundle), "Hi", "--emulate"): "usage",
        ("run", str(arm_bundle), "Hi", "--emulate", "--cpu", "cortex-x4"): "usage",
        ("run", str(arm_bundle), "Hi", "--emulate", "--cpu", "max,wings=on"): "usage",
        ("run", str(arm_bundle), "Hi", "--cpu", "cortex-a76"): "usage",
        ("run", str(arm_bundle), "Hi", "--emulate", "--level", "foreign"): "cpu-unsupported",
        ("run", str(arm_bundle), "Hi", "--emulate", "--level", "none"): "usage",
        ("bench", str(arm_bundle), "--emulate", "--level", "foreign"): "cpu-unsupported",
        ("bench", str(arm_bundle), "--cpu", "max"): "usage",
        ("verify", str(bundle), str(bundle), "--emulate"): "usage",
        ("verify", str(bundle), str(bundle), "--cpu", "max"): "usage",
    }
    for arguments, code in cases.items():
        assert main([*arguments]) == (2 if code == "usage" else 1), arguments
        out, err = capsys.readouterr()
        assert out == ""
        assert f"error[{code}]: " in err, arguments
        assert "\n  cause: " in err and "\n  fix: " in err


@pytest.mark.parametrize("command", [("run", "Hi"), ("bench",), ("verify", "model")])
def test_a_missing_emulator_is_said_before_anything_else(
    command: tuple[str, ...],
    monkeypatch: pytest.MonkeyPatch,
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
) -> None:
    """With the command that installs it."""
    monkeypatch.setenv("PATH", str(tmp_path))
    name, *rest = command
    assert main([name, "no-bundle", *rest, "--emulate"]) == 1
    err = capsys.readouterr().err
    assert err.startswith("error[toolchain-missing]: no emulator for AArch64 was found\n")
    assert "apt-get install qemu-user" in err


# -- bench ---------------------------------------------------------------------------------------


@pytest.mark.needs("qemu-aarch64")
def test_bench_labels_its_times_as_the_emulators(
    arm_bundle: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """A table for people and JSON for programs; nothing in either passes for a device's figure."""
    arguments = ["bench", str(arm_bundle), "--emulate", "--cpu", "cortex-a57", "--threads", "1"]
    assert main(arguments) == 0
    out, err = capsys.readouterr()
    assert "1 thread: 1 round under qemu-aarch64" in err
    assert "CPU model cortex-a57: times of the emulator, not of a device" in out
    assert "emulated prefill, 32 tokens" in out
    assert "emulated decode, 8 tokens" in out
    assert "memory" not in out and "bandwidth" not in out
    assert main([*arguments, "--json", "--prompt-tokens", "5", "--rounds", "2"]) == 0
    [run] = json.loads(capsys.readouterr().out)["runs"]
    assert "cortex-a57" in run["emulator"]
    assert run["prompt_tokens"] == 5
    assert run["peak_resident_bytes"] is None
    assert run["bandwidth_share"] is None


# -- Ctrl-C --------------------------------------------------------------------------------------


def processes_with(word: str) -> list[int]:
    """Ids of running processes whose command line has the word."""
    found = []
    for path in Path("/proc").glob("[0-9]*/cmdline"):
        try:
            if word.encode() in path.read_bytes():
                found.append(int(path.parent.name))
        except OSError:  # it has just ended
            continue
    return found


@pytest.fixture
def hanging_qemu(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> str:
    """An emulator that is found and then does nothing, under a name of its own."""
    path = tmp_path / "qemu-that-hangs"
    path.write_text(
        "#!/bin/sh\n"
        'case "$*" in\n'
        "--version) echo qemu-aarch64 version 10.0.2 ;;\n"
        '-help | "-cpu help") ;;\n'
        f"*) exec {sys.executable} -c 'import time; time.sleep(600)' \"$0\" ;;\n"
        "esac\n"
    )
    path.chmod(0o755)
    monkeypatch.setenv("LLAMAC_QEMU", str(path))
    return str(path)


@pytest.mark.parametrize("command", [("run", "Hi"), ("bench",)])
def test_ctrl_c_leaves_no_process(
    command: tuple[str, ...], arm_bundle: Path, hanging_qemu: str
) -> None:
    """The interrupt goes to the command alone, as from `kill`; it ends all that it started."""
    name, *rest = command
    process = subprocess.Popen(
        [*LLAMAC, name, str(arm_bundle), *rest, "--emulate"],
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
    )
    sleeps = f"time.sleep(600)\0{hanging_qemu}"
    wait_until(lambda: bool(processes_with(sleeps)))
    process.send_signal(signal.SIGINT)
    out, err = process.communicate(timeout=30)
    assert process.returncode == 130
    assert out == ""
    assert err.endswith("interrupted\n") and "Traceback" not in err
    wait_until(lambda: not processes_with(hanging_qemu))


def wait_until(condition: Callable[[], bool]) -> None:
    """Wait, half a minute at most."""
    deadline = time.monotonic() + 30
    while not condition():
        assert time.monotonic() < deadline
        time.sleep(0.02)


@pytest.mark.needs("qemu-aarch64")
def test_a_runner_that_is_killed_ends_the_command(
    arm_bundle: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """It is told with the signal; standard output keeps the text so far."""
    from llamac.runtime import remote  # noqa: PLC0415

    evaluate = remote.RemoteSession.eval
    calls: list[int] = []

    def dies_later(self: remote.RemoteSession, tokens: object) -> None:
        calls.append(1)
        if len(calls) == 3:
            os.kill(self._process.pid, signal.SIGSEGV)
        evaluate(self, tokens)  # type: ignore[arg-type]

    monkeypatch.setattr(remote.RemoteSession, "eval", dies_later)
    assert main(["run", str(arm_bundle), "the user", "--no-chat", "--emulate"]) == 1
    assert "error[device]: the runner was ended by SIGSEGV" in capsys.readouterr().err
