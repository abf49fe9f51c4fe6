"""Run bundles of another processor here: qemu's user mode and the bundle's llamac-runner.

    with load("llama-1b-sm8650", machine=find_emulator()) as model:
        print(*model.generate("Why is the sky blue?", max_tokens=8), sep="")

`find_emulator(arch="hexagon")` is for bundles of a DSP. The emulated CPU is a model of QEMU's, such
as cortex-a76, with properties behind it if wanted: "max,sve256=on". The library in the runner picks
its kernels by what that CPU offers, as it does on a device. Speeds are those of the emulator and
say nothing about a device.
"""

from __future__ import annotations

import os
import re
import shutil
import subprocess
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from llamac.runtime import system
from llamac.runtime.checks import check_abi, file_of_role
from llamac.runtime.errors import (
    BundleInvalid,
    CpuUnsupported,
    LlamacError,
    ToolchainMissing,
    UsageError,
)
from llamac.runtime.manifest import Manifest, read_manifest
from llamac.runtime.remote import RemoteModel
from llamac.targets.runner_program import RUNNER_ROLE
from llamac.targets.stand_in import StandIn, find_stand_in

CPU_VARIABLE = "QEMU_CPU"


@dataclass(frozen=True)
class Architecture:
    """An architecture that is emulated.

    Attributes:
        name: as in manifests, and as QEMU calls it.
        title: as people write it.
        variable: names another emulator than the first on PATH.
        default_cpu: CPU model if the user names none.
        elf_class, elf_machine: of its programs (elf.h).
    """

    name: str
    title: str
    variable: str
    default_cpu: str
    elf_class: int
    elf_machine: int

    @property
    def programs(self) -> tuple[str, str]:
        """Names of its emulators on PATH."""
        return f"qemu-{self.name}", f"qemu-{self.name}-static"


AARCH64 = Architecture("aarch64", "AArch64", "LLAMAC_QEMU", "max", elf_class=2, elf_machine=183)
# QEMU 7.2 knows one Hexagon, v67; newer ones know it too.
HEXAGON = Architecture(
    "hexagon", "Hexagon", "LLAMAC_QEMU_HEXAGON", "v67", elf_class=1, elf_machine=164
)
ARCHITECTURES = {arch.name: arch for arch in (AARCH64, HEXAGON)}
PROGRAMS = AARCH64.programs
PROGRAM_VARIABLE = AARCH64.variable

# Older ones compute int8 outer products of SME wrongly, so that their "max" must not offer it.
FIRST_VERSION_WITH_SME = (10, 0)


