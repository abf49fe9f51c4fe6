"""`llamac bench --emulate --count` on an Arm bundle of the tiny model."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from llamac.runtime.manifest import read_manifest
from llamac.targets.emulator import find_emulator
from llamac.targets.hot_loops import library_of
from llamac.targets.mca import MODELS
from llamac.tools import bench_count
from llamac.tools.cli import main

pytestmark = pytest.mark.needs("qemu-aarch64")


@pytest.fixture(scope="module")
def board(compiled: Callable[..., Path], tiny: Path) -> Path:
    """The model for a Raspberry Pi 5."""
    if not find_emulator().has_plugins:
        pytest.skip("missing program: a qemu-aarch64 that loads plug-ins")
    return compiled(tiny / "spinquant", target="rpi5")


@pytest.fixture
def count(
    board: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> Callable[..., dict[str, Any]]:
    """Count, and read the JSON; cycles, which take seconds, only if asked for."""

    def run(*options: str, with_cycles: bool = False) -> dict[str, Any]:
        if not with_cycles:
            monkeypatch.setattr("llamac.targets.hot_loops.find_mca", lambda: None)
        assert main(["bench", str(board), "--emulate", "--count", "--json", *options]) == 0
        document: dict[str, Any] = json.loads(capsys.readouterr().out)
        assert (document["hot_loops"] is not None) == with_cycles
        return document

    return run


def test_counts_are_complete_and_the_same_in_every_run(
    count: Callable[..., dict[str, Any]], board: Path
) -> None:
    """Each step of a function once; products as many as the model has weights."""
    options = ("--cpu", "cortex-a76", "--prompt-tokens", "37", "--decode-tokens", "3")
    document = count(*options)
    assert (document["level"], document["bundle"]) == ("dotprod", str(board))
    decode, prefill = document["functions"]
    assert (decode["function"], decode["position"], decode["tokens"]) == ("decode", 39, 1)
    assert (prefill["function"], prefill["position"], prefill["tokens"]) == ("prefill_32", 0, 32)
    for cost in (decode, prefill):
        assert sum(k["calls"] for k in cost["kernels"]) == 45
        assert sum(k["instructions"] for k in cost["kernels"]) == cost["instructions"]
        assert all(sum(k["by_class"].values()) == k["instructions"] for k in cost["kernels"])
    int4 = [k for k in decode["kernels"] if k["family"] == "qmatmul_quads"]
    layer = 256 * 128 + 128 * 128 + 512 * 128 + 128 * 256
    assert sum(k["macs_per_token"] for k in int4) == 4 * layer
    assert all(0.1 < k["instructions_per_mac"] < 0.4 for k in int4)
    assert sum(k["by_class"]["dot"] for k in int4) == 4 * layer // 16
    assert count(*options)["functions"] == document["functions"]


def test_another_level_has_other_counts(count: Callable[..., dict[str, Any]]) -> None:
    """Plain NEON has no dot products, and takes more instructions; one token has no prefill."""
    best, neon = (
        count("--prompt-tokens", "1", "--level", level)["functions"]
        for level in ("dotprod", "neon")
    )
    assert [cost["function"] for cost in neon] == ["decode"]
    assert neon[0]["position"] == best[0]["position"] == 1
    assert not any(k["by_class"]["dot"] for k in neon[0]["kernels"])
    assert neon[0]["instructions"] > 1.2 * best[0]["instructions"]


@pytest.mark.needs("llvm-mca-19", "llvm-objdump-19")
def test_hot_loops_are_those_of_the_library(count: Callable[..., dict[str, Any]]) -> None:
    """Each int8 product that ran, on each model."""
    document = count("--cpu", "cortex-a76", "--prompt-tokens", "5", with_cycles=True)
    assert document["functions"][1]["tokens"] == 5
    loops = {loop["kernel"]: loop for loop in document["hot_loops"]}
    ran = {k["name"] for cost in document["functions"] for k in cost["kernels"]}
    assert set(loops) == {name for name in ran if name.startswith("qmatmul")}
    for name, loop in loops.items():
        assert set(loop["macs_per_cycle"]) == set(MODELS)
        assert loop["macs"] >= 256
        assert loop["macs_per_cycle"]["N1"] > 8, name


def test_tables_and_notes_for_people(
    board: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """Results on standard output; without llvm-mca one line says what would bring it."""
    arguments = ["bench", str(board), "--emulate", "--count", "--prompt-tokens", "8"]
    monkeypatch.setattr("llamac.targets.hot_loops.find_mca", lambda: None)
    assert main(arguments) == 0
    out, err = capsys.readouterr()
    title, header, first, *_ = out.splitlines()
    assert "dotprod, decode at position 8: " in title and title.endswith("instructions per token")
    assert (
        header.split()
        == "kernel calls instructions/token share MACs/token instructions/MAC".split()
    )
    assert len(first.split()) == 7
    assert "prefill_8 of 8 tokens at position 0: " in out
    assert "MACs per cycle" not in out
    [line] = [line for line in err.splitlines() if "llvm-mca" in line]
    assert line.endswith("apt-get install llvm-19")
    assert "count under qemu-aarch64" in err
    assert "those of the few lines of C between them are not" in err


@pytest.mark.needs("llvm-mca-19", "llvm-objdump-19")
def test_the_cores_of_the_soc_have_columns(board: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """A Raspberry Pi 5 has an A76, for which the model of the N1 stands."""
    assert main(["--plain", "bench", str(board), "--emulate", "--count"]) == 0
    out = capsys.readouterr().out
    _, found, table = out.partition("MACs per cycle of the hot loops on one core, by llvm-mca\n")
    assert found
    assert table.splitlines()[0].split()[-2:] == ["cortex-a76", "(N1)"]


def test_a_runner_without_marks_is_an_error(
    board: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """As older versions built it: no region comes out."""
    monkeypatch.setattr("llamac.targets.count.read_counts", lambda path: [])
    assert main(["bench", str(board), "--emulate", "--count"]) == 1
    err = capsys.readouterr().err
    assert "error[bundle-invalid]: " in err and "compile the model again" in err


def test_only_the_runner_marks_kernels(board: Path) -> None:
    """Libraries have no such code; the two marks are in execute.c alone."""
    begin, end = (word.to_bytes(4, "little") for word in (0xAA0A014A, 0xAA0B016B))
    library = library_of(board, read_manifest(board))
    assert library.parent.name == "glibc"
    for path, number in ((library, 0), (board / "bin" / "llamac-runner", 1)):
        data = path.read_bytes()
        assert (data.count(begin), data.count(end)) == (number, number)


def test_regions_are_counted_for_the_whole_run(board: Path) -> None:
    """What the plan says is what runs: steps of all functions, one region each."""
    program = bench_count.read_program(board, read_manifest(board))
    calls = bench_count.plan_calls(program, 45, 2)
    assert [len(call.function.steps) for call in calls] == [45] * 5
