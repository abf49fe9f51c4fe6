"""`llamac doctor`: each check tells right from wrong, and says why and what to do."""

from __future__ import annotations

import json
from importlib import metadata
from pathlib import Path

import pytest

from llamac.runtime.errors import ToolchainMissing
from llamac.targets import machine_code, toolchain
from llamac.tools import doctor
from llamac.tools.cli import main
from llamac.tools.doctor import FAIL, NOTE, OK, Finding


@pytest.mark.parametrize(
    ("version", "spec", "fits"),
    [
        ("2.13.0+cpu", "==2.13.0", True),
        ("2.13.1", "==2.13.0", False),
        ("0.1.14.post1", "==0.1.14.post1", True),
        ("0.1.14", "==0.1.14.post1", False),
        ("1.23.2", "<1.24,>=1.23", True),
        ("1.24", "<1.24,>=1.23", False),
        ("1.9", ">=1.23", False),
        ("15.0.0", ">=13", True),
        ("1.0", "", True),
    ],
)
def test_versions_are_compared_by_number(version: str, spec: str, fits: bool) -> None:
    """Parts of a version are numbers, and a local part does not count."""
    assert doctor.satisfies(version, spec) is fits


def test_a_missing_package_names_the_extra(monkeypatch: pytest.MonkeyPatch) -> None:
    """What only compiling needs is installed by the extra; the rest comes with llamac."""

    def nothing(name: str) -> str:
        raise metadata.PackageNotFoundError(name)

    monkeypatch.setattr(metadata, "version", nothing)
    compiler = doctor.examine_package("ziglang==0.17.1", is_needed_to_run=False)
    runtime = doctor.examine_package("numpy>=1.26", is_needed_to_run=True)
    assert (compiler.status, compiler.fix) == (FAIL, "pip install 'llamac[compiler]'")
    assert (runtime.status, runtime.fix) == (FAIL, "pip install 'llamac'")


def test_a_package_of_another_version_is_found(monkeypatch: pytest.MonkeyPatch) -> None:
    """The pins are what was tested: another version fails, with the command that cures it."""
    monkeypatch.setattr(metadata, "version", lambda _name: "0.1.15")
    finding = doctor.examine_package("apache-tvm-ffi==0.1.14.post1", is_needed_to_run=False)
    assert finding.status == FAIL
    assert finding.found == "0.1.15, tested with ==0.1.14.post1"
    assert finding.fix == "pip install 'apache-tvm-ffi==0.1.14.post1'"


def test_all_pins_of_the_project_are_looked_at() -> None:
    """The list comes from the package's metadata, without what only developers need."""
    names = {finding.what for finding in doctor.examine_packages()}
    assert {"numpy", "tiktoken", "apache-tvm", "torch", "ziglang"} <= names
    assert "pytest" not in names


def test_an_old_python_fails() -> None:
    """3.11 is the oldest."""
    assert doctor.examine_python((3, 10, 14)).status == FAIL
    assert doctor.examine_python((3, 11, 0)).status == OK


def test_no_compiler_fails(monkeypatch: pytest.MonkeyPatch) -> None:
    """Without zig and without a system compiler nothing can be linked."""

    def missing() -> None:
        raise ToolchainMissing("none", cause="no ziglang", fix="pip install ziglang")

    monkeypatch.setattr(toolchain, "find_toolchain", missing)
    [finding] = (f for f in doctor.examine_tools() if f.what == "C compiler")
    assert finding.status == FAIL
    assert (finding.found, finding.fix) == ("no ziglang", "pip install ziglang")


