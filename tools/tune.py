"""`llamac tune`: find the knobs with which a model's kernels are fastest on a SoC."""

from __future__ import annotations

import argparse
import time
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from llamac.runtime.errors import TuningImpossible
from llamac.tools.console import (
    Subparsers,
    list_of_ints,
    notice,
    positive_int,
    print_json,
    print_rows,
)

if TYPE_CHECKING:
    from llamac.compiler.tuning.kernels import ModelKernels
    from llamac.compiler.tuning.tuner import KernelState, Tuner
    from llamac.schedules.intrin.isa import Isa
    from llamac.targets.cpu.kernels import KernelSpec
    from llamac.targets.tuning.measure import Measurer
    from llamac.targets.tuning.records import Record

COSTS = ("auto", "time", "cycles", "instructions", "packets")
DEFAULT_TRIALS = 32
DEFAULT_WAIT = 600
REPORT = "report"  # in place of a model
DEFAULT_PAGE = "tune-report.html"

EPILOG = """\
examples:
  llamac tune llama-1b-host
  llamac tune llama-3.2-1b --target host --trials 16 --time 120
  llamac tune llama-3.2-1b:qlora --target sm8650 --level i8mm --kernels qmatmul
  llamac tune llama-3.2-1b --target sm8650 --processor hvx
  llamac tune llama-3.2-1b --target sm8650 --farm 127.0.0.1:9190
  llamac tune llama-1b-host --list
  llamac tune report --target sm8650 --output sm8650.html

MODEL is a bundle (its SoC is known), a checkpoint, or a name: llama-3.2-1b or llama-3.2-3b, then
perhaps :spinquant, :qlora, :ptq or :float. With `report` in its place nothing is measured: a page
shows what was, of --records or else of all your records, or those of --target.

A kernel's generator declares a few knobs: tokens per tile, loops unrolled, how far ahead to
prefetch. Each point is compiled, equal code is measured once, and a result that differs from the
reference is never chosen. A small model learns from what was measured what is worth measuring next.

What is measured depends on the SoC, --cost chooses:
  time          microseconds on this machine: host
  cycles        instructions under QEMU, at the rate that llvm-mca's model of the core predicts
  instructions  the same without a model
  packets       under qemu-hexagon: hvx
Only time is time: the others know no caches and no memory, and rank kernels that compute.
With --farm the devices of a farm measure, several at a time; see `llamac farm --help`.

Records are appended as they are made. Ctrl-C loses nothing: the same command goes on where it was.
`llamac compile` uses them at once; nothing has to be named.
"""


