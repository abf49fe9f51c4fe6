"""Progress and the report: what is shown, what is measured, what an exception leaves behind."""

from __future__ import annotations

import io
import json
import mmap
import threading
import time

import pytest
from rich.console import Console

from llamac.compiler.progress import (
    PlainProgress,
    Progress,
    RichProgress,
    SilentProgress,
    anonymous_bytes,
    open_progress,
)


class Terminal(io.StringIO):
    """A stream that says it is a terminal."""

    def isatty(self) -> bool:
        return True


def test_plain_progress_writes_a_line_at_start_and_end() -> None:
    """Without a terminal each stage is two lines, the last with seconds and memory."""
    stream = io.StringIO()
    with PlainProgress(stream).stage("pack weights"):
        pass
    first, last = stream.getvalue().splitlines()
    assert first == "pack weights ..."
    assert last.startswith("pack weights: 0.0 s, peak memory ")
    assert last.endswith(" MiB")


def test_a_long_stage_gives_heartbeats() -> None:
    """A long stage says how far it is without any call that would print, at most at that pace."""
    stream = io.StringIO()
    with PlainProgress(stream, heartbeat_seconds=0.1).stage("build", total=4) as stage:
        stage.advance(1, note="decode")
        time.sleep(0.35)
    beats = stream.getvalue().splitlines()[1:-1]
    assert 1 <= len(beats) <= 3
    assert beats[0].startswith("build: 1/4 (decode) after ")
    assert beats[0].endswith(" s left")


def test_a_short_stage_gives_no_heartbeat() -> None:
    """The default pace is seconds, so that a log of a quick run stays short."""
    stream = io.StringIO()
    with PlainProgress(stream).stage("build"):
        time.sleep(0.1)
    assert len(stream.getvalue().splitlines()) == 2


def test_peak_memory_of_a_stage_that_freed_it_again() -> None:
    """The peak is sampled while the stage runs: 64 MiB taken and given back are seen."""
    progress = SilentProgress()
    before = anonymous_bytes()
    with progress.stage("take"):
        # Pages from the system: the heap of a process that held much may keep what is freed.
        with mmap.mmap(-1, 64 << 20, mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS) as block:
            for _ in range(64):
                block.write(bytes([1]) * (1 << 20))
            time.sleep(0.1)
    with progress.stage("rest"):
        pass
    take, rest = progress.report.stages
    assert take.peak_anonymous_bytes - before > 60 << 20
    assert rest.peak_anonymous_bytes < take.peak_anonymous_bytes - (50 << 20)
    assert progress.report.peak_anonymous_bytes == take.peak_anonymous_bytes


def test_a_stage_inside_another_is_not_counted_twice() -> None:
    """The total is that of outer stages; inner ones are indented in the table."""
    progress = SilentProgress()
    with progress.stage("verify"), progress.stage("reference"):
        time.sleep(0.05)
    inner, outer = progress.report.stages
    assert (inner.name, inner.depth) == ("reference", 1)
    assert (outer.name, outer.depth) == ("verify", 0)
    assert progress.report.seconds == outer.seconds >= inner.seconds >= 0.05
    assert progress.report.lines()[0].startswith("  reference")
    assert progress.report.lines()[-1].startswith("all")


def test_the_report_is_json() -> None:
    """Notes, files and stages reach the JSON form."""
    progress = SilentProgress()
    with progress.stage("one"):
        pass
    progress.report.notes.append("assumed a RoPE factor of 32")
    progress.report.files["weights.bin"] = 7
    document = json.loads(json.dumps(progress.report.to_json()))
    assert [stage["name"] for stage in document["stages"]] == ["one"]
    assert document["notes"] == ["assumed a RoPE factor of 32"]
    assert document["files"] == {"weights.bin": 7}
    assert document["seconds"] >= 0


@pytest.mark.parametrize("kind", ["plain", "rich", "silent"])
def test_an_exception_ends_the_stage_and_its_thread(kind: str) -> None:
    """The exception goes through, no thread stays, the stage is not in the report."""
    stream = Terminal()
    progress: Progress = {
        "plain": lambda: PlainProgress(stream),
        "rich": lambda: RichProgress(Console(file=stream, force_terminal=True)),
        "silent": SilentProgress,
    }[kind]()
    with pytest.raises(KeyboardInterrupt), progress.stage("build"):
        raise KeyboardInterrupt
    assert "llamac-progress" not in {thread.name for thread in threading.enumerate()}
    assert not progress.report.stages
    if kind != "silent":
        assert "stopped" in stream.getvalue()


@pytest.mark.parametrize(
    ("done", "total", "text"), [(3, 146, "3/146"), (42 << 20, 100 << 20, "42 %"), (3, None, "")]
)
def test_counts_are_for_people(done: int, total: int | None, text: str) -> None:
    """Steps are counted, bytes are shown in percent."""
    with SilentProgress().stage("pack", total) as stage:
        stage.advance(done)
        assert stage.done_of_total == text


def test_rich_progress_leaves_a_line_per_stage() -> None:
    """On a terminal the bar goes and a line with the time stays."""
    stream = Terminal()
    progress = RichProgress(Console(file=stream, force_terminal=True, width=100))
    with progress.stage("pack weights", total=2) as stage:
        stage.update("layers.0", 1, 2)
        time.sleep(0.06)
        stage.advance()
    assert "✓" in stream.getvalue()
    assert "pack weights" in stream.getvalue()


def test_the_display_follows_the_stream(monkeypatch: pytest.MonkeyPatch) -> None:
    """A terminal gets the bar; a file, a dumb terminal and --plain get lines."""
    monkeypatch.setenv("TERM", "xterm-256color")
    monkeypatch.delenv("TTY_COMPATIBLE", raising=False)
    assert isinstance(open_progress(Terminal()), RichProgress)
    assert isinstance(open_progress(Terminal(), plain=True), PlainProgress)
    assert isinstance(open_progress(io.StringIO()), PlainProgress)
    monkeypatch.setenv("TERM", "dumb")
    assert isinstance(open_progress(Terminal()), PlainProgress)
