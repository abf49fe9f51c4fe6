"""`llamac bench`: how fast a bundle is on this machine, beside what its memory allows."""

from __future__ import annotations

import argparse
import json
import subprocess
import sys
from collections.abc import Sequence
from dataclasses import asdict
from pathlib import Path
from statistics import median
from typing import TYPE_CHECKING, Any

from llamac.runtime.errors import DeviceError, LlamacError, UsageError
from llamac.tools.console import (
    Row,
    Subparsers,
    format_bytes,
    list_of_ints,
    notice,
    positive_int,
    print_json,
    print_rows,
)
from llamac.tools.measure import Measurement, Request

if TYPE_CHECKING:
    from llamac.runtime.manifest import Manifest

EPILOG = """\
examples:
  llamac bench llama-1b-host
  llamac bench llama-1b-host --threads 1,2,4 --json
  llamac bench llama-1b-host --prompt-tokens 512 --decode-tokens 128 --profile

Decoding reads all weights and the KV cache once per token, so that memory bandwidth is its limit.
It is measured between the rounds, with as many threads, because machines drift.
Each thread count runs in a process of its own; one unmeasured round comes first.
"""


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
    counts = {"--prompt-tokens": 128, "--decode-tokens": 64, "--rounds": 3}
    for flag, default in counts.items():
        parser.add_argument(
            flag, metavar="N", type=positive_int, default=default, help=f"(default: {default})"
        )
    parser.add_argument(
        "--threads", metavar="LIST", type=list_of_ints, help="thread counts (default: all cores)"
    )
    parser.add_argument("--level", metavar="NAME", help="kernels to use (default: the best)")
    parser.add_argument(
        "--profile", action="store_true", help="time per operation of a decode step"
    )
    parser.add_argument("--json", action="store_true", help="print all values as JSON")


def run(args: argparse.Namespace) -> int:
    """Measure each thread count in a child process and print what came out."""
    from llamac.runtime.manifest import read_manifest  # noqa: PLC0415
    from llamac.runtime.system import default_threads  # noqa: PLC0415

    manifest = read_manifest(args.bundle)
    _check(args, manifest)
    results = []
    for threads in args.threads or (default_threads(),):
        if not args.quiet:
            notice(f"{_threads(threads)}: {args.rounds} rounds ...")
        request = Request(
            bundle=str(args.bundle),
            threads=threads,
            prompt_tokens=args.prompt_tokens,
            decode_tokens=args.decode_tokens,
            rounds=args.rounds,
            level=args.level,
            profile=args.profile,
        )
        results.append(summarize(measure_in_child(request), request, manifest))
    if args.json:
        print_json({"bundle": str(args.bundle), "model": manifest.model.name, "runs": results})
        return 0
    for result in results:
        title = f"{manifest.model.name}, {_threads(result['threads'])}, {result['level']}"
        print_rows(title, _rows(result), plain=args.plain)
        if result["profile_ms"]:
            print_rows("decode step", _profile_rows(result["profile_ms"]), plain=args.plain)
    return 0


def _threads(count: int) -> str:
    return "1 thread" if count == 1 else f"{count} threads"


def _check(args: argparse.Namespace, manifest: Manifest) -> None:
    """Refuse what the measuring process could not do, before it starts."""
    if args.profile and all(entry.role != "program" for entry in manifest.files.values()):
        raise UsageError(
            "--profile needs the names of the bundle's operations",
            cause="the bundle has no program.json",
            fix="compile the model again, or leave out --profile",
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
    done = subprocess.run(command, stdout=subprocess.PIPE, text=True, check=False)
    if done.returncode != 0:
        raise DeviceError(
            f"the measuring process ended with code {done.returncode}",
            cause="a crash in the library, or too little memory; its own words are above",
            fix="check the bundle with `llamac inspect --check` and `llamac verify`",
        )
    answer = json.loads(done.stdout)
    if "error" in answer:
        raise _error_of(answer["error"])
    return Measurement(**answer["measurement"])


def _error_of(told: dict[str, str]) -> LlamacError:
    """Make the error again that the child process met."""
    error = LlamacError(told["message"], cause=told["cause"], fix=told["fix"])
    error.code = told["code"]  # type: ignore[misc]  # of this one instance
    return error


def summarize(result: Measurement, request: Request, manifest: Manifest) -> dict[str, Any]:
    """Turn times into speeds, and the decode speed into a share of the bandwidth.

    Returns:
        JSON values: speeds in tokens/s and times in seconds, each with median, min and max.
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
        "prompt_tokens": request.prompt_tokens,
        "decode_tokens": request.decode_tokens,
        "prefill_tokens_per_s": _spread(prefill),
        "decode_tokens_per_s": _spread(decode),
        "first_token_s": _spread(result.first_token_s),
        "load_s": result.load_s,
        "peak_resident_bytes": result.peak_resident_bytes,
        "peak_anonymous_bytes": result.peak_anonymous_bytes,
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

    share = result["bandwidth_share"]
    reached = f", {100 * share:.0f} % of it" if share is not None else ""
    return [
        (f"prefill, {result['prompt_tokens']} tokens", spread("prefill_tokens_per_s", "tokens/s")),
        (f"decode, {result['decode_tokens']} tokens", spread("decode_tokens_per_s", "tokens/s")),
        ("time to first token", spread("first_token_s", "ms", 1000)),
        ("load", f"{1000 * result['load_s']:.1f} ms"),
        ("peak resident memory", format_bytes(result["peak_resident_bytes"])),
        ("peak anonymous memory", format_bytes(result["peak_anonymous_bytes"])),
        ("weights read per token", format_bytes(result["weight_bytes_per_token"])),
        ("KV cache read per token", format_bytes(result["kv_bytes_per_token"])),
        ("read bandwidth, measured", spread("read_bandwidth_gb_s", "GB/s")),
        ("read while decoding", f"{result['decode_gb_s']:.1f} GB/s{reached}"),
    ]


def _profile_rows(profile_ms: dict[str, float]) -> list[Row]:
    total = sum(profile_ms.values())
    ranked = sorted(profile_ms.items(), key=lambda item: -item[1])
    return [(name, f"{ms:.3f} ms", f"{100 * ms / total:.1f} %") for name, ms in ranked]
