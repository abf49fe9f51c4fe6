"""The page of a comparison: tables and pictures of what the rounds gave, and the raw figures."""

from __future__ import annotations

import json
import platform
from collections.abc import Mapping, Sequence
from datetime import UTC, datetime
from functools import partial
from pathlib import Path
from statistics import median
from typing import Any

from benchmarks.build import SHAPES, VOCAB, matrices
from benchmarks.plots import bars, lines

Result = Mapping[str, Any]
OURS = "llamac"


def write_report(folder: Path, raw: Mapping[str, Any], sizes: Mapping[str, int]) -> None:
    """Write SIZE.md, its pictures and SIZE.json into a folder."""
    folder.mkdir(parents=True, exist_ok=True)
    size, rounds = raw["size"], raw["rounds"]
    stem = f"{size}-{raw['threads']}-threads"
    results = {name: [r["engines"].get(name) for r in rounds] for name in sizes}
    found = {name: [r for r in runs if r] for name, runs in results.items()}
    found = {name: runs for name, runs in found.items() if runs}
    machines = [r["machine"] for r in rounds]
    prompts = [case["prompt"] for case in found[OURS][0]["cases"]]
    text = [
        f"# Llama 3.2 {size.upper()} beside other engines, {raw['threads']} threads\n",
        f"{datetime.now(UTC):%Y-%m-%d}, {cpu_name()}, {len(rounds)} interleaved rounds. Medians, "
        "in brackets the ends. Written by `python -m benchmarks`.\n",
        speed_table(found, prompts),
        start_table(found, sizes),
        limits_table(size, found[OURS], machines, prompts),
        f"![Decoding by context]({stem}-decode.svg)\n",
        f"![Prefill by length of the prompt]({stem}-prefill.svg)\n",
        f"![Peak resident memory]({stem}-memory.svg)\n",
    ]
    (folder / f"{stem}.md").write_text("\n".join(text), "utf-8")
    (folder / f"{stem}.json").write_text(json.dumps(raw, indent=1) + "\n", "utf-8")
    write_pictures(folder, stem, found, prompts)


def write_pictures(
    folder: Path, stem: str, found: Mapping[str, Sequence[Result]], prompts: Sequence[int]
) -> None:
    """Three SVG files."""
    for name, value in (("decode", decode_speed), ("prefill", prefill_speed)):
        series = {
            engine: [
                (length, median(value(r, i) for r in runs)) for i, length in enumerate(prompts)
            ]
            for engine, runs in found.items()
        }
        picture = lines(f"{name}: tokens/s by tokens in the prompt", series)
        (folder / f"{stem}-{name}.svg").write_text(picture, "utf-8")
    memory = {
        engine: median(r["peak_resident"] for r in runs) / 1e9 for engine, runs in found.items()
    }
    picture = bars("peak resident memory, GB", memory)
    (folder / f"{stem}-memory.svg").write_text(picture, "utf-8")


def prefill_speed(result: Result, case: int) -> float:
    """Tokens of the prompt by the time to the first token."""
    c = result["cases"][case]
    return float(c["prompt"] / c["first_s"])


def decode_speed(result: Result, case: int) -> float:
    """Tokens after the first by their time."""
    c = result["cases"][case]
    return float((c["count"] - 1) / c["rest_s"])


def spread(values: Sequence[float], form: str = ".1f") -> str:
    """Median, and the ends in brackets."""
    low, middle, high = (format(f(values), form) for f in (min, median, max))
    return f"{middle} ({low} to {high})"


def speed_table(found: Mapping[str, Sequence[Result]], prompts: Sequence[int]) -> str:
    """Tokens per second."""
    columns = [
        (f"{name} {length}", partial(speed, case=i))
        for name, speed in (("prefill", prefill_speed), ("decode after", decode_speed))
        for i, length in enumerate(prompts)
    ]
    rows = [
        [engine, *(spread([value(r) for r in runs]) for _, value in columns)]
        for engine, runs in found.items()
    ]
    for i, (_, value) in enumerate(columns):
        add_ratio(rows, i + 1, {e: median(value(r) for r in runs) for e, runs in found.items()})
    return "## Tokens per second\n\n" + table(["engine", *(name for name, _ in columns)], rows)


