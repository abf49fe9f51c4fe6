"""Runs in a process of its own: what a program on a phone does with the library of a bundle.

Arguments: library, weights, and JSON: `prompt` (tokens), `count` (tokens to choose), `rewind`
(do it again from behind the prompt), `level`, `sessions` (how many at once).
"""

from __future__ import annotations

import json
import sys
from pathlib import Path

import numpy as np

from llamac.runtime.errors import LlamacError
from llamac.runtime.library import NativeSession, open_library


def choose(session: NativeSession, count: int) -> list[int]:
    """The most likely tokens, one after the other."""
    chosen = []
    for _ in range(count):
        chosen.append(int(session.argmax()))
        session.eval(np.array(chosen[-1:], np.int32))
    return chosen


def run(library: Path, weights: Path, wanted: dict[str, object]) -> dict[str, object]:
    """Tokens of every session, logits behind the last one, and what a second run gave."""
    model = open_library(library, weights, wanted.get("level"))
    sessions = [model.open_session(1, ()) for _ in range(wanted.get("sessions", 1))]
    prompt = np.array(wanted["prompt"], np.int32)
    result = {"level": model.info.level, "tokens": [], "again": []}
    for session in sessions:
        session.eval(prompt)
        result["tokens"].append(choose(session, wanted["count"]))
        result["logits"] = session.logits().tobytes().hex()
        result["position"] = session.position()
    if wanted.get("rewind"):
        sessions[0].rewind(len(prompt) - 1)
        sessions[0].eval(prompt[-1:])
        result["again"] = choose(sessions[0], wanted["count"])
    for session in sessions:
        session.close()
    model.close()
    return result


if __name__ == "__main__":
    try:
        print(json.dumps(run(Path(sys.argv[1]), Path(sys.argv[2]), json.loads(sys.argv[3]))))
    except LlamacError as error:
        print(json.dumps({"error": error.code, "message": f"{error.message} {error.cause}"}))