@dataclass(frozen=True)
class Emulator:
    """An emulator that was found, and the CPU that it stands for.

    Attributes:
        program: its path.
        version: of QEMU, (7, 2, 22).
        cpu: model and properties as QEMU's -cpu takes them.
        has_plugins: whether it loads plug-ins, which counting instructions needs.
        plugin: path of the plug-in that every program is run with, and its arguments; "" is none.
        arch: architecture of the programs that it runs.
        packets: file into which a runner for Hexagon writes what its kernels execute; "" is none.
    """

    program: str
    version: tuple[int, ...]
    cpu: str
    has_plugins: bool
    plugin: str = ""
    arch: str = AARCH64.name
    packets: str = ""

    @property
    def version_text(self) -> str:
        """Its version as QEMU writes it, "7.2.22"."""
        return ".".join(map(str, self.version))

    @property
    def description(self) -> str:
        """What it is, for people."""
        return f"{Path(self.program).name} {self.version_text}, CPU model {self.cpu}"

    def command(self, *program: str | Path) -> list[str]:
        """Return the command that runs a static program with its arguments."""
        plugins = ("-plugin", self.plugin) if self.plugin else ()
        return [self.program, "-cpu", self.cpu, *plugins, *map(str, program)]

    def check(self, bundle: Path, manifest: Manifest) -> None:
        """Check that the bundle is for the emulated architecture and has a runner.

        Raises:
            UsageError: it is for another architecture.
            BundleInvalid: it has no runner.
            AbiMismatch: bundle and runtime are of different versions.
        """
        check_abi(manifest)
        target = manifest.target
        if target.arch != self.arch:
            is_native = (target.arch, target.os) == (system.machine(), system.operating_system())
            raise UsageError(
                f"the bundle is for {target.arch} ({target.soc}), which is not emulated",
                cause=f"{Path(self.program).name} runs bundles for {self.arch}"
                if target.arch in ARCHITECTURES
                else f"--emulate runs bundles for {' and '.join(ARCHITECTURES)}",
                fix="leave out --emulate: this machine runs the bundle itself"
                if is_native
                else f"run it on a {target.arch} machine",
            )
        runner_of(bundle, manifest)

    def open(self, bundle: Path, manifest: Manifest, level: str | None) -> RemoteModel:
        """Start the bundle's runner and open its weights."""
        weights = bundle / manifest.file("weights")
        return self.open_runner(runner_of(bundle, manifest), weights, level)

    def open_runner(self, runner: Path, weights: Path, level: str | None) -> RemoteModel:
        """Start a runner and open weights.

        Raises:
            CpuUnsupported: the emulated CPU lacks features of the level.
            LlamacError: what RemoteModel raises.
        """
        try:
            count = ("--count", self.packets) if self.packets else ()
            command = self.command(runner, "--serve", *count)
            return RemoteModel(command, os.fspath(weights), level)
        except CpuUnsupported as error:
            raise CpuUnsupported(
                error.message.replace("this CPU", f"the emulated CPU {self.cpu}"),
                cause="the kernels of that level use instructions that the CPU model lacks",
                fix="choose another level, or another CPU model"
                + (" (--cpu max has all features)" if self.arch == AARCH64.name else ""),
            ) from error


def runner_of(bundle: Path, manifest: Manifest) -> Path:
    """Return the path of the bundle's llamac-runner.

    Raises:
        BundleInvalid: it has none, one that may not be executed, or one for another processor.
        BundleCorrupt: the file is missing.
    """
    path = file_of_role(bundle, manifest, RUNNER_ROLE, "runner to emulate")
    if not os.access(path, os.X_OK):
        raise BundleInvalid(
            f"{path} may not be executed",
            cause="the bundle was copied without the files' permissions",
            fix=f"chmod +x {path}",
        )
    _check_machine_code(path, ARCHITECTURES.get(manifest.target.arch, AARCH64))
    return path


def _check_machine_code(path: Path, arch: Architecture) -> None:
    """Look at the head of an ELF file, where byte 4 says how long addresses are, 18 which CPU."""
    with path.open("rb") as file:
        head = file.read(20)
    is_elf = len(head) == 20 and head.startswith(b"\x7fELF")
    found = (head[4], int.from_bytes(head[18:20], "little")) if is_elf else None
    if found != (arch.elf_class, arch.elf_machine):
        raise BundleInvalid(
            f"{path} is no program for {arch.name}",
            cause="it is an ELF file for another processor" if is_elf else "it is no ELF file",
            fix="compile the model again",
        )


def find_emulator(cpu: str | None = None, arch: str = AARCH64.name) -> Emulator:
    """Find the emulator of an architecture's programs.

    $LLAMAC_QEMU ($LLAMAC_QEMU_HEXAGON) names another one than the first on PATH. The CPU is `cpu`,
    else $QEMU_CPU (a variable of QEMU's own), else "max" ("v67").

    Raises:
        ToolchainMissing: there is none, or it does not run.
        UsageError: it does not know the CPU model, or the model not its properties.
    """
    wanted_arch = ARCHITECTURES[arch]
    variable, names = wanted_arch.variable, wanted_arch.programs
    program = os.environ.get(variable) or _first_on_path(names)
    if not program or shutil.which(program) is None:
        where = f"${variable} is {program}" if program else f"{names[0]} is not on PATH"
        raise _missing(f"no emulator for {wanted_arch.title} was found", where, wanted_arch)
    try:
        version = _version(program, wanted_arch)
        has_plugins = "-plugin" in _output(program, "-help")
        models = _cpu_models(program)
    except (OSError, subprocess.SubprocessError) as error:
        raise _missing(f"{program} does not run", str(error), wanted_arch) from error
    wanted = cpu or os.environ.get(CPU_VARIABLE) or wanted_arch.default_cpu
    model, comma, _ = wanted.partition(",")
    if models and model not in models:
        raise UsageError(
            f"{Path(program).name} has no CPU model {model!r}",
            cause=f"it knows {', '.join(models)}",
            fix="choose one of them with --cpu, or install a newer QEMU",
        )
    if comma or (not models and model != wanted_arch.default_cpu):
        _check_cpu(program, wanted, wanted_arch)
    if (
        wanted_arch == AARCH64
        and model == AARCH64.default_cpu
        and version < FIRST_VERSION_WITH_SME
        and ",sme" not in wanted
    ):
        wanted += ",sme=off"
    return Emulator(program, version, wanted, has_plugins, arch=arch)


