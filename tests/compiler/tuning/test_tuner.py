"""The tuner: right before fast, few trials, every stop, resuming, merging, and what it records.

Kernels are compiled for real; costs come from a formula, so that the best point is known.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

import pytest

from llamac.compiler.tuning.candidates import find_candidates
from llamac.compiler.tuning.problems import make_problem
from llamac.compiler.tuning.tuner import KernelState, Limits, Tuner
from llamac.schedules.intrin.x86 import X86_LEVELS
from llamac.schedules.lora import LoraShape
from llamac.schedules.qmatmul import QMatmulShape
from llamac.targets.cpu.kernels import KernelSpec
from llamac.targets.tuning.measure import Candidate, Measurement, Measurer, Problem
from llamac.targets.tuning.records import Place, Record, same

LEVEL = X86_LEVELS[2]  # avx2: every x86-64 compiler makes it, nothing is executed
SPEC = KernelSpec("k", "qmatmul", QMatmulShape(8, 64, 256))
PLACE = Place("host", "x86-64", "avx2")


def formula(knobs: Any) -> float:
    """Best at mr=2, unroll=2, prefetch=0; the default is mr=2, unroll=1."""
    cost = {1: 30.0, 2: 10.0, 4: 14.0, 6: 20.0}[knobs["mr"]]
    return cost * {1: 1.0, 2: 0.8, 4: 0.9}[knobs["unroll"]] * (1 + 0.01 * knobs["prefetch"])


@dataclass
class Formula(Measurer):
    """Measures by a formula; some points are wrong, and it can be interrupted."""

    device: str = "a formula"
    is_exact: bool = True
    wrong: Any = None
    interrupt_after: int = 10**9
    asked: list[Any] = field(default_factory=list)

    def kind(self, problem: Problem) -> str:
        return "time_us"

    def measure(self, problem: Problem, candidates: Sequence[Candidate]) -> list[Measurement]:
        if len(self.asked) >= self.interrupt_after:
            raise KeyboardInterrupt
        self.asked += [candidate.knobs for candidate in candidates]
        return [self._one(candidate.knobs) for candidate in candidates]

    def _one(self, knobs: Any) -> Measurement:
        if self.wrong is not None and self.wrong(knobs):
            return Measurement("wrong", "time_us", note="result[0] is 1, expected 2")
        return Measurement("ok", "time_us", formula(knobs))


@pytest.fixture(autouse=True, scope="module")
def cache(tmp_path_factory: pytest.TempPathFactory) -> Any:
    """A cache of this module's own: its kernels are compiled once."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("XDG_CACHE_HOME", str(tmp_path_factory.mktemp("cache")))
        patch.delenv("LLAMAC_KERNEL_CACHE", raising=False)
        yield


def tune(
    measurer: Measurer,
    records: list[Record],
    trials: int = 32,
    *,
    spec: KernelSpec = SPEC,
    seconds: float | None = None,
    seed: int = 0,
) -> KernelState:
    states: list[KernelState] = []
    tuner = Tuner(PLACE, measurer, tuple(records), records.extend, states.append, seed)
    result = tuner.tune(spec, LEVEL, Limits(trials, seconds))
    assert states[-1] is result
    return result


@pytest.mark.parametrize("seed", range(3))
def test_the_best_point_is_found_in_few_trials(seed: int) -> None:
    """Of 30 points; the default is measured first, and every trial is recorded."""
    measurer, records = Formula(), list[Record]()
    state = tune(measurer, records, 24, seed=seed)
    assert measurer.asked[0] == SPEC.points(LEVEL)[0]
    assert state.best <= 1.05 * formula({"mr": 2, "unroll": 2, "prefetch": 0})
    assert state.best == min(record.cost for record in records) < state.default
    assert len(records) == state.trials <= 24 < state.candidates
    assert len({same(knobs) for knobs in measurer.asked}) == len(measurer.asked)


def test_records_say_what_was_measured() -> None:
    records: list[Record] = []
    tune(Formula(), records, 3)
    record = records[0]
    assert (record.place, record.family, record.kind) == (PLACE, "qmatmul", "time_us")
    assert (record.shape["m"], record.knobs) == (8, SPEC.points(LEVEL)[0])
    assert (record.device, record.version, len(record.code)) == ("a formula", 1, 16)
    assert record.tools["apache-tvm"]
    assert record.time.endswith("Z")
    assert Record.from_json(record.to_json()) == replace(
        record, shape=Record.from_json(record.to_json()).shape
    )


def test_what_is_wrong_is_recorded_and_never_chosen() -> None:
    """Even if it is the cheapest point by far."""
    measurer, records = Formula(wrong=lambda k: k["mr"] == 2 and k["unroll"] == 2), list[Record]()
    state = tune(measurer, records, 60)
    assert state.wrong > 0
    wrong = [record for record in records if record.status == "wrong"]
    assert len(wrong) == state.wrong
    assert all(record.cost == 0 and "expected" in record.note for record in wrong)
    assert state.knobs["unroll"] != 2 or state.knobs["mr"] != 2
    assert state.best > 0


def test_nothing_right_is_no_crash() -> None:
    state = tune(Formula(wrong=lambda knobs: True), [], 9)
    assert (state.best, state.gain, state.wrong, state.ended) == (0, 0, 9, "trials")


