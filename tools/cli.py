"""The command `llamac`: reads the arguments, runs one command, turns errors into text and a code.

    0    it worked            1    it failed (error[code], cause, fix on standard error)
    130  interrupted          2    the command line is wrong

Each command is a file of this folder with `add_parser(subparsers)` and `run(args) -> int`. What a
command needs is imported when it runs, so that `llamac --help` loads neither numpy nor TVM.
"""

from __future__ import annotations

import argparse
import io
import os
import signal
import sys
import traceback
from collections.abc import Iterable, Iterator, Sequence
from contextlib import contextmanager
from importlib import import_module
from types import FrameType
from typing import NoReturn

from llamac import __version__
from llamac.runtime.errors import LlamacError, UsageError
from llamac.tools.console import print_error

COMMANDS = (
    "compile",
    "import",
    "quantize",
    "adapt",
    "tune",
    "farm",
    "run",
    "bench",
    "verify",
    "inspect",
    "targets",
    "doctor",
)

EPILOG = """\
from a model to text in two commands:
  llamac compile examples/tiny-llama/spinquant --target host -o tiny-llama-host
  llamac run tiny-llama-host "Tell me a story about a fox."

`llamac COMMAND --help` shows the options of a command, with examples.
Results go to standard output, everything else to standard error.
Exit codes: 0 worked, 1 failed, 2 wrong command line, 130 interrupted.
"""


class Parser(argparse.ArgumentParser):
    """Reports a wrong command line in the form of all other errors."""

    def error(self, message: str) -> NoReturn:
        """Raise what argparse would print."""
        raise UsageError(
            message,
            cause=f"the arguments do not fit `{self.prog}`",
            fix=f"`{self.prog} --help` shows what it takes",
        )


def build_parser() -> argparse.ArgumentParser:
    """Return the parser of the whole command line."""
    parser = Parser(
        prog="llamac",
        description="Compile quantized Llama models into shared libraries for one SoC.",
        epilog=EPILOG,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument("--version", action="version", version=f"llamac {__version__}")
    _add_common(parser, default=False)
    subparsers = parser.add_subparsers(dest="command", metavar="COMMAND", title="commands")
    for name in COMMANDS:
        import_module(f"llamac.tools.{name}").add_parser(subparsers)
    for command in [*subparsers.choices.values(), *_parts(subparsers.choices.values())]:
        # Common options work before and after the command; a default here would undo the former.
        _add_common(command.add_argument_group("common options"), default=argparse.SUPPRESS)
    return parser


def _parts(commands: Iterable[argparse.ArgumentParser]) -> list[argparse.ArgumentParser]:
    """Parsers of the parts that a command may have, as `llamac farm` has."""
    actions = [action for command in commands for action in command._actions]
    parts = [a.choices for a in actions if isinstance(a, argparse._SubParsersAction)]
    return [parser for choices in parts for parser in choices.values()]


def _add_common(parser: argparse._ActionsContainer, default: bool | str) -> None:
    flags = {
        "--debug": "show the traceback of an error",
        "--plain": "no colours and no live display, even on a terminal",
        "--quiet": "no progress on standard error",
    }
    for flag, text in flags.items():
        parser.add_argument(flag, action="store_true", default=default, help=text)


def main(argv: Sequence[str] | None = None) -> int:
    """Run the command line.

    Args:
        argv: the arguments after the program's name; None: those of this process.

    Returns:
        The exit code.
    """
    arguments = sys.argv[1:] if argv is None else list(argv)
    # Known before the arguments are: reading them can fail too.
    is_debug = "--debug" in arguments
    if isinstance(sys.stdout, io.TextIOWrapper):
        # A terminal that cannot show a character must not end a generation.
        sys.stdout.reconfigure(errors="replace")
    with _ctrl_c() as interrupted:
        try:
            code = _run(arguments)
            sys.stdout.flush()
            return code
        except BrokenPipeError:
            # The reader has what it wanted; Python would complain again when it closes the stream.
            os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
            return 0
        except (Exception, KeyboardInterrupt) as error:
            if is_debug:
                traceback.print_exc()
            if interrupted or isinstance(error, KeyboardInterrupt):
                print("interrupted", file=sys.stderr)
                return 130
            print_error(error if isinstance(error, LlamacError) else _internal(error), sys.stderr)
            return 2 if isinstance(error, UsageError) else 1


@contextmanager
def _ctrl_c() -> Iterator[list[int]]:
    """Give a list that fills when Ctrl-C is pressed: TVM turns KeyboardInterrupt into others."""
    interrupted: list[int] = []

    def remember(number: int, frame: FrameType | None) -> None:
        interrupted.append(number)
        raise KeyboardInterrupt

    try:
        before = signal.signal(signal.SIGINT, remember)
    except ValueError:  # not the main thread, where signals do not arrive anyway
        yield interrupted
        return
    try:
        yield interrupted
    finally:
        signal.signal(signal.SIGINT, before)


def _run(arguments: Sequence[str]) -> int:
    parser = build_parser()
    try:
        args = parser.parse_args(arguments)
    except SystemExit as done:  # --help and --version
        return int(done.code or 0)
    if args.command is None:
        parser.print_help()
        return 0
    code: int = import_module(f"llamac.tools.{args.command}").run(args)
    return code


class InternalError(LlamacError):
    """Something that llamac does not expect: a mistake of its own, or a broken installation."""

    code = "internal"


def _internal(error: Exception) -> InternalError:
    text = str(error).strip().splitlines()
    return InternalError(
        f"{type(error).__name__}: {text[0] if text else 'no message'}",
        cause="llamac did not expect this: a mistake of its own, or a broken installation",
        fix="run `llamac doctor`; if it finds nothing, report what --debug shows",
    )


if __name__ == "__main__":
    sys.exit(main())
