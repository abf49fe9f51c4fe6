"""Find the optional extra `llamac[qnn]`, and run jobs on it in a process of their own."""

from __future__ import annotations

import importlib.metadata
import importlib.util
import json
import os
import re
import signal
import subprocess
import sys
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from llamac.runtime.errors import BuildFailed, ToolchainMissing

PACKAGE = "onnxruntime-qnn"
VERSION = "2.7.0"
"""The one version that everything here was tested with; other ones have other traps."""
INSTALL = "pip install 'llamac[qnn]'"

_TAIL = 600


@dataclass(frozen=True)
class Qnn:
    """Qualcomm's libraries for x86-64, as the extra installs them."""

    folder: Path

    @property
    def system_library(self) -> Path:
        """Describes context binaries."""
        return self.folder / "libQnnSystem.so"


def find_qnn() -> Qnn:
    """Find the extra without loading it.

    Raises:
        ToolchainMissing: it is not installed, or in another version.
    """
    try:
        version = importlib.metadata.version(PACKAGE)
        spec = importlib.util.find_spec("onnxruntime_qnn")
    except importlib.metadata.PackageNotFoundError:
        version, spec = "", None
    if spec is None or spec.origin is None:
        raise ToolchainMissing(
            f"the Python package {PACKAGE} is not installed",
            cause="Qualcomm's compiler for HTP comes with it, under Qualcomm's licence",
            fix=f"{INSTALL} (x86-64 Linux; 98 MB)",
        )
    if version != VERSION:
        raise ToolchainMissing(
            f"{PACKAGE} has version {version}, needed is {VERSION}",
            cause="binaries and their description differ from version to version",
            fix=INSTALL,
        )
    return Qnn(Path(spec.origin).parent)


class JobFailed(Exception):
    """The worker ended without an answer; the text says how."""


def run_job(folder: Path, job: dict[str, Any]) -> dict[str, Any]:
    """Run a job of `worker.py` in `folder`.

    Raises:
        JobFailed: the worker ended without an answer.
    """
    from llamac.targets.qnn_htp.worker import ANSWER  # noqa: PLC0415

    answer = folder / ANSWER
    answer.unlink(missing_ok=True)
    command = [sys.executable, "-m", "llamac.targets.qnn_htp.worker", json.dumps(job)]
    paths = [path for path in sys.path if path]
    done = subprocess.run(
        command,
        cwd=folder,
        env=os.environ | {"PYTHONPATH": os.pathsep.join(paths)},
        capture_output=True,
        text=True,
        errors="replace",
        check=False,
    )
    if done.returncode or not answer.is_file():
        raise JobFailed(_last_words(done))
    result: dict[str, Any] = json.loads(answer.read_text("utf-8"))
    return result


def _last_words(done: subprocess.CompletedProcess[str]) -> str:
    """What a worker said before it ended: refused operators if it named them, or its last line."""
    if done.returncode < 0:
        return f"the process died of {signal.Signals(-done.returncode).name}"
    output = re.sub(r"\x1b\[[0-9;]*m", "", done.stderr)
    refused = re.findall(r"\{ name: (\w+), type: \w+ \}", output)
    if refused:
        return "refused operators: " + ", ".join(dict.fromkeys(refused))[:_TAIL]
    lines = [line for line in output.splitlines() if line.strip()]
    return lines[-1][-_TAIL:] if lines else f"exit status {done.returncode}"


def build_failed(what: str, error: JobFailed) -> BuildFailed:
    """Make the error for a failed compilation."""
    return BuildFailed(
        f"Qualcomm's compiler failed on {what}",
        cause=str(error),
        fix="compile for the CPU, or report the operators that it names",
    )