def emulator_for(bundle: Path, cpu: str | None = None) -> Emulator | StandIn:
    """Find the emulator of a bundle's architecture; of AArch64 if there is none for it.

    A bundle with graphs needs what executes these, `stand_in.py`. What is wrong with the bundle is
    said by whoever opens it.

    Raises:
        UsageError: a CPU for a bundle with graphs.
        LlamacError: what `find_emulator` and `find_stand_in` raise.
    """
    try:
        manifest = read_manifest(bundle)
        arch, graphs = manifest.target.arch, manifest.graphs
    except LlamacError:
        arch, graphs = AARCH64.name, ()
    if graphs:
        if cpu is not None:
            raise UsageError(
                "--cpu cannot be chosen for a bundle with graphs",
                cause="its CPU is not emulated: code for this machine stands in for it",
                fix="leave out --cpu",
            )
        return find_stand_in(graphs)
    return find_emulator(cpu, arch if arch in ARCHITECTURES else AARCH64.name)


def _first_on_path(names: Sequence[str]) -> str | None:
    return next((path for path in map(shutil.which, names) if path), None)


def _missing(message: str, cause: str, arch: Architecture) -> LlamacError:
    return ToolchainMissing(
        message,
        cause=cause,
        fix=f"apt-get install qemu-user, or set {arch.variable} to the path of {arch.programs[0]}",
    )


def _version(program: str, arch: Architecture) -> tuple[int, ...]:
    """Version of a QEMU; refuses other programs, and QEMUs of other processors."""
    found = re.match(r"qemu-(\w+) version (\d+(?:\.\d+)*)", _output(program, "--version"))
    if found is None:
        why = "it does not say its version as QEMU's user mode"
        raise _missing(f"{program} is not QEMU", why, arch)
    if found[1] != arch.name:
        raise _missing(f"{program} does not emulate {arch.name}", f"it is qemu-{found[1]}", arch)
    return tuple(map(int, found[2].split(".")))


def _check_cpu(program: str, cpu: str, arch: Architecture) -> None:
    """Try a CPU: QEMU makes it before it looks at the program that it shall run."""
    try:
        said = _output(program, "-cpu", cpu, os.devnull)
    except (OSError, subprocess.SubprocessError) as error:
        raise _missing(f"{program} does not run", str(error), arch) from error
    if said and os.devnull not in said:
        raise UsageError(
            f"{Path(program).name} cannot emulate the CPU {cpu!r}",
            cause="; ".join(line.strip() for line in said.strip().splitlines()[:3]),
            fix="correct the properties behind the model's name, as in max,sve=off"
            if arch == AARCH64
            else f"leave out --cpu for {arch.default_cpu}, or install a newer QEMU",
        )


def _cpu_models(program: str) -> list[str]:
    """Names of the CPU models; empty if it lists none."""
    lines = _output(program, "-cpu", "help").splitlines()
    return [line.split()[0] for line in lines if line.startswith(" ") and line.strip()]


def _output(program: str, *arguments: str) -> str:
    done = subprocess.run(
        [program, *arguments],
        stdin=subprocess.DEVNULL,
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
        errors="replace",
        timeout=30,
        check=False,
    )
    return done.stdout
