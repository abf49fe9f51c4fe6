"""Give damaged models to the readers: each is refused with a code, or read.

    python -m llamac.tools.fuzz_readers model.gguf hf-folder/ model.pt2 --files 20000
    python -m llamac.tools.fuzz_readers model.onnx --seed 7 --keep found/

A developer's script. Of each model copies are made with bytes changed, cut out, repeated or taken
from elsewhere in the file, half of them near the beginning, where forms have their tables. Each is
opened as `llamac compile` opens it, and all its tensors are read. Children do the work, so that one
that dies is found; a file that takes longer than five seconds, or memory of more than twice its
size, is found, too. What was found is kept with --keep.
"""

from __future__ import annotations

import argparse
import gc
import multiprocessing
import resource
import shutil
import signal
import sys
import tempfile
from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from types import FrameType

import numpy as np

from llamac.compiler.frontends.recognize import open_checkpoint
from llamac.runtime.errors import LlamacError

SECONDS = 5
BATCH = 500
LEAST_MEMORY = 256 << 20
"""Beside twice the file: what torch and onnx take when they are first used."""

_START = 4096


@dataclass(frozen=True)
class Job:
    """Some damaged copies of one model.

    Attributes:
        model: file or folder.
        seed: of the first copy; the others follow.
        count: how many.
        tokenizer: for forms that have none.
    """

    model: Path
    seed: int
    count: int
    tokenizer: Path | None


def mutate(data: bytes, seed: int) -> bytes:
    """A damaged copy."""
    generator = np.random.default_rng(seed)
    changed = bytearray(data)
    for _ in range(int(generator.integers(1, 6))):
        most = min(len(changed), _START if generator.random() < 0.5 else len(changed))
        place = int(generator.integers(0, max(1, most)))
        kind, length = generator.integers(0, 6), int(generator.integers(1, 17))
        if kind == 0:
            del changed[place : place + length]
        elif kind == 1:
            changed[place:place] = changed[place : place + length]
        elif kind == 2:
            changed[place : place + 8] = int(generator.integers(0, 1 << 63)).to_bytes(8, "little")
        elif kind == 3 and generator.random() < 0.3:
            del changed[place:]
        elif place < len(changed):
            changed[place] = (0, 1, 0x7F, 0x80, 0xFF, int(generator.integers(0, 256)))[length % 6]
    return bytes(changed)


def damaged_copy(model: Path, seed: int, folder: Path) -> Path:
    """Write a damaged copy of a model; of a folder one file is damaged."""
    if model.is_file():
        (folder / model.name).write_bytes(mutate(model.read_bytes(), seed))
        return folder / model.name
    files = sorted(path for path in model.iterdir() if path.is_file())
    chosen = files[seed % len(files)]
    copy = folder / model.name
    copy.mkdir(exist_ok=True)
    for path in files:
        data = path.read_bytes()
        (copy / path.name).write_bytes(mutate(data, seed) if path == chosen else data)
    return copy


def read_all(path: Path, tokenizer: Path | None) -> str:
    """Open a model and read every tensor; the error's code, or "read"."""
    try:
        checkpoint = open_checkpoint(path, tokenizer=tokenizer)
        for name in checkpoint.weights.names():
            checkpoint.weights.read(name)
    except LlamacError as error:
        return error.code
    return "read"


def limit_memory(file_bytes: int) -> None:
    """Let this process take twice a file's size more than it has, and a little."""
    used = int(Path("/proc/self/statm").read_text().split()[0]) * resource.getpagesize()
    limit = used + 2 * file_bytes + LEAST_MEMORY
    resource.setrlimit(resource.RLIMIT_AS, (limit, limit))


def run_job(job: Job, results: multiprocessing.Queue[tuple[int, str]]) -> None:
    """Read all copies; each outcome is sent with its seed, before and after."""

    def too_long(number: int, frame: FrameType | None) -> None:
        raise TimeoutError(f"longer than {SECONDS} s")

    signal.signal(signal.SIGALRM, too_long)
    with tempfile.TemporaryDirectory(prefix="llamac-fuzz-") as folder:
        read_all(damaged_copy(job.model, job.seed, Path(folder)), job.tokenizer)  # loads libraries
        limit_memory(sum(p.stat().st_size for p in Path(folder).rglob("*") if p.is_file()))
        for seed in range(job.seed, job.seed + job.count):
            results.put((seed, "began"))
            path = damaged_copy(job.model, seed, Path(folder))
            signal.alarm(SECONDS)
            try:
                outcome = read_all(path, job.tokenizer)
            except BaseException as error:  # anything but an error with a code is a finding
                outcome = f"!{type(error).__name__}: {error!s:.120}"
            signal.alarm(0)
            gc.collect()  # what an error held must not be taken for what the next file needs
            results.put((seed, outcome))


def fuzz(model: Path, args: argparse.Namespace) -> tuple[Counter[str], dict[int, str]]:
    """Damage one model many times; outcomes counted, and what was found by seed."""
    outcomes: Counter[str] = Counter()
    found: dict[int, str] = {}
    context = multiprocessing.get_context("spawn")
    for start in range(args.seed, args.seed + args.files, BATCH):
        count = min(BATCH, args.seed + args.files - start)
        results = context.Queue()
        job = Job(model, start, count, args.tokenizer)
        child = context.Process(target=run_job, args=(job, results))
        child.start()
        last, done = start, 0
        while done < count and (child.is_alive() or not results.empty()):
            try:
                seed, outcome = results.get(timeout=1)
            except Exception:  # queue.Empty
                continue
            last = seed
            if outcome != "began":
                done += 1
                outcomes[outcome.partition(":")[0]] += 1
                if outcome.startswith("!"):
                    found[seed] = outcome
        child.join()
        if child.exitcode:
            outcomes["!died"] += 1
            found[last] = f"the process ended with {child.exitcode}"
    return outcomes, found


def main(arguments: Sequence[str] | None = None) -> int:
    """Run the command line."""
    parser = argparse.ArgumentParser(prog="llamac.tools.fuzz_readers", description=__doc__)
    parser.formatter_class = argparse.RawDescriptionHelpFormatter
    parser.add_argument("models", type=Path, nargs="+", help="files or folders that are read well")
    parser.add_argument("--files", type=int, default=2000, help="copies of each (default: 2000)")
    parser.add_argument("--seed", type=int, default=0, help="of the first copy")
    parser.add_argument("--tokenizer", type=Path, help="for forms that have none")
    parser.add_argument("--keep", type=Path, help="folder for copies that found something")
    args = parser.parse_args(arguments)
    num_found = 0
    for model in args.models:
        outcomes, found = fuzz(model, args)
        num_found += len(found)
        print(
            f"{model.name}: {args.files} copies, "
            + ", ".join(f"{count} {outcome}" for outcome, count in sorted(outcomes.items()))
        )
        for seed, what in sorted(found.items())[:10]:
            print(f"  seed {seed}: {what}")
            if args.keep:
                folder = args.keep / f"{model.name}-{seed}"
                shutil.rmtree(folder, ignore_errors=True)
                folder.mkdir(parents=True)
                damaged_copy(model, seed, folder)
    print(f"{num_found} found" if num_found else "nothing found")
    return 1 if num_found else 0


if __name__ == "__main__":
    sys.exit(main())
