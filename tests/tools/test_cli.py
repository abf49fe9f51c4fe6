"""The command line as a whole: help, exit codes, the form of errors, what goes to which stream."""

from __future__ import annotations

import os
import resource
import subprocess
import sys
from pathlib import Path

import pytest

import llamac
from llamac.runtime.errors import BundleMissing, UsageError
from llamac.tools import cli, console
from llamac.tools import inspect as inspect_command
from llamac.tools.cli import COMMANDS, main

LLAMAC = (sys.executable, "-P", "-m", "llamac.tools.cli")


def fail_with(monkeypatch: pytest.MonkeyPatch, error: BaseException) -> None:
    """Make `llamac inspect` raise."""

    def run(_args: object) -> int:
        raise error

    monkeypatch.setattr(inspect_command, "run", run)


def test_help_lists_every_command(capsys: pytest.CaptureFixture[str]) -> None:
    """`llamac --help` and `llamac` alone say what there is."""
    assert main(["--help"]) == 0
    text = capsys.readouterr().out
    assert main([]) == 0
    assert capsys.readouterr().out == text
    for command in COMMANDS:
        assert f"\n    {command} " in text
    assert "examples/tiny-llama" in text


@pytest.mark.parametrize("command", COMMANDS)
def test_the_help_of_a_command_has_examples(
    command: str, capsys: pytest.CaptureFixture[str]
) -> None:
    """Help teaches: every command shows at least one whole line to copy."""
    assert main([command, "--help"]) == 0
    examples = capsys.readouterr().out.partition("examples:")[2]
    assert f"\n  llamac {command}" in examples


def test_version(capsys: pytest.CaptureFixture[str]) -> None:
    """`llamac --version` is the version of the package."""
    assert main(["--version"]) == 0
    assert capsys.readouterr().out == f"llamac {llamac.__version__}\n"


@pytest.mark.parametrize(
    "arguments",
    [
        ["bake"],
        ["run"],
        ["run", "bundle", "text", "--max-tokens", "0"],
        ["run", "bundle", "text", "--top-q", "0.5"],
        ["compile", "model", "-o", "out"],
        ["compile", "model", "--target", "host", "-o", "out", "--chunks", "128,x"],
        ["compile", "model", "--target", "host", "-o", "out", "--scales", "float8"],
        ["bench", "bundle", "--threads", ""],
    ],
)
def test_a_wrong_command_line_is_an_error_like_others(
    arguments: list[str], capsys: pytest.CaptureFixture[str]
) -> None:
    """Exit code 2, nothing on standard output, the three lines on standard error."""
    assert main(arguments) == 2
    out, err = capsys.readouterr()
    lines = err.splitlines()
    assert out == ""
    assert lines[0].startswith("error[usage]: ")
    assert lines[1].startswith("  cause: ")
    assert lines[2].startswith("  fix: ")
    assert "--help" in lines[2]
    assert len(lines) == 3


