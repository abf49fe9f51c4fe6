"""The process that LiteRT's interpreter runs in: one graph, once, then it ends.

It prints, keeps what it mapped, and may die on a damaged file; here that harms nobody. The job is a
JSON object in the first argument, with paths. Started by `interpreter.run_model`, never by hand.
"""

from __future__ import annotations

import importlib
import json
import sys
from typing import Any

import numpy as np


def run(job: dict[str, Any]) -> None:
    """Execute a graph: {"model", "feeds", "results", "inside": names of values}."""
    module = importlib.import_module("ai_edge_litert.interpreter")
    # Nothing but LiteRT's own kernels: delegates compute some operations by other rules.
    resolver = module.OpResolverType.BUILTIN_WITHOUT_DEFAULT_DELEGATES
    interpreter = module.Interpreter(
        model_path=job["model"],
        experimental_op_resolver_type=resolver,
        experimental_preserve_all_tensors=bool(job["inside"]),
    )
    interpreter.allocate_tensors()
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
