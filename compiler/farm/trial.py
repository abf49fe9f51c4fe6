"""A candidate as an agent gets it: a static program, its input, and how to read its output."""

from __future__ import annotations

import tempfile
import threading
from dataclasses import dataclass
from pathlib import Path

import numpy as np
from numpy.typing import NDArray
from tvm.tirx import PrimFunc

from llamac.schedules.kernel import num_outputs, work_items
from llamac.targets.kernel_runner import (
    KernelCall,
    TimedCall,
    build_kernel_program,
    build_timed_program,
)
from llamac.targets.tuning.host import DEFAULT_CACHE_BYTES
from llamac.targets.tuning.measure import Array, Problem, empty_outputs, weight_copies
from llamac.targets.tuning.records import KnobValues

_turn = threading.Lock()  # TVM compiles for one thread at a time


@dataclass(frozen=True)
class Reading:
    """What came back.

    Attributes:
        outputs: of the kernel.
        times: nanoseconds of a call, [rounds, 2]: the default knobs, the candidate; else None.
        count: of a call with all work items, in the transport's unit; 0 where times are.
    """

    outputs: list[Array]
    times: NDArray[np.float64] | None = None
    count: float = 0.0


@dataclass(frozen=True)
class Trial:
    """A candidate that is ready to be measured.

    Attributes:
        problem: whose candidate it is.
        func: the kernel.
        cost: kind of cost that its program tells, see `Transport.cost`.
        program: a static program.
        call: its standard input, read by `read`.
    """

    problem: Problem
    func: PrimFunc
    cost: str
    program: bytes
    call: KernelCall | TimedCall

    def read(self, output: bytes, count: int) -> Reading:
        """What the program wrote, and the agent counted.

        Raises:
            ValueError: it wrote something else.
        """
        if isinstance(self.call, TimedCall):
            outputs, times = self.call.decode_times(output)
            return Reading(outputs, times)
        if len(output) != self.call.output_bytes:
            raise ValueError(f"{len(output)} bytes came back instead of {self.call.output_bytes}")
        after = self.call.decode(output)
        if self.cost == "packets":
            count = self.call.decode_costs(output).total
        scale = work_items(self.func) / self.problem.judged_items(self.func)
        return Reading(after[len(after) - num_outputs(self.func) :], count=count * scale)


def make_trial(problem: Problem, knobs: KnobValues, cost: str) -> Trial:
    """Compile a candidate for a kind of cost.

    Raises:
        LlamacError, ValueError: it does not compile.
    """
    with _turn, tempfile.TemporaryDirectory(prefix="llamac-trial-") as folder:
        func = problem.build(knobs)
        program = Path(folder) / "program"
        tensors = [*problem.inputs, *empty_outputs(func)]
        if cost != "time_us":
            build_kernel_program(func, problem.isa, program)
            call = KernelCall(
                tensors, 0, problem.judged_items(func), alignment=problem.isa.alignment
            )
            return Trial(problem, func, cost, program.read_bytes(), call)
        reference = problem.build(problem.spec.points(problem.isa)[0])
        build_timed_program(func, reference, problem.isa, program)
        timed = TimedCall(
            tensors,
            0,
            work_items(func),
            alignment=problem.isa.alignment,
            num_outputs=num_outputs(func),
            reference_end=work_items(reference),
            streamed=problem.streamed,
            copies=weight_copies(
                problem.spec, problem.inputs, problem.streamed, DEFAULT_CACHE_BYTES
            ),
        )
        return Trial(problem, func, cost, program.read_bytes(), timed)
