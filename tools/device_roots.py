"""Make what the tests of other processors run on: an emulator that knows SME, arm64 systems.

    python -m llamac.tools.device_roots                # all, below build/devices
    python -m llamac.tools.device_roots qemu -o DIR

    qemu          qemu-aarch64 of version 10 or newer, unless the system has one: older ones compute
                  int8 outer products of SME wrongly
    arm64-python  sysroot/, Debian's Python 3.11 for arm64, and site/, the wheels that
                  llamac.runtime needs; about 160 MB
    arm64-musl    sysroot/, Debian's musl for arm64, a C library that is not glibc; 1 MB

Packages come from the archive and the package index that this machine's apt and pip use. Nothing is
installed, and no right of the administrator is needed. What is there already is left as it is.
"""

from __future__ import annotations

import argparse
import json
import re
import shutil
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from importlib import metadata
from pathlib import Path
from typing import Any

from llamac.runtime.errors import BuildFailed, LlamacError, OutputError
from llamac.targets.emulator import FIRST_VERSION_WITH_SME, PROGRAMS, find_emulator
from llamac.tools.console import notice, print_error
from llamac.tools.private_apt import PrivateApt, host_archive, run_tool

DEFAULT_FOLDER = Path("build/devices")
RECIPE_FILE = "recipe.json"

# Debian 13 first: it is a release, and 10.0 computes SME as 11.1 does.
QEMU_SUITES = ("trixie", "bookworm-backports")
QEMU_PACKAGE = "qemu-user"
QEMU_PROGRAM = Path("usr/bin") / PROGRAMS[0]
QEMU_COPYRIGHT = Path("usr/share/doc") / QEMU_PACKAGE / "copyright"

PYTHON_SUITE = "bookworm"
PYTHON_VERSION = "3.11"
PYTHON_PROGRAM = Path("sysroot/usr/bin") / f"python{PYTHON_VERSION}"
# The C++ library serves wheels; Python itself depends on everything else that they load.
PYTHON_PACKAGES = (f"python{PYTHON_VERSION}", "libstdc++6")
# Newest first. Debian 12 has glibc 2.36, and runs wheels for all of them.
WHEEL_PLATFORMS = tuple(
    f"manylinux{version}_aarch64" for version in ("_2_34", "_2_28", "_2_27", "_2_17", "2014")
)
MUSL_PACKAGE = "musl"
MUSL_LOADER = Path("sysroot/lib/ld-musl-aarch64.so.1")
PYTHON_CHECK = "import numpy, tiktoken; print(numpy.__version__, tiktoken.__version__)"


@dataclass(frozen=True)
class Root:
    """Something that is made as one folder.

    Attributes:
        name: of the folder.
        recipe: JSON values; a folder that was made by another recipe is made again.
        make: fills an empty folder.
        check: runs what the folder has and says what it is.
        is_needed: whether the system lacks it; says why if not.
    """

    name: str
    recipe: dict[str, Any]
    make: Callable[[Path], None]
    check: Callable[[Path], str]
    is_needed: Callable[[], bool] = lambda: True


def qemu_version(program: str | Path) -> tuple[int, ...]:
    """Return the version of an emulator, (10, 0, 2); empty if there is none of that name."""
    if shutil.which(program) is None:
        return ()
    found = re.search(r"version (\d+(?:\.\d+)*)", run_tool(str(program), "--version"))
    return tuple(map(int, found[1].split("."))) if found else ()


def _needs_qemu() -> bool:
    for name in PROGRAMS:
        if qemu_version(name) >= FIRST_VERSION_WITH_SME:
            notice(f"qemu: not needed, the system's {shutil.which(name)} is new enough")
            return False
    return True


def _make_qemu(folder: Path) -> None:
    """Unpack the first release of QEMU that is new enough; it is a static program."""
    archive = host_archive()
    architecture = run_tool("dpkg", "--print-architecture").strip()
    tried = []
    for suite in QEMU_SUITES:
        notice(f"qemu: reading the packages of {suite} at {archive.uri}")
        try:
            with PrivateApt(
                archive, suite=suite, architecture=architecture, work=folder.parent
            ) as apt:
                version = apt.version(QEMU_PACKAGE)
                if _debian_version(version) >= FIRST_VERSION_WITH_SME:
                    notice(f"qemu: fetching {QEMU_PACKAGE} {version}")
                    apt.unpack([QEMU_PACKAGE], folder / "all", with_dependencies=False)
                    _keep_aarch64(folder)
                    return
            tried.append(f"{suite} has version {version or 'none'}")
        except BuildFailed as error:
            tried.append(f"{suite}: {error.cause}")
    raise BuildFailed(
        "no QEMU that computes SME rightly was found",
        cause="; ".join(tried),
        fix="check the network, or set LLAMAC_QEMU_SME to a qemu-aarch64 of version 10 or newer",
    )


