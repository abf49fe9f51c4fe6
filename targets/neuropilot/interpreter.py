"""Execute a .tflite here, by LiteRT's own kernels for CPUs.

They are the definition of what the file computes, in integers, and tell nothing about speed on an
APU. What MediaTek's compiler makes of it may round elsewhere.
"""

from __future__ import annotations

import importlib.util
import json
import os
import signal
import subprocess
import sys
import tempfile
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from llamac.runtime.errors import DeviceError, ToolchainMissing, UsageError

Codes = Mapping[str, NDArray[np.int16]]

_PACKAGE = "ai_edge_litert"
_TAIL = 600


def run_model(path: Path, feeds: Codes, inside: Sequence[str] = ()) -> dict[str, NDArray[np.int16]]:
    """Execute a graph once, in a process of its own.

    Args:
        path: of the .tflite.
        feeds: every input, int16 codes in the graph's shapes.
        inside: names of values inside the graph that are wanted too.

    Returns:
        Every output by name, and the values inside.

    Raises:
        ToolchainMissing: the extra is not installed.
        UsageError: an input is missing, superfluous or of another form, or no value has that name.
        DeviceError: the interpreter failed.
    """
    find_litert()
    _check(path, feeds, inside)
    with tempfile.TemporaryDirectory(prefix="llamac-litert-") as text:
        folder = Path(text)
        np.savez(folder / "feeds.npz", **feeds)  # type: ignore[arg-type]
        job = {
            "model": os.path.abspath(path),
            "feeds": str(folder / "feeds.npz"),
            "results": str(folder / "results.npz"),
            "inside": list(inside),
        }
        _run(path, job)
        with np.load(folder / "results.npz") as results:
            return {name: results[name] for name in results.files}


def find_litert() -> None:
    """Find the extra without loading it.

    Raises:
        ToolchainMissing: it is not installed.
    """
    if importlib.util.find_spec(_PACKAGE) is None:
        raise ToolchainMissing(
            "the Python package ai-edge-litert is not installed",
            cause="the format of .tflite files and their interpreter come with it (Apache-2.0)",
            fix="pip install 'llamac[apu]'",
        )


def _run(path: Path, job: dict[str, Any]) -> None:
    paths = [path for path in sys.path if path]
    done = subprocess.run(
        [sys.executable, "-m", "llamac.targets.neuropilot.worker", json.dumps(job)],
        env=os.environ | {"PYTHONPATH": os.pathsep.join(paths)},
        capture_output=True,
        text=True,
        errors="replace",
        check=False,
    )
    if done.returncode == 0:
        return
    lines = [line for line in done.stderr.splitlines() if line.strip()]
    cause = lines[-1][-_TAIL:] if lines else f"exit status {done.returncode}"
    if done.returncode < 0:
        cause = f"the process died of {signal.Signals(-done.returncode).name}"
    raise DeviceError(
        f"LiteRT's interpreter could not execute {path.name}",
        cause=cause,
        fix="write it again; if that does not help, run this model on the CPU",
    )


def _check(path: Path, feeds: Codes, inside: Sequence[str]) -> None:
    """Compare what is given and wanted with what the file has."""
    # Late: without the extra there is no schema.
    from llamac.targets.neuropilot.tflite_file import read_names  # noqa: PLC0415

    inputs, names = read_names(path)
    expected: dict[str, Any] = {name: (shape, "int16") for name, shape in inputs.items()}
    given = {name: (value.shape, str(value.dtype)) for name, value in feeds.items()}
    for name in sorted(n for n in expected | given if expected.get(n) != given.get(n)):
        raise UsageError(
            f"the graph's input {name} is {expected.get(name)}, given was {given.get(name)}",
            cause="inputs must have the names, shapes and dtypes that the graph was written with",
            fix="give what the interface of the graph lists",
        )
    for name in sorted(set(inside) - names):
        raise UsageError(
            f"{path.name} has no value {name}",
            cause="values inside a graph are named by their labels",
            fix="ask for a label of the chunk",
        )