def test_a_missing_emulator_is_a_note(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    """Compiling works without it; what is found says what it cannot do."""
    monkeypatch.delenv("QEMU_CPU", raising=False)
    monkeypatch.setenv("LLAMAC_QEMU", str(tmp_path / "qemu"))
    finding = doctor.examine_emulator()
    assert finding.status == "note"
    assert "apt-get install qemu-user" in finding.fix
    (tmp_path / "qemu").write_text("#!/bin/sh\necho qemu-aarch64 version 7.2.22\n")
    (tmp_path / "qemu").chmod(0o755)
    finding = doctor.examine_emulator()
    assert finding.status == "ok"
    assert finding.found.endswith(
        "7.2.22, CPU model max,sme=off; counting instructions needs one that loads plug-ins, as "
        "Debian 12's does; SME kernels need version 10"
    )


def test_an_emulator_says_what_it_can(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    """One that loads plug-ins counts; SME is right from version 10 on."""
    monkeypatch.delenv("QEMU_CPU", raising=False)
    monkeypatch.setenv("LLAMAC_QEMU", str(tmp_path / "qemu"))
    (tmp_path / "qemu").write_text("#!/bin/sh\necho qemu-aarch64 version 10.0.2 -plugin\n")
    (tmp_path / "qemu").chmod(0o755)
    found = doctor.examine_emulator().found
    assert found == "qemu 10.0.2, CPU model max; counts instructions; runs SME kernels"


def test_a_wrong_emulator_is_a_note(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    """A variable that names another program, and a CPU model that does not exist."""
    monkeypatch.setenv("LLAMAC_QEMU", "true")
    finding = doctor.examine_emulator()
    assert (finding.status, "is not QEMU" in finding.found) == (NOTE, True)
    (tmp_path / "qemu").write_text("#!/bin/sh\necho qemu-aarch64 version 10.0.2; echo '  max'\n")
    (tmp_path / "qemu").chmod(0o755)
    monkeypatch.setenv("LLAMAC_QEMU", str(tmp_path / "qemu"))
    monkeypatch.setenv("QEMU_CPU", "cortex-none")
    finding = doctor.examine_emulator()
    assert (finding.status, "no CPU model" in finding.found) == (NOTE, True)
    assert finding.fix


def test_missing_llvm_tools_are_a_note(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    """They only predict; an old one counts as none."""
    search_again = machine_code.find_llvm_tool.__wrapped__  # what it found before is cached
    monkeypatch.setattr(machine_code, "find_llvm_tool", search_again)
    monkeypatch.setenv("PATH", str(tmp_path))
    finding = doctor.examine_llvm_tools()
    assert finding.status == NOTE
    assert finding.found == "no llvm-mca and no llvm-objdump of version 16 or later"
    assert finding.fix.startswith("apt-get install llvm")
    for name, version in (("llvm-mca", 19), ("llvm-objdump", 14)):
        (tmp_path / name).write_text(f"#!/bin/sh\necho LLVM version {version}.0.0\n")
        (tmp_path / name).chmod(0o755)
    assert doctor.examine_llvm_tools().found == "no llvm-objdump of version 16 or later"
    (tmp_path / "llvm-objdump").write_text("#!/bin/sh\necho LLVM version 16.0.0\n")
    finding = doctor.examine_llvm_tools()
    assert finding.status == OK
    assert finding.found == f"{tmp_path}/llvm-mca, {tmp_path}/llvm-objdump"


def test_a_plugin_is_ready_if_it_is_for_one_of_its_socs() -> None:
    """Apple's files name the Arm plug-in, which makes no libraries for them, and come first."""
    [finding] = (f for f in doctor.examine_plugins() if f.what == "plug-in arm-cpu")
    if finding.status == OK:
        assert finding.found.endswith(", ready")
    else:
        assert "flavour" not in finding.found


@pytest.mark.parametrize(
    ("flags", "status", "level"),
    [
        ("fpu avx2 fma f16c avx512f avx512bw avx512vl avx512dq avx512_vnni", OK, "avx512vnni"),
        ("fpu avx2 fma f16c avx_vnni", OK, "avxvnni"),
        ("fpu avx2 fma f16c", OK, "avx2"),
        ("fpu sse4_2 avx", NOTE, "x86-64, correct but slow"),
    ],
)
def test_the_level_follows_the_features(
    flags: str, status: str, level: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Linux's words for features are understood; the best level that fits is named."""
    monkeypatch.setattr("platform.machine", lambda: "x86_64")
    cpuinfo = tmp_path / "cpuinfo"
    cpuinfo.write_text(f"processor : 0\nflags\t\t: {flags}\nbogomips : 1\n", "ascii")
    [finding] = (f for f in doctor.examine_cpu(cpuinfo) if f.what == "level")
    assert (finding.status, finding.found) == (status, level)


def test_another_architecture_cannot_compile_for_itself(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """`host` is x86-64 in this version, and doctor says so on an Arm machine."""
    monkeypatch.setattr("platform.machine", lambda: "aarch64")
    [finding] = doctor.examine_cpu(tmp_path / "none")
    assert finding.status == FAIL


def test_a_folder_without_room_is_a_note(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The folder need not exist yet; the nearest one above it counts."""
    folder = tmp_path / "cache" / "llamac"
    assert doctor.examine_folder("cache", folder, "why").status == OK
    monkeypatch.setattr(doctor, "DISK_BYTES", 1 << 60)
    assert doctor.examine_folder("cache", folder, "why").status == NOTE
    monkeypatch.setattr("os.access", lambda _path, _mode: False)
    assert doctor.examine_folder("cache", folder, "why").status == FAIL


def test_a_broken_plugin_of_somebody_else_does_not_fail(monkeypatch: pytest.MonkeyPatch) -> None:
    """Only the plug-in of this machine's CPU decides whether compiling for it is possible."""
    monkeypatch.setattr("llamac.targets.registry.target_names", lambda: ("dsp",))
    monkeypatch.setattr("llamac.targets.registry.distribution_of", lambda _name: "other 1.0")
    found = {finding.what: finding for finding in doctor.examine_plugins()}
    assert found["plug-in x86-cpu"].status == FAIL
    assert found["plug-in dsp"].status == NOTE
    assert found["plug-in dsp"].fix


@pytest.mark.parametrize(("status", "code"), [(OK, 0), (NOTE, 0), (FAIL, 1)])
def test_the_exit_code_says_whether_compiling_is_possible(
    status: str,
    code: int,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    """A note is no failure; a failure is shown with why and fix, and in the JSON form."""
    finding = Finding("zig", status, "nothing", "links", "" if status == OK else "install it")
    monkeypatch.setattr(doctor, "examine", lambda: iter([finding]))
    assert main(["doctor"]) == code
    text = capsys.readouterr().out
    assert ("  why: links\n  fix: install it\n" in text) is (status != OK)
    assert main(["doctor", "--json"]) == code
    document = json.loads(capsys.readouterr().out)
    assert document["ready"] is (code == 0)
    assert document["findings"][0]["status"] == status
