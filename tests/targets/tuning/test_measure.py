"""Ways to measure: real kernels are right and cost something, wrong and crashing ones are found."""

from __future__ import annotations

import os
import signal
from collections.abc import Iterator
from dataclasses import replace
from typing import Any

import numpy as np
import pytest

from llamac.compiler.tuning.problems import make_problem
from llamac.runtime.errors import TuningImpossible
from llamac.schedules.attention import AttentionShape
from llamac.schedules.hadamard import HadamardShape
from llamac.schedules.intrin.arm_levels import ARM_LEVELS
from llamac.schedules.intrin.hexagon import HexagonHvx
from llamac.schedules.intrin.x86 import X86_LEVELS, X86Portable
from llamac.schedules.lora import LoraShape
from llamac.schedules.matmul import MatmulShape
from llamac.schedules.qmatmul import QMatmulShape
from llamac.schedules.qmatmul_int8 import QMatmulInt8Shape
from llamac.schedules.rope import CacheShape
from llamac.schedules.sampling import ArgmaxShape
from llamac.targets.cpu.kernels import KernelSpec
from llamac.targets.tuning.emulated import AarchCounter, PacketCounter
from llamac.targets.tuning.host import HostTimer, idlest_cpu
from llamac.targets.tuning.measure import Candidate, Measurement, Measurer, Problem

LEVEL = X86Portable()
I8MM = ARM_LEVELS[2].scheduled_for("neoverse-v2")
HVX = HexagonHvx(75, simulate=True)
SPLIT = (64, 32, 32)
KERNELS = {
    "int4": ("qmatmul", QMatmulShape(5, 192, 64)),
    "int4 of a token": ("qmatmul", QMatmulShape(1, 192, 64, "bfloat16")),
    "swiglu": ("qmatmul", QMatmulShape(5, 192, 64, "float16", "swiglu")),
    "residual": ("qmatmul", QMatmulShape(5, 192, 64, "float16", "residual")),
    "lora branch": ("qmatmul", QMatmulShape(5, 128, 64, "float16", "none", 4, 2.0, SPLIT)),
    "swiglu with lora": (
        "qmatmul",
        QMatmulShape(5, 128, 64, "float16", "swiglu", 4, 2.0, (64, 64)),
    ),
    "int8": ("qmatmul_int8", QMatmulInt8Shape(3, 192, 64)),
    "float": ("matmul", MatmulShape(3, 192, 64, "residual")),
    "float swiglu": ("matmul", MatmulShape(3, 192, 64, "swiglu")),
    "lora": ("lora", LoraShape(3, 8, 64)),
    "argmax": ("sampling", ArgmaxShape(1000)),
    "hadamard": ("hadamard", HadamardShape(2, 256)),
    "attention": ("attention", AttentionShape(8, 4, CacheShape(2, 16, 64))),
    "attention int8": ("attention", AttentionShape(1, 4, CacheShape(2, 16, 2048, "int8"))),
}


def spec(name: str) -> KernelSpec:
    return KernelSpec(name, *KERNELS[name])


def measure(measurer: Measurer, problem: Problem, count: int = 2) -> list[Measurement]:
    points = problem.spec.points(problem.isa)
    chosen = points[:1] + points[len(points) - count + 1 :]
    return measurer.measure(problem, [Candidate(knobs, "") for knobs in chosen])


def broken(problem: Problem) -> Problem:
    """The same with other weights than the reference has."""
    inputs = list(problem.inputs)
    for i in problem.streamed:
        inputs[i] = np.roll(inputs[i], 1, axis=-1)
    return replace(problem, inputs=inputs)


@pytest.fixture(scope="module")
def timer() -> Iterator[HostTimer]:
    """A timer of plain x86-64 code, whose process is shared by the tests."""
    try:
        found = HostTimer(LEVEL)
    except TuningImpossible as error:
        pytest.skip(f"this CPU is no x86-64: {error}")
    with found:
        yield found


@pytest.mark.parametrize("name", KERNELS)
def test_kernels_of_every_family_are_right_and_take_time(timer: HostTimer, name: str) -> None:
    """Operands and reference fit each other, for the default and another point."""
    for found in measure(timer, make_problem(spec(name), LEVEL)):
        assert (found.status, found.note, found.kind) == ("ok", "", "time_us")
        assert found.cost > 0
        assert found.noise >= 0


def test_the_judge_looks_at_the_first_items_only() -> None:
    """Of a large kernel only some, so that the reference and emulators stay fast."""
    large = KernelSpec("k", "qmatmul", QMatmulShape(128, 2048, 2048))
    problem = make_problem(large, LEVEL)
    assert problem.items is not None
    assert 0 < problem.items < 2048 // 16
    func = problem.build(large.points(LEVEL)[0])
    assert problem.judged_items(func) == problem.items


@pytest.mark.parametrize("name", ["int4", "swiglu", "int8", "float"])
def test_a_wrong_result_has_no_cost(timer: HostTimer, name: str) -> None:
    """Other weights than the reference's: it is wrong, and the note says where."""
    for found in measure(timer, broken(make_problem(spec(name), LEVEL))):
        assert (found.status, found.cost) == ("wrong", 0.0)
        assert "result[" in found.note