def test_an_error_is_code_cause_and_fix(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """A failure exits 1 and prints no traceback."""
    fail_with(monkeypatch, BundleMissing("no bundle at x", cause="it is not there", fix="make it"))
    assert main(["inspect", "x"]) == 1
    expected = "error[bundle-missing]: no bundle at x\n  cause: it is not there\n  fix: make it\n"
    assert capsys.readouterr() == ("", expected)


@pytest.mark.parametrize("arguments", [["--debug", "inspect", "x"], ["inspect", "x", "--debug"]])
def test_debug_adds_the_traceback(
    arguments: list[str], monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """--debug works before and after the command."""
    fail_with(monkeypatch, UsageError("no", cause="because", fix="do"))
    assert main(arguments) == 2
    err = capsys.readouterr().err
    assert "Traceback (most recent call last)" in err
    assert err.endswith("error[usage]: no\n  cause: because\n  fix: do\n")


def test_an_unexpected_exception_is_an_internal_error(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """What nobody foresaw has a code too, its first line, and the way to the traceback."""
    fail_with(monkeypatch, KeyError("layers.0\nmore"))
    assert main(["inspect", "x"]) == 1
    err = capsys.readouterr().err
    assert err.startswith("error[internal]: KeyError: ")
    assert "--debug" in err
    assert "Traceback" not in err


def test_ctrl_c_is_one_word(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """An interrupted command exits with 130, as shells expect."""
    fail_with(monkeypatch, KeyboardInterrupt())
    assert main(["inspect", "x"]) == 130
    assert capsys.readouterr() == ("", "interrupted\n")


def test_a_reader_that_left_is_no_error(bundle: Path) -> None:
    """`llamac inspect ... | head -1` ends quietly."""
    process = subprocess.Popen(
        [*LLAMAC, "inspect", str(bundle), "--json"], stdout=subprocess.PIPE, stderr=subprocess.PIPE
    )
    assert process.stdout is not None
    process.stdout.close()
    _, err = process.communicate(timeout=60)
    assert (process.returncode, err) == (0, b"")


def test_a_terminal_without_unicode_gets_question_marks(bundle: Path) -> None:
    """Output in an encoding that lacks a character is no error: the hash's ellipsis is a "?"."""
    environment = dict(os.environ) | {"PYTHONIOENCODING": "ascii"}
    done = subprocess.run(
        [*LLAMAC, "inspect", str(bundle)], capture_output=True, env=environment, check=True
    )
    assert b"sha256 " in done.stdout
    assert done.stdout.count(b"?") == 4


def test_help_comes_at_once() -> None:
    """Building all parsers takes a fraction of a second of CPU time; the best of three counts."""
    seconds = []
    for _ in range(3):
        before = resource.getrusage(resource.RUSAGE_CHILDREN)
        subprocess.run([*LLAMAC, "--help"], check=True, stdout=subprocess.DEVNULL)
        after = resource.getrusage(resource.RUSAGE_CHILDREN)
        seconds.append(after.ru_utime + after.ru_stime - before.ru_utime - before.ru_stime)
    assert min(seconds) < 0.5


def test_colours_follow_the_terminal(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """Tables are rich on a terminal, without colours under NO_COLOR, plain when asked or piped."""
    rows = [("name", "tiny [bold]")]
    console.print_rows("model", rows, plain=False)
    piped = capsys.readouterr().out
    monkeypatch.setattr(sys.stdout, "isatty", lambda: True)
    monkeypatch.setenv("TERM", "xterm-256color")
    monkeypatch.delenv("NO_COLOR", raising=False)
    console.print_rows("model", rows, plain=False)
    coloured = capsys.readouterr().out
    monkeypatch.setenv("NO_COLOR", "1")
    console.print_rows("model", rows, plain=False)
    uncoloured = capsys.readouterr().out
    console.print_rows("model", rows, plain=True)
    assert capsys.readouterr().out == piped == "model\n  name  tiny [bold]\n\n"
    assert "\x1b[36m" in coloured
    assert "\x1b[36m" not in uncoloured
    assert all("tiny [bold]" in text for text in (coloured, uncoloured))


@pytest.mark.parametrize(
    ("count", "text"), [(0, "0 B"), (1023, "1023 B"), (1536, "1.5 KiB"), (5 << 30, "5.0 GiB")]
)
def test_sizes_for_people(count: int, text: str) -> None:
    """Sizes are in binary units with one digit."""
    assert console.format_bytes(count) == text


def test_every_command_has_a_module_with_the_two_functions() -> None:
    """The rule of the folder: `add_parser` and `run` in a file of the command's name."""
    parser = cli.build_parser()
    assert parser.parse_args(["doctor"]).command == "doctor"
    for command in COMMANDS:
        module = __import__(f"llamac.tools.{command}", fromlist=["run"])
        assert callable(module.add_parser)
        assert callable(module.run)