def _keep_aarch64(folder: Path) -> None:
    """Keep one of the forty emulators of the package: 16 MB of 455."""
    if not (folder / "all" / QEMU_PROGRAM).is_file():
        raise BuildFailed(
            f"the package {QEMU_PACKAGE} has no {QEMU_PROGRAM}",
            cause="a newer release keeps the emulators in another package",
            fix="install it, and set LLAMAC_QEMU_SME to its qemu-aarch64",
        )
    for kept in (QEMU_PROGRAM, QEMU_COPYRIGHT):
        (folder / kept).parent.mkdir(parents=True)
        (folder / "all" / kept).rename(folder / kept)
    shutil.rmtree(folder / "all")


def _debian_version(text: str) -> tuple[int, ...]:
    """Return the numbers of "1:10.0.2+ds-2~bpo12+1": (10, 0, 2)."""
    found = re.match(r"(?:\d+:)?(\d+(?:\.\d+)*)", text)
    return tuple(map(int, found[1].split("."))) if found else ()


def _check_qemu(folder: Path) -> str:
    version = qemu_version(folder / QEMU_PROGRAM)
    if version < FIRST_VERSION_WITH_SME:
        raise BuildFailed(
            f"{folder / QEMU_PROGRAM} does not run as version 10 or newer",
            cause=f"it says version {'.'.join(map(str, version)) or 'nothing'}",
            fix=f"remove {folder} and try again",
        )
    return f"QEMU {'.'.join(map(str, version))}"


def runtime_requirements() -> list[str]:
    """Return what llamac.runtime and the command line need, as `name==version` of this Python's.

    Extras are left out, and what they need with them.
    """
    pins: dict[str, str] = {}
    names = [_name(line) for line in metadata.requires("llamac") or () if "extra ==" not in line]
    while names:
        name = names.pop()
        try:
            found = metadata.distribution(name)
        except metadata.PackageNotFoundError:  # for another system or Python
            continue
        if name not in pins:
            pins[name] = f"{name}=={found.version}"
            names += [_name(line) for line in found.requires or () if "extra ==" not in line]
    return sorted(pins.values())


def _name(requirement: str) -> str:
    """Return the name in a requirement: "charset_normalizer<4,>=2" gives charset-normalizer."""
    name = re.split(r"[^\w.-]", requirement.strip(), maxsplit=1)[0]
    return re.sub(r"[-_.]+", "-", name).lower()


def _make_python(folder: Path) -> None:
    """Unpack Python and install wheels for it."""
    archive = host_archive()
    notice(f"arm64-python: reading the packages of {PYTHON_SUITE} at {archive.uri}")
    with PrivateApt(archive, suite=PYTHON_SUITE, architecture="arm64", work=folder.parent) as apt:
        notice(f"arm64-python: fetching {', '.join(PYTHON_PACKAGES)} and what they need")
        count = apt.unpack(PYTHON_PACKAGES, folder / "sysroot", with_dependencies=True)
    pins = runtime_requirements()
    notice(f"arm64-python: {count} packages unpacked; fetching wheels: {', '.join(pins)}")
    try:
        _install_wheels(pins, folder / "site")
    except BuildFailed as error:
        # A wheel for arm64 may come later than the one for this machine, or never.
        notice(f"arm64-python: {error.cause}")
        names = [pin.partition("==")[0] for pin in pins]
        notice(f"arm64-python: fetching other versions of {', '.join(names)}")
        shutil.rmtree(folder / "site", ignore_errors=True)
        _install_wheels(names, folder / "site")


def _install_wheels(requirements: Sequence[str], site: Path) -> None:
    platforms = [argument for name in WHEEL_PLATFORMS for argument in ("--platform", name)]
    where = ("--only-binary", ":all:", "--implementation", "cp", "--python-version", PYTHON_VERSION)
    command = (sys.executable, "-m", "pip", "install", "--quiet", "--disable-pip-version-check")
    run_tool(*command, "--no-compile", *platforms, *where, "--target", str(site), *requirements)


def _check_python(folder: Path) -> str:
    """Import what has machine code in it, which also leaves the modules compiled."""
    command = python_command(folder)
    versions = run_tool("env", f"PYTHONPATH={folder / 'site'}", *command, "-c", PYTHON_CHECK)
    numpy, tiktoken = versions.split()
    return f"Python {PYTHON_VERSION}, numpy {numpy}, tiktoken {tiktoken}"


