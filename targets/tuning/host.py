"""Wall time on this machine, in a process of its own that may crash.

Candidates are measured in rounds, and in each round the kernel with its default knobs is measured
too: a machine that becomes slower slows both, and only their ratio counts. The shortest of the
rounds is taken, because whatever else runs on a machine only makes things slower; rounds with much
noise are measured again. The process stays on one CPU. Weights are copied until the copies are
twice the size of the last cache and each call takes the next copy, so that a kernel for one token
reads from memory, as it does in a model.
"""

from __future__ import annotations

import contextlib
import multiprocessing
import os
import platform
import re
import signal
import time
from collections.abc import Callable, Collection, Sequence
from dataclasses import dataclass
from multiprocessing.connection import Connection
from pathlib import Path
from typing import Any

import numpy as np

from llamac.runtime.errors import TuningImpossible
from llamac.schedules.intrin.isa import Isa
from llamac.schedules.kernel import compile_kernels, work_items
from llamac.targets.cpu.kernels import KernelSpec
from llamac.targets.tuning.measure import (
    SYMBOL,
    Array,
    Candidate,
    Measurement,
    Measurer,
    Problem,
    empty_outputs,
    is_for_token,
    last_line,
    weight_copies,
)
from llamac.targets.tuning.records import KnobValues
from llamac.targets.tuning.roofs import Roofs, has_roof, measure_roofs

KIND = "time_us"
ROUNDS = 7
ATTEMPTS = 4  # at rounds with less noise than the next line says; the quietest are taken
MOST_NOISE = 0.05
SAMPLE_SECONDS = 0.004  # at least; the clock and the call from Python are then below 1 %
START_SECONDS = 120.0  # importing TVM on a busy machine
CALL_SECONDS = 60.0
IDLE_SECONDS = 0.2
DEFAULT_CACHE_BYTES = 32 << 20
_X86_MACHINES = {"x86_64", "AMD64"}


class HostTimer(Measurer):
    """Measures kernels of x86-64 on this CPU, in one thread.

    Args:
        level: whose kernels are measured.

    Raises:
        TuningImpossible: this CPU lacks the level.
    """

    def __init__(self, level: Isa) -> None:
        check_level(level)
        self.device = cpu_name()
        self._worker: _Worker | None = None
        self._loaded: Problem | None = None
        self._reference_us = 0.0
        self._roofs = Roofs()

    def kind(self, problem: Problem) -> str:
        """Microseconds."""
        return KIND

    def measure(self, problem: Problem, candidates: Sequence[Candidate]) -> list[Measurement]:
        """Judge each candidate, then measure those that are right in interleaved rounds."""
        measured: list[Measurement | None] = []
        for candidate in candidates:
            measured.append(self._judge(problem, candidate.knobs))
        right = [i for i, bad in enumerate(measured) if bad is None]
        if right:
            timed = self._time(problem, [candidates[i].knobs for i in right])
            for i, result in zip(right, timed, strict=True):
                measured[i] = result
        return [result for result in measured if result is not None]

    def roof(self, problem: Problem) -> float:
        """Microseconds, by what this CPU has multiplied and read at most in all calls so far."""
        if not has_roof(problem.spec.family):
            return 0.0
        try:
            found = self._ask(problem, "roofs", None)
        except _WorkerError:
            return 0.0
        self._roofs = found.at_least(self._roofs)
        streamed = sum(problem.inputs[i].nbytes for i in problem.streamed)
        weights = streamed if is_for_token(problem.spec) else 0
        return self._roofs.of_call(problem.spec.family, problem.products, weights)

    def _judge(self, problem: Problem, knobs: KnobValues) -> Measurement | None:
        """What is wrong with a candidate; None: nothing."""
        try:
            outputs = self._ask(problem, "run", knobs)
        except _WorkerError as error:
            return Measurement("failed", KIND, note=str(error))
        wrong = problem.judge(outputs)
        return Measurement("wrong", KIND, note=wrong[:200]) if wrong else None

    def _time(self, problem: Problem, points: Sequence[KnobValues]) -> list[Measurement]:
        default = problem.spec.points(problem.isa)[0]
        quietest, noise = np.zeros(0), np.full(1, np.inf)
        try:
            for _ in range(ATTEMPTS):
                times = np.array(self._ask(problem, "time", [default, *points]))
                spread = np.median(times, axis=0) / times.min(axis=0) - 1
                if spread.max() < noise.max():
                    quietest, noise = times, spread
                if noise.max() <= MOST_NOISE:
                    break
        except _WorkerError as error:
            return [Measurement("failed", KIND, note=str(error)) for _ in points]
        best = quietest.min(axis=0)
        if not self._reference_us:
            self._reference_us = float(best[0])
        drift = self._reference_us / best[0]
        return [
            Measurement("ok", KIND, float(best[i] * drift), float(noise[i]))
            for i in range(1, len(best))
        ]

    def _ask(self, problem: Problem, command: str, argument: Any) -> Any:
        """Let the process do something with the problem; it is started anew after a crash."""
        if self._worker is None:
            self._worker = _Worker()
            self._loaded = None
        try:
            if self._loaded is not problem:
                if self._loaded is None or self._loaded.spec != problem.spec:
                    self._reference_us = 0.0
                task = (problem.spec, problem.isa, problem.inputs, problem.streamed)
                self._worker.ask("load", task)
                self._loaded = problem
            return self._worker.ask(command, argument)
        except _WorkerLost:
            self.close()
            raise

    def close(self) -> None:
        """End the process."""
        if self._worker is not None:
            self._worker.stop()
        self._worker = None