def add_ratio(rows: list[list[str]], column: int, medians: Mapping[str, float]) -> None:
    """Put into the last row how many times the best peer llamac is."""
    peers = [value for name, value in medians.items() if name != OURS]
    if not peers:
        return
    if column == 1:
        rows.append(["llamac : best peer"])
    rows[-1].append(f"{medians[OURS] / max(peers):.2f}")


def start_table(found: Mapping[str, Sequence[Result]], sizes: Mapping[str, int]) -> str:
    """Start and memory."""
    header = ["engine", "load, s", "start to first token, s", "page faults", "peak resident, GB"]
    header += ["anonymous, GB", "files, GB"]
    rows = [
        [
            engine,
            spread([r["load_s"] for r in runs], ".2f"),
            spread([r["to_first_token_s"] for r in runs], ".2f"),
            f"{median(r['minor_faults'] for r in runs):.0f}",
            f"{median(r['peak_resident'] for r in runs) / 1e9:.2f}",
            f"{median(r['anonymous'] for r in runs) / 1e9:.3f}",
            f"{sizes[engine] / 1e9:.2f}",
        ]
        for engine, runs in found.items()
    ]
    return "## Start and memory\n\n" + table(header, rows)


def limits_table(
    size: str, runs: Sequence[Result], machines: Sequence[Result], prompts: Sequence[int]
) -> str:
    """How near llamac comes to what the machine can."""
    per_token = sum(rows * columns for rows, columns in matrices(SHAPES[size]).values())
    per_token *= SHAPES[size].layers
    output = VOCAB * SHAPES[size].dim
    rows = []
    for i, length in enumerate(prompts):
        shares = []
        for run, machine in zip(runs, machines, strict=False):
            macs = per_token * length + output
            shares.append(100 * macs / run["cases"][i]["first_s"] / machine["gmac_s"] / 1e9)
        rows.append([f"prefill {length}, share of int8 products", spread(shares, ".0f") + " %"])
    for i, length in enumerate(prompts):
        shares = []
        for run, machine in zip(runs, machines, strict=False):
            read = bytes_per_token(size, length + run["cases"][i]["count"] / 2)
            shares.append(100 * read * decode_speed(run, i) / machine["read_gb_s"] / 1e9)
        rows.append([f"decode after {length}, share of bandwidth", spread(shares, ".0f") + " %"])
    rows.append(["int8 products, GMAC/s", spread([m["gmac_s"] for m in machines], ".0f")])
    rows.append(["read bandwidth, GB/s", spread([m["read_gb_s"] for m in machines])])
    return "## llamac beside what the machine can\n\n" + table(["", "measured"], rows)


def bytes_per_token(size: str, position: float) -> float:
    """What a token reads: int4 codes with float16 scales, the int8 output layer, float16 KV."""
    shape = SHAPES[size]
    weights = sum(rows * columns for rows, columns in matrices(shape).values()) * shape.layers
    keys_and_values = 2 * shape.layers * shape.kv_heads * shape.head_dim * 2 * position
    return weights * (0.5 + 2 / 32) + VOCAB * (shape.dim + 8) + keys_and_values


def table(header: Sequence[str], rows: Sequence[Sequence[str]]) -> str:
    """A table in Markdown."""
    every = [header, ["---"] * len(header), *rows]
    return "\n".join(f"| {' | '.join(row)} |" for row in every) + "\n"


def cpu_name() -> str:
    """Name of the CPU."""
    for line in Path("/proc/cpuinfo").read_text("utf-8").splitlines():
        if line.startswith("model name"):
            return line.partition(":")[2].strip()
    return platform.machine()
