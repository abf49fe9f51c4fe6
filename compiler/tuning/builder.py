"""Candidates are compiled in this process, in others of this machine, or on a Dask cluster.

A process that the compiler takes down with it is replaced, and the point that did it is found and
recorded as failed.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import BrokenExecutor, Executor, Future, as_completed
from contextlib import AbstractContextManager

from llamac.compiler.executors import executor_of
from llamac.schedules.intrin.isa import Isa
from llamac.schedules.kernel import compile_kernels
from llamac.targets.cpu.kernels import KernelSpec
from llamac.targets.tuning.features import per_product, read_assembly
from llamac.targets.tuning.measure import SYMBOL, Candidate, last_line
from llamac.targets.tuning.records import KnobValues

CHUNK = 4  # points that a process gets at a time
CRASHED = "the compiler crashed"

Built = Candidate | str
"""A candidate, or why there is none."""


def compile_point(spec: KernelSpec, isa: Isa, knobs: KnobValues) -> Built:
    """Compile a point of a kernel's space."""
    try:
        func = spec.make_with(knobs, isa, SYMBOL)
        code = read_assembly(compile_kernels({SYMBOL: func}, isa).inspect_source("asm"))
    except Exception as error:  # TVM raises all kinds
        return last_line(error)
    tokens = next((getattr(spec.shape, n) for n in ("m", "tokens") if hasattr(spec.shape, n)), 1)
    return Candidate(knobs, code.code, per_product(code, tokens, int(knobs.get("mr", 1))))


def compile_points(spec: KernelSpec, isa: Isa, points: Sequence[KnobValues]) -> list[Built]:
    """Compile some points, in another process."""
    return [compile_point(spec, isa, knobs) for knobs in points]


class Builder(AbstractContextManager["Builder"]):
    """Compiles points; a context manager that ends the processes which it started.

    Args:
        open_executor: starts processes, when there is something for them to do; None: this process
            does all.
    """

    def __init__(self, open_executor: Callable[[], Executor] | None = None) -> None:
        self._open = open_executor
        self._executor: Executor | None = None

    def build(
        self, spec: KernelSpec, isa: Isa, points: Sequence[KnobValues]
    ) -> Iterator[tuple[KnobValues, Built]]:
        """Compile points; gives each with its candidate, in any order."""
        if self._open is None or len(points) < 2:
            for knobs in points:
                yield knobs, compile_point(spec, isa, knobs)
            return
        left = {i: points[i : i + CHUNK] for i in range(0, len(points), CHUNK)}
        try:
            futures = {self._submit(spec, isa, chunk): i for i, chunk in left.items()}
            for future in as_completed(futures):
                results = future.result()
                yield from zip(left.pop(futures[future]), results, strict=True)
        except BrokenExecutor:
            self.close()
            for chunk in left.values():
                for knobs in chunk:
                    yield knobs, self._alone(spec, isa, knobs)

    def _alone(self, spec: KernelSpec, isa: Isa, knobs: KnobValues) -> Built:
        """Compile one point after a process has died: if it was this one, it dies again."""
        try:
            return self._submit(spec, isa, [knobs]).result()[0]
        except BrokenExecutor:
            self.close()
            return CRASHED

    def _submit(
        self, spec: KernelSpec, isa: Isa, points: Sequence[KnobValues]
    ) -> Future[list[Built]]:
        assert self._open is not None
        if self._executor is None:
            self._executor = self._open()
        return self._executor.submit(compile_points, spec, isa, points)

    def close(self) -> None:
        """End the processes."""
        if self._executor is not None:
            self._executor.shutdown(wait=True, cancel_futures=True)
        self._executor = None

    def __exit__(self, *error: object) -> None:
        self.close()


def open_builder(text: str) -> Builder:
    """A builder by the words of the command line, see `compiler/executors.py`.

    Raises:
        UsageError: there is no such builder.
    """
    return Builder(executor_of(text))