def check_level(level: Isa) -> None:
    """Refuse a level that this CPU cannot execute.

    Raises:
        TuningImpossible: it cannot.
    """
    fix = "measure counts instead (--cost), or tune on a machine that has it"
    if platform.machine() not in _X86_MACHINES or "x86_64" not in str(level.target.get("mtriple")):
        raise TuningImpossible(
            f"kernels of {level.name} cannot be timed on {platform.machine()}",
            cause="wall time is measured on the machine that tunes",
            fix=fix,
        )
    missing = sorted(set(level.features) - cpu_features())
    if missing:
        raise TuningImpossible(
            f"kernels of {level.name} cannot be timed on this CPU",
            cause=f"it lacks {', '.join(missing)}",
            fix=fix,
        )


def cpu_features() -> frozenset[str]:
    """Features of this CPU in the words of SoC files."""
    flags = re.search(r"^flags\s*:(.*)$", _cpu_info(), re.MULTILINE)
    return frozenset(flag.replace("_", "") for flag in flags[1].split()) if flags else frozenset()


def cpu_name() -> str:
    """Name of this CPU as the system tells it, with family and model."""
    found: dict[str, str] = dict(
        re.findall(r"^(model name|cpu family|model)\s*:\s*(.*)$", _cpu_info(), re.M)
    )
    name = found.get("model name", platform.machine())
    if {"cpu family", "model"} <= found.keys():
        name += f" (family {found['cpu family']}, model {found['model']})"
    return name


def _cpu_info() -> str:
    try:
        return Path("/proc/cpuinfo").read_text("utf-8")
    except OSError:
        return ""


def last_cache_bytes() -> int:
    """Size of the largest cache that this CPU shares."""
    sizes = []
    for path in Path("/sys/devices/system/cpu/cpu0/cache").glob("index*/size"):
        with contextlib.suppress(OSError, ValueError):
            sizes.append(int(path.read_text("ascii").strip().removesuffix("K")) << 10)
    return max(sizes, default=DEFAULT_CACHE_BYTES)


def idlest_cpu(allowed: Collection[int]) -> int:
    """The CPU that has most to spare right now, so that two tuners do not meet on one."""

    def idle() -> dict[int, int]:
        lines = re.findall(r"^cpu(\d+) \d+ \d+ \d+ (\d+)", _proc_stat(), re.MULTILINE)
        return {int(cpu): int(ticks) for cpu, ticks in lines}

    before = idle()
    time.sleep(IDLE_SECONDS)
    after = idle()
    return max(allowed, key=lambda cpu: (after.get(cpu, 0) - before.get(cpu, 0), cpu))


def _proc_stat() -> str:
    try:
        return Path("/proc/stat").read_text("ascii")
    except OSError:
        return ""


class _WorkerError(Exception):
    """A candidate failed in the process."""


class _WorkerLost(_WorkerError):
    """The process died or does not answer."""


class _Worker:
    """The process that runs kernels, and the pipe to it."""

    def __init__(self) -> None:
        context = multiprocessing.get_context("spawn")
        self._pipe, theirs = context.Pipe()
        self._process = context.Process(target=serve, args=(theirs,), daemon=True)
        self._process.start()
        theirs.close()
        self._is_new = True

    def ask(self, command: str, argument: Any) -> Any:
        """Send a command and wait for the answer."""
        limit = START_SECONDS if self._is_new else CALL_SECONDS
        self._is_new = False
        try:
            self._pipe.send((command, argument))
            if not self._pipe.poll(limit):
                raise _WorkerLost(f"no answer after {limit:.0f} s: it was ended")
            is_error, answer = self._pipe.recv()
        except (EOFError, OSError):
            self._process.join(5)
            raise _WorkerLost(f"it crashed: {_ending(self._process.exitcode)}") from None
        if is_error:
            raise _WorkerError(answer)
        return answer

    def stop(self) -> None:
        """End the process."""
        self._process.kill()
        self._process.join()
        self._process.close()
        self._pipe.close()


