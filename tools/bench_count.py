"""`llamac bench --emulate --count`: instructions by kernel, and cycles that core models predict.

On Hexagon it is packets, and no model predicts cycles.
"""

from __future__ import annotations

import argparse
import struct
import tempfile
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from llamac.runtime.errors import BundleInvalid, ToolchainMissing, UsageError
from llamac.tools.console import Row, notice, print_json, print_rows, progress_for
from llamac.tools.measure import prompt_tokens

if TYPE_CHECKING:
    from llamac.compiler.progress import Stage
    from llamac.runtime.backend import BackendSession
    from llamac.runtime.manifest import Manifest
    from llamac.targets.emulator import Emulator
    from llamac.targets.hot_loops import HotLoop
    from llamac.targets.kernel_cost import FunctionCost
    from llamac.targets.program import Function, Program
    from llamac.targets.stand_in import StandIn

COUNTED = "instructions of kernels are counted, those of the few lines of C between them are not"
PREDICTED = (
    "cycles are predicted from pipes and latencies, as if all data were in the first-level cache; "
    "kernels of SVE and SME are left out"
)


COUNTED_PACKETS = (
    "packets of kernels are counted, those of the few lines of C between them are not; a packet "
    "takes a cycle of a thread at least, and waiting for memory is not in it"
)


@dataclass(frozen=True)
class Call:
    """One run of a function: the position of its first token, and how many tokens are valid."""

    function: Function
    position: int
    tokens: int


def check(args: argparse.Namespace) -> None:
    """Refuse options that make no sense with --count, or it without --emulate.

    Raises:
        UsageError: they do not fit together.
    """
    if not args.count:
        return
    if not args.emulate:
        raise UsageError(
            "--count is for --emulate",
            cause="the emulator counts; processors do not tell what each kernel did",
            fix="add --emulate, or leave out --count",
        )
    if args.threads not in (None, (1,)) or args.profile:
        raise UsageError(
            "--count takes neither --profile nor several --threads",
            cause="it counts instructions of one thread and measures no time",
            fix="leave out --profile and --threads",
        )


def run(args: argparse.Namespace, manifest: Manifest, emulator: Emulator | StandIn) -> int:
    """Count, look at the hot loops, print."""
    from llamac.targets.emulator import HEXAGON, Emulator  # noqa: PLC0415

    if not isinstance(emulator, Emulator):
        raise UsageError(
            "--count cannot count a bundle with graphs",
            cause="Qualcomm's library for x86-64 executes them, and no emulator of a processor",
            fix="leave out --count, or compile with --processors cpu or hvx",
        )
    program = read_program(args.bundle, manifest)
    level, costs = _count(args, program, emulator)
    if emulator.arch == HEXAGON.name:
        loops = None
        if not args.quiet:
            notice(COUNTED_PACKETS)
    else:
        loops = _hot_loops(args, manifest, costs, level)
    if args.json:
        document = {"bundle": str(args.bundle), "model": manifest.model.name, "level": level}
        print_json(document | {"emulator": emulator.description} | to_json(costs, loops))
        return 0
    for cost in costs:
        _print_cost(f"{manifest.model.name}, {level}", cost, plain=args.plain)
    if loops:
        _print_loops(loops, manifest, plain=args.plain)
    return 0


def to_json(costs: Sequence[FunctionCost], loops: Sequence[HotLoop] | None) -> dict[str, Any]:
    """Return the results as JSON values; `hot_loops` is null without llvm-mca and on Hexagon."""
    return {
        "functions": [cost.to_json() for cost in costs],
        "hot_loops": None if loops is None else [loop.to_json() for loop in loops],
    }


def read_program(bundle: Path, manifest: Manifest) -> Program:
    """Read the bundle's program.json, which names its kernels."""
    from llamac.targets.program import Program  # noqa: PLC0415

    return Program.from_json((bundle / manifest.file("program")).read_text("utf-8"))


def plan_calls(program: Program, prompt_tokens: int, decode_tokens: int) -> list[Call]:
    """The functions that evaluate a prompt, as runtime/c/session.c chooses them, and the decodes.

    Args:
        program: compiled model.
        prompt_tokens: length of the prompt.
        decode_tokens: decoded after it.
    """
    *prefills, decode = program.functions
    calls, done = [], 0
    while done < prompt_tokens:
        rest = prompt_tokens - done
        largest = (f for f in prefills if f.num_tokens <= rest)
        function = decode if rest == 1 or not prefills else next(largest, prefills[-1])
        calls.append(Call(function, done, min(rest, function.num_tokens)))
        done += calls[-1].tokens
    return calls + [Call(decode, done + i, 1) for i in range(decode_tokens)]


