"""llamac-runner: a bundle's kernels, the support library and `runtime/c/runner` as one program.

It is static (musl), so that it runs on every Linux and Android of its architecture, and under an
emulator of it, without anything beside it but the weights.
"""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

from llamac.targets.toolchain import Toolchain, link_executable

RUNTIME_SOURCES = Path(__file__).parents[1] / "runtime" / "c"
RUNNER = Path("bin/llamac-runner")
RUNNER_ROLE = "runner"

# Hexagon: lld leaves a relocation of thread-local storage in static programs that are compiled as
# position independent. QEMU 7.2 reads stale memory in a packet that loads what it stores, after a
# packet with a cancelled store; LLVM makes such packets from v65 on. Its pages are of 64 KiB.
ARCH_FLAGS = {
    "hexagon": (
        "-mcpu=hexagonv62",
        "-fno-pic",
        "-fno-pie",
        "-ftls-model=local-exec",
        "-Wl,-z,max-page-size=65536",
    ),
}


def link_runner(
    toolchain: Toolchain, *, entry: Path, objects: Sequence[Path], arch: str, out: Path
) -> None:
    """Link the runner of a model.

    Args:
        toolchain: from `find_toolchain`; it must be zig unless `arch` is this machine's and its C
            library is musl.
        entry: the generated entry.c.
        objects: the kernels, as for the library.
        arch: "aarch64", "x86_64" or "hexagon".
        out: the program; its folder exists.

    Raises:
        BuildFailed, ToolchainMissing: see `link_executable`.
    """
    link_executable(
        toolchain,
        sources=[
            entry,
            *sorted(RUNTIME_SOURCES.glob("*.c")),
            *sorted((RUNTIME_SOURCES / "runner").glob("*.c")),
        ],
        objects=objects,
        include_dirs=[RUNTIME_SOURCES],
        out=out,
        target=f"{arch}-linux-musl",
        # Kernels are marked for plug-ins that count (targets/count.py); it costs two instructions.
        cflags=["-static", "-DLLAMAC_MARK_KERNELS", *ARCH_FLAGS.get(arch, ())],
    )
