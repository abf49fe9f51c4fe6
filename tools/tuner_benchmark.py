"""How near the tuner comes to the best of a space: `python -m llamac.tools.tuner_benchmark`.

All points of some spaces are measured on this machine. Then the tuner runs many times over what was
measured, with other chance each time, and so does a search by chance alone. Quality is the cost of
the best of all points by that of the point which was chosen: 100 % is the optimum. The tables are
those of docs/tuning.md.

With --transfer one product of the 1B model is tuned, for one token and for 128, and the best knobs
are used for the others of the 1B and the 3B model without a trial, as compiling with records does.
"""

from __future__ import annotations

import argparse
import random
import sys
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import numpy as np

from llamac.compiler.tuning.candidates import find_candidates
from llamac.compiler.tuning.kernels import ModelOptions, model_kernels
from llamac.compiler.tuning.problems import make_problem
from llamac.compiler.tuning.tuner import Limits, Tuner
from llamac.schedules.intrin.isa import Isa
from llamac.targets.cpu.kernels import KernelSpec
from llamac.targets.tuning.host import KIND, HostTimer
from llamac.targets.tuning.measure import Candidate, Measurement, Measurer, Problem
from llamac.targets.tuning.records import KnobValues, Place, Record, same
from llamac.tools.console import positive_int, print_rows

MODEL = "llama-3.2-1b"
KERNELS = (
    "qsi4c32_8x3072x2048",
    "residual_8x2048x2048",
    "qsi4c32_128x3072x2048",
    "residual_128x2048x8192",
    "attention_float16_8x",
)
TRANSFERS = (
    ("qsi4c32_1x", "qsi4c32_residual_1x", "qsi4c32_swiglu_1x"),
    (
        "qsi4c32_128x",
        "qsi4c32_residual_128x",
        "qsi4c32_swiglu_128x",
    ),
)
TRANSFER_MODELS = (MODEL, "llama-3.2-3b")
TRANSFER_TRIALS = 16
TRIALS = (8, 12, 16, 24, 32)
BATCH = 8  # measured side by side with the default
NEAR = 0.95


@dataclass(frozen=True)
class Measured:
    """A kernel whose points are all measured: costs by the hash of the code."""

    spec: KernelSpec
    candidates: Sequence[Candidate]
    costs: Mapping[str, float]

    @property
    def best(self) -> float:
        """Lowest cost of all points."""
        return min(self.costs.values())


class Replay(Measurer):
    """Measures by looking up what was measured before."""

    device = "replay"
    is_exact = True

    def __init__(self, costs: Mapping[str, float]) -> None:
        self._costs = costs

    def kind(self, problem: Problem) -> str:
        """Microseconds."""
        return KIND

    def measure(self, problem: Problem, candidates: Sequence[Candidate]) -> list[Measurement]:
        """The costs from before."""
        return [Measurement("ok", KIND, self._costs[c.code]) for c in candidates]