def _ending(code: int | None) -> str:
    return signal.Signals(-code).name if code is not None and code < 0 else f"code {code}"


def serve(pipe: Connection) -> None:
    """Answer commands until the pipe is closed: the whole life of the process."""
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # Ctrl-C is for the tuner, which ends this one
    with contextlib.suppress(OSError, AttributeError):
        os.sched_setaffinity(0, {idlest_cpu(os.sched_getaffinity(0))})
    loaded: _Loaded | None = None
    while True:
        try:
            command, argument = pipe.recv()
        except EOFError:
            return
        try:
            if command == "load":
                loaded, answer = _Loaded.of(*argument), None
            else:
                assert loaded is not None
                answer = getattr(loaded, command)(argument)
            reply = (False, answer)
        except Exception as error:  # TVM raises all kinds
            reply = (True, last_line(error))
        pipe.send(reply)


@dataclass
class _Loaded:
    """A problem in the process: its tensors, and kernels as they are compiled."""

    spec: KernelSpec
    isa: Isa
    sets: list[list[Any]]  # the inputs, with other copies of the weights in each set
    kernels: dict[str, tuple[Callable[..., None], list[Any], list[Array], int]]

    @classmethod
    def of(
        cls, spec: KernelSpec, isa: Isa, inputs: Sequence[Array], streamed: Sequence[int]
    ) -> _Loaded:
        import tvm  # noqa: PLC0415 (the process has just started)

        copies = weight_copies(spec, inputs, streamed, last_cache_bytes())
        tensors = [tvm.runtime.tensor(array) for array in inputs]
        sets = [tensors]
        for _ in range(copies - 1):
            fresh = list(tensors)
            for i in streamed:
                fresh[i] = tvm.runtime.tensor(inputs[i])
            sets.append(fresh)
        return cls(spec, isa, sets, {})

    def _kernel(self, knobs: KnobValues) -> tuple[Callable[..., None], list[Any], list[Array], int]:
        import tvm  # noqa: PLC0415

        key = repr(sorted(knobs.items()))
        if key not in self.kernels:
            func = self.spec.make_with(knobs, self.isa, SYMBOL)
            kernel = compile_kernels({SYMBOL: func}, self.isa)[SYMBOL]
            arrays = empty_outputs(func)
            outputs = [tvm.runtime.tensor(array) for array in arrays]
            self.kernels[key] = (kernel, outputs, arrays, work_items(func))
        return self.kernels[key]

    def roofs(self, _: None) -> Roofs:
        """What this CPU does at most."""
        return measure_roofs(self.isa, last_cache_bytes())

    def run(self, knobs: KnobValues) -> list[Array]:
        """Outputs of a call with all work items."""
        kernel, outputs, arrays, items = self._kernel(knobs)
        for tensor, array in zip(outputs, arrays, strict=True):
            tensor.copyfrom(array)
        kernel(*self.sets[0], *outputs, 0, items)
        return [tensor.numpy() for tensor in outputs]

    def time(self, points: Sequence[KnobValues]) -> list[list[float]]:
        """Microseconds of a call: a row for each round, a column for each point."""
        calls = [_Call(self.sets, *self._kernel(knobs)) for knobs in points]
        for call in calls:
            call.calibrate()
        return [[call.sample() for call in calls] for _ in range(ROUNDS)]


class _Call:
    """A kernel with its operands, called often enough for the clock."""

    def __init__(
        self,
        sets: Sequence[Sequence[Any]],
        kernel: Callable[..., None],
        outputs: Sequence[Any],
        _arrays: Sequence[Array],
        items: int,
    ) -> None:
        self._kernel = kernel
        self._operands = [(*tensors, *outputs, 0, items) for tensors in sets]
        self._next, self._number = 0, 1

    def calibrate(self) -> None:
        """Choose how many calls a sample has."""
        self.sample()
        microseconds = max(self.sample(), 0.1)
        self._number = max(1, round(SAMPLE_SECONDS * 1e6 / microseconds))

    def sample(self) -> float:
        """Microseconds of a call."""
        count, operands = self._number, self._operands
        order = [operands[(self._next + i) % len(operands)] for i in range(count)]
        self._next = (self._next + count) % len(operands)
        kernel = self._kernel
        start = time.perf_counter()
        for arguments in order:
            kernel(*arguments)
        return (time.perf_counter() - start) * 1e6 / count
