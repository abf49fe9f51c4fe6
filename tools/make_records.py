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

from llamac.compiler.tuning.kernels import ModelOptions, model_kernels
from llamac.compiler.tuning.tuner import Limits, Tuner
from llamac.schedules.intrin.isa import Isa
from llamac.targets.cpu.kernels import KernelSpec
from llamac.targets.cpu.knobs import level_name
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
# A record must be better than the default by this much: times within it are noise.
LEAST_GAIN = 0.02


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


TASKS = (
    Task("host"),
    Task("sm8650", level="i8mm", kernels=PRODUCTS),
    Task("sm8650", "hvx", kernels=("residual_8x2048x2048", "qsi8cx")),
    Task("rpi5", level="dotprod", kernels=PRODUCTS[:2]),
)


def main(argv: Sequence[str] | None = None) -> int:
    """Tune, and write the files of the package."""
    parser = argparse.ArgumentParser(description=__doc__)
    socs = sorted({task.soc for task in TASKS})
    parser.add_argument("socs", metavar="SOC", nargs="*", default=socs, choices=[*socs, []])
    parser.add_argument("--trials", type=positive_int, default=24)
    parser.add_argument("--work", type=Path, default=Path("build/records"))
    args = parser.parse_args(argv)
    for soc in args.socs:
        kept = [
            record
            for task in TASKS
            if task.soc == soc
            for record in run_task(task, args.trials, args.work)
        ]
        write_records(kept, SHIPPED / f"{soc}{SUFFIX}")
        print(f"{soc}: {len(kept)} records", file=sys.stderr)
    return 0


def run_task(task: Task, trials: int, work: Path) -> list[Record]:
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

    with open_measurer("auto", model, level) as measurer:
        tuner = Tuner(place, measurer, history, sink, display.show)
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
    if default is None or default.status != "ok" or best.cost < (1 - LEAST_GAIN) * default.cost:
        return best
    return default


if __name__ == "__main__":
    sys.exit(main())