def add_parser(subparsers: Subparsers) -> None:
    """Add the command to the command line."""
    parser = subparsers.add_parser(
        "tune",
        help="find the fastest knobs of a model's kernels",
        description="Measure the kernels of a model with other knobs, and record what is fastest.",
        epilog=EPILOG,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument("model", metavar="MODEL", help="bundle, checkpoint, or name of a model")
    parser.add_argument("--target", metavar="SOC", help="the SoC (default: that of the bundle)")
    parser.add_argument(
        "--processor", metavar="NAME", default="cpu", help="of the SoC: cpu or hvx (default: cpu)"
    )
    parser.add_argument("--level", metavar="NAME", help="feature level (default: the best)")
    parser.add_argument(
        "--kernels", metavar="TEXT", default="", help="only kernels with this in their name"
    )
    parser.add_argument("--cost", choices=COSTS, default="auto", help="what is measured")
    parser.add_argument(
        "--trials",
        metavar="N",
        type=positive_int,
        default=DEFAULT_TRIALS,
        help=f"measured points of a kernel, all runs together (default: {DEFAULT_TRIALS})",
    )
    parser.add_argument(
        "--time", metavar="SECONDS", type=positive_int, help="for all kernels of this run"
    )
    _add_result_options(parser)
    _add_farm_options(parser.add_argument_group("devices of a farm"))
    _add_model_options(parser.add_argument_group("how checkpoints and named models are compiled"))


def _add_result_options(parser: argparse.ArgumentParser) -> None:
    parser.add_argument(
        "--records", metavar="FILE", type=Path, help="append to this file (default: yours of SOC)"
    )
    parser.add_argument(
        "--builder", metavar="WHERE", default="local", help="local, local[N] or dask://HOST:PORT"
    )
    parser.add_argument("--seed", metavar="N", type=int, default=0, help="of chance (default: 0)")
    parser.add_argument("--list", action="store_true", help="show the kernels, measure nothing")
    parser.add_argument(
        "-o", "--output", metavar="PAGE", type=Path, help=f"of report (default: {DEFAULT_PAGE})"
    )
    parser.add_argument("--json", action="store_true", help="print the result as JSON")


def _add_farm_options(group: argparse._ArgumentGroup) -> None:
    group.add_argument(
        "--farm", metavar="HOST:PORT", help="measure on the devices of this tracker (llamac farm)"
    )
    group.add_argument(
        "--key", metavar="SOC-CORE", help="devices of the farm (default: what is tuned)"
    )
    group.add_argument(
        "--farm-wait",
        metavar="SECONDS",
        type=positive_int,
        default=DEFAULT_WAIT,
        help=f"for a device, or a tracker that went away (default: {DEFAULT_WAIT})",
    )


def _add_model_options(group: argparse._ArgumentGroup) -> None:
    group.add_argument("--context", metavar="N", type=positive_int, default=8192)
    group.add_argument("--chunks", metavar="LIST", type=list_of_ints, default=(128, 32, 8))
    group.add_argument("--scales", choices=("float16", "bfloat16"), default="float16")
    group.add_argument("--kv-cache", choices=("float16", "int8"), default="float16")


def run(args: argparse.Namespace) -> int:
    """Tune; print what each kernel gained."""
    if args.model == REPORT:
        return _report(args)
    from llamac.compiler.tuning.kernels import ModelOptions, model_kernels  # noqa: PLC0415

    options = ModelOptions(args.context, args.chunks, args.scales, args.kv_cache)
    model = model_kernels(args.model, args.target, args.processor, options)
    level = model.level(args.level)
    specs = model.tunable(level, args.kernels)
    if args.list:
        return _list(args, specs, level)
    states = _tune(args, model, specs, level)
    if args.json:
        print_json([_as_json(state) for state in states])
    else:
        print_rows(
            f"{args.model} on {model.target.soc.name}, {level.name}",
            [_row(state) for state in states],
            plain=args.plain,
            header=("kernel", "trials", "of", "default", "best", "gain", "of roof", "knobs"),
        )
    return 0


def _report(args: argparse.Namespace) -> int:
    """Write a page of what was measured."""
    from llamac.targets.tuning.records import (  # noqa: PLC0415
        read_folder,
        read_records,
        user_file,
        user_folder,
    )
    from llamac.tools.tune_report import write_report  # noqa: PLC0415

    path = args.records or (user_file(args.target) if args.target else None)
    files = read_folder(user_folder()) if path is None else (read_records(path),)
    out = args.output or Path(DEFAULT_PAGE)
    count = write_report(files, out)
    if not args.quiet:
        notice(f"{out}: {count} kernel{'s' * (count != 1)}")
    return 0


def _list(args: argparse.Namespace, specs: Sequence[KernelSpec], level: Isa) -> int:
    rows = [(spec.name, len(spec.points(level)), dict(spec.points(level)[0])) for spec in specs]
    if args.json:
        print_json([{"kernel": n, "points": p, "default": d} for n, p, d in rows])
    else:
        cells = [(name, str(points), _words(default)) for name, points, default in rows]
        header = ("kernel", "points", "default")
        print_rows(f"kernels of {level.name}", cells, plain=args.plain, header=header)
    return 0


def _tune(
    args: argparse.Namespace, model: ModelKernels, specs: Sequence[KernelSpec], level: Isa
) -> list[KernelState]:
    """Tune kernel by kernel; records are in the file when this returns or raises."""
    from llamac.compiler.tuning.builder import open_builder  # noqa: PLC0415
    from llamac.compiler.tuning.tuner import Tuner  # noqa: PLC0415
    from llamac.targets.cpu.knobs import level_name  # noqa: PLC0415
    from llamac.targets.tuning.records import Place, RecordWriter, user_file  # noqa: PLC0415
    from llamac.tools.tune_display import display_for  # noqa: PLC0415

    soc = model.target.soc.name
    path = args.records or user_file(soc)
    history = _history(path, quiet=args.quiet)
    place = Place(soc, model.target.tuned_core, level_name(level))
    made = 0
    with (
        open_builder(args.builder) as builder,
        _measurer(args, model, level) as measurer,
        display_for(args, specs) as display,
    ):
        writer = RecordWriter(path)
        display.devices = measurer.devices

        def sink(records: Sequence[Record]) -> None:
            nonlocal made
            writer.append(*records)
            made += len(records)

        tuner = Tuner(place, measurer, history, sink, display.show, args.seed, builder)
        try:
            return _tune_all(tuner, specs, level, args)
        finally:
            writer.close()
            display.close()
            if not args.quiet:
                notice(f"{made} new records in {path}")


def _tune_all(
    tuner: Tuner, specs: Sequence[KernelSpec], level: Isa, args: argparse.Namespace
) -> list[KernelState]:
    """One kernel after the other; each gets an equal part of the time that is left."""
    from llamac.compiler.tuning.tuner import Limits  # noqa: PLC0415

    deadline = None if args.time is None else time.monotonic() + args.time
    states: list[KernelState] = []
    for i, spec in enumerate(specs):
        left = None if deadline is None else deadline - time.monotonic()
        if left is not None and left <= 0:
            break
        seconds = None if left is None else left / (len(specs) - i)
        states.append(tuner.tune(spec, level, Limits(args.trials, seconds)))
    return states


def _history(path: Path, *, quiet: bool) -> Sequence[Record]:
    from llamac.targets.tuning.records import read_records  # noqa: PLC0415

    if not path.exists():
        return ()
    found = read_records(path)
    if found.torn and not quiet:
        notice(f"note: {path}: {found.torn} damaged lines were skipped")
    return found.records


def _measurer(args: argparse.Namespace, model: ModelKernels, level: Isa) -> Measurer:
    """A farm, or this machine."""
    if args.farm is None:
        return open_measurer(args.cost, model, level)
    from llamac.compiler.farm.keys import key_of  # noqa: PLC0415
    from llamac.compiler.farm.measurer import FarmMeasurer, FarmOptions  # noqa: PLC0415
    from llamac.compiler.farm.tracker import Address  # noqa: PLC0415

    target = model.target
    options = FarmOptions(Address.parse(args.farm), args.key or key_of(target), wait=args.farm_wait)
    say = (lambda line: None) if args.quiet else notice
    return FarmMeasurer(options, target.arch, level.name, target.tuned_core, args.cost, say)


def open_measurer(cost: str, model: ModelKernels, level: Isa) -> Measurer:
    """The way to measure that was asked for, or that fits the processor.

    Raises:
        TuningImpossible: it does not fit the processor, or this machine.
        ToolchainMissing: an emulator is missing.
    """
    from llamac.targets.tuning.emulated import AarchCounter, PacketCounter  # noqa: PLC0415
    from llamac.targets.tuning.host import HostTimer  # noqa: PLC0415

    fitting = {
        "x86_64": ("time",),
        "aarch64": ("cycles", "instructions"),
        "hexagon": ("packets",),
    }.get(model.target.arch, ())
    wanted = fitting[0] if cost == "auto" and fitting else cost
    if wanted not in fitting:
        raise TuningImpossible(
            f"{wanted} of {model.target.soc.name} cannot be measured for {model.target.name}",
            cause=f"for {model.target.arch} there are {', '.join(fitting) or 'no costs'}",
            fix="leave out --cost, or choose one of these",
        )
    if wanted == "time":
        return HostTimer(level)
    if wanted == "packets":
        return PacketCounter()
    return AarchCounter(level, model.target.tuned_core, use_model=wanted == "cycles")


def _row(state: KernelState) -> tuple[str, ...]:
    from llamac.tools.tune_display import cost_text, share_text  # noqa: PLC0415

    return (
        state.name,
        str(state.trials),
        str(state.candidates),
        cost_text(state.default, state.kind),
        cost_text(state.best, state.kind),
        f"{100 * state.gain:.1f} %",
        share_text(state.roof_share),
        _words(state.knobs),
    )


def _words(knobs: Any) -> str:
    items: Iterable[tuple[str, Any]] = knobs.items()
    return " ".join(f"{name}={value}" for name, value in items)


def _as_json(state: KernelState) -> dict[str, Any]:
    derived = {"gain": state.gain, "roof_share": state.roof_share}
    return vars(state) | {"knobs": dict(state.knobs)} | derived
