"""The chain model as a bundle of another processor, under QEMU; and finding QEMU."""

from __future__ import annotations

import os
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

from llamac.runtime import load, system
from llamac.runtime.errors import (
    AbiMismatch,
    BundleCorrupt,
    BundleInvalid,
    CpuUnsupported,
    DeviceError,
    ToolchainMissing,
    UsageError,
)
from llamac.runtime.manifest import read_manifest
from llamac.targets.emulator import Emulator, find_emulator

PROMPT = (11, 70, 257, 3, 260)


@pytest.fixture
def fake_qemu(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Callable[..., Path]:
    """Write a program that answers like some QEMU, and make it the one that is found."""

    def write(version: str, *, plugins: bool = True, cpus: str = "  max\n  cortex-a55\n") -> Path:
        path = tmp_path / "qemu-aarch64"
        lines = [
            "#!/bin/sh",
            'case "$1" in',
            f'--version) echo "{version}" ;;',
            f'-help) echo "{"-plugin FILE" if plugins else "-cpu MODEL"}" ;;',
            f"-cpu) [ \"$2\" != help ] || printf 'Available CPUs:\\n{cpus}' ;;",
            "esac",
        ]
        path.write_text("\n".join(lines) + "\n")
        path.chmod(0o755)
        monkeypatch.setenv("LLAMAC_QEMU", str(path))
        return path

    return write


# -- finding -------------------------------------------------------------------------------------


@pytest.fixture(autouse=True)
def no_choice(monkeypatch: pytest.MonkeyPatch) -> None:
    """Tests choose for themselves."""
    monkeypatch.delenv("QEMU_CPU", raising=False)
    monkeypatch.delenv("LLAMAC_QEMU", raising=False)


def test_an_emulator_says_what_it_is(fake_qemu: Callable[..., Path]) -> None:
    """Version, plug-ins and the CPU model are known before anything runs."""
    path = fake_qemu("qemu-aarch64 version 10.0.2 (Debian 1:10.0.2+ds-2)")
    emulator = find_emulator()
    assert emulator == Emulator(str(path), (10, 0, 2), "max", has_plugins=True)
    assert emulator.description == "qemu-aarch64 10.0.2, CPU model max"
    assert emulator.command("a", "--b") == [str(path), "-cpu", "max", "a", "--b"]
    counting = replace(emulator, plugin="c.so,out=d")
    assert counting.command("a")[3:] == ["-plugin", "c.so,out=d", "a"]


def test_an_old_emulator_does_not_offer_what_it_computes_wrongly(
    fake_qemu: Callable[..., Path],
) -> None:
    """QEMU 7.2 has SME, with wrong results of int8 outer products: only by name."""
    fake_qemu("qemu-aarch64 version 7.2.22", plugins=False)
    assert find_emulator() == find_emulator("max")
    assert find_emulator().cpu == "max,sme=off"
    assert not find_emulator().has_plugins
    assert find_emulator("max,sme=on").cpu == "max,sme=on"
    assert find_emulator("max,sve256=on").cpu == "max,sve256=on,sme=off"
    assert find_emulator("cortex-a55").cpu == "cortex-a55"


def test_the_cpu_is_the_arguments_before_the_variables(
    fake_qemu: Callable[..., Path], monkeypatch: pytest.MonkeyPatch
) -> None:
    """$QEMU_CPU is what QEMU itself would take."""
    fake_qemu("qemu-aarch64 version 10.0.2")
    monkeypatch.setenv("QEMU_CPU", "cortex-a55")
    assert find_emulator().cpu == "cortex-a55"
    assert find_emulator("max,sve=off").cpu == "max,sve=off"


def test_an_unknown_cpu_model_is_refused_with_the_known_ones(
    fake_qemu: Callable[..., Path],
) -> None:
    fake_qemu("qemu-aarch64 version 7.2.22")
    with pytest.raises(UsageError, match="no CPU model 'cortex-x4'") as info:
        find_emulator("cortex-x4,sve=off")
    assert "max, cortex-a55" in info.value.cause


def test_a_missing_emulator_is_an_error_with_the_command_that_installs_it(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path, fake_qemu: Callable[..., Path]
) -> None:
    """Not on PATH, not where the variable says, not QEMU, or unable to run."""
    monkeypatch.setenv("PATH", str(tmp_path))
    with pytest.raises(ToolchainMissing, match="no emulator for AArch64") as info:
        find_emulator()
    assert "apt-get install qemu-user" in info.value.fix
    monkeypatch.setenv("LLAMAC_QEMU", str(tmp_path / "none"))
    with pytest.raises(ToolchainMissing) as info:
        find_emulator()
    assert "$LLAMAC_QEMU is" in info.value.cause
    for text in ("something else", "true (GNU coreutils) 9.1, GNU GPL version 3 or later"):
        path = fake_qemu(text)
        with pytest.raises(ToolchainMissing, match="is not QEMU"):
            find_emulator()
    fake_qemu("qemu-arm version 7.2.22")
    with pytest.raises(ToolchainMissing, match="does not emulate aarch64") as info:
        find_emulator()
    assert info.value.cause == "it is qemu-arm"
    path.write_text("#!/does/not/exist\n")
    with pytest.raises(ToolchainMissing, match="does not run"):
        find_emulator()


# -- bundles that cannot be emulated -------------------------------------------------------------


def test_a_bundle_of_this_machine_is_not_emulated(
    bundle: Path, fake_qemu: Callable[..., Path]
) -> None:
    """It says that the bundle runs without."""
    fake_qemu("qemu-aarch64 version 10.0.2")
    if system.machine() != "x86_64":
        pytest.skip("this CPU is the emulated one")
    with pytest.raises(UsageError, match="is for x86_64") as info:
        load(bundle, machine=find_emulator())
    assert "leave out --emulate" in info.value.fix


def test_a_bundle_without_a_runner_is_refused(
    make_bundle: Any,
    chain_runner: Callable[[str], Path],
    fake_qemu: Callable[..., Path],
    tmp_path: Path,
) -> None:
    """No file of that role, no such program, not executable, gone, another version."""
    fake_qemu("qemu-aarch64 version 10.0.2")
    machine = find_emulator()

    def for_arm(document: dict[str, Any]) -> None:
        document["target"]["arch"] = "aarch64"

    with pytest.raises(BundleInvalid, match="has no runner") as info:
        load(make_bundle(change=for_arm), machine=machine)
    assert info.value.fix == "compile the model again"
    program = tmp_path / "program"
    elf_of_32_bit = chain_runner("aarch64").read_bytes()[:4] + b"\x01" + bytes(100)
    for content, cause in {
        b"#!/bin/sh\n": "no ELF file",
        chain_runner("aarch64").read_bytes()[:10]: "no ELF file",
        elf_of_32_bit: "for another processor",
        chain_runner("x86_64").read_bytes(): "for another processor",
    }.items():
        program.write_bytes(content)
        program.chmod(0o755)
        with pytest.raises(BundleInvalid, match="is no program for aarch64") as info:
            load(make_bundle(change=for_arm, runner=program), machine=machine)
        assert cause in info.value.cause
    bundle = make_bundle(change=for_arm, runner=chain_runner("aarch64"))
    (bundle / "bin" / "llamac-runner").chmod(0o644)
    with pytest.raises(BundleInvalid, match="may not be executed"):
        load(bundle, machine=machine)
    (bundle / "bin" / "llamac-runner").unlink()
    with pytest.raises(BundleCorrupt, match="is missing"):
        load(bundle, machine=machine)
    newer = make_bundle(change=lambda d: for_arm(d) or d.update(abi_version=9))
    with pytest.raises(AbiMismatch):
        load(newer, machine=machine)


# -- under QEMU ----------------------------------------------------------------------------------


@pytest.mark.needs("qemu-aarch64")
@pytest.mark.parametrize("cpu", [None, "cortex-a57"])
def test_a_bundle_of_another_processor_generates_the_same_tokens(
    arm_bundle: Path, cpu: str | None, greedy_after: Callable[..., list[int]]
) -> None:
    """The whole runtime works on an emulated machine as it does here."""
    with pytest.raises(CpuUnsupported, match="is for aarch64"):
        load(arm_bundle)
    with load(arm_bundle, machine=find_emulator(cpu), threads=2) as model:
        assert model.info.level == "portable"
        generation = model.generate(PROMPT, max_tokens=20)
        list(generation)
        assert len(generation.tokens) > 3
        assert list(generation.tokens) == greedy_after(PROMPT, len(generation.tokens))


@pytest.mark.needs("qemu-aarch64")
def test_the_features_are_those_of_the_cpu_model(arm_bundle: Path) -> None:
    """Levels are chosen by them, as on a device; nothing of this machine shines through."""
    weights = arm_bundle / "weights.bin"
    runner = arm_bundle / "bin" / "llamac-runner"
    expected = {"cortex-a57": set(), "cortex-a76": {"dotprod", "fullfp16"}}
    for cpu, features in expected.items():
        model = find_emulator(cpu).open_runner(runner, weights, None)
        assert set(model.features) == features
        model.close()
    model = find_emulator().open_runner(runner, weights, None)
    assert {"dotprod", "i8mm", "sve", "sve2"} <= set(model.features)
    model.close()
    # What the system hides is not there, as on phones that hide SVE.
    model = find_emulator("max,sve=off").open_runner(runner, weights, None)
    assert {"dotprod", "i8mm"} <= set(model.features)
    assert not {"sve", "sve2"} & set(model.features)
    model.close()


@pytest.mark.needs("qemu-aarch64")
def test_a_level_that_the_cpu_model_lacks_is_refused_before_it_runs(arm_bundle: Path) -> None:
    """The message is about the emulated CPU, and so is the fix."""
    with pytest.raises(CpuUnsupported, match="the emulated CPU cortex-a57 lacks avx512") as info:
        load(arm_bundle, machine=find_emulator("cortex-a57"), level="foreign")
    assert "--cpu" in info.value.fix
    with pytest.raises(UsageError, match="no level 'best'"):
        load(arm_bundle, machine=find_emulator(), level="best")


@pytest.mark.needs("qemu-aarch64")
@pytest.mark.parametrize(
    ("cpu", "words"),
    [
        ("max,wings=on", "wings"),
        ("max,sve", "sve"),
        ("cortex-a76,sve=on", "sve"),
        ("max,sve=off,sve256=on", "SVE must be enabled"),
    ],
)
def test_wrong_properties_of_a_cpu_model_are_refused_in_qemus_words(cpu: str, words: str) -> None:
    """QEMU is asked before a bundle is opened."""
    with pytest.raises(UsageError, match="cannot emulate the CPU") as info:
        find_emulator(cpu)
    assert words in info.value.cause


@pytest.mark.needs("qemu-aarch64")
def test_a_program_for_another_cpu_dies_with_the_emulators_words(
    arm_bundle: Path, chain_runner: Callable[[str], Path], tmp_path: Path
) -> None:
    """A wrong architecture, where nobody looked at the file before."""
    weights = arm_bundle / "weights.bin"
    if system.machine() == "x86_64":
        with pytest.raises(DeviceError, match="the runner ended") as info:
            find_emulator().open_runner(chain_runner("x86_64"), weights, None)
        assert "Invalid ELF image" in info.value.cause


@pytest.mark.needs("qemu-aarch64")
def test_a_crash_under_the_emulator_leaves_no_file(
    arm_bundle: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """QEMU writes core files of its own; the runner asks it not to."""
    monkeypatch.chdir(tmp_path)
    manifest = read_manifest(arm_bundle)
    model = find_emulator().open(arm_bundle, manifest, None)
    os.kill(model.process.pid, 4)
    with pytest.raises(DeviceError, match="SIGILL") as info:
        model.open_session(1, ())
    assert "another CPU" in info.value.fix
    assert list(tmp_path.iterdir()) == []
