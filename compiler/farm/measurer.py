"""Measure on the devices of a farm, on as many at a time as it has.

A candidate is charged with a failure only when it failed twice, on two devices where there are two,
and each device's canary was right afterwards. A device that is sick, an agent that dies and a
tracker that goes away cost time, but no trial: it is measured elsewhere, or later. Waiting for a
device is not measuring; the deadline of a measurement begins when its program starts.
"""

from __future__ import annotations

import contextlib
import threading
import time
from collections import Counter
from collections.abc import Callable, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from typing import Any

import numpy as np

from llamac.compiler.farm.client import Lease, LeaseLost
from llamac.compiler.farm.protocol import Outcome
from llamac.compiler.farm.tracker import Address, Offer, TrackerLost, agents, request
from llamac.compiler.farm.trial import Reading, Trial, make_trial
from llamac.runtime.errors import FarmUnfit, FarmUnreachable, LlamacError, UsageError
from llamac.targets.tuning.emulated import CoreModel
from llamac.targets.tuning.host import ATTEMPTS, MOST_NOISE
from llamac.targets.tuning.measure import (
    Candidate,
    DeviceState,
    Measurement,
    Measurer,
    Problem,
    last_line,
)

MOST_LOST = 12  # leases of one candidate
_PAUSE = 1.0
_SLICE = 2.0  # that a request waits before the farm is looked at again


@dataclass(frozen=True)
class FarmOptions:
    """How a farm is used.

    Attributes:
        tracker: of the farm.
        key: of its devices.
        wait: seconds to wait for a device, or for a tracker that went away.
        seconds: that a program may run.
        grace: that an agent may take for all else.
    """

    tracker: Address
    key: str
    wait: float = 600.0
    seconds: float = 60.0
    grace: float = 180.0


class FarmMeasurer(Measurer):
    """Measures on leased devices.

    Args:
        options: which, and how.
        arch: of the kernels.
        level: of the kernels.
        core: that a model predicts cycles of, where devices count instructions.
        cost: that is wanted: "auto", "time", "cycles", "instructions" or "packets".
        say: called with a line about what went wrong on the way.

    Raises:
        FarmUnreachable: the tracker does not answer.
        FarmUnfit: it has no device that fits.
    """

    def __init__(
        self,
        options: FarmOptions,
        arch: str,
        level: str,
        core: str,
        cost: str = "auto",
        say: Callable[[str], None] = lambda line: None,
    ) -> None:
        self._options, self._say = options, say
        found = _fitting(options, arch, level)
        self._cost = str(found[0]["cost"])
        _check_cost(cost, self._cost)
        self.parallel = len(found)
        self.is_exact = self._cost != "time_us"
        counts_cycles = self._cost == "instructions" and cost in ("auto", "cycles")
        self._model = CoreModel(core if counts_cycles else "")
        self.device = f"{found[0]['device']}{self._model.title}"[:200]
        self._pool = ThreadPoolExecutor(self.parallel, "farm")
        self._turn = threading.Lock()
        self._leases: set[Lease] = set()
        self._trials: Counter[str] = Counter()
        self._is_closed = False
        self._reference: tuple[Problem, float] | None = None

    def kind(self, problem: Problem) -> str:
        """What the devices tell, or what a model makes of it."""
        return self._model.kind(problem) if self._cost == "instructions" else self._cost

    def measure(self, problem: Problem, candidates: Sequence[Candidate]) -> list[Measurement]:
        """Measure candidates, each on the next device that is free.

        Raises:
            FarmUnreachable: there is none any more.
        """
        pending = [self._pool.submit(self._measure, problem, c) for c in candidates]
        return [future.result() for future in pending]

    def devices(self) -> list[DeviceState]:
        """Devices that it has leased so far."""
        with self._turn:
            busy = {lease.welcome.name for lease in self._leases}
            return [DeviceState(name, n, name in busy) for name, n in sorted(self._trials.items())]

    def close(self) -> None:
        """Give all devices back."""
        with self._turn:
            self._is_closed = True
            for lease in self._leases:
                lease.close()
        self._pool.shutdown(wait=True, cancel_futures=True)

    # -- One candidate -----------------------------------------------------------------------------

    def _measure(self, problem: Problem, candidate: Candidate) -> Measurement:
        kind = self.kind(problem)
        try:
            trial = make_trial(problem, candidate.knobs, self._cost)
        except (LlamacError, ValueError) as error:
            return Measurement("failed", kind, note=last_line(error))
        failures: list[str] = []
        lost = 0
        while True:
            try:
                outcome, output = self._on_a_device(trial)
            except LeaseLost as error:
                lost += 1
                self._lost(str(error), lost)
                continue
            if outcome.outcome == "device":
                lost += 1
                self._lost(outcome.note, lost)
            elif outcome.outcome == "candidate":
                failures.append(outcome.note)
                if len(failures) > 1:
                    return Measurement("failed", kind, note=failures[-1][:200])
            else:
                return self._judge(trial, outcome, output)

    def _on_a_device(self, trial: Trial) -> tuple[Outcome, bytes]:
        """Run a program on the next device; several times, if its times differ much."""
        with self._lease() as lease:
            best: tuple[float, Outcome, bytes] | None = None
            call, most_output = trial.call.encode(), trial.call.output_bytes
            for _ in range(ATTEMPTS):
                outcome, output = lease.measure(
                    trial.program, call, most_output, self._options.seconds, self._options.grace
                )
                noise = self._noise(trial, outcome, output)
                if best is None or noise < best[0]:
                    best = (noise, outcome, output)
                if noise <= MOST_NOISE:
                    break
            assert best is not None
            with self._turn:
                self._trials[lease.welcome.name] += 1
            return best[1:]

    @staticmethod
    def _noise(trial: Trial, outcome: Outcome, output: bytes) -> float:
        """How much its times differ; 0 where there are none."""
        with contextlib.suppress(ValueError):
            if outcome.outcome == "ok":
                return _spread(trial.read(output, outcome.count))
        return 0.0

    def _judge(self, trial: Trial, outcome: Outcome, output: bytes) -> Measurement:
        problem, kind = trial.problem, self.kind(trial.problem)
        try:
            reading = trial.read(output, outcome.count)
            if wrong := problem.judge(reading.outputs):
                return Measurement("wrong", kind, note=wrong[:200])
            if reading.times is None:
                cost = reading.count
                if self._cost == "instructions":
                    cost = self._model.cost(problem, trial.func, cost)
                return Measurement("ok", kind, cost)
        except ValueError as error:
            return Measurement("failed", kind, note=last_line(error))
        reference, own = (float(ns) / 1000 for ns in reading.times.min(axis=0))
        cost = own * self._first_reference(problem, reference) / reference
        return Measurement("ok", kind, cost, _spread(reading))

    def _first_reference(self, problem: Problem, reference: float) -> float:
        """What the default took first: later measurements, of any device, are relative to it."""
        with self._turn:
            if self._reference is None or self._reference[0].spec != problem.spec:
                self._reference = (problem, reference)
            return self._reference[1]

    # -- Leases ------------------------------------------------------------------------------------

    @contextlib.contextmanager
    def _lease(self) -> Any:
        """A device; the tracker is waited for, and a device is."""
        lease = Lease(self._next_offer())
        with self._turn:
            if self._is_closed:
                lease.close()
            self._leases.add(lease)
            self._trials[lease.welcome.name] += 0
        try:
            yield lease
        finally:
            with self._turn:
                self._leases.discard(lease)
            lease.close()

    def _next_offer(self) -> Offer:
        tracker, key = self._options.tracker, self._options.key
        deadline = time.monotonic() + self._options.wait
        why = "all devices are leased to others, or sick"
        while not self._is_closed and (left := deadline - time.monotonic()) > 0:
            try:
                offer = request(tracker, key, min(left, _SLICE))
            except TrackerLost as error:
                why = f"the tracker: {error}"
                time.sleep(min(left, _PAUSE))
                continue
            if offer is not None:
                return offer
        raise FarmUnreachable(
            f"no {key} of the farm at {tracker} was to be had for {self._options.wait:.0f} s",
            cause=why,
            fix="look at `llamac farm status`; the same command goes on from here",
        )

    def _lost(self, why: str, times: int) -> None:
        """Take note of a lost measurement; give up after many."""
        if self._is_closed:
            raise FarmUnreachable("the farm was given back", cause=why, fix="start again")
        self._say(f"note: measured again, because a device was lost: {why}")
        if times >= MOST_LOST:
            raise FarmUnreachable(
                f"a kernel was lost with its device {times} times",
                cause=why,
                fix="look at `llamac farm status`; the same command goes on from here",
            )