def main(argv: Sequence[str] | None = None) -> int:
    """Measure, search, print two tables."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--seeds", type=positive_int, default=40)
    parser.add_argument("--kernels", nargs="*", default=KERNELS)
    parser.add_argument("--level")
    parser.add_argument("--transfer", action="store_true")
    args = parser.parse_args(argv)
    if args.transfer:
        return transfer(args.level, args.seeds)
    model = model_kernels(MODEL, "host", "cpu", ModelOptions())
    level = model.level(args.level)
    with HostTimer(level) as timer:
        specs = [model.tunable(level, name)[0] for name in args.kernels]
        all_measured = [measure_all(spec, level, timer) for spec in specs]
        print(f"device: {timer.device}, level {level.name}\n")
    print_rows("spaces", map(space_row, all_measured), plain=True, header=SPACE_HEADER)
    rows = [
        row
        for measured in all_measured
        for row in (
            (measured.spec.name, "chance", *by_chance(measured, args.seeds)),
            ("", "tuner", *by_tuner(measured, level, args.seeds, None)),
            ("", "tuner, calibrated", *by_tuner(measured, level, args.seeds, all_measured)),
        )
    ]
    header = ("kernel", "search", *(f"{trials} trials" for trials in TRIALS))
    print_rows("quality: mean (5th percentile), %", rows, plain=True, header=header)
    return 0


def transfer(level_name: str | None, seeds: int) -> int:
    """Tune the first shape of each family; how good are its knobs for the others?"""
    models = [model_kernels(name, "host", "cpu", ModelOptions()) for name in TRANSFER_MODELS]
    level = models[0].level(level_name)
    rows = []
    with HostTimer(level) as timer:
        print(f"device: {timer.device}, level {level.name}\n")
        for names in TRANSFERS:
            specs = [s for m in models for name in names for s in m.tunable(level, name)]
            first, *others = (measure_all(spec, level, timer) for spec in specs)
            chosen = [chosen_knobs(first, level, seed) for seed in range(seeds)]
            for measured in (first, *others):
                costs = {same(c.knobs): measured.costs.get(c.code) for c in measured.candidates}
                qualities = [_quality(measured, costs.get(same(knobs))) for knobs in chosen]
                trials = TRANSFER_TRIALS if measured is first else 0
                default = space_row(measured)[-1]
                rows.append((measured.spec.name, str(trials), default, summary(qualities)))
    header = ("kernel", "trials", "default", "chosen: mean (5th percentile), %")
    print_rows("knobs of another shape", rows, plain=True, header=header)
    return 0


def _quality(measured: Measured, cost: float | None) -> float:
    """Of knobs that a kernel got from another; where they do not fit it has its default."""
    return measured.best / (cost or measured.costs[measured.candidates[0].code])


def chosen_knobs(measured: Measured, level: Isa, seed: int) -> KnobValues:
    """What the tuner chooses for a kernel."""
    place = Place("host", "x86-64", level.name)
    tuner = Tuner(place, Replay(measured.costs), (), lambda records: None, lambda state: None, seed)
    return tuner.tune(measured.spec, level, Limits(TRANSFER_TRIALS)).knobs


SPACE_HEADER = ("kernel", "points", "codes", "worst : best", "within 5 %", "default")


def space_row(measured: Measured) -> tuple[str, ...]:
    """What a space looks like."""
    costs = np.array(list(measured.costs.values()))
    default = measured.costs[measured.candidates[0].code]
    return (
        measured.spec.name,
        str(len(measured.candidates)),
        str(len(measured.costs)),
        f"{costs.max() / costs.min():.2f}",
        f"{100 * np.mean(costs <= costs.min() / NEAR):.0f} %",
        f"{100 * costs.min() / default:.1f} %",
    )


def measure_all(spec: KernelSpec, level: Isa, timer: Measurer) -> Measured:
    """Measure every point of a kernel."""
    problem = make_problem(spec, level)
    candidates = find_candidates(problem, lambda done, points: None).candidates
    costs = {}
    for first in range(0, len(candidates), BATCH):
        batch = candidates[first : first + BATCH]
        for candidate, result in zip(batch, timer.measure(problem, batch), strict=True):
            if result.status == "ok":
                costs[candidate.code] = result.cost
        print(f"{spec.name}: {first + len(batch)} of {len(candidates)}", file=sys.stderr)
    return Measured(spec, candidates, costs)


def summary(qualities: Sequence[float]) -> str:
    """Mean and fifth percentile in percent."""
    values = 100 * np.array(qualities)
    return f"{values.mean():.1f} ({np.percentile(values, 5):.1f})"


def by_chance(measured: Measured, seeds: int) -> list[str]:
    """The best of points that are drawn."""
    costs = list(measured.costs.values())
    return _table(measured.best, [random.Random(i).sample(costs, len(costs)) for i in range(seeds)])


def by_tuner(
    measured: Measured, level: Isa, seeds: int, others: Sequence[Measured] | None
) -> list[str]:
    """The tuner's best; with `others`, after it has tuned another kernel of the same family."""
    family = [m for m in others or () if m.spec.family == measured.spec.family]
    before = [m for m in family if m is not measured][:1]
    if others is not None and not before:
        return ["-"] * len(TRIALS)
    runs = [tune_in_order([*before, measured], level, seed) for seed in range(seeds)]
    return _table(measured.best, runs)


def tune_in_order(kernels: Sequence[Measured], level: Isa, seed: int) -> list[float]:
    """Tune kernels one after the other, the first with 24 trials; what the last one's cost."""
    costs = {code: cost for m in kernels for code, cost in m.costs.items()}
    records: list[Record] = []
    place = Place("host", "x86-64", level.name)
    tuner = Tuner(place, Replay(costs), (), records.extend, lambda state: None, seed)
    for kernel in kernels[:-1]:
        tuner.tune(kernel.spec, level, Limits(24))
    records.clear()
    tuner.tune(kernels[-1].spec, level, Limits(max(TRIALS)))
    return [record.cost for record in records]


def _table(best: float, runs: Sequence[Sequence[float]]) -> list[str]:
    """Quality after each number of trials; a search that ended early keeps what it found."""
    return [summary([best / min(costs[:trials]) for costs in runs]) for trials in TRIALS]


if __name__ == "__main__":
    sys.exit(main())
