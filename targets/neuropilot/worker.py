"""The process that LiteRT's interpreter runs in: one graph, once, then it ends.

It prints, keeps what it mapped, and may die on a damaged file; here that harms nobody. The job is a
JSON object in the first argument, with paths. Started by `interpreter.run_model`, never by hand.
"""

from __future__ import annotations

import json
import sys
from pathlib import Path
from typing import Any

import numpy as np

from llamac.targets.neuropilot.executor import open_interpreter


def run(job: dict[str, Any]) -> None:
    """Execute a graph: {"model", "feeds", "results", "inside": names of values}."""
    interpreter = open_interpreter(Path(job["model"]), keep_all=bool(job["inside"]))
    with np.load(job["feeds"]) as feeds:
        for details in interpreter.get_input_details():
            interpreter.set_tensor(details["index"], feeds[details["name"]])
    interpreter.invoke()
    wanted = {details["name"]: details["index"] for details in interpreter.get_output_details()}
    if job["inside"]:
        every = {d["name"]: d["index"] for d in interpreter.get_tensor_details()}
        wanted |= {name: every[name] for name in job["inside"]}
    np.savez(job["results"], **{name: interpreter.get_tensor(i) for name, i in wanted.items()})


if __name__ == "__main__":
    run(json.loads(sys.argv[1]))