def _spread(reading: Reading) -> float:
    """How far the median of a kernel's times is above the shortest, relative to it."""
    if reading.times is None:
        return 0.0
    spread = np.median(reading.times, axis=0) / reading.times.min(axis=0) - 1
    return float(spread.max())


def _check_cost(wanted: str, found: str) -> None:
    told = {"time_us": ("time",), "instructions": ("cycles", "instructions")}
    fitting = told.get(found, (found,))
    if wanted not in ("auto", *fitting):
        raise UsageError(
            f"the devices of this key do not measure {wanted}",
            cause=f"they measure {' and '.join(fitting)}",
            fix="leave out --cost, or choose one of these",
        )


def _fitting(options: FarmOptions, arch: str, level: str) -> list[Mapping[str, Any]]:
    """Agents of the key, after comparing what they say with what is wanted."""
    known = agents(options.tracker)
    found = [info for info in known if info.get("key") == f"server:{options.key}"]
    where = f"the farm at {options.tracker}"
    if not found:
        keys = sorted({str(info.get("key")).removeprefix("server:") for info in known})
        raise FarmUnfit(
            f"{where} has no device {options.key}",
            cause=f"it has {', '.join(keys)}" if keys else "it has no devices at all",
            fix=f"start one: llamac farm serve --key {options.key} --device ...",
        )
    fitting = [info for info in found if info.get("arch") == arch]
    if not fitting:
        raise FarmUnfit(
            f"{options.key} of {where} is {found[0].get('arch')}, and the kernels are {arch}",
            cause="a device runs programs of its own architecture only",
            fix="give the key of the SoC that is tuned, or leave --key out",
        )
    able = [info for info in fitting if level in info.get("levels", ())]
    if not able:
        told = fitting[0]
        raise FarmUnfit(
            f"{options.key} of {where} cannot run kernels of {level}",
            cause=f"it is {told.get('state')}, and runs {', '.join(told.get('levels', ())) or 'no'}"
            f" levels{': ' if told.get('note') else ''}{told.get('note', '')}",
            fix="choose another level with --level, or wait until its canary is right",
        )
    costs = {str(info.get("cost")) for info in able}
    if len(costs) > 1:
        raise FarmUnfit(
            f"devices of {options.key} measure different things: {', '.join(sorted(costs))}",
            cause="an emulator's counts and a device's time cannot be compared",
            fix="serve them with different trackers",
        )
    return able
