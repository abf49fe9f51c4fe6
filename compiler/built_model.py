"""How a model that was just built can be run, so that it can be compared with the reference."""

from __future__ import annotations

from collections.abc import Sequence
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING

from llamac.runtime import system
from llamac.runtime.errors import ToolchainMissing
from llamac.runtime.library import open_library
from llamac.targets.base import Artifact, Target
from llamac.targets.runner_program import RUNNER_ROLE
from llamac.targets.stand_in import built_emulation, find_stand_in

if TYPE_CHECKING:
    from llamac.compiler.verify import OpenModel


def opener(
    target: Target, folder: Path, artifacts: Sequence[Artifact], weights: str
) -> tuple[OpenModel | None, str]:
    """Return how to open what was built, and where it runs; None and why it cannot run here.

    On its own architecture the library is loaded, the one for this process's C library if there
    is one for each. Elsewhere an emulator runs the runner, which has the same objects in it. What
    has graphs runs in its library for emulation.

    Args:
        target: that built it.
        folder: of the bundle.
        artifacts: what was built.
        weights: name of the weights.
    """
    emulation = built_emulation(folder, artifacts)
    if emulation is not None:
        stand_in = find_stand_in()
        return partial(stand_in.open_library, emulation, folder / weights), stand_in.description
    if target.arch == system.machine():
        fits = (None, system.c_library())
        for library in artifacts:
            if library.role == "library" and library.flavour in fits:
                return partial(open_library, folder / library.path, folder / weights), (
                    "this machine"
                )
        return None, f"no library was built for the C library of this process, {fits[1]}"
    from llamac.targets.emulator import find_emulator  # noqa: PLC0415

    runners = [artifact.path for artifact in artifacts if artifact.role == RUNNER_ROLE]
    if not runners:
        return None, f"it is for {target.arch}, and no runner was built"
    try:
        emulator = find_emulator(arch=target.arch)
    except ToolchainMissing as error:
        return None, f"{error.message}; verify later: llamac verify BUNDLE MODEL --emulate"
    return partial(emulator.open_runner, folder / runners[0], folder / weights), (
        emulator.description
    )