def _count(
    args: argparse.Namespace, program: Program, emulator: Emulator
) -> tuple[str, list[FunctionCost]]:
    """Evaluate the prompt and decode greedily under the counting emulator.

    Returns:
        The level that ran, and the costs of the last call and, if it is a prefill, the first.

    Raises:
        BundleInvalid: the runner does not mark its kernels.
    """
    from llamac.runtime import load  # noqa: PLC0415
    from llamac.targets.count import counting, read_counts  # noqa: PLC0415
    from llamac.targets.emulator import HEXAGON  # noqa: PLC0415
    from llamac.targets.kernel_cost import function_cost  # noqa: PLC0415
    from llamac.targets.packets import counting_packets, read_packets  # noqa: PLC0415

    calls = plan_calls(program, args.prompt_tokens, args.decode_tokens)
    total = sum(len(call.function.steps) for call in calls)
    with tempfile.TemporaryDirectory(prefix="llamac-count-") as folder:
        out = Path(folder) / "counts"
        is_dsp = emulator.arch == HEXAGON.name
        machine = (counting_packets if is_dsp else counting)(emulator, out)
        with (
            progress_for(args).stage(f"count under {emulator.description}", total) as stage,
            load(args.bundle, threads=1, level=args.level, machine=machine) as model,
            model.session() as session,
        ):
            level = model.info.level
            tokens = prompt_tokens(args.prompt_tokens, model.info.vocab_size)
            for call in calls:
                given = tokens[call.position : call.position + call.tokens]
                tokens += [_call(session.native, program, call, given, stage)]
        # Complete, as the runner has ended.
        regions: Sequence[Any] = read_packets(out) if is_dsp else read_counts(out)
    if len(regions) != total:
        raise BundleInvalid(
            f"{args.bundle} has a runner whose kernels cannot be counted",
            cause=f"it marked {len(regions)} of {total} calls: an older version of llamac built it",
            fix="compile the model again",
        )
    first, last = calls[0], calls[-1]
    parts = [(last, regions[-len(last.function.steps) :])]
    if first.function is not last.function:
        parts.append((first, regions[: len(first.function.steps)]))
    return level, [function_cost(program, c.function, c.position, c.tokens, r) for c, r in parts]


def _call(
    session: BackendSession, program: Program, call: Call, tokens: Sequence[int], stage: Stage
) -> int:
    """Run a function on padded tokens, one step at a time to show it, and return the next token."""
    from llamac.targets.program import SPACES  # noqa: PLC0415

    function = call.function
    padding = [0] * (function.num_tokens - call.tokens)
    inputs = {function.tokens: [*tokens, *padding], function.meta: [call.position, call.tokens - 1]}
    for index, values in inputs.items():
        place = program.tensors[index]
        session.write_memory(SPACES.index(place.space), place.offset, _int32(*values))
    for index, step in enumerate(function.steps):
        stage.advance(0, note=f"{function.name}: {program.kernels[step.kernel].name}")
        session.run_steps(function.name, index, 1)
        stage.advance(1, note=stage.note)
    best = program.tensors[function.argmax]
    data = session.read_memory(SPACES.index(best.space), best.offset, best.num_bytes)
    return int.from_bytes(data, "little")


def _int32(*values: int) -> bytes:
    return struct.pack(f"<{len(values)}i", *values)


def _hot_loops(
    args: argparse.Namespace, manifest: Manifest, costs: Sequence[FunctionCost], level: str
) -> list[HotLoop] | None:
    """The hot loops of all kernels that ran; None, and a line about it, without llvm-mca."""
    from llamac.targets.hot_loops import find_hot_loops, models_of  # noqa: PLC0415
    from llamac.targets.mca import MODELS  # noqa: PLC0415

    models = [*MODELS] if args.json else [model for _, model in models_of(manifest)]
    kernels = [kernel.name for cost in costs for kernel in cost.kernels if kernel.macs]
    try:
        with progress_for(args).stage("predict cycles of hot loops") as stage:
            loops = find_hot_loops(
                args.bundle, manifest, kernels, level, models=models, progress=stage.update
            )
    except ToolchainMissing as error:
        if not args.quiet:
            notice(f"{COUNTED}\n{error.message}: {error.fix}")
        return None
    if not args.quiet:
        notice(f"{COUNTED}\n{PREDICTED}")
    return loops


def _print_cost(name: str, cost: FunctionCost, *, plain: bool) -> None:
    per_token = cost.total / cost.tokens
    tokens = "" if cost.function == "decode" else f" of {cost.tokens} tokens"
    at = f"{cost.function}{tokens} at position {cost.position}"
    title = f"{name}, {at}: {per_token:,.0f} {cost.unit} per token"
    more = ("instructions/token", "HVX/token") if cost.unit == "packets" else ()
    products = ("MACs/token", f"{cost.unit}/MAC")
    header = ("kernel", "calls", f"{cost.unit}/token", "share", *more, *products)
    print_rows(title, _cost_rows(cost), plain=plain, header=header)


def _cost_rows(cost: FunctionCost) -> list[Row]:
    from llamac.targets.packets import Packets  # noqa: PLC0415

    rows: list[Row] = []
    for kernel in cost.kernels:
        total = kernel.counts.total
        per_token, share = total / cost.tokens, total / cost.total
        row = [kernel.name, f"{kernel.calls}", f"{per_token:,.0f}", f"{100 * share:.1f} %"]
        if isinstance(kernel.counts, Packets):
            parts = (kernel.counts.instructions, kernel.counts.vector_instructions)
            row += [f"{part / cost.tokens:,.0f}" for part in parts]
        if kernel.per_mac is not None:
            row += [f"{kernel.macs / cost.tokens:,.0f}", f"{kernel.per_mac:.4f}"]
        rows.append(row)
    return rows


def _print_loops(loops: Sequence[HotLoop], manifest: Manifest, *, plain: bool) -> None:
    """The cores of the bundle's SoC; all models are in the JSON."""
    from llamac.targets.hot_loops import models_of  # noqa: PLC0415

    models = models_of(manifest)
    cores = (core if core == model else f"{core} ({model})" for core, model in models)
    rows: list[Row] = []
    for loop in loops:
        cycles = (loop.macs_per_cycle[model] for _, model in models)
        cells = ("-" if value is None else f"{value:.1f}" for value in cycles)
        rows.append((loop.kernel, str(loop.instructions), str(loop.macs), *cells))
    title = "MACs per cycle of the hot loops on one core, by llvm-mca"
    print_rows(title, rows, plain=plain, header=("kernel", "instructions", "MACs", *cores))
