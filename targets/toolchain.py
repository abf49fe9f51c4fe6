"""Find a C compiler and link with it: zig from PyPI, or what the system has.

zig is preferred because it is installed by pip, carries the C libraries of many systems and thus
links for other CPUs and for older glibc versions than the host's. A system compiler links for the
host only.
"""

from __future__ import annotations

import importlib.util
import os
import platform
import shutil
import subprocess
import sys
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

from llamac.runtime.errors import BuildFailed, ToolchainMissing

DEFAULT_TARGET = "x86_64-linux-gnu.2.34"

_SYSTEM_COMPILERS = ("cc", "clang", "gcc")

# Lines of a failing tool's output that are worth showing.
_LAST_LINES = 12

_COMPILE_FLAGS = ("-std=c11", "-O2", "-g0", "-fvisibility=hidden")

# 16 KiB pages: recent Android phones refuse libraries with smaller alignment.
# Build ids and symbol tables would make equal inputs give different files.
PAGE_BYTES = 16384
_LINK_FLAGS = (f"-Wl,-z,max-page-size={PAGE_BYTES}", "-Wl,--build-id=none", "-Wl,-s")

# Both hash styles: bionic before API 23 knows only the old one.
_SHARED_FLAGS = ("-shared", "-fPIC", "-Wl,--hash-style=both", "-Wl,--no-undefined")


@dataclass(frozen=True)
class Toolchain:
    """A C compiler that was found and answered.

    Attributes:
        command: how to call it, without arguments.
        name: "zig", or the name of the system compiler.
        version: what it says about itself.
        target: the only one that it links for, "aarch64-linux-android28"; "": zig's choice of
            many, or for a system compiler the host.
    """

    command: tuple[str, ...]
    name: str
    version: str
    target: str = ""

    @property
    def is_zig(self) -> bool:
        """Whether it can link for other systems than the host."""
        return self.name == "zig"


def find_toolchain() -> Toolchain:
    """Return the zig of this Python environment, else a C compiler on PATH.

    Raises:
        ToolchainMissing: there is neither, or none of them runs.
    """
    if importlib.util.find_spec("ziglang") is not None:
        zig = (sys.executable, "-m", "ziglang")
        version = _first_line((*zig, "version"))
        if version:
            return Toolchain((*zig, "cc"), "zig", version)
    for name in _SYSTEM_COMPILERS:
        path = shutil.which(name)
        found = find_compiler(path, name) if path else None
        if found is not None:
            return found
    raise ToolchainMissing(
        "no C compiler was found",
        cause=f"this Python has no ziglang package, and {', '.join(_SYSTEM_COMPILERS)} "
        "are not on PATH or do not run",
        fix="pip install ziglang",
    )


def find_compiler(path: str, name: str, target: str = "") -> Toolchain | None:
    """Return the compiler at that path, or None if it does not run; see Toolchain."""
    version = _first_line((path, "--version"))
    return Toolchain((path,), name, version, target) if version else None


def link_shared(
    toolchain: Toolchain,
    *,
    sources: Sequence[Path],
    objects: Sequence[Path],
    include_dirs: Sequence[Path],
    out: Path,
    target: str = DEFAULT_TARGET,
    soname: str | None = None,
    cflags: Sequence[str] = (),
    exports: Sequence[str] = (),
) -> None:
    """Compile C files and link them with objects into a shared library.

    The same inputs give the same bytes, wherever they lie. The library needs libc, and libm if it
    calls it; everything else must be inside.

    Args:
        toolchain: from `find_toolchain`.
        sources: C11 files; symbols are hidden unless the source says otherwise.
        objects: object files for the same target.
        include_dirs: for the sources.
        out: the library; written only if everything succeeded.
        target: zig's name of CPU, system and C library.
        soname: DT_SONAME, or None for none.
        cflags: more flags for compiling and linking, after our own.
        exports: names or `*` patterns of the only symbols to export; empty: as visibility says.

    Raises:
        BuildFailed: the compiler or linker reported an error.
        ToolchainMissing: a system compiler was asked to link for another system.
    """
    flags = [*_SHARED_FLAGS]
    if soname is not None:
        flags.append(f"-Wl,-soname,{soname}")
    with _version_script(exports, out) as script:
        flags += [f"-Wl,{flag}" for flag in script]
        arguments = [*flags, *cflags, *_inputs(sources, objects, include_dirs)]
        _build(toolchain, target, arguments, out)


