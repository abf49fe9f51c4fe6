"""This computer in place of a phone with an NPU: its kernels, and what executes its graphs here.

    with load(bundle, machine=find_stand_in(read_manifest(bundle).graphs)) as model: ...

The bundle's library for emulation (`emulation_library.py`) runs in this process and calls the
graphs. Who executes these depends on their form: `qnn_htp/stand_in.py`, `neuropilot/stand_in.py`.
Speeds say nothing about a device.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING

from llamac.runtime import system
from llamac.runtime.checks import check_abi, file_of_role
from llamac.runtime.errors import CpuUnsupported, UsageError
from llamac.runtime.graph_entry import QNN_CONTEXT
from llamac.targets.emulation_library import ARCH, ROLE

if TYPE_CHECKING:
    from llamac.runtime.backend import BackendModel
    from llamac.runtime.graph_entry import GraphEntry
    from llamac.runtime.manifest import Manifest
    from llamac.targets.base import Artifact


class StandIn(ABC):
    """What executes graphs of one form here."""

    @property
    @abstractmethod
    def description(self) -> str:
        """What it is, for people."""

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
                cause="what a bundle carries for emulation is made for no other system",
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

    @abstractmethod
    def open_library(self, library: Path, weights: Path, level: str | None = None) -> BackendModel:
        """Load a library for emulation; `level` must be None.

        Raises:
            AcceleratorError: a graph is refused.
        """


def find_stand_in(graphs: Sequence[GraphEntry]) -> StandIn:
    """Find what executes these graphs here.

    Raises:
        ToolchainMissing: the optional extra for it is not installed.
    """
    # Late: each loads its vendor's part only.
    from llamac.targets.neuropilot import stand_in as apu  # noqa: PLC0415
    from llamac.targets.qnn_htp import stand_in as htp  # noqa: PLC0415

    is_htp = any(graph.form == QNN_CONTEXT for graph in graphs)
    return htp.find_stand_in() if is_htp else apu.find_stand_in()


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
