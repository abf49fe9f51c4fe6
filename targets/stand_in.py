"""This computer in place of a phone with an HTP: its kernels and Qualcomm's library for x86-64.

    with load(bundle, machine=find_stand_in()) as model: ...

The bundle's library for emulation (`emulation_library.py`) runs in this process and calls the
graphs. What Qualcomm's library computes is what the SoC would, as far as Qualcomm models it; speeds
say nothing about a device.
"""

from __future__ import annotations

import os
import sys
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

from llamac.runtime import system
from llamac.runtime.backend import BackendModel
from llamac.runtime.checks import check_abi, file_of_role
from llamac.runtime.errors import CpuUnsupported, UsageError
from llamac.runtime.library import open_library
from llamac.runtime.manifest import Manifest
from llamac.targets.base import Artifact
from llamac.targets.emulation_library import ARCH, ROLE

VARIABLE = "LLAMAC_QNN_LIBRARIES"


@dataclass(frozen=True)
class StandIn:
    """Where Qualcomm's libraries for this computer are, and their version for people."""

    libraries: Path
    version: str

    @property
    def description(self) -> str:
        """What it is, for people."""
        return f"x86-64 kernels and Qualcomm's HTP library for x86-64 ({self.version})"

    def check(self, bundle: Path, manifest: Manifest) -> None:
        """Check that the bundle has a library for emulation, and that it fits this machine.

        Raises:
            BundleInvalid: it has none.
            CpuUnsupported: this is no x86-64 Linux.
            AbiMismatch: bundle and runtime are of different versions.
        """
        check_abi(manifest)
        here = (system.machine(), system.operating_system())
        if here != (ARCH, "linux"):
            raise CpuUnsupported(
                f"graphs are emulated on {ARCH} linux, this machine is {' '.join(here)}",
                cause="Qualcomm's library that executes them here exists for no other system",
                fix="run the bundle on its phone, or emulate it on an x86-64 computer",
            )
        emulation_library(bundle, manifest)

    def open(self, bundle: Path, manifest: Manifest, level: str | None) -> BackendModel:
        """Load the library and open weights and graphs."""
        if level is not None:
            raise UsageError(
                f"--level {level} cannot be chosen here",
                cause="the kernels for x86-64 have one level, which no phone has",
                fix="leave out --level",
            )
        return self.open_library(
            emulation_library(bundle, manifest), bundle / manifest.file("weights")
        )

    def open_library(self, library: Path, weights: Path, level: str | None = None) -> BackendModel:
        """Load a library for emulation; `level` must be None.

        Raises:
            AcceleratorError: Qualcomm's library refuses a graph.
        """
        # The C library reads it when it opens graphs; a folder that the user names comes first.
        os.environ.setdefault(VARIABLE, os.fspath(self.libraries))
        with _without_output():  # Qualcomm's library prints a line when it is loaded
            return open_library(library, weights, level)


@contextmanager
def _without_output() -> Iterator[None]:
    """Drop what C code writes to standard output, which is for the model's text."""
    sys.stdout.flush()
    kept = os.dup(1)
    with open(os.devnull, "wb") as nowhere:
        os.dup2(nowhere.fileno(), 1)
    try:
        yield
    finally:
        os.dup2(kept, 1)
        os.close(kept)


def find_stand_in() -> StandIn:
    """Find Qualcomm's libraries: the folder in $LLAMAC_QNN_LIBRARIES, else those of the extra.

    Raises:
        ToolchainMissing: the extra is not installed.
    """
    from llamac.targets.qnn_htp.toolchain import VERSION, find_qnn  # noqa: PLC0415

    named = os.environ.get(VARIABLE)
    if named:
        return StandIn(Path(named), f"of ${VARIABLE}")
    return StandIn(find_qnn().folder, f"onnxruntime-qnn {VERSION}")


def emulation_library(bundle: Path, manifest: Manifest) -> Path:
    """Return the path of the bundle's library for emulation.

    Raises:
        BundleInvalid: it has none.
        BundleCorrupt: the file is missing.
    """
    return file_of_role(bundle, manifest, ROLE, "library for emulation")


def built_emulation(folder: Path, artifacts: Sequence[Artifact]) -> Path | None:
    """Return the path of a library for emulation that was just built, None without one."""
    return next((folder / a.path for a in artifacts if a.role == ROLE), None)
