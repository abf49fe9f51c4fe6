"""`llamac bench --count`: options that do not fit, and which functions run."""

from __future__ import annotations

from pathlib import Path

import pytest

from llamac.targets.program import Function, Program
from llamac.tools.bench_count import plan_calls
from llamac.tools.cli import main


def program(*chunks: int) -> Program:
    """A program with prefill functions of these lengths, and decode."""
    functions = [Function(f"prefill_{n}", n, (), 0, 0, 0, 0, 0) for n in chunks]
    decode = Function("decode", 1, (), 0, 0, 0, 0, 0)
    return Program((), (), (*functions, decode), 0, 0, 0)


@pytest.mark.parametrize(
    ("chunks", "prompt", "expected"),
    [
        ((32, 8), 32, [("prefill_32", 0, 32)]),
        ((32, 8), 45, [("prefill_32", 0, 32), ("prefill_8", 32, 8), ("prefill_8", 40, 5)]),
        ((32, 8), 33, [("prefill_32", 0, 32), ("decode", 32, 1)]),
        ((32, 8), 5, [("prefill_8", 0, 5)]),
        ((32, 8), 1, [("decode", 0, 1)]),
        ((), 2, [("decode", 0, 1), ("decode", 1, 1)]),
    ],
)
def test_functions_are_those_that_the_runtime_takes(
    chunks: tuple[int, ...], prompt: int, expected: list[tuple[str, int, int]]
) -> None:
    """The largest that the rest fills, the smallest for a rest that fills none; then decode."""
    calls = [
        (c.function.name, c.position, c.tokens) for c in plan_calls(program(*chunks), prompt, 2)
    ]
    assert calls == [*expected, ("decode", prompt, 1), ("decode", prompt + 1, 1)]


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (["--count"], "--count is for --emulate"),
        (["--count", "--emulate", "--threads", "2"], "--count takes neither --profile nor several"),
        (["--count", "--emulate", "--profile"], "--count takes neither --profile nor several"),
    ],
)
def test_options_that_do_not_fit_are_said_first(
    options: list[str],
    message: str,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    """Before an emulator or the bundle is looked for."""
    monkeypatch.setenv("PATH", str(tmp_path))
    assert main(["bench", "no-bundle", *options]) == 2
    err = capsys.readouterr().err
    assert f"error[usage]: {message}" in err
    assert "\n  cause: " in err and "\n  fix: " in err


def test_an_emulator_without_plug_ins_is_said(
    bundle: Path,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    """A static build of QEMU; it comes before anything runs."""
    qemu = tmp_path / "qemu-static"
    qemu.write_text('#!/bin/sh\n[ "$1" = --version ] && echo qemu-aarch64 version 10.0.2\nexit 0\n')
    qemu.chmod(0o755)
    monkeypatch.setenv("LLAMAC_QEMU", str(qemu))
    program_json = bundle / "program.json"
    program_json.write_text(program(8).to_json(), "utf-8")
    assert main(["bench", str(bundle), "--emulate", "--count"]) == 1
    err = capsys.readouterr().err
    assert "error[toolchain-missing]: qemu-static 10.0.2 has no plug-ins" in err
    assert "dynamic build" in err


@pytest.mark.needs("qemu-aarch64")
def test_count_needs_the_names_of_the_operations(
    bundle: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """A bundle without program.json cannot be counted."""
    manifest = bundle / "manifest.json"
    text = manifest.read_text("utf-8")
    manifest.write_text(text.replace('"role": "program"', '"role": "other"'), "utf-8")
    assert main(["bench", str(bundle), "--emulate", "--count"]) == 2
    assert "--count needs the names of the bundle's operations" in capsys.readouterr().err
