"""`llamac bench`: how fast a bundle is on this machine, beside what its memory allows."""

from __future__ import annotations

import argparse
import json
import signal
import subprocess
import sys
from collections.abc import Iterator, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import asdict
from functools import partial
from pathlib import Path
from statistics import median
from typing import TYPE_CHECKING, Any

from llamac.runtime.errors import DeviceError, LlamacError, UsageError
from llamac.runtime.system import interrupts_later
from llamac.tools import bench_count, emulation
from llamac.tools.console import (
    Row,
    Subparsers,
    format_bytes,
    list_of_ints,
    notice,
    positive_int,
    print_json,
    print_rows,
    progress_for,
)
from llamac.tools.measure import Measurement, Request

if TYPE_CHECKING:
    from llamac.runtime.manifest import Manifest
    from llamac.targets.emulator import Emulator
    from llamac.targets.stand_in import StandIn

EPILOG = """\
examples:
  llamac bench llama-1b-host
  llamac bench llama-1b-host --threads 1,2,4 --json
  llamac bench llama-1b-host --prompt-tokens 512 --decode-tokens 128 --profile
  llamac bench llama-1b-sm8650 --emulate --threads 1 --decode-tokens 1
  llamac bench llama-1b-sm8650 --emulate --count

Decoding reads all weights and the KV cache once per token, so that memory bandwidth is its limit.
It is measured between the rounds, with as many threads, because machines drift.
Each thread count runs in a process of its own; one unmeasured round comes first.
--emulate runs a bundle for an Arm CPU under qemu-aarch64, one for a Hexagon DSP under qemu-hexagon:
it shows that the bundle works and which kernels a CPU gets. All times are then those of the
emulator and say nothing about a device.
--count counts instead of measuring time, without rounds: the instructions of each kernel, exact and
the same on every machine, for the first chunk of the prompt and the last decoded token. On Hexagon
packets are counted, of up to four instructions each.
"""

# Defaults: here, for emulated CPUs, which are much slower, and with --count.
COUNTS = {"prompt_tokens": (128, 32, 32), "decode_tokens": (64, 8, 1), "rounds": (3, 1, 0)}

SECONDS_TO_END = 10


