"""Progress on the screen while stages run, and a report of time and memory when they are done.

    progress = open_progress(sys.stderr)          # a live bar, or plain lines without a terminal
    with progress.stage("pack weights", total=146) as stage:
        for name in names:
            ...
            stage.advance(note=name)
    print(progress.report.to_json())

Times and memory are measurements of one run: they are printed, and never written into a bundle.
"""

from __future__ import annotations

import threading
import time
from abc import ABC, abstractmethod
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import IO, TYPE_CHECKING, Any

if TYPE_CHECKING:
    from rich.console import Console
    from rich.progress import TaskID

SAMPLE_SECONDS = 0.02
HEARTBEAT_SECONDS = 5.0
LARGEST_COUNT = 10_000  # larger totals are bytes, and shown in percent


@dataclass(frozen=True)
class StageReport:
    """What one stage took.

    Attributes:
        name: as given to `stage`.
        depth: 0, or 1 and more for a stage inside another one.
        seconds: wall time.
        peak_anonymous_bytes: highest anonymous resident memory of this process meanwhile (what
            cannot be dropped and read again, as mapped files can); 0 where Linux does not tell.
    """

    name: str
    depth: int
    seconds: float
    peak_anonymous_bytes: int


@dataclass
class Report:
    """What a run of the pipeline took and made.

    Attributes:
        stages: in the order in which they ended.
        notes: what the user should know.
        files: size in bytes of each file that was written.
    """

    stages: list[StageReport] = field(default_factory=list)
    notes: list[str] = field(default_factory=list)
    files: dict[str, int] = field(default_factory=dict)

    @property
    def seconds(self) -> float:
        """Wall time of all stages; those inside others are not counted twice."""
        return sum(stage.seconds for stage in self.stages if stage.depth == 0)

    @property
    def peak_anonymous_bytes(self) -> int:
        """Highest anonymous memory of any stage."""
        return max((stage.peak_anonymous_bytes for stage in self.stages), default=0)

    def to_json(self) -> dict[str, Any]:
        """Return the report as JSON values."""
        totals = {"seconds": self.seconds, "peak_anonymous_bytes": self.peak_anonymous_bytes}
        return totals | asdict(self)

    def lines(self) -> list[str]:
        """Return the report as a table in plain text."""
        rows = [
            ("  " * stage.depth + stage.name, stage.seconds, stage.peak_anonymous_bytes)
            for stage in self.stages
        ]
        rows.append(("all", self.seconds, self.peak_anonymous_bytes))
        width = max(len(name) for name, _, _ in rows)
        return [
            f"{name:<{width}} {seconds:8.2f} s {peak / 2**20:8.0f} MiB"
            for name, seconds, peak in rows
        ]


def anonymous_bytes() -> int:
    """Return the anonymous resident memory of this process in bytes, 0 where it is not known."""
    try:
        status = Path("/proc/self/status").read_bytes()
    except OSError:
        return 0
    _, found, rest = status.partition(b"RssAnon:")
    return int(rest.split(None, 1)[0]) * 1024 if found else 0


class Stage:
    """A stage that is running; `Progress.stage` makes it."""

    def __init__(self, name: str, total: int | None, depth: int) -> None:
        self.name = name
        self.total = total
        self.depth = depth
        self.done = 0
        self.note = ""
        self.started = time.monotonic()
        self.peak_bytes = anonymous_bytes()

    @property
    def seconds(self) -> float:
        """Wall time since the start."""
        return time.monotonic() - self.started

    @property
    def done_of_total(self) -> str:
        """How far it is, for people: "3/146", "42 %" of many, or nothing where it is not known."""
        if not self.total:
            return ""
        if self.total > LARGEST_COUNT:
            return f"{100 * self.done // self.total} %"
        return f"{self.done}/{self.total}"

    @property
    def seconds_left(self) -> float | None:
        """Wall time that the rest takes at the speed so far, or None if that is not known."""
        if not self.total or not self.done:
            return None
        return self.seconds / self.done * (self.total - self.done)

    def advance(self, n: int = 1, note: str = "") -> None:
        """Say that `n` more of `total` are done, and on what the work is now."""
        self.done += n
        self.note = note

    def update(self, note: str, done: int, total: int) -> None:
        """Say how far the work is; this is a `llamac.targets.base.Progress`."""
        self.note, self.done, self.total = note, done, total


class Progress(ABC):
    """Shows stages while they run and collects their reports; `open_progress` picks a way to show.

    Attributes:
        report: of all stages that ended so far.
    """

    def __init__(self) -> None:
        self.report = Report()
        self._running: list[Stage] = []

    @contextmanager
    def stage(self, name: str, total: int | None = None) -> Iterator[Stage]:
        """Run a stage; one inside another is shown as a part of it.

        Args:
            name: a few words, "pack weights".
            total: number of steps that `advance` will count, if known.
        """
        stage = Stage(name, total, len(self._running))
        self._running.append(stage)
        sampler = _Sampler(self._sample) if stage.depth == 0 else None
        self._show_start(stage)
        completed = False
        try:
            yield stage
            completed = True
        finally:
            if sampler:
                sampler.stop()
            self._measure()
            self._running.remove(stage)
            report = StageReport(name, stage.depth, stage.seconds, stage.peak_bytes)
            if completed:
                self.report.stages.append(report)
            self._show_end(stage, report if completed else None)

    def _sample(self) -> None:
        """Look at memory and at the clock; called in a thread every `SAMPLE_SECONDS`."""
        self._measure()
        if self._running:
            self._show_running(self._running[-1])

    def _measure(self) -> None:
        now = anonymous_bytes()
        for stage in tuple(self._running):
            stage.peak_bytes = max(stage.peak_bytes, now)

    @abstractmethod
    def _show_start(self, stage: Stage) -> None:
        """A stage starts."""

    @abstractmethod
    def _show_running(self, stage: Stage) -> None:
        """The innermost stage still runs; called often, from another thread."""

    @abstractmethod
    def _show_end(self, stage: Stage, report: StageReport | None) -> None:
        """A stage ended; `report` is None if an exception ended it."""


