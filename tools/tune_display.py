"""What `llamac tune` shows while it measures: a live table, plain lines, or nothing."""

from __future__ import annotations

import argparse
import sys
import time
from collections.abc import Callable, Sequence
from contextlib import AbstractContextManager
from dataclasses import replace
from typing import IO, TYPE_CHECKING, Any

if TYPE_CHECKING:
    from llamac.compiler.tuning.tuner import KernelState
    from llamac.targets.cpu.kernels import KernelSpec
    from llamac.targets.tuning.measure import DeviceState

LINE_SECONDS = 5.0
ROWS = 12  # of kernels in the live table
_UNITS = {"time_us": "us"}


def cost_text(cost: float, kind: str) -> str:
    """A cost for people: "812 us", "1.25 M cycles"."""
    if not cost:
        return "-"
    unit = _UNITS.get(kind, kind)
    for factor, letter in ((1e9, "G "), (1e6, "M "), (1e4, "k ")):
        if cost >= factor and kind not in _UNITS:
            return f"{cost / min(factor, 1e3 if letter == 'k ' else factor):.4g} {letter}{unit}"
    return f"{cost:.4g} {unit}" if cost < 1e4 else f"{cost:.0f} {unit}"


def share_text(share: float | None) -> str:
    """A share in percent, "" if it is not known."""
    return "" if share is None else f"{100 * share:.0f} %"


class Display(AbstractContextManager["Display"]):
    """Shows nothing; `display_for` chooses what shows more.

    Args:
        count: kernels to tune.

    Attributes:
        devices: tells what the devices of a farm do.
    """

    def __init__(self, count: int = 0) -> None:
        self.count = count
        self.states: dict[str, KernelState] = {}
        self.devices: Callable[[], Sequence[DeviceState]] = list
        self._started = time.monotonic()

    def show(self, state: KernelState) -> None:
        """A kernel's state changed."""

    def close(self) -> None:
        """Stop showing."""

    def __exit__(self, *error: object) -> None:
        self.close()

    def seconds_left(self) -> float | None:
        """What the rest takes if its kernels take as long as those before; None: not known."""
        ended = sum(1 for state in self.states.values() if state.ended)
        if not ended:
            return None
        return (time.monotonic() - self._started) / ended * (self.count - ended)


class PlainDisplay(Display):
    """Writes a line when a kernel ends, and now and then while it lasts."""

    def __init__(self, count: int, stream: IO[str]) -> None:
        super().__init__(count)
        self._stream = stream
        self._last = time.monotonic()

    def show(self, state: KernelState) -> None:
        """Write a line if it is time."""
        self.states[state.name] = replace(state)
        now = time.monotonic()
        if state.ended or now - self._last >= LINE_SECONDS:
            self._last = now
            print(self._line(state), file=self._stream, flush=True)

    def _line(self, state: KernelState) -> str:
        place = f"{len(self.states)}/{self.count} {state.name}"
        if state.compiled < state.points:
            return f"{place}: compiled {state.compiled} of {state.points} points"
        parts = [f"{state.trials} of {state.budget} trials"]
        if state.best:
            gain = f"{100 * state.gain:.1f} % below the default"
            parts.append(f"best {cost_text(state.best, state.kind)}, {gain}")
        if state.roof_share is not None:
            parts.append(f"{share_text(state.roof_share)} of the roof")
        if state.wrong:
            parts.append(f"{state.wrong} wrong")
        if state.model_error is not None:
            parts.append(f"model off by {100 * state.model_error:.0f} %")
        if state.ended:
            parts.append(f"{state.ended}, {state.seconds:.1f} s")
        left = self.seconds_left()
        if left:
            parts.append(f"about {left:.0f} s left")
        return f"{place}: {', '.join(parts)}"


class LiveDisplay(Display):
    """A table on a terminal that is drawn anew as states change."""

    def __init__(self, count: int) -> None:
        from rich.console import Console  # noqa: PLC0415
        from rich.live import Live  # noqa: PLC0415

        super().__init__(count)
        self._live = Live(
            console=Console(stderr=True), refresh_per_second=4, get_renderable=self._table
        )

    def __enter__(self) -> LiveDisplay:
        self._live.start()
        return self

    def show(self, state: KernelState) -> None:
        """Keep the state for the next drawing."""
        self.states[state.name] = replace(state)

    def close(self) -> None:
        """Draw once more and stop."""
        self._live.stop()

    def _table(self) -> Any:
        from rich import box  # noqa: PLC0415
        from rich.table import Table  # noqa: PLC0415

        left = self.seconds_left()
        ended = sum(1 for state in self.states.values() if state.ended)
        about = "" if left is None else f", about {left:.0f} s left"
        table = Table(
            title=f"tuned {ended} of {self.count} kernels{about}",
            title_justify="left",
            box=box.SIMPLE_HEAD,
        )
        for name in ("kernel", "trials", "best", "gain", "of roof", "model error", ""):
            table.add_column(name, no_wrap=name != "kernel")
        for state in list(self.states.values())[-ROWS:]:
            is_compiling = state.compiled < state.points
            table.add_row(
                state.name,
                f"{state.compiled}/{state.points} compiled"
                if is_compiling
                else f"{state.trials}/{state.budget}",
                cost_text(state.best, state.kind),
                f"{100 * state.gain:.1f} %",
                share_text(state.roof_share),
                share_text(state.model_error),
                state.ended,
            )
        table.caption = "\n".join(
            f"{device.name}: {device.trials} trials{', measuring' if device.is_busy else ''}"
            for device in self.devices()
        )
        table.caption_justify = "left"
        return table


def display_for(args: argparse.Namespace, specs: Sequence[KernelSpec]) -> Display:
    """The display that the flags and the terminal ask for."""
    if args.quiet:
        return Display(len(specs))
    if args.plain or not sys.stderr.isatty():
        return PlainDisplay(len(specs), sys.stderr)
    return LiveDisplay(len(specs))
