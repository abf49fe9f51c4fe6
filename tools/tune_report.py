"""`llamac tune report`: one page of what was measured, from records alone.

The page needs nothing but itself: styles and pictures (SVG) are in it, and no scripts. For each
kernel it shows how the best cost fell trial by trial, and what the model had expected beside what
was measured.
"""

from __future__ import annotations

import html
import os
from collections import Counter
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from llamac.runtime.errors import OutputError, TuningMissing
from llamac.targets.tuning.records import Record, RecordFile, same
from llamac.tools.tune_display import cost_text

WIDTH, HEIGHT, MARGIN = 420, 220, 44  # of a picture, in units of its own

STYLE = """
:root{--ink:#1b1f24;--paper:#fff;--line:#d5dae0;--soft:#5f6b7a;--best:#0b6bcb;--dot:#8a97a6;
--bad:#c0392b}
@media(prefers-color-scheme:dark){:root{--ink:#e8ecf1;--paper:#14181d;--line:#36404c;
--soft:#9aa7b6;--best:#5db0ff;--dot:#73808f;--bad:#ff7a6b}}
*{box-sizing:border-box}
body{margin:0 auto;max-width:60rem;padding:1rem;background:var(--paper);color:var(--ink);
font:16px/1.5 system-ui,sans-serif}
h1{font-size:1.5rem}h2{font-size:1.05rem;margin:2.5rem 0 .3rem;overflow-wrap:anywhere}
p{margin:.3rem 0}.soft{color:var(--soft)}.bad{color:var(--bad)}
.scroll{overflow-x:auto}table{border-collapse:collapse;width:100%;font-size:.9rem}
th,td{text-align:left;padding:.25rem .7rem .25rem 0;border-bottom:1px solid var(--line);
white-space:nowrap}td:first-child{white-space:normal}a{color:var(--best)}
td.n,th.n{text-align:right;font-variant-numeric:tabular-nums}
.pair{display:grid;grid-template-columns:repeat(auto-fit,minmax(17rem,1fr));gap:1rem}
figure{margin:.6rem 0}figcaption{font-size:.85rem;color:var(--soft)}svg{width:100%;height:auto}
svg text{fill:var(--soft);font:11px system-ui,sans-serif}.axis{stroke:var(--line)}
.best{stroke:var(--best);fill:none;stroke-width:2}.dot{fill:var(--dot)}.guess{fill:var(--best)}
.same{stroke:var(--soft);stroke-dasharray:4 4}
"""


@dataclass(frozen=True)
class Kernel:
    """The records of one kernel on one device, in their order.

    Attributes:
        records: with the newest generators; those of older ones are left out.
    """

    records: tuple[Record, ...]

    @property
    def name(self) -> str:
        """Family and shape."""
        first = self.records[0]
        fields = [f"{name} {value}" for name, value in first.shape.items() if _is_size(value)]
        kind = str(first.shape.get("epilogue") or "")
        return f"{first.family} {', '.join([*fields, *([kind] if kind else [])])}"

    @property
    def right(self) -> list[Record]:
        """Those with a cost."""
        return [record for record in self.records if record.status == "ok"]

    @property
    def newest(self) -> dict[str, Record]:
        """The newest measurement of each point; the default is first, as the tuner measures it."""
        return {same(record.knobs): record for record in self.right}

    @property
    def default(self) -> Record:
        """The default."""
        return next(iter(self.newest.values()))

    @property
    def best(self) -> Record:
        """The point that costs least."""
        return min(self.newest.values(), key=lambda record: record.cost)

    @property
    def gain(self) -> float:
        """How much less the best costs than the default, relative to the default."""
        return 1 - self.best.cost / self.default.cost


def _is_size(value: object) -> bool:
    return isinstance(value, int) and not isinstance(value, bool) and value > 0