class _Sampler:
    """Calls a function every `SAMPLE_SECONDS` until it is stopped."""

    def __init__(self, call: Any) -> None:
        self._stopped = threading.Event()
        self._call = call
        self._thread = threading.Thread(target=self._run, name="llamac-progress", daemon=True)
        self._thread.start()

    def _run(self) -> None:
        while not self._stopped.wait(SAMPLE_SECONDS):
            self._call()

    def stop(self) -> None:
        self._stopped.set()
        self._thread.join()


class SilentProgress(Progress):
    """Shows nothing; the report is kept all the same."""

    def _show_start(self, stage: Stage) -> None:
        pass

    def _show_running(self, stage: Stage) -> None:
        pass

    def _show_end(self, stage: Stage, report: StageReport | None) -> None:
        pass


class PlainProgress(Progress):
    """Writes a line when a stage starts and ends, and a heartbeat in between if it takes long.

    Args:
        stream: where to.
        heartbeat_seconds: least time between two lines of one stage.
    """

    def __init__(self, stream: IO[str], heartbeat_seconds: float = HEARTBEAT_SECONDS) -> None:
        super().__init__()
        self._stream = stream
        self._heartbeat_seconds = heartbeat_seconds
        self._last_line = 0.0

    def _write(self, stage: Stage, text: str) -> None:
        self._stream.write(f"{'  ' * stage.depth}{stage.name}{text}\n")
        self._stream.flush()
        self._last_line = time.monotonic()

    def _show_start(self, stage: Stage) -> None:
        self._write(stage, " ...")

    def _show_running(self, stage: Stage) -> None:
        if time.monotonic() - self._last_line < self._heartbeat_seconds:
            return
        count = f" {stage.done_of_total}" if stage.total else ""
        left = stage.seconds_left
        about = f", about {left:.0f} s left" if left is not None else ""
        note = f" ({stage.note})" if stage.note else ""
        self._write(stage, f":{count}{note} after {stage.seconds:.0f} s{about}")

    def _show_end(self, stage: Stage, report: StageReport | None) -> None:
        self._write(stage, f": {_summary(report)}")


class RichProgress(Progress):
    """Shows a live bar with the time left; a line per stage stays on the screen.

    Args:
        console: of a terminal.
    """

    def __init__(self, console: Console) -> None:
        super().__init__()
        from rich import progress  # noqa: PLC0415 (only where there is a terminal)

        self._bar = progress.Progress(
            progress.SpinnerColumn(),
            progress.TextColumn("{task.description}"),
            progress.BarColumn(bar_width=24),
            progress.TextColumn("{task.fields[count]}"),
            progress.TimeElapsedColumn(),
            progress.TimeRemainingColumn(),
            progress.TextColumn("[dim]{task.fields[note]}"),
            console=console,
            transient=True,
        )
        self._tasks: dict[int, TaskID] = {}

    def _show_start(self, stage: Stage) -> None:
        if stage.depth == 0:
            self._bar.start()
        self._tasks[id(stage)] = self._bar.add_task(
            "  " * stage.depth + stage.name, total=stage.total, count="", note=""
        )

    def _show_running(self, stage: Stage) -> None:
        task = self._tasks.get(id(stage))
        if task is not None:
            count, note = stage.done_of_total, stage.note
            self._bar.update(task, completed=stage.done, total=stage.total, count=count, note=note)

    def _show_end(self, stage: Stage, report: StageReport | None) -> None:
        self._bar.remove_task(self._tasks.pop(id(stage)))
        mark = "[green]✓[/]" if report else "[red]✗[/]"
        indent = "  " * stage.depth
        self._bar.console.print(f"{indent}{mark} {stage.name} [dim]{_summary(report)}[/]")
        if stage.depth == 0:
            self._bar.stop()


def _summary(report: StageReport | None) -> str:
    if report is None:
        return "stopped"
    return f"{report.seconds:.1f} s, peak memory {report.peak_anonymous_bytes / 2**20:.0f} MiB"


def open_progress(stream: IO[str], *, plain: bool = False) -> Progress:
    """Return a live display if `stream` is a terminal, else one of plain lines.

    Args:
        stream: usually standard error, since standard output is for results.
        plain: plain lines even on a terminal.
    """
    if plain or not stream.isatty():
        return PlainProgress(stream)
    from rich.console import Console  # noqa: PLC0415 (only where there is a terminal)

    console = Console(file=stream)
    return PlainProgress(stream) if console.is_dumb_terminal else RichProgress(console)
