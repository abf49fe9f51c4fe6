"""Link the CPU side of a model on the DSP: `llamac.h` on top of the phone's FastRPC."""

from __future__ import annotations

from pathlib import Path

from llamac.targets.bionic import link_for_bionic
from llamac.targets.fastrpc.link import DSP_SOURCES, RUNTIME_SOURCES
from llamac.targets.toolchain import Toolchain, link_shared

STUB_SOURCES = RUNTIME_SOURCES / "fastrpc"
ANDROID = "android"

_EXPORTS = ("llamac_*",)
_INCLUDES = (STUB_SOURCES, DSP_SOURCES, RUNTIME_SOURCES)


def link_stub(zig: Toolchain, *, target: str, out: Path) -> str:
    """Link the library that programs on the phone load; it serves every model.

    Args:
        zig: from `find_toolchain`.
        target: zig's name of CPU, system and C library, or ANDROID.
        out: the library; its folder exists.

    Returns:
        What linked it for Android, in words for the user; "" for another system.

    Raises:
        BuildFailed, ToolchainMissing: see `link_shared` and `link_for_bionic`.
    """
    sources = [*sorted(STUB_SOURCES.glob("*.c")), RUNTIME_SOURCES / "error.c"]
    if target == ANDROID:
        return link_for_bionic(
            zig,
            sources=sources,
            objects=(),
            include_dirs=_INCLUDES,
            out=out,
            soname=out.name,
            exports=_EXPORTS,
        )
    link_shared(
        zig,
        sources=sources,
        objects=(),
        include_dirs=_INCLUDES,
        out=out,
        target=target,
        soname=out.name,
        exports=_EXPORTS,
    )
    return ""
