"""How a model that was just built can be run, so that it can be compared with the reference."""

from __future__ import annotations

from collections.abc import Sequence
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING

from llamac.runtime import system
from llamac.runtime.errors import ToolchainMissing
from llamac.runtime.library import open_library
from llamac.targets.base import GRAPH_ROLE, Artifact, Target
from llamac.targets.runner_program import RUNNER_ROLE
from llamac.targets.stand_in import built_emulation, find_stand_in

# A layer of the 1B model is 34 MB and takes 10 to 25 s for a call; verification makes some thirty.
MOST_GRAPH_MEGABYTES = 100

if TYPE_CHECKING:
    from llamac.compiler.verify import OpenModel
    from llamac.runtime.graph_entry import GraphEntry


def opener(
    target: Target,
    folder: Path,
    artifacts: Sequence[Artifact],
    weights: str,
    graphs: Sequence[GraphEntry] = (),
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
        graphs: that the model calls.
    """
    emulation = built_emulation(folder, artifacts)
    if emulation is not None:
        if too_large := _too_large(folder, artifacts):
            open_model, where = None, too_large
        else:
            stand_in = find_stand_in(graphs)
            where = stand_in.description
            open_model = partial(stand_in.open_library, emulation, folder / weights)
        return open_model, where
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


def _too_large(folder: Path, artifacts: Sequence[Artifact]) -> str:
    """Why graphs are not executed while they are compiled; "" if they are, it takes minutes."""
    graphs = (folder / artifact.path for artifact in artifacts if artifact.role == GRAPH_ROLE)
    megabytes = sum(path.stat().st_size for path in graphs) // 1_000_000
    if megabytes <= MOST_GRAPH_MEGABYTES:
        return ""
    return (
        f"a token through {megabytes} MB of graphs takes minutes where they are emulated; "
        "verify with time: llamac verify BUNDLE MODEL --emulate"
    )
