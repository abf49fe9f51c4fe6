"""Target plug-ins: one class per processor, one TOML file per SoC."""

from __future__ import annotations

from llamac.targets.base import (
    Artifact,
    Identity,
    Lowered,
    LowerOptions,
    Missing,
    Target,
    WeightReader,
)
from llamac.targets.registry import load_target, target_names
from llamac.targets.soc import SoC, load_soc, soc_files

__all__ = [
    "Artifact",
    "Identity",
    "LowerOptions",
    "Lowered",
    "Missing",
    "SoC",
    "Target",
    "WeightReader",
    "load_soc",
    "load_target",
    "soc_files",
    "target_names",
]
