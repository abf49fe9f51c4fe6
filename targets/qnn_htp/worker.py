"""The process that Qualcomm's libraries run in: one job, then it ends.

They print, keep gigabytes, and may die on a damaged file; here that harms nobody. A job is a JSON
object in the first argument, with paths relative to the current folder; the answer goes to the file
"answer.json" there. Started by `toolchain.run_job`, never by hand.
"""

from __future__ import annotations

import importlib
import json
import sys
from pathlib import Path
from typing import Any

import numpy as np

from llamac.targets.qnn_htp.system_library import DescriptionError, read_binary

PROVIDER = "QNNExecutionProvider"
ANSWER = "answer.json"


def _session(model: str, options: dict[str, str], entries: dict[str, str]) -> Any:
    """Open a session whose every node must run on QNN."""
    ort, qnn = (importlib.import_module(name) for name in ("onnxruntime", "onnxruntime_qnn"))
    ort.register_execution_provider_library(PROVIDER, qnn.get_library_path())
    devices = [device for device in ort.get_ep_devices() if device.ep_name == PROVIDER]
    settings = ort.SessionOptions()
    settings.log_severity_level = 3
    # Without this ONNX Runtime computes on the CPU what QNN refuses, and says nothing.
    settings.add_session_config_entry("session.disable_cpu_ep_fallback", "1")
    for key, value in entries.items():
        settings.add_session_config_entry(key, value)
    backend = {"backend_path": qnn.get_qnn_htp_path(), "offload_graph_io_quantization": "0"}
    settings.add_provider_for_devices(devices[:1], backend | options)
    session = ort.InferenceSession(model, sess_options=settings)
    # And without this it would run the whole graph again on the CPU after an error.
    session.disable_fallback()
    return session


def compile_model(job: dict[str, Any]) -> dict[str, Any]:
    """Make a context binary: {"model", "context", "options"} -> {}."""
    entries = {
        "ep.context_enable": "1",
        "ep.context_file_path": job["context"],
        "ep.context_embed_mode": "0",
    }
    _session(job["model"], job["options"], entries)
    return {}


def run_model(job: dict[str, Any]) -> dict[str, Any]:
    """Execute a wrapped binary: {"model", "feeds", "results", "options"} -> {}."""
    session = _session(job["model"], job["options"], {})
    names = [output.name for output in session.get_outputs()]
    with np.load(job["feeds"]) as feeds:
        values = session.run(names, {name: feeds[name] for name in feeds.files})
    np.savez(job["results"], **dict(zip(names, values, strict=True)))
    return {}


def inspect_binary(job: dict[str, Any]) -> dict[str, Any]:
    """Describe a binary: {"library", "binary"} -> the fields, or {"refused": why}."""
    try:
        return read_binary(Path(job["library"]), Path(job["binary"]))
    except DescriptionError as error:
        return {"refused": str(error)}


JOBS = {"compile": compile_model, "run": run_model, "inspect": inspect_binary}


def main() -> None:
    """Do the job of the command line."""
    job = json.loads(sys.argv[1])
    answer = JOBS[job["job"]](job)
    Path(ANSWER).write_text(json.dumps(answer), "utf-8")


if __name__ == "__main__":
    main()
