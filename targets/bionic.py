"""Libraries for Android, whose C library is bionic: with the NDK, or with zig alone.

zig has no bionic. Without an NDK, the support library is compiled with the headers of musl and
`c/bionic.h`, which says why that is right and checks it, and linked against stubs: libraries that
have the names of bionic's symbols and nothing else. The linker takes from them what NEEDED must
say, and refuses a symbol that is not in SYMBOLS, so that a library which bionic could not load is
not built. That it does load can only be seen on a device.
"""

from __future__ import annotations

import os
import platform
import tempfile
from collections.abc import Sequence
from pathlib import Path

from llamac.runtime.errors import ToolchainMissing
from llamac.targets.toolchain import (
    PAGE_BYTES,
    Toolchain,
    compile_object,
    find_compiler,
    link_objects,
    link_shared,
)

API_LEVEL = 28
TARGET = f"aarch64-linux-android{API_LEVEL}"
NDK_VARIABLE = "ANDROID_NDK_HOME"

HEADER = Path(__file__).parent / "c" / "bionic.h"
_MUSL = "aarch64-linux-musl"

# Without it, LLVM makes bcmp of a memcmp whose sign nobody needs: musl and glibc have it, bionic
# has not on 64-bit systems.
_CFLAGS = ("-include", str(HEADER), "-fno-builtin-bcmp")

SYMBOLS = {
    "libc.so": {
        "__errno": 21,
        "__sched_cpucount": 21,
        "access": 21,
        "calloc": 21,
        "clock_gettime": 21,
        "close": 21,
        "free": 21,
        "fstat": 21,
        "fsync": 21,
        "getauxval": 21,
        "getenv": 21,
        "madvise": 21,
        "malloc": 21,
        "memcmp": 21,
        "memcpy": 21,
        "memmove": 21,
        "memset": 21,
        "mkdir": 21,
        "mkstemp": 21,
        "mmap": 21,
        "mprotect": 21,
        "munmap": 21,
        "open": 21,
        "posix_memalign": 21,
        "prctl": 21,
        "pread": 21,
        "pthread_attr_destroy": 21,
        "pthread_attr_init": 21,
        "pthread_attr_setstacksize": 21,
        "pthread_create": 21,
        "pthread_join": 21,
        "pthread_mutex_destroy": 21,
        "pthread_mutex_init": 21,
        "pthread_mutex_lock": 21,
        "pthread_mutex_unlock": 21,
        "pthread_self": 21,
        "pthread_sigmask": 21,
        "rename": 21,
        "sched_getaffinity": 21,
        "sched_setaffinity": 21,
        "setenv": 21,
        "sigfillset": 21,
        "snprintf": 21,
        "sscanf": 21,
        "strcmp": 21,
        "strerror": 21,
        "strlen": 21,
        "strncmp": 21,
        "strrchr": 21,
        "syscall": 21,
        "unlink": 21,
        "vsnprintf": 21,
        "write": 21,
    },
    # Of bundles that load the libraries of another processor.
    "libdl.so": {
        "dlclose": 21,
        "dlerror": 21,
        "dlopen": 21,
        "dlsym": 21,
    },
}
"""Per library, the functions that we may use, and the API level at which 64-bit Arm got each.

bionic's libc.map.txt, introduced-arm64; 21 is the first level with 64-bit Arm. memmove and strlen
are here because compilers make calls of them. What the support library begins to call is added
with its level, if that is not above API_LEVEL and its types are in `c/bionic.h`.
"""


def find_ndk() -> Toolchain | None:
    """Return the compiler of the NDK that $ANDROID_NDK_HOME names; None if it is not set.

    Raises:
        ToolchainMissing: it is set, and there is no compiler that runs.
    """
    given = os.environ.get(NDK_VARIABLE)
    if not given:
        return None
    host = f"{platform.system().lower()}-x86_64"  # of all NDKs, on other processors too
    clang = Path(given, "toolchains/llvm/prebuilt", host, "bin", f"{TARGET}-clang")
    found = find_compiler(str(clang), "the Android NDK's clang", TARGET)
    if found is None:
        raise ToolchainMissing(
            f"there is no usable Android NDK at {given}",
            cause=f"{clang} {'does not run' if clang.exists() else 'does not exist'}",
            fix=f"set {NDK_VARIABLE} to the folder of an NDK (the one with toolchains/ in it), or "
            "unset it to link with zig",
        )
    return found


def link_for_bionic(
    toolchain: Toolchain,
    *,
    sources: Sequence[Path],
    objects: Sequence[Path],
    include_dirs: Sequence[Path],
    out: Path,
    soname: str,
    exports: Sequence[str],
) -> str:
    """Compile C files and link them with objects into a library for Android, 64-bit Arm.

    Args:
        toolchain: zig; the NDK is taken instead if there is one.
        sources: C11 files.
        objects: object files.
        include_dirs: for the sources.
        out: the library.
        soname: DT_SONAME.
        exports: as for `link_shared`.

    Returns:
        What linked it, and that no bionic has loaded it, in words for the user.

    Raises:
        BuildFailed: the compiler or linker reported an error, or a symbol is not in SYMBOLS.
        ToolchainMissing: $ANDROID_NDK_HOME is wrong.
    """
    ndk = find_ndk()
    if ndk is not None:
        link_shared(
            ndk,
            sources=sources,
            objects=objects,
            include_dirs=include_dirs,
            out=out,
            target=TARGET,
            soname=soname,
            cflags=[f"-Wl,-z,common-page-size={PAGE_BYTES}"],  # as in link_objects
            exports=exports,
        )
        how = f"{ndk.name}, {ndk.version}"
    else:
        with tempfile.TemporaryDirectory(dir=out.parent) as folder:
            support = Path(folder, "support.o")
            compile_object(
                toolchain,
                sources=sources,
                include_dirs=include_dirs,
                out=support,
                target=_MUSL,
                cflags=_CFLAGS,
            )
            stubs = [make_stub(toolchain, name, Path(folder)) for name in SYMBOLS]
            inputs = [support, *objects, *stubs]
            link_objects(toolchain, inputs, out=out, soname=soname, exports=exports)
        how = f"{toolchain.name} {toolchain.version} with stubs of bionic, without an NDK"
    return f"linked for Android API {API_LEVEL} by {how}; not loaded on bionic, which needs a phone"


def make_stub(zig: Toolchain, name: str, folder: Path) -> Path:
    """Make a library that has the names of `SYMBOLS[name]` and nothing behind them."""
    source, compiled, out = (folder / (name + suffix) for suffix in (".s", ".o", ""))
    lines = (f".globl {x}\n.type {x}, %function\n{x}:\n" for x in SYMBOLS[name])
    source.write_text(".text\n" + "".join(lines), encoding="ascii")
    compile_object(zig, sources=[source], include_dirs=(), out=compiled, target=_MUSL)
    link_objects(zig, [compiled], out=out, soname=name)
    return out