@pytest.mark.parametrize("trials", [1, 2, 9])
def test_it_stops_after_so_many_trials(trials: int) -> None:
    measurer = Formula()
    assert tune(measurer, [], trials).trials == len(measurer.asked) == trials


def test_it_stops_when_the_time_is_over() -> None:
    """The first points are measured, so that there is something to choose."""
    state = tune(Formula(), [], 60, seconds=0.0)
    assert (state.ended, state.trials) == ("time", 8)


def test_it_stops_when_the_best_of_the_model_are_measured() -> None:
    state = tune(Formula(), [], 60)
    assert state.ended == "best of the model measured"
    assert state.trials < state.candidates


def test_a_small_space_is_measured_whole() -> None:
    spec = KernelSpec("lora", "lora", LoraShape(4, 8, 64))
    measurer = Formula()
    measurer._one = lambda knobs: Measurement("ok", "time_us", 10.0 / knobs["chains"])  # type: ignore[method-assign]
    state = tune(measurer, [], spec=spec)
    assert (state.ended, state.trials, state.knobs) == ("all measured", 3, {"chains": 4})


def test_interrupted_it_keeps_what_was_measured_and_goes_on() -> None:
    """Ctrl-C in the second batch: the second run measures none of the first again."""
    first, records = Formula(interrupt_after=8), list[Record]()
    with pytest.raises(KeyboardInterrupt):
        tune(first, records, 20)
    assert len(records) == len(first.asked) == 8
    second = Formula()
    state = tune(second, records, 20)
    assert state.resumed == 8
    assert state.trials == 8 + len(second.asked)
    assert not {same(k) for k in first.asked} & {same(k) for k in second.asked}
    third = Formula()
    tune(third, records, state.trials)
    assert third.asked == []


@pytest.mark.parametrize(
    "changes",
    [
        {"device": "another"},
        {"template": {"version": 1, "hash": "old"}},
        {"place": replace(PLACE, level="avxvnni")},
        {"kind": "cycles"},
    ],
)
def test_measurements_of_something_else_are_not_resumed(changes: dict[str, Any]) -> None:
    records: list[Record] = []
    tune(Formula(), records, 4)
    other = [replace(record, **changes) for record in records]
    assert tune(Formula(), other, 4).resumed == 0


def test_another_shape_needs_fewer_first_points() -> None:
    """The model knows the family by then."""
    measurer, records = Formula(), list[Record]()
    tuner = Tuner(PLACE, measurer, (), records.extend, lambda state: None)
    tuner.tune(SPEC, LEVEL, Limits(20))
    before = len(measurer.asked)
    other = replace(SPEC, name="other", shape=QMatmulShape(8, 128, 256))
    state = tuner.tune(other, LEVEL, Limits(8))
    assert state.best <= 1.2 * formula({"mr": 2, "unroll": 2, "prefetch": 0})
    assert len(measurer.asked) - before <= 8


def test_noisy_measurements_are_confirmed() -> None:
    """The default and the best ones once more; their last costs are the newest records."""
    measurer, records = Formula(is_exact=False), list[Record]()
    state = tune(measurer, records, 12)
    assert len(records) - state.trials == len(measurer.asked) - 12 > 0
    again = {same(record.knobs) for record in records[state.trials :]}
    assert {same(state.knobs), same(SPEC.points(LEVEL)[0])} <= again


def test_points_with_equal_code_are_one_candidate() -> None:
    """Every point is a candidate, or has the code of one."""
    problem = make_problem(SPEC, LEVEL)
    space = find_candidates(problem, lambda done, points: None)
    points = SPEC.points(LEVEL)
    assert len(space.candidates) + space.merged == len(points)
    assert len({candidate.code for candidate in space.candidates}) == len(space.candidates)
    assert space.candidates[0].knobs == points[0]
    assert all(candidate.features for candidate in space.candidates)


def test_the_second_time_nothing_is_compiled(monkeypatch: pytest.MonkeyPatch) -> None:
    """Candidates are kept by everything that decides their code."""
    problem = make_problem(SPEC, LEVEL)
    first = find_candidates(problem, lambda done, points: None)
    monkeypatch.setattr("llamac.compiler.tuning.builder.compile_kernels", None)
    assert find_candidates(problem, lambda done, points: None) == first
    other = make_problem(replace(SPEC, shape=QMatmulShape(8, 64, 128)), LEVEL)
    assert find_candidates(other, lambda done, points: None).candidates == ()


def test_a_point_that_does_not_compile_is_recorded(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    """With what the compiler said; the others are tuned."""
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    make_with = KernelSpec.make_with

    def fail_sometimes(self: Any, knobs: Any, isa: Any, name: str) -> Any:
        if knobs["prefetch"] == 32:
            raise ValueError("no such prefetch")
        return make_with(self, knobs, isa, name)

    monkeypatch.setattr(KernelSpec, "make_with", fail_sometimes)
    records: list[Record] = []
    state = tune(Formula(), records, 2)
    failed = [record for record in records if record.status == "failed"]
    assert state.wrong == len(failed) > 0
    assert {record.note for record in failed} == {"no such prefetch"}
    assert state.best > 0
