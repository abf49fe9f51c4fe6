"""Costs without a device: what an emulator counts, and cycles that a core's model makes of it.

Counts are exact and the same on every machine, but they are no time. For cores that llvm-mca
models, all counted instructions are taken to run at the rate that the model predicts for the hot
loop of the products: `cycles`. Where there is no such loop, or no model, the count itself is the
cost. Both say nothing of caches and memory.
"""

from __future__ import annotations

import tempfile
from collections.abc import Sequence
from pathlib import Path

from tvm.tirx import PrimFunc

from llamac.runtime.errors import LlamacError, TuningImpossible
from llamac.schedules.intrin.isa import Isa
from llamac.schedules.kernel import compile_kernels, num_outputs, work_items
from llamac.targets.count import count_instructions
from llamac.targets.emulator import (
    AARCH64,
    FIRST_VERSION_WITH_SME,
    HEXAGON,
    Emulator,
    find_emulator,
)
from llamac.targets.kernel_runner import KernelCall, build_kernel_program, count_kernel_program
from llamac.targets.machine_code import parse_assembly
from llamac.targets.mca import CORES, MODELS, find_mca, hot_loop, macs_per_cycle
from llamac.targets.tuning.measure import (
    SYMBOL,
    Array,
    Candidate,
    Measurement,
    Measurer,
    Problem,
    empty_outputs,
    last_line,
)
from llamac.targets.tuning.records import KnobValues

# A CPU that has what a level needs. Vectors of SVE are of 256 bits, of SME of 512, as the levels'
# kernels are counted elsewhere.
CPUS = {
    "neon": "max,sve=off,sme=off",
    "dotprod": "max,sve=off,sme=off",
    "i8mm": "max,sve=off,sme=off",
    "sve": "max,sme=off,sve-default-vector-length=32",
    "sme": "max,sme_fa64=off,sme-default-vector-length=64",
}


class EmulatedMeasurer(Measurer):
    """Runs kernels as static programs under an emulator."""

    is_exact = True

    def __init__(self, emulator: Emulator) -> None:
        self.emulator = emulator
        self._folder = tempfile.TemporaryDirectory(prefix="llamac-tune-")
        self._built = 0

    def measure(self, problem: Problem, candidates: Sequence[Candidate]) -> list[Measurement]:
        """Run, judge and count one candidate after the other."""
        return [self._measure(problem, candidate.knobs) for candidate in candidates]

    def _measure(self, problem: Problem, knobs: KnobValues) -> Measurement:
        kind = self.kind(problem)
        try:
            func = problem.build(knobs)
            outputs, count = self._run(problem, func)
            wrong = problem.judge(outputs)
            if wrong:
                return Measurement("wrong", kind, note=wrong[:200])
            whole = count * work_items(func) / problem.judged_items(func)
            return Measurement("ok", kind, self._cost(problem, func, whole))
        except (LlamacError, ValueError) as error:
            return Measurement("failed", kind, note=last_line(error))

    def _run(self, problem: Problem, func: PrimFunc) -> tuple[list[Array], float]:
        """Outputs of a call, and what was counted of it."""
        program = Path(self._folder.name) / f"kernel{self._built}"
        self._built += 1
        build_kernel_program(func, problem.isa, program)
        tensors = [*problem.inputs, *empty_outputs(func)]
        call = KernelCall(tensors, 0, problem.judged_items(func), alignment=problem.isa.alignment)
        after, count = self._count(program, call)
        program.unlink()
        return after[len(after) - num_outputs(func) :], count

    def _count(self, program: Path, call: KernelCall) -> tuple[list[Array], float]:
        raise NotImplementedError

    def _cost(self, problem: Problem, func: PrimFunc, count: float) -> float:
        """The cost of a call with all items, from its count."""
        return count

    def close(self) -> None:
        """Remove the programs."""
        self._folder.cleanup()


