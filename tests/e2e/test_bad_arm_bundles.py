"""Arm bundles, CPUs and emulators that do not fit, through the commands: nothing dies of it."""

from __future__ import annotations

import hashlib
import json
import shutil
from collections.abc import Callable
from pathlib import Path

import pytest

from llamac.runtime import load, system
from llamac.runtime.errors import CpuUnsupported
from llamac.runtime.manifest import read_manifest
from llamac.targets.emulator import find_emulator

pytestmark = pytest.mark.needs("qemu-aarch64")

RUNNER = "bin/llamac-runner"

Copy = Callable[[Path], Path]
Refused = Callable[..., str]


@pytest.fixture(autouse=True)
def no_choice(monkeypatch: pytest.MonkeyPatch) -> None:
    """Tests choose the emulated CPU for themselves."""
    monkeypatch.delenv("QEMU_CPU", raising=False)


@pytest.fixture(scope="module")
def board(arm_bundle: Callable[[str], Path]) -> Path:
    return arm_bundle("spinquant")


def replace_runner(bundle: Path, content: bytes) -> None:
    """Put another program into the runner's place, and its size and hash into the manifest."""
    (bundle / RUNNER).write_bytes(content)
    path = bundle / "manifest.json"
    manifest = json.loads(path.read_text("utf-8"))
    entry = manifest["files"][RUNNER]
    entry |= {"bytes": len(content), "sha256": hashlib.sha256(content).hexdigest()}
    path.write_text(json.dumps(manifest), "utf-8")


def a_program_of_this_machine() -> bytes:
    return Path(str(shutil.which("true"))).resolve().read_bytes()


SPOILED: dict[str, tuple[str, Callable[[Path], object], str]] = {
    "deleted": ("bundle-corrupt", lambda b: (b / RUNNER).unlink(), "is missing"),
    "a folder": (
        "bundle-corrupt",
        lambda b: ((b / RUNNER).unlink(), (b / RUNNER).mkdir()),
        "is missing",
    ),
    "cut off": (
        "bundle-corrupt",
        lambda b: (b / RUNNER).write_bytes((b / RUNNER).read_bytes()[:5000]),
        "has 5000 bytes",
    ),
    "a program of this machine": (
        "bundle-corrupt" if system.machine() == "aarch64" else "bundle-invalid",
        lambda b: (b / RUNNER).write_bytes(a_program_of_this_machine()),
        RUNNER,
    ),
    "that program, in the manifest too": (
        "device" if system.machine() == "aarch64" else "bundle-invalid",
        lambda b: replace_runner(b, a_program_of_this_machine()),
        "",
    ),
    "a script": (
        "bundle-invalid",
        lambda b: replace_runner(b, b"#!/bin/sh\necho hello\n"),
        "no ELF file",
    ),
    "not executable": ("bundle-invalid", lambda b: (b / RUNNER).chmod(0o644), "chmod +x"),
}


@pytest.mark.parametrize("case", SPOILED)
def test_a_spoiled_runner_is_refused(
    case: str, board: Path, copied: Copy, refused: Refused
) -> None:
    """Before it runs, by every command that would run it."""
    code, spoil, words = SPOILED[case]
    bundle = copied(board)
    spoil(bundle)
    before = sorted(path.name for path in bundle.rglob("*"))
    for command in (("run", bundle, "Hi"), ("bench", bundle)):
        assert words in refused(*command, "--emulate", error=code)
    assert sorted(path.name for path in bundle.rglob("*")) == before


def test_a_bundle_of_another_cpu_names_the_way_to_run_it(
    board: Path, tiny: Path, compiled: Callable[..., Path], refused: Refused
) -> None:
    """Arm bundles here, and bundles of this machine under the emulator."""
    if system.machine() == "aarch64":
        pytest.skip("this CPU runs the bundle")
    assert "llamac run --emulate" in refused("run", board, "Hi", error="cpu-unsupported")
    host = compiled(tiny / "spinquant")
    assert "leave out --emulate" in refused("run", host, "Hi", "--emulate", error="usage")


@pytest.mark.parametrize(
    ("program", "words"),
    [("/does/not/exist", "$LLAMAC_QEMU is"), ("true", "is not QEMU"), ("sh", "is not QEMU")],
)
def test_what_is_no_emulator_is_refused(
    program: str, words: str, board: Path, refused: Refused, monkeypatch: pytest.MonkeyPatch
) -> None:
    """With the command that installs one."""
    monkeypatch.setenv("LLAMAC_QEMU", program)
    printed = refused("run", board, "Hi", "--emulate", error="toolchain-missing")
    assert words in printed
    assert "apt-get install qemu-user" in printed


CPUS = ["cortex-a57", "cortex-a76", "max,sve=off", "max"]


@pytest.mark.parametrize("cpu", CPUS)
def test_no_level_kills_the_process(cpu: str, board: Path) -> None:
    """Each one runs or is refused: no instruction is tried that the CPU model lacks."""
    runs = []
    for entry in read_manifest(board).target.levels:
        try:
            with load(board, level=entry.name, machine=find_emulator(cpu)) as model:
                "".join(model.generate("Once upon a time", max_tokens=2))
                runs.append(entry.name)
        except CpuUnsupported as error:
            assert "lacks" in error.message
    assert "neon" in runs
    assert ("dotprod" in runs) == (cpu != "cortex-a57")
    assert ("i8mm" in runs) == cpu.startswith("max")
    assert cpu == "max" or not {"sve", "sve2"} & {*runs}
