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

from llamac.compiler.tuning.builder import Builder, Built
from llamac.targets.cpu.object_cache import SWITCH, object_key
from llamac.targets.toolchain import cache_folder
from llamac.targets.tuning.measure import SYMBOL, Candidate, Problem
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


def find_candidates(
    problem: Problem, progress: Callable[[int, int], None], builder: Builder | None = None
) -> Space:
    """Compile all points of a kernel's space.

    Args:
        problem: the kernel.
        progress: called with the points done and their number.
        builder: compiles those that are not known; None: this process does.
    """
    points = problem.spec.points(problem.isa)
    cache = _Cache(problem)
    known: dict[str, Built] = {}
    for point in points:
        if candidate := cache.get(point):
            known[same(point)] = candidate
    progress(len(known), len(points))
    new = [point for point in points if same(point) not in known]
    try:
        for knobs, built in (builder or Builder()).build(problem.spec, problem.isa, new):
            known[same(knobs)] = built if isinstance(built, str) else cache.put(built)
            progress(len(known), len(points))
    finally:  # Ctrl-C loses no candidate either
        cache.save()
    by_code: dict[str, Candidate] = {}
    failed: list[tuple[KnobValues, str]] = []
    for point in points:  # in their order: the default is the first
        built = known[same(point)]
        if isinstance(built, str):
            failed.append((point, built))
        else:
            by_code.setdefault(built.code, built)
    found = tuple(by_code.values())
    return Space(found, len(points) - len(found) - len(failed), tuple(failed))


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
