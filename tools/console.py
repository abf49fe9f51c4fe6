"""What every command prints with: results to standard output, all else to standard error."""

from __future__ import annotations

import argparse
import json
import sys
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import IO, TYPE_CHECKING, Any, TypeAlias

from llamac.runtime.errors import LlamacError, OutputError

if TYPE_CHECKING:
    from llamac.compiler.progress import Progress

Subparsers: TypeAlias = "argparse._SubParsersAction[argparse.ArgumentParser]"

Row: TypeAlias = Sequence[str]


def notice(text: str) -> None:
    """Tell the user something that is not a result."""
    print(text, file=sys.stderr, flush=True)


def print_json(document: Any) -> None:
    """Print JSON values to standard output."""
    print(json.dumps(document, indent=2, ensure_ascii=False))


def write_json(document: Any, path: Path) -> None:
    """Write JSON values to a file.

    Raises:
        OutputError: the file cannot be written.
    """
    try:
        path.write_text(json.dumps(document, indent=2, ensure_ascii=False) + "\n", "utf-8")
    except OSError as error:
        raise OutputError(
            f"{path} cannot be written",
            cause=str(error.strerror),
            fix="give a path in a folder that exists and has room",
        ) from error


def print_rows(title: str, rows: Iterable[Row], *, plain: bool, header: Row = ()) -> None:
    """Print a table to standard output: with rich on a terminal, else as aligned columns.

    Args:
        title: heading, a few words.
        rows: cells; with two columns the first is the name of the second.
        plain: aligned columns even on a terminal.
        header: names of the columns, if they need names.
    """
    cells = [tuple(row) for row in rows]
    if plain or not sys.stdout.isatty():
        _print_plain(title, [tuple(header), *cells] if header else cells)
        return
    from rich import box  # noqa: PLC0415 (keeps `llamac --help` fast)
    from rich.console import Console  # noqa: PLC0415
    from rich.table import Table  # noqa: PLC0415
    from rich.text import Text  # noqa: PLC0415

    table = Table(
        title=title,
        title_justify="left",
        title_style="bold",
        box=box.SIMPLE_HEAD if header else None,
        show_header=bool(header),
    )
    for index, name in enumerate(header or [""] * max((len(row) for row in cells), default=0)):
        table.add_column(name, style="cyan" if index == 0 else None, overflow="fold")
    for row in cells:
        table.add_row(*(Text(cell) for cell in row))
    console = Console()
    console.print(table)
    console.print()


def _print_plain(title: str, rows: Sequence[Row]) -> None:
    print(title)
    columns = max((len(row) for row in rows), default=0)
    widths = [max(len(row[i]) for row in rows if i < len(row)) for i in range(columns)]
    for row in rows:
        padded = (cell.ljust(width) for cell, width in zip(row, widths, strict=False))
        print(("  " + "  ".join(padded)).rstrip())
    print()


def print_error(error: LlamacError, stream: IO[str]) -> None:
    """Print an error as code and message, cause, fix."""
    print(f"error[{error.code}]: {error.message}", file=stream)
    print(f"  cause: {error.cause}", file=stream)
    print(f"  fix: {error.fix}", file=stream)


def format_bytes(count: int) -> str:
    """Return a size for people, in binary units: 1536 is "1.5 KiB"."""
    value = float(count)
    for unit in ("B", "KiB", "MiB", "GiB"):
        if value < 1024 or unit == "GiB":
            break
        value /= 1024
    return f"{count} B" if unit == "B" else f"{value:.1f} {unit}"


def progress_for(args: argparse.Namespace) -> Progress:
    """Return the progress display that the flags and the terminal ask for."""
    from llamac.compiler.progress import SilentProgress, open_progress  # noqa: PLC0415

    if args.quiet:
        return SilentProgress()
    return open_progress(sys.stderr, plain=args.plain)


def positive_int(text: str) -> int:
    """Read a whole number above zero, for argparse."""
    value = int(text)
    if value < 1:
        raise ValueError(text)
    return value


def list_of_ints(text: str) -> tuple[int, ...]:
    """Read whole numbers above zero between commas, for argparse."""
    return tuple(positive_int(part) for part in text.split(","))


# argparse puts these names into its messages: "invalid whole number above 0 value: 'x'".
positive_int.__name__ = "whole number above 0"
list_of_ints.__name__ = "list of whole numbers above 0"
