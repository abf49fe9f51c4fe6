"""LiteRT's interpreter in place of a phone's APU.

It executes the .tflite files of a bundle in this process, on the CPU, and defines what they compute
in integers. An APU may round elsewhere.
"""

from __future__ import annotations

from dataclasses import dataclass
from functools import cache
from importlib import metadata
from pathlib import Path

from llamac.runtime.backend import BackendModel
from llamac.runtime.library import Library, NativeModel
from llamac.targets.hosted_graphs import GraphHost
from llamac.targets.neuropilot.interpreter import find_litert
from llamac.targets.stand_in import StandIn


@dataclass(frozen=True)
class ApuStandIn(StandIn):
    """The version of LiteRT, for people."""

    version: str

    @property
    def description(self) -> str:
        """What it is, for people."""
        return f"x86-64 kernels and LiteRT's interpreter (ai-edge-litert {self.version})"

    def open_library(self, library: Path, weights: Path, level: str | None = None) -> BackendModel:
        """Load a library for emulation; `level` must be None.

        Raises:
            AcceleratorError: the interpreter refuses a graph.
        """
        loaded = Library(library)
        graph_host().serve(loaded)
        return NativeModel(loaded, weights, level)


@cache
def graph_host() -> GraphHost:
    """What executes all .tflite files of this process; it lives as long as the process."""
    from llamac.targets.neuropilot.executor import LiteRtGraph  # noqa: PLC0415

    return GraphHost(LiteRtGraph)


def find_stand_in() -> ApuStandIn:
    """Find LiteRT's interpreter.

    Raises:
        ToolchainMissing: the extra is not installed.
    """
    find_litert()
    return ApuStandIn(metadata.version("ai-edge-litert"))
