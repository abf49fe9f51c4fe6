"""Link the DSP library of a model: kernels, tables, and the support library without a system.

zig compiles the C files and has LLVM's linker and compiler-rt inside; nothing of Qualcomm's is
needed. `elf.py` gives the result its last form.
"""

from __future__ import annotations

import tempfile
from collections.abc import Sequence
from pathlib import Path

from llamac.targets.fastrpc.elf import PAGE_BYTES, finish_library
from llamac.targets.toolchain import Toolchain, compile_object, run_zig

RUNTIME_SOURCES = Path(__file__).parents[2] / "runtime" / "c"
DSP_SOURCES = RUNTIME_SOURCES / "dsp"

INTERFACE = "llamac"
SKEL = f"{INTERFACE}_skel_handle_invoke"

IMPORTS = frozenset(
    {"HAP_mmap", "HAP_munmap", "free", "malloc", "memcmp", "memcpy", "memmove", "memset"}
)
"""Symbols that the image of every DSP has and a library may leave to it.

The library names no library that it needs: the image is searched first. Helpers of the compiler
(division, square roots) are linked in.
"""

# Code for v62 runs on all DSPs, and QEMU 7.2 executes it rightly: see ARCH_FLAGS in
# targets/runner_program.py. The kernels decide which version the library says.
_CPU = "hexagonv62"
_HEADERS = "hexagon-linux-musl"  # for the C library's declarations alone
_CFLAGS = (f"-mcpu={_CPU}", "-fno-builtin", "-fno-stack-protector")

_SHARED = ("session.c", "execute.c")
_LINK_FLAGS = (
    *("-m", "hexagonelf", "-shared", "-Bsymbolic", "--hash-style=sysv", "--gc-sections", "-s"),
    *("-z", "now", "-z", "norelro", "-z", "text", "-z", f"max-page-size={PAGE_BYTES}"),
    *("--no-rosegment", "--build-id=none", "-rpath", "."),
)


def library_name(version: str) -> str:
    """File name of the library for a version of the DSP, "v75"; phones look for it by name."""
    return f"lib{INTERFACE}-{version}.so"


def link_dsp_library(
    zig: Toolchain, *, entry: Path, objects: Sequence[Path], version: str, out: Path
) -> None:
    """Link a library that FastRPC can load.

    Args:
        zig: from `find_toolchain`; no system compiler links for Hexagon.
        entry: the generated entry.c.
        objects: the kernels, compiled for the version.
        version: of the DSP, "v75".
        out: the library; its folder exists.

    Raises:
        BuildFailed: a tool reported an error, or the result is in a form that no DSP loads.
    """
    with tempfile.TemporaryDirectory(dir=out.parent) as folder:
        support, helpers, linked = (Path(folder, name) for name in ("s.o", "rt.a", out.name))
        sources = [*sorted(DSP_SOURCES.glob("*.c")), *(RUNTIME_SOURCES / x for x in _SHARED)]
        compile_object(
            zig,
            sources=[entry, *sources],
            include_dirs=[RUNTIME_SOURCES, DSP_SOURCES],
            out=support,
            target=_HEADERS,
            cflags=_CFLAGS,
        )
        _compiler_helpers(zig, helpers)
        exports = Path(folder, "exports")
        exports.write_text(f"{{ global: {SKEL}; local: *; }};\n", encoding="ascii")
        flags = [*_LINK_FLAGS, "-soname", library_name(version), f"--version-script={exports}"]
        inputs = [support, *objects, helpers]
        run_zig(zig, ["ld.lld", *flags, *map(str, inputs), "-o", str(linked)], out)
        out.write_bytes(finish_library(linked.read_bytes(), imports=IMPORTS))


def _compiler_helpers(zig: Toolchain, out: Path) -> None:
    """Make the archive of compiler-rt; 8 s for the first time, then from zig's cache."""
    empty = out.with_suffix(".zig")
    empty.write_text("", encoding="ascii")
    target = ["-target", "hexagon-freestanding", f"-mcpu={_CPU}"]
    flags = ["-fcompiler-rt", "-fPIC", "-O", "ReleaseSmall", f"-femit-bin={out}"]
    run_zig(zig, ["build-lib", *target, *flags, str(empty)], out)