def test_a_kernel_that_refuses_its_operands_fails(timer: HostTimer) -> None:
    """What it says becomes the note; the next problem is measured as if nothing had been."""
    problem = make_problem(spec("int4"), LEVEL)
    short = replace(problem, inputs=[problem.inputs[0][:, :32], *problem.inputs[1:]])
    assert {found.status for found in measure(timer, short)} == {"failed"}
    assert {found.status for found in measure(timer, problem)} == {"ok"}


def test_a_crash_is_a_failed_candidate(timer: HostTimer) -> None:
    """The process dies, which is noted; a new one measures what follows."""
    problem = make_problem(spec("hadamard"), LEVEL)
    measure(timer, problem)
    worker: Any = timer._worker
    os.kill(worker._process.pid, signal.SIGSEGV)
    first, second = measure(timer, problem)
    assert first.status == "failed"
    assert "SIGSEGV" in first.note
    assert second.status == "ok"


def test_a_level_that_this_machine_lacks_cannot_be_timed() -> None:
    with pytest.raises(TuningImpossible, match="i8mm"):
        HostTimer(I8MM)


def test_it_stays_on_an_idle_cpu() -> None:
    """One of those that it may use."""
    allowed = os.sched_getaffinity(0)
    assert idlest_cpu(allowed) in allowed
    assert idlest_cpu({min(allowed)}) == min(allowed)


def test_gates_are_open_in_large_kernels() -> None:
    """Each row of what the judge looks at has results of a size that can be compared."""
    large = KernelSpec("k", "qmatmul", QMatmulShape(128, 16384, 2048, "float16", "swiglu"))
    problem = make_problem(large, LEVEL)
    far_off = problem.judge([np.zeros((128, 8192), np.float32)])
    assert "error 1 of the row's largest" in far_off


def test_weights_of_one_token_are_streamed() -> None:
    """Codes and scales of products; a Hadamard transform has none."""
    assert len(make_problem(spec("int4 of a token"), LEVEL).streamed) == 2
    assert make_problem(spec("hadamard"), LEVEL).streamed == ()


ARM = [
    ("qmatmul_quads", QMatmulShape(20, 64, 64), "cycles"),
    ("qmatmul_quads", QMatmulShape(1, 64, 64, "float16", "swiglu"), "cycles"),
    ("hadamard", HadamardShape(1, 256), "instructions"),
]


@pytest.mark.needs("qemu-aarch64", "llvm-mca-19")
@pytest.mark.parametrize(("family", "shape", "kind"), ARM, ids=str)
def test_arm_kernels_cost_cycles_of_a_model(family: str, shape: Any, kind: str) -> None:
    """Or instructions where the model knows no loop; twice the same; fewer cycles than counts."""
    problem = make_problem(KernelSpec("k", family, shape), I8MM)
    with AarchCounter(I8MM, "cortex-x4") as counter:
        found = measure(counter, problem)
        assert [(m.status, m.kind) for m in found] == [("ok", kind)] * 2, found
        assert found == measure(counter, problem)
        assert {m.status for m in measure(counter, broken(problem))} <= {"wrong", "ok"}
    with AarchCounter(I8MM, "cortex-x4", use_model=False) as counter:
        counts = measure(counter, problem)
    assert {m.kind for m in counts} == {"instructions"}
    assert (counts[0].cost > found[0].cost) == (kind == "cycles")


@pytest.mark.needs("qemu-aarch64")
def test_an_arm_kernel_that_is_wrong_is_found() -> None:
    problem = broken(make_problem(KernelSpec("k", "qmatmul_quads", QMatmulShape(1, 64, 64)), I8MM))
    with AarchCounter(I8MM, "unknown-core") as counter:
        assert {m.status for m in measure(counter, problem)} == {"wrong"}


HEXAGON = [
    ("qmatmul_hvx", QMatmulShape(5, 64, 64)),
    pytest.param(
        "qmatmul_hvx",
        QMatmulShape(5, 128, 64, "bfloat16", "swiglu", 4, 2.0, (64, 64)),
        marks=pytest.mark.slow,  # LLVM takes minutes
    ),
    ("qmatmul_int8_hvx", QMatmulInt8Shape(2, 64, 64)),
]


@pytest.mark.needs("qemu-hexagon")
@pytest.mark.parametrize(("family", "shape"), HEXAGON, ids=str)
def test_hexagon_kernels_cost_packets(family: str, shape: Any) -> None:
    problem = make_problem(KernelSpec("k", family, shape), HVX)
    with PacketCounter() as counter:
        for found in measure(counter, problem):
            assert (found.status, found.kind, found.note) == ("ok", "packets", "")
            assert found.cost == int(found.cost) > 0
        assert {m.status for m in measure(counter, broken(problem))} == {"wrong"}


def test_every_level_of_this_machine_has_its_level_names() -> None:
    """Levels are told by their names in records: no two are the same."""
    names = [isa.name for isa in (*X86_LEVELS, *ARM_LEVELS)]
    assert len(set(names)) == len(names)
