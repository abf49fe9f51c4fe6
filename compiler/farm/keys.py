"""Keys of a farm: a SoC and a core of it, "sm8650-cortex-x4" or "sm8650-v75"."""

from __future__ import annotations

from llamac.compiler.tuning.kernels import cpu_target
from llamac.runtime.errors import LlamacError, UsageError
from llamac.targets.cpu.target import CpuTarget
from llamac.targets.soc import load_soc, soc_files


def key_of(target: CpuTarget) -> str:
    """The key under which devices of a target are leased."""
    return f"{target.soc.name}-{target.tuned_core}"


def target_of(key: str) -> CpuTarget:
    """The target of a key.

    Raises:
        UsageError: no SoC has that core.
    """
    named = [name for name in soc_files() if key.startswith(f"{name}-")]
    keys = {}
    for name in sorted(named, key=len, reverse=True) or soc_files():
        for target in _targets(name):
            keys[key_of(target)] = target
    if key in keys:
        return keys[key]
    raise UsageError(
        f"there is no device key {key!r}",
        cause=f"keys are a SoC and its core: {', '.join(sorted(keys))}",
        fix="give one of these with --key",
    )


def _targets(soc: str) -> list[CpuTarget]:
    """Targets of a SoC whose kernels are tuned."""
    found = []
    for processor in load_soc(soc).processors:
        try:
            found.append(cpu_target(processor.plugin, soc))
        except LlamacError:  # a plug-in that tunes nothing, or is not installed
            continue
    return found
