"""MediaTek's offline compiler, where the user has it: a .tflite becomes a DLA for one APU.

The compiler, `ncc-tflite`, is in MediaTek's NeuroPilot SDK, which nobody but MediaTek may give
away. It is used only if the variable LLAMAC_NEUROPILOT_SDK names its folder, so that what a bundle
holds never depends on what happens to be installed. Options as in public scripts that call it; the
version of the accelerator, its local memory and their number come from the SoC file.
"""

from __future__ import annotations

import os
import re
import subprocess
import tempfile
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path

from llamac.runtime.errors import BuildFailed, ToolchainMissing
from llamac.targets.soc import SoC

VARIABLE = "LLAMAC_NEUROPILOT_SDK"
PROGRAM = "ncc-tflite"
WHERE_TO_GET_IT = "MediaTek's NeuroPilot portal (neuropilot.mediatek.com), with an account there"

_PROGRAM_FOLDERS = ("host/bin", "neuron_sdk/host/bin", "bin", ".")
_TAIL_LINES = 6


@dataclass(frozen=True)
class Sdk:
    """An SDK that was found.

    Attributes:
        program: its compiler.
        version: what the compiler says of itself, one line.
    """

    program: Path
    version: str


@dataclass(frozen=True)
class OfflineCompiler:
    """A compiler that knows the APU of a SoC, and the options for it."""

    sdk: Sdk
    options: tuple[str, ...]


def find_compiler(soc: SoC) -> OfflineCompiler | None:
    """Find the user's compiler and ask whether it compiles for a SoC; None: there is no SDK.

    Raises:
        ToolchainMissing: it is not where the variable says, or does not know the accelerator, or
            the SoC file does not tell which that is.
    """
    sdk = find_sdk()
    if sdk is None:
        return None
    options = compile_options(soc)
    _check_architecture(sdk, soc, options[0].removeprefix("--arch="))
    return OfflineCompiler(sdk, options)


def find_sdk() -> Sdk | None:
    """Find the compiler in the folder that the variable names; None: there is no variable.

    Raises:
        ToolchainMissing: it is not there, or does not tell its version.
    """
    named = os.environ.get(VARIABLE)
    if not named:
        return None
    for folder in _PROGRAM_FOLDERS:
        program = Path(named) / folder / PROGRAM
        if program.is_file():
            return Sdk(program, _ask_version(program))
    raise ToolchainMissing(
        f"no {PROGRAM} in {named}",
        cause=f"{VARIABLE} must name the SDK's folder, which has one of "
        + ", ".join(f"{folder}/{PROGRAM}" for folder in _PROGRAM_FOLDERS[:-1]),
        fix=f"correct {VARIABLE}, or unset it: the phone's adapter then compiles the graphs",
    )


def compile_options(soc: SoC) -> tuple[str, ...]:
    """Options of the compiler for a SoC's APU.

    Raises:
        ToolchainMissing: the SoC file does not tell the version of the accelerator.
    """
    apu = soc.apu
    if apu is None or apu.mdla is None:
        raise ToolchainMissing(
            f"no version of the MDLA of {soc.name} is known, so {PROGRAM} cannot be told what to "
            "compile for",
            cause="its SoC file has no apu.mdla: no source that may be quoted tells it",
            fix=f"take a copy of the SoC file, add the version that `{PROGRAM} --arch=?` and "
            f"MediaTek's documents name, and give the copy as --target; or unset {VARIABLE}",
        )
    options = [f"--arch=mdla{apu.mdla}"]
    if apu.l1_kib is not None:
        options.append(f"--l1-size-kb={apu.l1_kib}")
    if apu.mdla_cores is not None:
        options.append(f"--num-mdla={apu.mdla_cores}")
    # Float32 stands only between operations in RMSNorm; an MDLA has no more than float16 for it.
    return (*options, "--relax-fp32", "--opt=3", *apu.compiler_options)


def _check_architecture(sdk: Sdk, soc: SoC, wanted: str) -> None:
    """Fail if the compiler lists accelerators, and this one is not among them."""
    text = _run(sdk.program, "--arch=?").stdout
    known = re.findall(r"^\s*-\s*(\w[\w.]*)\s*$", text, re.MULTILINE)
    # One that lists nothing is left to say so itself.
    if known and wanted not in known:
        raise ToolchainMissing(
            f"{PROGRAM} ({sdk.version}) does not know {wanted}, the accelerator of {soc.name}",
            cause=f"it compiles for {', '.join(known)}: the SDK is too old, or for other SoCs",
            fix=f"get a newer SDK from {WHERE_TO_GET_IT}, or unset {VARIABLE}",
        )


def compile_dla(compiler: OfflineCompiler, tflite: Path, out: Path) -> None:
    """Compile a graph.

    Args:
        compiler: what is called.
        tflite: the graph.
        out: the file that is written.

    Raises:
        BuildFailed: the compiler failed, or wrote nothing; the end of what it said is in the cause.
    """
    partial = out.with_name(out.name + ".partial")
    command = (*compiler.options, "-d", str(partial.resolve()), str(tflite.resolve()))
    try:
        done = _run(compiler.sdk.program, *command)
        if done.returncode == 0 and partial.is_file() and partial.stat().st_size > 0:
            partial.replace(out)
            return
    finally:
        partial.unlink(missing_ok=True)
    said = [line for line in (done.stdout + done.stderr).splitlines() if line.strip()]
    ended = "wrote nothing" if done.returncode == 0 else f"ended with code {done.returncode}"
    raise BuildFailed(
        f"{PROGRAM} does not compile {tflite.name}: it {ended}",
        cause="it said: " + " | ".join(said[-_TAIL_LINES:]) if said else "it said nothing",
        fix="keep the layers or the scheme that it refuses off the APU (--scheme, "
        f"--cpu-layers), or unset {VARIABLE}; called with {' '.join(compiler.options)}",
    )


def _ask_version(program: Path) -> str:
    done = _run(program, "--version")
    lines = (done.stdout + done.stderr).strip().splitlines()
    if done.returncode == 0 and lines:
        return lines[0].strip()
    raise ToolchainMissing(
        f"{program} does not tell its version: it ended with code {done.returncode}",
        cause=lines[-1].strip() if lines else "it said nothing",
        fix="the SDK is for x86-64 Linux; see that it is whole, and that its libraries load",
    )


def _run(program: Path, *arguments: str) -> subprocess.CompletedProcess[str]:
    """Call the compiler in a folder where it may leave what it likes."""
    with tempfile.TemporaryDirectory(prefix="llamac-ncc-") as folder:
        try:
            return subprocess.run(
                [str(program.resolve()), *arguments],
                cwd=folder,
                env=_environment(program),
                stdin=subprocess.DEVNULL,
                capture_output=True,
                text=True,
                errors="replace",
                check=False,
            )
        except OSError as error:
            raise ToolchainMissing(
                f"{program} cannot be started: {error.strerror}",
                cause="it is damaged, not executable, or for another machine",
                fix=f"get the SDK again from {WHERE_TO_GET_IT}, or unset {VARIABLE}",
            ) from error


def _environment(program: Path) -> Mapping[str, str]:
    """Let the compiler find the libraries that lie beside it."""
    libraries = program.resolve().parent.parent / "lib"
    others = os.environ.get("LD_LIBRARY_PATH")
    path = f"{libraries}{os.pathsep}{others}" if others else str(libraries)
    return os.environ | {"LD_LIBRARY_PATH": path} if libraries.is_dir() else os.environ
