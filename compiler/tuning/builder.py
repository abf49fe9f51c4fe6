"""Where candidates are compiled: in this process, in others of this machine, or on a Dask cluster.

    local        as many processes as there are CPUs
    local[N]     N processes; local[1] is this one
    dask://H:P   the workers of a scheduler, with the same llamac and TVM

All others than this process stand behind `concurrent.futures.Executor`. A process that the compiler
takes down with it is replaced, and the point that did it is found and recorded as failed.
"""

from __future__ import annotations

import os
import re
import signal
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import BrokenExecutor, Executor, Future, ProcessPoolExecutor, as_completed
from contextlib import AbstractContextManager
from importlib.metadata import version
from multiprocessing import get_context
from types import TracebackType
from typing import Any

from llamac.runtime.errors import ToolchainMissing, UsageError
from llamac.schedules.intrin.isa import Isa
from llamac.schedules.kernel import compile_kernels
from llamac.targets.cpu.kernels import KernelSpec
from llamac.targets.tuning.features import per_product, read_assembly
from llamac.targets.tuning.measure import SYMBOL, Candidate, last_line
from llamac.targets.tuning.records import KnobValues

CHUNK = 4  # points that a process gets at a time
CRASHED = "the compiler crashed"
PACKAGES = ("llamac", "apache-tvm", "apache-tvm-ffi")
_DASK_SECONDS = 10

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

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        self.close()


def open_builder(text: str) -> Builder:
    """A builder by the words of the command line; see the beginning of this file.

    Raises:
        UsageError: there is no such builder, or the cluster cannot be used.
        ToolchainMissing: Dask is not installed.
    """
    if text.startswith("dask://"):
        return Builder(lambda: _cluster(text.removeprefix("dask://")))
    found = re.fullmatch(r"local(?:\[(\d{1,3})\])?", text)
    processes = int(found[1] or os.cpu_count() or 1) if found else 0
    if not processes:
        raise UsageError(
            f"{text!r} is no builder",
            cause="builders are local, local[N] and dask://HOST:PORT",
            fix="leave out --builder for local",
        )
    return Builder(None if processes == 1 else lambda: _processes(processes))


def _processes(count: int) -> Executor:
    """Processes of this machine, which leave Ctrl-C to this one."""
    return ProcessPoolExecutor(
        count, get_context("spawn"), signal.signal, (signal.SIGINT, signal.SIG_IGN)
    )


def versions() -> dict[str, str]:
    """Versions of what compiles candidates, in this process."""
    return {name: version(name) for name in PACKAGES}


def _cluster(address: str) -> Executor:
    """The workers of a Dask scheduler."""
    try:
        from distributed import Client  # noqa: PLC0415
    except ImportError as error:
        raise ToolchainMissing(
            "Dask is not installed",
            cause="--builder dask:// compiles on a Dask cluster",
            fix="pip install 'llamac[dask]'",
        ) from error
    try:
        client: Any = Client(  # type: ignore[no-untyped-call]
            f"tcp://{address}", timeout=_DASK_SECONDS, set_as_default=False
        )
        workers = client.run(versions)
    except Exception as error:  # Dask raises all kinds, and those of its workers
        raise UsageError(
            f"the Dask cluster at {address} cannot be used",
            cause=last_line(error),
            fix="give the address of a scheduler whose workers have this llamac installed",
        ) from error
    different = {name: found for name, found in workers.items() if found != versions()}
    if different or not workers:
        client.close()
        raise UsageError(
            f"the Dask cluster at {address} compiles something else",
            cause=f"its workers have {next(iter(different.values()), 'not begun')}",
            fix=f"install {versions()} there",
        )
    return _ClosingExecutor(client)


class _ClosingExecutor(Executor):
    """A Dask client as an executor that is closed with it."""

    def __init__(self, client: Any) -> None:
        self._client, self._executor = client, client.get_executor(pure=False)

    def submit(self, function: Any, /, *args: Any, **kwargs: Any) -> Any:
        """See `Executor.submit`."""
        return self._executor.submit(function, *args, **kwargs)

    def shutdown(self, wait: bool = True, *, cancel_futures: bool = False) -> None:
        """Close the client; what was not done is not done."""
        self._executor.shutdown(wait=wait and not cancel_futures)
        self._client.close()
