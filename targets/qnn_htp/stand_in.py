"""Qualcomm's library for x86-64 in place of a phone's HTP.

What it computes is what the SoC would, as far as Qualcomm models it.
"""

from __future__ import annotations

import os
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

from llamac.runtime.backend import BackendModel
from llamac.runtime.library import open_library
from llamac.targets.stand_in import StandIn

VARIABLE = "LLAMAC_QNN_LIBRARIES"


@dataclass(frozen=True)
class HtpStandIn(StandIn):
    """Where Qualcomm's libraries for this computer are, and their version for people."""

    libraries: Path
    version: str

    @property
    def description(self) -> str:
        """What it is, for people."""
        return f"x86-64 kernels and Qualcomm's HTP library for x86-64 ({self.version})"

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


def find_stand_in() -> HtpStandIn:
    """Find Qualcomm's libraries: the folder in $LLAMAC_QNN_LIBRARIES, else those of the extra.

    Raises:
        ToolchainMissing: the extra is not installed.
    """
    from llamac.targets.qnn_htp.toolchain import VERSION, find_qnn  # noqa: PLC0415

    named = os.environ.get(VARIABLE)
    if named:
        return HtpStandIn(Path(named), f"of ${VARIABLE}")
    return HtpStandIn(find_qnn().folder, f"onnxruntime-qnn {VERSION}")
