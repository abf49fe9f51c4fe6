"""Compares engines on this machine; see `--help`."""

from __future__ import annotations

import argparse
import json
import subprocess
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from benchmarks.engines import ENGINES
from benchmarks.machine import measure_machine
from benchmarks.report import write_report

HERE = Path(__file__).resolve().parent
EPILOG = """\
examples:
  python -m benchmarks --folder /tmp/models
  python -m benchmarks --folder /tmp/models --peers ~/peers/bin/python --rounds 5
  python -m benchmarks --folder /tmp/models --size 3b --engines llamac,llama.cpp --prompts 128,1984

Builds a model of the same shapes and the same form for each engine, once, then measures: in each
round every engine has its turn, in a process of its own, and the machine itself is measured before.
Peers need not be installed where llamac is; those that the Python of --peers does not have are
left out. What they are installed from: benchmarks/README.md.
"""


def main(argv: Sequence[str] | None = None) -> int:
    """Build, measure, write the page."""
    args = parse(argv)
    folder: Path = args.folder / args.size
    folder.mkdir(parents=True, exist_ok=True)
    models = build_models(args, folder)
    rounds: list[dict[str, Any]] = []
    for number in range(args.rounds):
        machine = measure_machine(models["llamac"], args.threads)
        say(f"round {number + 1} of {args.rounds}: {machine['read_gb_s']:.1f} GB/s")
        results = {}
        names = list(models)
        for name in names[number % len(names) :] + names[: number % len(names)]:
            results[name] = measure(args, name, models[name])
        rounds.append({"machine": machine, "engines": results})
        raw = {"size": args.size, "threads": args.threads, "rounds": rounds}
        write_report(args.output, raw, {name: size_of(path) for name, path in models.items()})
    return 0


def parse(argv: Sequence[str] | None) -> argparse.Namespace:
    """The command line."""
    parser = argparse.ArgumentParser(
        prog="python -m benchmarks",
        description=__doc__,
        epilog=EPILOG,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument("--folder", type=Path, required=True, help="for models; they are kept")
    parser.add_argument("--size", choices=("1b", "3b"), default="1b")
    parser.add_argument("--engines", default=",".join(ENGINES), help="default: all")
    parser.add_argument("--peers", default=sys.executable, help="the Python that has the peers")
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--prompts", default="128,512,1984", help="lengths of prompts")
    parser.add_argument("--context", type=int, default=2304, help="positions of the KV cache")
    parser.add_argument("--tokens", type=int, default=48, help="chosen after each prompt")
    parser.add_argument("-o", "--output", type=Path, default=HERE.parent / "docs" / "peers")
    args = parser.parse_args(argv)
    args.engines = args.engines.split(",")
    args.prompts = [int(length) for length in args.prompts.split(",")]
    if unknown := set(args.engines) - set(ENGINES):
        parser.error(f"unknown: {', '.join(sorted(unknown))}; there are {', '.join(ENGINES)}")
    if max(args.prompts) + args.tokens > args.context:
        parser.error("the longest prompt and the tokens after it need a larger --context")
    return args


def python_of(args: argparse.Namespace, engine: str) -> str:
    """The interpreter that has an engine."""
    return sys.executable if engine == "llamac" else str(args.peers)


def build_models(args: argparse.Namespace, folder: Path) -> dict[str, Path]:
    """Build what is not there; a peer that cannot be built is told, and left out."""
    models = {}
    for name in dict.fromkeys(["llamac", *args.engines]):  # others read its checkpoint
        say(f"{name}: building")
        command = [python_of(args, name), str(HERE / "build.py"), name, args.size]
        command += [str(args.context), str(folder)]
        log = folder / f"{name.replace(' ', '-')}.log"
        with log.open("w") as file:
            done = subprocess.run(
                command, stdout=subprocess.PIPE, stderr=file, text=True, check=False
            )
        if done.returncode == 0:
            models[name] = Path(done.stdout.splitlines()[-1])
        elif name == "llamac":
            raise SystemExit(f"llamac's own model was not built: see {log}")
        else:
            say(f"{name}: not built, left out; see {log}")
    return models


def measure(args: argparse.Namespace, engine: str, model: Path) -> dict[str, Any] | None:
    """One engine in a process of its own; None if it failed, which is told."""
    request = {
        "engine": engine,
        "model": str(model),
        "threads": args.threads,
        "context": args.context,
        "first": 128,
        "cases": [(length, args.tokens) for length in args.prompts],
    }
    command = [python_of(args, engine), str(HERE / "child.py"), json.dumps(request)]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    if done.returncode:
        say(f"{engine}: {(done.stderr.strip().splitlines() or ['no reason'])[-1][:200]}")
        return None
    answer: dict[str, Any] = json.loads(done.stdout.splitlines()[-1])
    case = answer["cases"][0]
    say(
        f"  {engine}: prefill {case['prompt'] / case['first_s']:.0f}, "
        f"decode {(case['count'] - 1) / case['rest_s']:.1f} tokens/s"
    )
    return answer


def size_of(model: Path) -> int:
    """Bytes of a file, or of all files of a folder."""
    files = [model] if model.is_file() else [p for p in model.rglob("*") if p.is_file()]
    return sum(path.stat().st_size for path in files)


def say(line: str) -> None:
    """Progress."""
    print(line, file=sys.stderr, flush=True)


if __name__ == "__main__":
    sys.exit(main())