def write_report(files: Sequence[RecordFile], out: Path) -> int:
    """Write the page; return how many kernels it has.

    Raises:
        TuningMissing: the files have no record with a cost.
        OutputError: it cannot be written.
    """
    kernels = find_kernels(record for file in files for record in file.records)
    if not kernels:
        raise TuningMissing(
            "there is nothing to report",
            cause=f"{', '.join(str(f.path) for f in files) or 'no file'}: no measured kernel",
            fix="tune first (llamac tune MODEL --target SOC), or name a file with --records",
        )
    partial = out.with_name(f"{out.name}.{os.getpid()}.partial")
    try:
        partial.write_text(page(kernels), "utf-8")
        partial.replace(out)
    except OSError as error:
        partial.unlink(missing_ok=True)
        raise OutputError(
            f"the page {out} cannot be written",
            cause=str(error.strerror),
            fix="name another file with --output",
        ) from error
    return len(kernels)


def find_kernels(records: Iterable[Record]) -> list[Kernel]:
    """Kernels with a cost, each with the records of its newest generators."""
    groups: dict[str, list[Record]] = {}
    for record in records:
        place = f"{record.place} {record.device} {record.kind}"
        groups.setdefault(f"{place} {record.family} {same(record.shape)}", []).append(record)
    kernels = []
    for group in groups.values():
        newest = group[-1].template.get("hash")
        kernel = Kernel(tuple(r for r in group if r.template.get("hash") == newest))
        if kernel.right:
            kernels.append(kernel)
    return kernels


def page(kernels: Sequence[Kernel]) -> str:
    """The page's text."""
    title = "Tuning of " + ", ".join(sorted({k.records[0].place.soc for k in kernels}))
    parts = [
        '<!doctype html><html lang="en"><head><meta charset="utf-8">',
        '<meta name="viewport" content="width=device-width,initial-scale=1">',
        f"<title>{_text(title)}</title><style>{STYLE}</style></head><body>",
        f"<h1>{_text(title)}</h1>{_summary(kernels)}{_table(kernels)}",
        *(_section(kernel, number) for number, kernel in enumerate(kernels)),
        "</body></html>\n",
    ]
    return "".join(parts)


def _text(value: object) -> str:
    return html.escape(str(value))


def _summary(kernels: Sequence[Kernel]) -> str:
    records = [record for kernel in kernels for record in kernel.records]
    times = sorted(record.time for record in records if record.time)
    counts = Counter(record.status for record in records)
    faults = ", ".join(f"{counts[s]} {s}" for s in ("wrong", "failed") if counts[s])
    devices = ", ".join(sorted({record.device for record in records}))
    span = f"{times[0]} to {times[-1]}" if times else "at unknown times"
    return (
        f"<p>{len(records)} measurements of {len(kernels)} kernels{', of them ' if faults else ''}"
        f'{faults}.</p><p class="soft">{_text(devices)}<br>{_text(span)}</p>'
    )


def _table(kernels: Sequence[Kernel]) -> str:
    rows = []
    for number, kernel in enumerate(kernels):
        best, first = kernel.best, kernel.default
        cells = (
            f'<td><a href="#k{number}">{_text(kernel.name)}</a></td>'
            f"<td>{_text(best.place.level)}</td>"
            f'<td class="n">{len(kernel.records)}</td>'
            f'<td class="n">{cost_text(first.cost, first.kind)}</td>'
            f'<td class="n">{cost_text(best.cost, best.kind)}</td>'
            f'<td class="n">{100 * kernel.gain:.1f} %</td>'
        )
        rows.append(f"<tr>{cells}</tr>")
    names = ("kernel", "level")
    numbers = ("trials", "default", "best", "gain")
    head = "".join(f"<th>{name}</th>" for name in names)
    head += "".join(f'<th class="n">{name}</th>' for name in numbers)
    return f'<div class="scroll"><table><tr>{head}</tr>{"".join(rows)}</table></div>'


def _section(kernel: Kernel, number: int) -> str:
    best = kernel.best
    knobs = ", ".join(f"{name} {value}" for name, value in best.knobs.items())
    wrong = [record for record in kernel.records if record.status != "ok"]
    notes = "".join(
        f'<p class="bad">{_text(_words(r.knobs))}: {_text(r.status)}, {_text(r.note)}</p>'
        for r in wrong[:5]
    )
    place = best.place
    return (
        f'<h2 id="k{number}">{_text(kernel.name)}</h2>'
        f'<p class="soft">{_text(place.soc)}, {_text(place.core)}, {_text(place.level)}</p>'
        f"<p>Best: {_text(knobs)}; {cost_text(best.cost, best.kind)}, "
        f"noise {100 * best.noise:.1f} %</p>{notes}"
        f'<div class="pair">{_curve(kernel)}{_model(kernel)}</div>'
    )


