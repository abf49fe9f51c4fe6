"""Candidates of a kernel: every valid point compiled once, and points with equal code merged.

What is needed of a point, the hash of its code and its features, is kept in the cache folder by
everything that decides it, so that a second run compiles nothing.
"""

from __future__ import annotations

import hashlib
import json
import os
from collections.abc import Callable
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from llamac.schedules.kernel import compile_kernels
from llamac.targets.cpu.object_cache import SWITCH, object_key
from llamac.targets.toolchain import cache_folder
from llamac.targets.tuning.features import per_product, read_assembly
from llamac.targets.tuning.measure import SYMBOL, Candidate, Problem, last_line
from llamac.targets.tuning.records import KnobValues, same

VERSION = 1  # of the features


@dataclass(frozen=True)
class Space:
    """The candidates of a kernel.

    Attributes:
        candidates: one for each different code, that of the default first.
        merged: points whose code another point has already.
        failed: points that did not compile, and why.
    """

    candidates: tuple[Candidate, ...]
    merged: int
    failed: tuple[tuple[KnobValues, str], ...]


def find_candidates(problem: Problem, progress: Callable[[int, int], None]) -> Space:
    """Compile all points of a kernel's space.

    Args:
        problem: the kernel.
        progress: called with the points done and their number.
    """
    points = problem.spec.points(problem.isa)
    cache = _Cache(problem)
    by_code: dict[str, Candidate] = {}
    failed: list[tuple[KnobValues, str]] = []
    for done, knobs in enumerate(points):
        progress(done, len(points))
        try:
            candidate = cache.get(knobs) or cache.put(_compile(problem, knobs))
        except Exception as error:  # TVM raises all kinds
            failed.append((knobs, last_line(error)))
            continue
        by_code.setdefault(candidate.code, candidate)
    progress(len(points), len(points))
    cache.save()
    found = tuple(by_code.values())
    return Space(found, len(points) - len(found) - len(failed), tuple(failed))


def _compile(problem: Problem, knobs: KnobValues) -> Candidate:
    module = compile_kernels({SYMBOL: problem.build(knobs)}, problem.isa)
    code = read_assembly(module.inspect_source("asm"))
    shape = problem.spec.shape
    tokens = next((getattr(shape, name) for name in ("m", "tokens") if hasattr(shape, name)), 1)
    return Candidate(knobs, code.code, per_product(code, tokens, int(knobs.get("mr", 1))))


class _Cache:
    """What is known of a kernel's points, in one file."""

    def __init__(self, problem: Problem) -> None:
        key = f"{VERSION} {object_key(problem.spec, problem.isa, SYMBOL)}"
        name = hashlib.sha256(key.encode()).hexdigest()
        self._path = cache_folder() / "tuning" / f"{name}.json"
        self._is_on = os.environ.get(SWITCH) != "0"
        self._known: dict[str, dict[str, Any]] = {}
        self._is_new = False
        with suppress(OSError, ValueError):
            if self._is_on:
                self._known = json.loads(self._path.read_text("utf-8"))

    def get(self, knobs: KnobValues) -> Candidate | None:
        """The candidate of a point, if it was compiled before."""
        known = self._known.get(same(knobs))
        return None if known is None else Candidate(knobs, known["code"], known["features"])

    def put(self, candidate: Candidate) -> Candidate:
        """Remember a candidate."""
        entry = {"code": candidate.code, "features": candidate.features}
        self._known[same(candidate.knobs)] = entry
        self._is_new = True
        return candidate

    def save(self) -> None:
        """Write the file; a cache that cannot be written is not an error."""
        if not (self._is_on and self._is_new):
            return
        partial = Path(f"{self._path}.{os.getpid()}.partial")
        with suppress(OSError):
            self._path.parent.mkdir(parents=True, exist_ok=True)
            partial.write_text(json.dumps(self._known), "utf-8")
            partial.replace(self._path)
