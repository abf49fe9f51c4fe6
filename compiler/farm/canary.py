"""The canary: a kernel whose result and cost an agent knows, and runs when it doubts its device.

It is the smallest product of a model with its default knobs. Its result must be the reference's,
and where time is measured it must take about as long as before on this device: a phone that is hot,
or busy with something else, measures nothing that means anything.
"""

from __future__ import annotations

import statistics
from collections import deque
from dataclasses import dataclass, field
from pathlib import Path

from llamac.compiler.farm.transports import CALL, OUTPUT, PROGRAM, Transport
from llamac.compiler.farm.trial import Trial, make_trial
from llamac.compiler.tuning.kernels import ModelOptions, model_kernels
from llamac.compiler.tuning.problems import make_problem
from llamac.schedules.intrin.isa import Isa
from llamac.targets.cpu.kernels import KernelSpec
from llamac.targets.cpu.target import CpuTarget
from llamac.targets.kernel_cost import macs_of
from llamac.targets.program import ProgramKernel

MODEL = "llama-3.2-1b"
SECONDS = 30.0
MOST_SLOWER = 2.0  # than the median of what it took before
HISTORY = 20
LEAST_HISTORY = 3


@dataclass
class Canary:
    """A level's canary on one device.

    Attributes:
        level: whose kernel it is.
        trial: the kernel.
        costs: what it took lately, microseconds or a count.
    """

    level: str
    trial: Trial
    costs: deque[float] = field(default_factory=lambda: deque(maxlen=HISTORY))

    async def check(self, transport: Transport, folder: Path, seconds: float = SECONDS) -> str:
        """Run it; return what is wrong with the device, "" if nothing is.

        Raises:
            DeviceLost: it is not there.
        """
        (folder / PROGRAM).write_bytes(self.trial.program)
        (folder / CALL).write_bytes(self.trial.call.encode())
        ran = await transport.run(folder, seconds, self.trial.call.output_bytes)
        if ran.problem:
            return f"the canary fails: {ran.problem}"
        try:
            reading = self.trial.read((folder / OUTPUT).read_bytes(), ran.count)
        except ValueError as error:
            return f"the canary fails: {error}"
        if wrong := self.trial.problem.judge(reading.outputs):
            return f"the canary is wrong: {wrong}"
        cost = reading.count if reading.times is None else float(reading.times.min()) / 1000
        return self._compare(cost)

    def _compare(self, cost: float) -> str:
        """Compare with what it took before; a slow one is no part of the history."""
        if len(self.costs) >= LEAST_HISTORY:
            usual = statistics.median(self.costs)
            if cost > MOST_SLOWER * usual:
                return f"the canary took {cost:.0f} instead of {usual:.0f}"
        self.costs.append(cost)
        return ""


def make_canaries(target: CpuTarget, cost: str) -> list[Canary]:
    """Canaries of a target's levels, the best level first."""
    options = ModelOptions()
    processor = next(p.kind for p in target.soc.processors if p.plugin == target.name)
    kernels = model_kernels(MODEL, target.soc.name, processor, options)
    return [_make(kernels.tunable(isa), isa, cost) for isa in target.isas()]


def _make(specs: list[KernelSpec], isa: Isa, cost: str) -> Canary:
    products = [spec for spec in specs if _macs(spec)]
    problem = make_problem(min(products, key=_macs), isa)
    knobs = problem.spec.points(problem.isa)[0]
    return Canary(isa.name, make_trial(problem, knobs, cost))


def _macs(spec: KernelSpec) -> int:
    if spec.family == "attention":
        return 0
    return macs_of(ProgramKernel(spec.name, spec.family, spec.shape_fields(), 0), 0)
