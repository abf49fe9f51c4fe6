"""The hot loops of a bundle's kernels on models of its cores, from the library that was built."""

from __future__ import annotations

from collections.abc import Collection, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from llamac.runtime.errors import LlamacError, ToolchainMissing
from llamac.runtime.manifest import Manifest
from llamac.targets.base import Progress
from llamac.targets.machine_code import PACKAGE, disassemble, find_llvm_tool
from llamac.targets.mca import CORES, MODELS, find_mca, hot_loop, macs_per_cycle
from llamac.targets.soc import load_soc

LIBRARY_ROLE = "library"
PREFERRED = "glibc"  # of several libraries with the same kernels


@dataclass(frozen=True)
class HotLoop:
    """The hot loop of a kernel.

    Attributes:
        kernel: its name.
        instructions: of one iteration.
        macs: int8 products of one iteration.
        macs_per_cycle: by model, a key of MODELS; None where the model rejects the loop.
    """

    kernel: str
    instructions: int
    macs: int
    macs_per_cycle: dict[str, float | None]

    def to_json(self) -> dict[str, Any]:
        """Return it as JSON values."""
        return vars(self)


def find_hot_loops(
    bundle: Path,
    manifest: Manifest,
    kernels: Sequence[str],
    level: str,
    *,
    models: Collection[str] = MODELS,
    progress: Progress,
) -> list[HotLoop]:
    """Disassemble the bundle's library and look at each kernel that multiplies int8.

    Kernels of SVE and SME are left out: the models know no vector length.

    Args:
        bundle: its folder.
        manifest: of the bundle.
        kernels: names, without the level; each is looked at once.
        level: name of the level whose kernels are meant.
        models: keys of MODELS.
        progress: called with each kernel.

    Returns:
        Loops in the order of the kernels.

    Raises:
        ToolchainMissing: llvm-mca or llvm-objdump is not installed.
        DeviceError: the library cannot be read.
    """
    objdump = find_llvm_tool("llvm-objdump")
    if objdump is None or find_mca() is None:
        raise ToolchainMissing(
            "cycles of processor models are left out: no llvm-mca",
            cause="llvm-mca and llvm-objdump of LLVM 16 or later are not both on PATH",
            fix=f"apt-get install {PACKAGE}",
        )
    code = disassemble(library_of(bundle, manifest), objdump)
    found = []
    seen: dict[tuple[str, ...], dict[str, float | None]] = {}
    kernels = list(dict.fromkeys(kernels))
    for done, kernel in enumerate(kernels):
        progress(kernel, done, len(kernels))
        loop = hot_loop(code.function(f"__tvm_ffi_{kernel}__{level.replace('-', '_')}"))
        if loop is not None:
            # Kernels that differ in a size alone have the same loop, up to addresses.
            key = tuple(instruction.text for instruction in loop.code)
            cycles = seen[key] = seen.get(key) or {
                name: macs_per_cycle(loop, MODELS[name]) for name in models
            }
            found.append(HotLoop(kernel, loop.instructions, loop.macs, cycles))
    return found


def library_of(bundle: Path, manifest: Manifest) -> Path:
    """The library to look at; where there are several, their kernels are the same."""
    names = [name for name, entry in manifest.files.items() if entry.role == LIBRARY_ROLE]
    return bundle / min(names, key=lambda name: PREFERRED not in name)


def models_of(manifest: Manifest) -> Sequence[tuple[str, str]]:
    """Cores of the bundle's SoC and the model that stands for each; all models if none is known."""
    try:
        clusters = load_soc(manifest.target.soc).clusters
    except LlamacError:  # a file of the user's that is not here
        clusters = ()
    cores = dict.fromkeys(c.mcpu for c in clusters if c.mcpu in CORES)
    return [(core, CORES[core]) for core in cores] or [(name, name) for name in MODELS]