class PacketCounter(EmulatedMeasurer):
    """Packets of an emulated Hexagon.

    Raises:
        ToolchainMissing: there is no qemu-hexagon.
    """

    def __init__(self) -> None:
        super().__init__(find_emulator(arch=HEXAGON.name))
        self.device = f"qemu-hexagon {self.emulator.version_text}"

    def kind(self, problem: Problem) -> str:
        """Packets."""
        return "packets"

    def _count(self, program: Path, call: KernelCall) -> tuple[list[Array], float]:
        after, packets = count_kernel_program(self.emulator.command(program), call)
        return after, packets.total


class AarchCounter(EmulatedMeasurer):
    """Instructions of an emulated AArch64, or cycles of a core's model.

    Args:
        level: whose kernels are counted.
        core: of the SoC, "cortex-x4".
        use_model: whether cycles are wanted where a model can tell them.

    Raises:
        ToolchainMissing: there is no qemu-aarch64 that loads plug-ins.
        TuningImpossible: it computes the level wrongly.
    """

    def __init__(self, level: Isa, core: str, *, use_model: bool = True) -> None:
        super().__init__(find_emulator(CPUS.get(level.name), AARCH64.name))
        version = self.emulator.version_text
        if level.name == "sme" and self.emulator.version < FIRST_VERSION_WITH_SME:
            self.close()
            raise TuningImpossible(
                f"kernels of the level sme cannot be counted with QEMU {version}",
                cause="it computes some outer products wrongly, so that no result can be judged",
                fix="tune another level (--level), or name a newer QEMU with LLAMAC_QEMU",
            )
        self._model = CoreModel(core if use_model else "")
        self.device = f"qemu-aarch64 {version}{self._model.title}"

    def kind(self, problem: Problem) -> str:
        """Cycles if the model knows the default's hot loop, else instructions."""
        return self._model.kind(problem)

    def _count(self, program: Path, call: KernelCall) -> tuple[list[Array], float]:
        data, [counts] = count_instructions(self.emulator, [program], call.encode())
        return call.decode(data), counts.total

    def _cost(self, problem: Problem, func: PrimFunc, count: float) -> float:
        return self._model.cost(problem, func, count)


class CoreModel:
    """Cycles of a core for counted instructions, by llvm-mca's prediction of the hot loop.

    Args:
        core: of the SoC, "cortex-x4"; one that llvm-mca does not model has no cycles.

    Attributes:
        title: what records say of it, behind the emulator.
    """

    def __init__(self, core: str) -> None:
        self._model = CORES.get(core) if find_mca() else None
        self.title = "" if self._model is None else f", llvm-mca for {MODELS[self._model]}"
        self._kinds: dict[str, str] = {}

    def kind(self, problem: Problem) -> str:
        """Cycles if the model knows the default's hot loop, else instructions."""
        name = problem.spec.name
        if name not in self._kinds:
            func = problem.build(problem.spec.points(problem.isa)[0])
            is_known = self._model is not None and self._predict(problem, func) is not None
            self._kinds[name] = "cycles" if is_known else "instructions"
        return self._kinds[name]

    def cost(self, problem: Problem, func: PrimFunc, count: float) -> float:
        """The cost of what was counted, in the problem's kind.

        Raises:
            ValueError: the model knows the default's hot loop, but not this one's.
        """
        if self.kind(problem) == "instructions":
            return count
        per_cycle = self._predict(problem, func)
        if per_cycle is None:
            raise ValueError("the model knows no hot loop in it")
        return count / per_cycle

    def _predict(self, problem: Problem, func: PrimFunc) -> float | None:
        """Instructions of the hot loop for each cycle of the model."""
        if self._model is None:
            return None
        assembly = compile_kernels({SYMBOL: func}, problem.isa).inspect_source("asm")
        loop = hot_loop(parse_assembly(assembly))
        if loop is None:
            return None
        rate = macs_per_cycle(loop, MODELS[self._model])
        return None if rate is None else rate * loop.instructions / loop.macs
