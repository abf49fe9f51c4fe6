"""Make the tuning records that llamac ships: `python -m llamac.tools.make_records [SOC...]`.

Each SoC is tuned for Llama 3.2 1B as `llamac tune` does it, for the levels and kernels below, and
of each kernel one record is kept: the best one, or that of the default where it is as good. Run it
on an idle machine after the generators have changed; a run that was stopped goes on where it was,
from build/records/
"""

from __future__ import annotations

import argparse
import sys
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from llamac.compiler.tuning.builder import Builder, open_builder
from llamac.compiler.tuning.kernels import ModelOptions, model_kernels
from llamac.compiler.tuning.tuner import Limits, Tuner
from llamac.schedules.intrin.isa import Isa
from llamac.targets.cpu.kernels import KernelSpec
from llamac.targets.cpu.knobs import level_name
from llamac.targets.tuning.measure import Candidate, Measurement, Measurer, Problem
from llamac.targets.tuning.records import (
    SHIPPED,
    SUFFIX,
    Place,
    Record,
    RecordWriter,
    read_records,
    same,
    write_records,
)
from llamac.tools.console import positive_int
from llamac.tools.tune import open_measurer
from llamac.tools.tune_display import PlainDisplay

MODEL = "llama-3.2-1b"
# One of each kind; the others are near to them, and an emulator takes its time.
PRODUCTS = ("qsi4c32_1x3072x2048", "qsi4c32_128x3072x2048", "residual_128x2048x2048")
# A record must be better than the default by this much: times within it are noise, and counts and
# models know no caches, which small tiles need more.
LEAST_GAIN = {"time_us": 0.02, "packets": 0.02}
LEAST_GAIN_OF_MODELS = 0.05


@dataclass(frozen=True)
class Task:
    """What is tuned for a SoC.

    Attributes:
        soc: its name.
        processor: of it.
        level: "" is the best one.
        kernels: of kernels that have one of these in their name; empty: all.
    """

    soc: str
    processor: str = "cpu"
    level: str = ""
    kernels: tuple[str, ...] = ()


# The best level that QEMU 7 counts: it computes some outer products of SME wrongly.
I8MM = (
    "sm8450", "sm8550", "sm8650", "sm8750", "sm8850",
    "mt6897", "mt6983", "mt6985", "mt6989", "mt6991", "mt6993",
)  # fmt: skip
DOTPROD = ("sm8350", "qcs6490", "genio1200", "rpi5", "armv8", "armv8-dotprod")
TASKS = (
    Task("host"),
    Task("graviton3", level="sve", kernels=PRODUCTS),
    *(Task(soc, level="i8mm", kernels=PRODUCTS) for soc in I8MM),
    *(Task(soc, level="dotprod", kernels=PRODUCTS) for soc in DOTPROD),
    Task("sm8650", "hvx", kernels=("residual_8x2048x2048", "qsi8cx")),
)


def main(argv: Sequence[str] | None = None) -> int:
    """Tune, and write the files of the package."""
    parser = argparse.ArgumentParser(description=__doc__)
    socs = sorted({task.soc for task in TASKS})
    parser.add_argument("socs", metavar="SOC", nargs="*", default=socs, choices=[*socs, []])
    parser.add_argument("--trials", type=positive_int, default=24)
    parser.add_argument("--work", type=Path, default=Path("build/records"))
    args = parser.parse_args(argv)
    known: Known = {}
    with open_builder("local") as builder:
        for soc in args.socs:
            kept = [
                record
                for task in TASKS
                if task.soc == soc
                for record in run_task(task, args.trials, args.work, known, builder)
            ]
            write_records(kept, SHIPPED / f"{soc}{SUFFIX}")
            print(f"{soc}: {len(kept)} records", file=sys.stderr)
    return 0


Known = dict[tuple[str, str, str], Measurement]
"""What was counted, by device, kind of cost and hash of the code."""


class Remembering(Measurer):
    """Counts code once: SoCs whose cores LLVM models alike share what was counted.

    Args:
        measurer: counts what is not known.
        known: what is; added to.
    """

    def __init__(self, measurer: Measurer, known: Known) -> None:
        self._measurer, self._known = measurer, known
        self.device, self.is_exact = measurer.device, measurer.is_exact

    def kind(self, problem: Problem) -> str:
        """See `Measurer.kind`."""
        return self._measurer.kind(problem)

    def measure(self, problem: Problem, candidates: Sequence[Candidate]) -> list[Measurement]:
        """See `Measurer.measure`."""
        if not self.is_exact:
            return self._measurer.measure(problem, candidates)
        key = (self.device, self.kind(problem))
        for candidate in candidates:
            place = (*key, candidate.code)
            if place not in self._known:
                [self._known[place]] = self._measurer.measure(problem, [candidate])
        return [self._known[*key, candidate.code] for candidate in candidates]

    def close(self) -> None:
        """See `Measurer.close`."""
        self._measurer.close()


def run_task(task: Task, trials: int, work: Path, known: Known, builder: Builder) -> list[Record]:
    """Tune the kernels of a task; one record for each."""
    model = model_kernels(MODEL, task.soc, task.processor, ModelOptions())
    level = model.level(task.level or None)
    path = work / f"{task.soc}{SUFFIX}"
    specs = [
        spec
        for spec in model.tunable(level)
        if not task.kernels or any(part in spec.name for part in task.kernels)
    ]
    history = read_records(path).records if path.exists() else ()
    place = Place(task.soc, model.target.tuned_core, level_name(level))
    display, writer = PlainDisplay(len(specs), sys.stderr), RecordWriter(path)

    def sink(records: Sequence[Record]) -> None:
        writer.append(*records)

    with Remembering(open_measurer("auto", model, level), known) as measurer:
        tuner = Tuner(place, measurer, history, sink, display.show, builder=builder)
        for spec in specs:
            tuner.tune(spec, level, Limits(trials))
    writer.close()
    found = read_records(path).records
    kept = (best_record(found, spec, level) for spec in specs)
    return [record for record in kept if record is not None]


def best_record(records: Sequence[Record], spec: KernelSpec, level: Isa) -> Record | None:
    """The record of a kernel that is shipped; None: nothing was right."""
    isa = spec.isa_of(level)
    mine = {
        same(record.knobs): record
        for record in records
        if record.place.level == level_name(isa)
        and record.family == spec.family
        and same(record.shape) == same(spec.shape_fields())
    }
    right = [record for record in mine.values() if record.status == "ok"]
    if not right:
        return None
    best = min(right, key=lambda record: record.cost)
    default = mine.get(same(spec.points(level)[0]))
    gain = LEAST_GAIN.get(best.kind, LEAST_GAIN_OF_MODELS)
    if default is None or default.status != "ok" or best.cost < (1 - gain) * default.cost:
        return best
    return default


if __name__ == "__main__":
    sys.exit(main())