def python_command(folder: Path, cpu: str | None = None) -> list[str]:
    """Return the command that runs a made arm64 Python under QEMU; its arguments follow.

    Args:
        folder: of the root.
        cpu: as `find_emulator` takes it.

    Raises:
        ToolchainMissing: the system has no emulator.
    """
    emulator = find_emulator(cpu)
    sysroot, python = folder / "sysroot", folder / PYTHON_PROGRAM
    return [emulator.program, "-cpu", emulator.cpu, "-L", str(sysroot), str(python)]


def _make_musl(folder: Path) -> None:
    """Unpack one package; it needs no other."""
    archive = host_archive()
    notice(f"arm64-musl: reading the packages of {PYTHON_SUITE} at {archive.uri}")
    with PrivateApt(archive, suite=PYTHON_SUITE, architecture="arm64", work=folder.parent) as apt:
        apt.unpack([MUSL_PACKAGE], folder / "sysroot", with_dependencies=False)


def _check_musl(folder: Path) -> str:
    """Call the loader without a program: it says its version, and that it wants one."""
    loader = folder / MUSL_LOADER
    command = find_emulator().command(loader)
    done = subprocess.run(command, capture_output=True, text=True, errors="replace", check=False)
    version = re.search(r"^Version (\S+)", done.stderr, re.MULTILINE)
    if version is None:
        raise BuildFailed(
            f"{loader} does not run",
            cause=done.stderr.strip() or "it says nothing",
            fix=f"remove {folder} and try again",
        )
    return f"musl {version[1]}"


def roots() -> Iterator[Root]:
    """Yield everything that can be made, in the order in which one needs the other."""
    wanted = ".".join(map(str, FIRST_VERSION_WITH_SME))
    recipe = {"package": QEMU_PACKAGE, "suites": QEMU_SUITES, "at least": wanted}
    yield Root("qemu", recipe, _make_qemu, _check_qemu, _needs_qemu)
    recipe = {
        "suite": PYTHON_SUITE,
        "packages": PYTHON_PACKAGES,
        "wheels": runtime_requirements(),
        "platforms": WHEEL_PLATFORMS,
    }
    yield Root("arm64-python", recipe, _make_python, _check_python)
    recipe = {"suite": PYTHON_SUITE, "packages": [MUSL_PACKAGE]}
    yield Root("arm64-musl", recipe, _make_musl, _check_musl)


def make_root(root: Root, folder: Path) -> None:
    """Make a root as `folder`/<name> if it is not there; it appears complete or not at all.

    Raises:
        LlamacError: it could not be made, or does not run.
        OutputError: the folder cannot be written.
    """
    place, recipe = folder / root.name, json.dumps(root.recipe, indent=2) + "\n"
    if _made_by(place) == recipe:
        notice(f"{root.name}: {root.check(place)}, is there")
        return
    if not root.is_needed():
        return
    started = time.perf_counter()
    try:
        folder.mkdir(parents=True, exist_ok=True)
        with tempfile.TemporaryDirectory(prefix=".partial-", dir=folder) as temporary:
            partial = Path(temporary) / root.name
            partial.mkdir()
            root.make(partial)
            found = root.check(partial)
            (partial / RECIPE_FILE).write_text(recipe, "utf-8")
            if place.exists():
                place.rename(Path(temporary) / "before")
            partial.rename(place)
    except OSError as error:
        raise OutputError(
            f"{place} cannot be written",
            cause=str(error),
            fix="give a folder with room for 400 MB with --output",
        ) from error
    notice(f"{root.name}: {found}, {place}, {time.perf_counter() - started:.0f} s")


def _made_by(place: Path) -> str:
    """Return the recipe of what is there; "" for nothing, or what nobody can read."""
    try:
        return (place / RECIPE_FILE).read_text("utf-8")
    except OSError:
        return ""


def main(arguments: Sequence[str] | None = None) -> int:
    """Run the command line."""
    known = {root.name: root for root in roots()}
    parser = argparse.ArgumentParser(prog="llamac.tools.device_roots", description=__doc__)
    parser.formatter_class = argparse.RawDescriptionHelpFormatter
    parser.add_argument("names", nargs="*", metavar="NAME", help=f"{', '.join(known)} (all)")
    parser.add_argument("-o", "--output", type=Path, default=DEFAULT_FOLDER)
    given = parser.parse_args(arguments)
    for name in given.names:
        if name not in known:
            parser.error(f"there is no {name!r}; choose from {', '.join(known)}")
    try:
        for name in given.names or known:
            make_root(known[name], given.output.resolve())
    except LlamacError as error:
        print_error(error, sys.stderr)
        return 1
    except KeyboardInterrupt:
        notice("interrupted: nothing was left")
        return 130
    return 0


if __name__ == "__main__":
    sys.exit(main())