def add_parser(subparsers: Subparsers) -> None:
    """Add the command to the command line."""
    parser = subparsers.add_parser(
        "bench",
        help="measure a bundle on this machine",
        description="Measure prefill and decode speed, memory, and the bandwidth that was reached.",
        epilog=EPILOG,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument("bundle", metavar="BUNDLE", type=Path)
    for name, (here, emulated, counted) in COUNTS.items():
        text = f"(default: {here}; with --emulate {emulated}; with --count {counted})"
        parser.add_argument(
            f"--{name.replace('_', '-')}", metavar="N", type=positive_int, help=text
        )
    parser.add_argument(
        "--threads", metavar="LIST", type=list_of_ints, help="thread counts (default: all cores)"
    )
    parser.add_argument("--level", metavar="NAME", help="kernels to use (default: the best)")
    parser.add_argument(
        "--profile", action="store_true", help="time per operation of a decode step"
    )
    parser.add_argument(
        "--count",
        action="store_true",
        help="count the instructions of each kernel instead of measuring times; with --emulate",
    )
    emulation.add_arguments(parser)
    parser.add_argument("--json", action="store_true", help="print all values as JSON")


def run(args: argparse.Namespace) -> int:
    """Measure each thread count in a child process and print what came out."""
    from llamac.runtime.manifest import read_manifest  # noqa: PLC0415
    from llamac.runtime.system import default_threads  # noqa: PLC0415

    bench_count.check(args)
    emulator = emulation.find(args)
    for name, defaults in COUNTS.items():
        if getattr(args, name) is None:
            setattr(args, name, defaults[args.emulate + args.count])
    manifest = read_manifest(args.bundle)
    _check(args, manifest)
    if args.count and emulator is not None:
        return bench_count.run(args, manifest, emulator)
    results = []
    for threads in args.threads or (default_threads(),):
        request = Request(
            bundle=str(args.bundle),
            threads=threads,
            prompt_tokens=args.prompt_tokens,
            decode_tokens=args.decode_tokens,
            rounds=args.rounds,
            level=args.level,
            profile=args.profile,
            emulate=args.emulate,
            cpu=args.cpu,
        )
        with _shown(args, f"{_threads(threads)}: {_rounds(args.rounds)}", emulator):
            results.append(summarize(measure_in_child(request), request, manifest))
    if args.json:
        print_json({"bundle": str(args.bundle), "model": manifest.model.name, "runs": results})
        return 0
    for result in results:
        _print_result(result, manifest.model.name, plain=args.plain)
    return 0


@contextmanager
def _shown(
    args: argparse.Namespace, work: str, emulator: Emulator | StandIn | None
) -> Iterator[None]:
    """Say what is measured; under an emulator, which takes long, also that it goes on."""
    if emulator is not None and not args.quiet:
        with progress_for(args).stage(f"{work} under {emulator.description}"):
            yield
        return
    if not args.quiet:
        notice(f"{work} ...")
    yield


def _print_result(result: dict[str, Any], name: str, *, plain: bool) -> None:
    title = f"{name}, {_threads(result['threads'])}, {result['level']}"
    profile_title = "decode step"
    if result["emulator"]:
        title += f", emulated by {result['emulator']}: times of the emulator, not of a device"
        profile_title += ", times of the emulator"
    print_rows(title, _rows(result), plain=plain)
    if result["profile_ms"]:
        print_rows(profile_title, _profile_rows(result["profile_ms"]), plain=plain)


def _rounds(count: int) -> str:
    return "1 round" if count == 1 else f"{count} rounds"


def _threads(count: int) -> str:
    return "1 thread" if count == 1 else f"{count} threads"


def _check(args: argparse.Namespace, manifest: Manifest) -> None:
    """Refuse what the measuring process could not do, before it starts."""
    option = "--profile" if args.profile else "--count" if args.count else ""
    if option and all(entry.role != "program" for entry in manifest.files.values()):
        raise UsageError(
            f"{option} needs the names of the bundle's operations",
            cause="the bundle has no program.json",
            fix=f"compile the model again, or leave out {option}",
        )
    tokens, context = args.prompt_tokens + args.decode_tokens, manifest.model.context_length
    if tokens > context:
        raise UsageError(
            f"{args.prompt_tokens} + {args.decode_tokens} tokens do not fit into the context",
            cause=f"the bundle was compiled for a context of {context} tokens",
            fix="ask for fewer tokens, or compile with a larger --context",
        )


def measure_in_child(request: Request) -> Measurement:
    """Run `llamac.tools.measure` in a process of its own.

    Raises:
        DeviceError: the process died.
        LlamacError: what went wrong in it, with its own code.
    """
    command = [sys.executable, "-m", "llamac.tools.measure", json.dumps(asdict(request))]
    # -P: the folder it starts in must not be searched for modules.
    command.insert(1, "-P")
    with ExitStack() as stack:
        with interrupts_later():
            process = subprocess.Popen(command, stdout=subprocess.PIPE, text=True)
            stack.enter_context(process)
            stack.push(partial(_end_if_interrupted, process))
        output, _ = process.communicate()
    if process.returncode != 0:
        raise DeviceError(
            f"the measuring process ended with code {process.returncode}",
            cause="a crash in the library, or too little memory; its own words are above",
            fix="check the bundle with `llamac inspect --check` and `llamac verify`",
        )
    answer = json.loads(output)
    if "error" in answer:
        raise _error_of(answer["error"])
    return Measurement(**answer["measurement"])


def _end_if_interrupted(process: subprocess.Popen[str], kind: object, *_: object) -> None:
    """After an exception, end the measuring process in a way that lets it end its emulator."""
    if kind is None:
        return
    try:
        process.wait(1)  # Ctrl-C of a terminal has reached it too
    except subprocess.TimeoutExpired:
        process.send_signal(signal.SIGINT)
        try:
            process.wait(SECONDS_TO_END)
        except subprocess.TimeoutExpired:
            process.kill()


def _error_of(told: dict[str, str]) -> LlamacError:
    """Make the error again that the child process met."""
    error = LlamacError(told["message"], cause=told["cause"], fix=told["fix"])
    error.code = told["code"]  # type: ignore[misc]  # of this one instance
    return error


def summarize(result: Measurement, request: Request, manifest: Manifest) -> dict[str, Any]:
    """Turn times into speeds, and the decode speed into a share of the bandwidth.

    Returns:
        JSON values: speeds in tokens/s and times in seconds, each with median, min and max. With an
        emulator they are its own, and what is not known of a device is None.
    """
    prefill = [request.prompt_tokens / seconds for seconds in result.prefill_s]
    decode = [request.decode_tokens / seconds for seconds in result.decode_s]
    kv_bytes = kv_bytes_per_token(manifest, request.prompt_tokens + request.decode_tokens / 2)
    bytes_per_token = manifest.memory.weight_bytes_per_token + kv_bytes
    bandwidth = _spread(result.bandwidth_gb_s)
    reached = bytes_per_token * median(decode) / 1e9
    return {
        "threads": result.threads,
        "level": result.level,
        "emulator": result.emulator,
        "prompt_tokens": request.prompt_tokens,
        "decode_tokens": request.decode_tokens,
        "prefill_tokens_per_s": _spread(prefill),
        "decode_tokens_per_s": _spread(decode),
        "first_token_s": _spread(result.first_token_s),
        "load_s": result.load_s,
        "peak_resident_bytes": result.peak_resident_bytes or None,
        "peak_anonymous_bytes": result.peak_anonymous_bytes or None,
        "weight_bytes_per_token": manifest.memory.weight_bytes_per_token,
        "kv_bytes_per_token": kv_bytes,
        "read_bandwidth_gb_s": bandwidth,
        "decode_gb_s": reached,
        "bandwidth_share": reached / bandwidth["median"] if bandwidth["median"] else None,
        "profile_ms": result.profile_ms,
    }


def kv_bytes_per_token(manifest: Manifest, position: float) -> int:
    """Return how many bytes of the KV cache attention reads for a token at `position`."""
    # The cache has room for the context and one padded chunk.
    positions = manifest.model.context_length + max(f.num_tokens for f in manifest.functions)
    return round(manifest.memory.kv_cache_bytes / positions * position)


def _spread(values: Sequence[float]) -> dict[str, float]:
    return {"median": median(values), "min": min(values), "max": max(values)}


def _rows(result: dict[str, Any]) -> list[Row]:
    def spread(name: str, unit: str, factor: int = 1) -> str:
        low, middle, high = (factor * result[name][key] for key in ("min", "median", "max"))
        return f"{middle:.1f} {unit}  ({low:.1f} to {high:.1f})"

    speeds = [
        (f"prefill, {result['prompt_tokens']} tokens", spread("prefill_tokens_per_s", "tokens/s")),
        (f"decode, {result['decode_tokens']} tokens", spread("decode_tokens_per_s", "tokens/s")),
        ("time to first token", spread("first_token_s", "ms", 1000)),
        ("load", f"{1000 * result['load_s']:.1f} ms"),
    ]
    reads = [
        ("weights read per token", format_bytes(result["weight_bytes_per_token"])),
        ("KV cache read per token", format_bytes(result["kv_bytes_per_token"])),
    ]
    if result["emulator"]:
        return [*((f"emulated {name}", text) for name, text in speeds), *reads]
    share = result["bandwidth_share"]
    reached = f", {100 * share:.0f} % of it" if share is not None else ""
    return [
        *speeds,
        ("peak resident memory", format_bytes(result["peak_resident_bytes"] or 0)),
        ("peak anonymous memory", format_bytes(result["peak_anonymous_bytes"] or 0)),
        *reads,
        ("read bandwidth, measured", spread("read_bandwidth_gb_s", "GB/s")),
        ("read while decoding", f"{result['decode_gb_s']:.1f} GB/s{reached}"),
    ]


def _profile_rows(profile_ms: dict[str, float]) -> list[Row]:
    total = sum(profile_ms.values())
    ranked = sorted(profile_ms.items(), key=lambda item: -item[1])
    return [(name, f"{ms:.3f} ms", f"{100 * ms / total:.1f} %") for name, ms in ranked]