def link_executable(
    toolchain: Toolchain,
    *,
    sources: Sequence[Path],
    objects: Sequence[Path] = (),
    include_dirs: Sequence[Path] = (),
    out: Path,
    target: str = DEFAULT_TARGET,
    cflags: Sequence[str] = (),
) -> None:
    """Compile C files and link them with objects and shared libraries into a program.

    Args:
        toolchain: from `find_toolchain`.
        sources: C11 files.
        objects: object files and shared libraries (with a soname) for the same target.
        include_dirs: for the sources.
        out: the program; written only if everything succeeded.
        target: zig's name of CPU, system and C library.
        cflags: more flags, for example `-Wl,-rpath,$ORIGIN`.

    Raises:
        BuildFailed: the compiler or linker reported an error.
        ToolchainMissing: a system compiler was asked to link for another system.
    """
    _build(toolchain, target, [*cflags, *_inputs(sources, objects, include_dirs)], out)


def compile_object(
    zig: Toolchain,
    *,
    sources: Sequence[Path],
    include_dirs: Sequence[Path],
    out: Path,
    target: str,
    cflags: Sequence[str] = (),
) -> None:
    """Compile C files for a shared library into one object; only zig merges them.

    Args:
        zig: from `find_toolchain`.
        sources: as for `link_shared`.
        include_dirs: for the sources.
        out: the object.
        target: zig's name of CPU, system and C library, whose headers are used.
        cflags: more flags.

    Raises:
        BuildFailed: the compiler reported an error.
    """
    flags = [*_target_flags(zig, target), *_COMPILE_FLAGS, "-fPIC", *cflags]
    inputs = _inputs(sources, (), include_dirs)
    _run(zig, [*zig.command, *flags, "-c", *inputs, "-o", str(out)], out)


def link_objects(
    zig: Toolchain,
    objects: Sequence[Path],
    *,
    out: Path,
    soname: str,
    exports: Sequence[str] = (),
) -> None:
    """Link objects and shared libraries into a shared library, and nothing else with them.

    zig's lld does it, without the C library and start files that `zig cc` adds, so it also links
    for systems whose C library zig does not know. What no object and no library has is an error.

    Args:
        zig: from `find_toolchain`.
        objects: object files, and shared libraries that the result shall need if it uses them.
        out: the library.
        soname: DT_SONAME.
        exports: as for `link_shared`.

    Raises:
        BuildFailed: the linker reported an error.
    """
    # As `zig cc` does it: kernels have helpers that nobody calls any more.
    flags = ["-shared", "--eh-frame-hdr", "--gc-sections", "--as-needed", "-z", "text", "-z", "now"]
    flags += ["-z", f"common-page-size={PAGE_BYTES}"]  # read-only relocations end at a page, too
    for flag in (*_LINK_FLAGS, *_SHARED_FLAGS):
        flags += flag.removeprefix("-Wl,").split(",") if flag.startswith("-Wl,") else []
    with _version_script(exports, out) as script:
        flags += [*script, "-soname", soname, *map(str, objects), "-o", str(out)]
        run_zig(zig, ["ld.lld", *flags], out)


def run_zig(zig: Toolchain, arguments: Sequence[str], out: Path) -> None:
    """Run another of zig's tools than its C compiler, which makes `out`.

    Raises:
        BuildFailed: it reported an error.
    """
    _run(zig, [*zig.command[:-1], *arguments], out)


