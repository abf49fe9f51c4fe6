"""Measures one engine in this process: `python child.py '{"engine": ...}'`, JSON to stdout.

It runs in the Python that has the engine, which needs numpy and nothing of this project but for
llamac itself.
"""

from __future__ import annotations

import json
import os
import resource
import sys
import time
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).resolve().parent))
from engines import ENGINES

VOCAB = 128000  # without special tokens


def prompt(count: int, seed: int) -> list[int]:
    """Tokens spread over the vocabulary; others for each seed, so that no prefix is known."""
    return [(7919 * i + 104729 * seed + 1) % VOCAB for i in range(count)]


def status_bytes(name: str) -> int:
    """A value of /proc/self/status in bytes."""
    _, found, rest = Path("/proc/self/status").read_bytes().partition(name.encode() + b":")
    return int(rest.split(None, 1)[0]) * 1024 if found else 0


def measure(request: dict[str, Any]) -> dict[str, Any]:
    """Load, answer a first prompt, then each case."""
    output = os.dup(1)
    os.dup2(2, 1)  # what engines print is not the answer
    started = time.perf_counter()
    engine = ENGINES[request["engine"]](
        Path(request["model"]), request["threads"], request["context"]
    )
    loaded = time.perf_counter() - started
    first, _ = engine.run(prompt(request["first"], 0), 1)
    to_first = time.perf_counter() - started
    faults = resource.getrusage(resource.RUSAGE_SELF)
    cases, anonymous = [], status_bytes("RssAnon")
    for i, (length, count) in enumerate(request["cases"]):
        prefill, decode = engine.run(prompt(length, i + 1), count)
        cases.append({"prompt": length, "count": count, "first_s": prefill, "rest_s": decode})
        anonymous = max(anonymous, status_bytes("RssAnon"))
    answer = {
        "load_s": loaded,
        "first_prompt_s": first,
        "to_first_token_s": to_first,
        "minor_faults": faults.ru_minflt,
        "major_faults": faults.ru_majflt,
        "peak_resident": status_bytes("VmHWM"),
        "anonymous": anonymous,
        "cases": cases,
    }
    os.write(output, json.dumps(answer).encode() + b"\n")
    return answer


if __name__ == "__main__":
    measure(json.loads(sys.argv[1]))
    os._exit(0)  # some engines crash or hang when Python tears them down
