"""What a bundle for the DSP carries for phones, beside the program for the emulator."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

from llamac.targets.base import Artifact
from llamac.targets.fastrpc.link import library_name, link_dsp_library
from llamac.targets.fastrpc.stub import ANDROID, link_stub
from llamac.targets.toolchain import Toolchain

DSP_ROLE = "dsp"
FLAVOURS = {"android": ANDROID, "glibc": "aarch64-linux-gnu.2.28"}
DSP_NOTE = "no phone has run it; tests run it under qemu-hexagon, behind a stand-in for FastRPC"
STUB_NOTE = "no phone has run it; tests run the same sources on x86-64, with a stand-in for FastRPC"


def link_for_phones(
    zig: Toolchain, *, entry: Path, objects: Sequence[Path], version: str, out: Path
) -> list[Artifact]:
    """Link the DSP library of a model, and the library for programs on the CPU.

    Args:
        zig: from `find_toolchain`.
        entry: the generated entry.c.
        objects: the kernels, compiled for the version.
        version: of the DSP, "v75".
        out: folder of the bundle.

    Returns:
        dsp/<version>/libllamac-<version>.so, where the other looks for it, and
        lib/<flavour>/libmodel.so, which has the functions of llamac.h.

    Raises:
        BuildFailed, ToolchainMissing: see `link_dsp_library` and `link_stub`.
    """
    library = out / "dsp" / version / library_name(version)
    library.parent.mkdir(parents=True)
    link_dsp_library(zig, entry=entry, objects=objects, version=version, out=library)
    artifacts = [Artifact(library.relative_to(out), DSP_ROLE, note=DSP_NOTE)]
    for flavour, target in FLAVOURS.items():
        stub = out / "lib" / flavour / "libmodel.so"
        stub.parent.mkdir(parents=True)
        how = link_stub(zig, target=target, out=stub)
        note = "; ".join(part for part in (how, STUB_NOTE) if part)
        artifacts.append(Artifact(stub.relative_to(out), "library", flavour, note))
    return artifacts