def _words(values: Mapping[str, Any]) -> str:
    return " ".join(f"{name}={value}" for name, value in values.items())


# -- Pictures --------------------------------------------------------------------------------------


class _Axes:
    """A picture's frame: places values, with some room around them."""

    def __init__(self, xs: Sequence[float], ys: Sequence[float]) -> None:
        self._x, self._y = _range(xs), _range(ys)

    def x(self, value: float) -> float:
        low, high = self._x
        return MARGIN + (value - low) / (high - low) * (WIDTH - MARGIN - 8)

    def y(self, value: float) -> float:
        low, high = self._y
        return HEIGHT - 26 - (value - low) / (high - low) * (HEIGHT - 36)

    def dots(self, points: Iterable[tuple[float, float]], kind: str) -> str:
        return "".join(
            f'<circle class="{kind}" cx="{self.x(x):.1f}" cy="{self.y(y):.1f}" r="3"/>'
            for x, y in points
        )

    def picture(self, inside: str, x_title: str, caption: str) -> str:
        """The whole figure; costs are relative to the default."""
        bottom, left = HEIGHT - 26, MARGIN
        ticks = "".join(
            f'<text x="{left - 5}" y="{self.y(value) + 4:.1f}" text-anchor="end">{value:.2f}</text>'
            for value in self._y
        )
        numbers = "".join(
            f'<text x="{self.x(value):.1f}" y="{bottom + 14}" text-anchor="{anchor}">{value:.3g}'
            "</text>"
            for value, anchor in zip(self._x, ("start", "end"), strict=True)
        )
        middle = (left + WIDTH) / 2
        return (
            f'<figure><svg viewBox="0 0 {WIDTH} {HEIGHT}" role="img" aria-label="{_text(caption)}">'
            f'<path class="axis" fill="none" d="M{left} 8V{bottom}H{WIDTH - 8}"/>{ticks}{numbers}'
            f'<text x="{middle}" y="{HEIGHT - 2}" text-anchor="middle">{x_title}</text>'
            f"{inside}</svg><figcaption>{_text(caption)}</figcaption></figure>"
        )


def _range(values: Sequence[float]) -> tuple[float, float]:
    low, high = min(values), max(values)
    return (low, high) if high > low else (low - 0.5, high + 0.5)


def _curve(kernel: Kernel) -> str:
    """Costs in the order of measuring, and the least so far."""
    base = kernel.default.cost
    costs = [record.cost / base for record in kernel.right]
    axes = _Axes([1, len(costs)], [*costs, 1.0])
    so_far, path = costs[0], f"M{axes.x(1):.1f} {axes.y(costs[0]):.1f}"
    for trial, cost in enumerate(costs[1:], 2):
        so_far = min(so_far, cost)
        path += f"H{axes.x(trial):.1f}V{axes.y(so_far):.1f}"
    dots = axes.dots(enumerate(costs, 1), "dot")
    return axes.picture(
        f'{dots}<path class="best" d="{path}"/>',
        "trial",
        "Cost of each trial, and the best so far; the default is 1",
    )


def _model(kernel: Kernel) -> str:
    """What the model expected and what was measured; on the line both are the same."""
    base = kernel.default.cost
    pairs = [(r.cost / base, r.predicted / base) for r in kernel.right if r.predicted]
    if not pairs:
        return ""
    values = [value for pair in pairs for value in pair]
    axes = _Axes(values, values)
    low, high = _range(values)
    line = f"M{axes.x(low):.1f} {axes.y(low):.1f}L{axes.x(high):.1f} {axes.y(high):.1f}"
    errors = sorted(abs(guess / cost - 1) for cost, guess in pairs)
    return axes.picture(
        f'<path class="same" d="{line}"/>{axes.dots(pairs, "guess")}',
        "measured",
        f"What the model expected (upwards), median error {100 * errors[len(errors) // 2]:.0f} %",
    )