@contextmanager
def _version_script(exports: Sequence[str], out: Path) -> Iterator[list[str]]:
    """Give the linker's flags that leave only these symbols visible; none if all may be."""
    if not exports:
        yield []
        return
    script = out.with_name(out.name + ".exports")
    names = "".join(f" {name};" for name in exports)
    script.write_text(f"{{ global:{names} local: *; }};\n", encoding="ascii")
    try:
        yield [f"--version-script={script}"]
    finally:
        script.unlink()


def _inputs(
    sources: Sequence[Path], objects: Sequence[Path], include_dirs: Sequence[Path]
) -> list[str]:
    """Arguments that name the inputs and keep their folders out of the output."""
    folders = dict.fromkeys([*(path.parent for path in sources), *include_dirs])
    return [
        *(f"-ffile-prefix-map={folder}=." for folder in folders),
        *(f"-I{folder}" for folder in include_dirs),
        *map(str, sources),
        *map(str, objects),
    ]


def _build(toolchain: Toolchain, target: str, arguments: Sequence[str], out: Path) -> None:
    """Compile and link in one call, to a name beside `out` that is renamed at the end."""
    partial = out.with_name(out.name + ".partial")
    command = [
        *toolchain.command,
        *_target_flags(toolchain, target),
        *_COMPILE_FLAGS,
        *_LINK_FLAGS,
        *arguments,
        "-Wl,--as-needed",
        "-lm",
        "-ldl",
        "-o",
        str(partial),
    ]
    try:
        _run(toolchain, command, out)
        partial.replace(out)
    finally:
        partial.unlink(missing_ok=True)


def _run(toolchain: Toolchain, command: Sequence[str], out: Path) -> None:
    """Run the compiler; turn a failure into BuildFailed with its errors and its last lines."""
    done = subprocess.run(
        command,
        env=_environment(),
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
        errors="replace",
        check=False,
    )
    if done.returncode != 0:
        lines = done.stdout.strip().splitlines()
        errors = [line for line in lines[:-_LAST_LINES] if "error:" in line][:_LAST_LINES]
        lines = [*errors, *lines[-_LAST_LINES:]]
        raise BuildFailed(
            f"{toolchain.name} could not build {out.name} (exit status {done.returncode})",
            cause="\n".join(lines) or "it wrote no message",
            fix="check that the disk is not full and that `llamac doctor` finds the pinned tools",
        )


def _target_flags(toolchain: Toolchain, target: str) -> tuple[str, ...]:
    """Flags that select the target; for a system compiler only the host is possible."""
    if toolchain.is_zig:
        return ("-target", target)
    if toolchain.target == target:
        return ("-Wl,-z,text",)
    if toolchain.target or not _is_host(target):
        raise ToolchainMissing(
            f"{toolchain.name} cannot link for {target}",
            cause=f"it links for {toolchain.target or 'this machine'} only",
            fix="pip install ziglang",
        )
    return ("-Wl,-z,text",)  # the default of zig's linker, which does not know the flag


def _is_host(target: str) -> bool:
    """Whether programs for the target run here, the version of its C library aside."""
    machine, system, libc = target.split(".", maxsplit=1)[0].split("-")
    host_libc = "gnu" if platform.libc_ver()[0] == "glibc" else "musl"
    return (machine, system, libc) == (platform.machine(), sys.platform, host_libc)


def cache_folder() -> Path:
    """Where llamac keeps what it can make again: zig's C libraries and compiled kernels."""
    return Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache") / "llamac"


def _environment() -> dict[str, str]:
    """The environment with zig's caches in our own cache folder.

    By default zig puts some 200 MB of them into the home folder and the working directory.
    """
    cache = str(cache_folder() / "zig")
    return {"ZIG_GLOBAL_CACHE_DIR": cache, "ZIG_LOCAL_CACHE_DIR": cache, **os.environ}


def _first_line(command: Sequence[str]) -> str:
    """What the command writes first to standard output; "" if it cannot run or fails."""
    try:
        done = subprocess.run(
            command,
            env=_environment(),
            capture_output=True,
            text=True,
            errors="replace",
            check=True,
        )
    except (OSError, subprocess.CalledProcessError):
        return ""
    return done.stdout.strip().partition("\n")[0]
