"""A library with which a computer stands in for a phone: its CPU's part in code for x86-64.

What executes graphs here, a vendor's library or an interpreter, runs on x86-64. So a bundle with
graphs carries its kernels a second time, compiled for x86-64 over the same packed weights, and the
same C support library. Graphs for an HTP are called as on a phone, those for an APU are handed to
the process (`runtime/c/hosted`). `--emulate` loads it.
"""

from __future__ import annotations

from pathlib import Path

from llamac.targets.base import Artifact, Identity, Lowered, Progress

ROLE = "emulation"
ARCH = "x86_64"
LIBRARY = Path("lib/emulation/libmodel.so")
TARGET = "x86_64-linux-gnu.2.28"
NOTE = "for x86-64 Linux, so that `--emulate` can run the bundle with what executes its graphs here"


def build_emulation(
    lowered: Lowered, identity: Identity, out: Path, progress: Progress
) -> Artifact:
    """Compile all kernels for x86-64 and link them into `LIBRARY`.

    Raises:
        BuildFailed, ToolchainMissing: see `link_shared`.
    """
    from llamac.schedules.intrin.arm_on_x86 import ArmOnX86  # noqa: PLC0415
    from llamac.targets.cpu.entry import Level, entry_source  # noqa: PLC0415
    from llamac.targets.cpu.target import (  # noqa: PLC0415
        RUNTIME_SOURCES,
        compile_levels,
        support_sources,
    )
    from llamac.targets.toolchain import find_toolchain, link_shared  # noqa: PLC0415

    work = out / "build" / ROLE
    work.mkdir()
    isa = ArmOnX86()
    level = Level(isa.name, isa.features)
    objects = compile_levels(lowered, [(isa, level)], work, progress)
    entry = work / "entry.c"
    source = entry_source(
        lowered.program, identity, [level], "LLAMAC_X86_", isa.alignment, is_emulation=True
    )
    entry.write_text(source, encoding="ascii")
    library = out / LIBRARY
    library.parent.mkdir(parents=True)
    link_shared(
        find_toolchain(),
        sources=support_sources(entry, lowered.program, is_emulation=True),
        objects=objects,
        include_dirs=[RUNTIME_SOURCES],
        out=library,
        target=TARGET,
        soname=LIBRARY.name,
        exports=["llamac_*", "__tvm_ffi_*"],
    )
    return Artifact(LIBRARY, ROLE, note=NOTE)
