"""`llamac doctor`: what this machine has, what it lacks to compile and run, and how to get it."""

from __future__ import annotations

import argparse
import os
import platform
import re
import shutil
import sys
import tempfile
from collections.abc import Iterator, Sequence
from dataclasses import asdict, dataclass
from importlib import metadata
from pathlib import Path

from llamac.runtime.errors import LlamacError
from llamac.targets.base import Missing
from llamac.targets.toolchain import cache_folder
from llamac.tools.console import Row, Subparsers, format_bytes, print_json, print_rows

OK, NOTE, FAIL = "ok", "note", "fail"
MEMORY_BYTES = 2 << 30
DISK_BYTES = 4 << 30
CPUINFO = Path("/proc/cpuinfo")

EPILOG = """\
examples:
  llamac doctor
  llamac doctor --json | jq '.findings[] | select(.status != "ok")'

Exit code 0 if compiling for this machine is possible, else 1.
"""


@dataclass(frozen=True)
class Finding:
    """One thing that was looked at.

    Attributes:
        what: its name.
        status: "ok", "note" (something is missing that compiling for this machine does not need)
            or "fail".
        found: what is there.
        why: what it is needed for.
        fix: how to get it; empty if there is nothing to do.
    """

    what: str
    status: str
    found: str
    why: str
    fix: str = ""


def add_parser(subparsers: Subparsers) -> None:
    """Add the command to the command line."""
    parser = subparsers.add_parser(
        "doctor",
        help="check this machine and the installation",
        description="Check this machine and the installation; say what is missing and the fix.",
        epilog=EPILOG,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument("--json", action="store_true", help="print the findings as JSON")


def run(args: argparse.Namespace) -> int:
    """Look at everything, print it, say by the exit code whether compiling is possible."""
    findings = list(examine())
    is_ready = all(finding.status != FAIL for finding in findings)
    if args.json:
        print_json({"ready": is_ready, "findings": [asdict(finding) for finding in findings]})
    else:
        rows: list[Row] = [(f.status, f.what, f.found) for f in findings]
        print_rows("this machine", rows, plain=args.plain, header=("", "what", "found"))
        for finding in findings:
            if finding.fix:
                print(f"{finding.status}: {finding.what}: {finding.found}")
                print(f"  why: {finding.why}")
                print(f"  fix: {finding.fix}")
        ready, not_ready = "ready to compile for this machine", "compiling is not possible yet"
        print(ready if is_ready else not_ready)
    return 0 if is_ready else 1


def examine() -> Iterator[Finding]:
    """Look at Python, packages, tools, CPU, memory, disk, caches and plug-ins."""
    yield examine_python(sys.version_info[:3])
    yield from examine_packages()
    yield from examine_tools()
    yield examine_neuropilot_sdk()
    yield from examine_cpu(CPUINFO)
    yield from examine_memory()
    yield from examine_folders()
    yield from examine_plugins()


def examine_python(version: tuple[int, ...]) -> Finding:
    """Check the interpreter's version."""
    found = ".".join(map(str, version)) + f" on {platform.system()} {platform.machine()}"
    if version >= (3, 11):
        return Finding("Python", OK, found, "runs llamac")
    return Finding("Python", FAIL, found, "llamac needs 3.11", "install Python 3.11 or newer")


def examine_packages() -> Iterator[Finding]:
    """Compare installed packages with what llamac's own metadata asks for, importing none."""
    try:
        requirements = metadata.requires("llamac") or []
    except metadata.PackageNotFoundError:
        why = "llamac finds its plug-ins through the metadata of its installation"
        yield Finding("llamac", FAIL, "not installed", why, "pip install 'llamac[compiler]'")
        return
    for requirement in requirements:
        text, _, marker = requirement.partition(";")
        extra = re.search(r"extra\s*==\s*['\"](\w+)['\"]", marker)
        if extra is None or extra.group(1) == "compiler":
            yield examine_package(text.strip(), is_needed_to_run=extra is None)


def examine_package(requirement: str, *, is_needed_to_run: bool) -> Finding:
    """Compare one installed package with a requirement such as "onnx<1.24,>=1.23"."""
    name, spec = re.fullmatch(r"([\w.-]+)\s*(.*)", requirement).groups()  # type: ignore[union-attr]
    extra = "llamac" if is_needed_to_run else "llamac[compiler]"
    why = "running bundles needs it" if is_needed_to_run else "compiling needs it"
    try:
        version = metadata.version(name)
    except metadata.PackageNotFoundError:
        return Finding(name, FAIL, "not installed", why, f"pip install '{extra}'")
    if satisfies(version, spec):
        return Finding(name, OK, version, why)
    found = f"{version}, tested with {spec}"
    return Finding(name, FAIL, found, why, f"pip install '{name}{spec}'")


def satisfies(version: str, spec: str) -> bool:
    """Tell whether a version fits a list of ==, >= and < conditions.

    A local part ("2.13.0+cpu") does not count, as in pip.
    """
    compare = {
        "==": lambda a, b: a == b,
        ">=": lambda a, b: a >= b,
        "<": lambda a, b: a < b,
    }
    for condition in filter(None, spec.split(",")):
        operator, wanted = re.fullmatch(r"(==|>=|<)\s*(.+)", condition.strip()).groups()  # type: ignore[union-attr]
        if not compare[operator](_release(version), _release(wanted)):
            return False
    return True


def _release(version: str) -> tuple[int, ...]:
    """Return the numbers of a version without trailing zeros: "1.24.0.post1" is (1, 24, 0, 1)."""
    numbers = [int(number) for number in re.findall(r"\d+", version.partition("+")[0])]
    while numbers and numbers[-1] == 0:
        numbers.pop()
    return tuple(numbers)


def examine_tools() -> Iterator[Finding]:
    """Find the compiler and linker of bundles, and programs that are of use beside it."""
    from llamac.targets.toolchain import find_toolchain  # noqa: PLC0415 (runs the compiler)

    why = "compiles and links the library of every bundle"
    try:
        toolchain = find_toolchain()
    except LlamacError as error:
        yield Finding("C compiler", FAIL, error.cause, why, error.fix)
    else:
        found = f"{toolchain.name} {toolchain.version}"
        if toolchain.is_zig:
            yield Finding("C compiler", OK, found, why)
        else:
            fix = "pip install 'llamac[compiler]' brings zig"
            why += "; a system compiler links for this machine only"
            yield Finding("C compiler", NOTE, found, why, fix)
    path, why = shutil.which("readelf"), "tests look into libraries with it"
    if path:
        yield Finding("readelf", OK, path, why)
    else:
        yield Finding("readelf", NOTE, "not installed", why, "apt-get install binutils")
    yield examine_emulator()
    yield examine_llvm_tools()


def examine_emulator() -> Finding:
    """Find the emulator of Arm CPUs, and say what it can do and what not."""
    from llamac.targets.emulator import FIRST_VERSION_WITH_SME, find_emulator  # noqa: PLC0415

    what, why = "qemu-aarch64", "runs, verifies and counts bundles for Arm CPUs (--emulate)"
    try:
        emulator = find_emulator()
    except LlamacError as error:
        return Finding(what, NOTE, f"{error.message}: {error.cause}", why, error.fix)
    counts = "counts instructions"
    if not emulator.has_plugins:
        counts = "counting instructions needs one that loads plug-ins, as Debian 12's does"
    knows_sme = emulator.version >= FIRST_VERSION_WITH_SME
    sme = "runs SME kernels" if knows_sme else "SME kernels need version 10"
    return Finding(what, OK, f"{emulator.description}; {counts}; {sme}", why)


def examine_llvm_tools() -> Finding:
    """Find the programs that predict cycles from the code of kernels."""
    from llamac.targets.machine_code import FIRST_VERSION, PACKAGE, find_llvm_tool  # noqa: PLC0415

    what, why = "LLVM tools", "predict cycles of kernels for Arm cores (bench --emulate --count)"
    found = {name: find_llvm_tool(name) for name in ("llvm-mca", "llvm-objdump")}
    absent = [name for name, path in found.items() if path is None]
    if not absent:
        return Finding(what, OK, ", ".join(filter(None, found.values())), why)
    text = f"no {' and no '.join(absent)} of version {FIRST_VERSION} or later"
    return Finding(what, NOTE, text, why, f"apt-get install {PACKAGE}")


def examine_neuropilot_sdk() -> Finding:
    """Ask MediaTek's offline compiler for its version, if the user has named an SDK."""
    from llamac.targets.neuropilot import sdk  # noqa: PLC0415

    what, why = "MediaTek's SDK", "compiles graphs for APUs beforehand; else the phone does it"
    try:
        found = sdk.find_sdk()
    except LlamacError as error:
        return Finding(what, NOTE, f"{error.message}: {error.cause}", why, error.fix)
    if found is not None:
        return Finding(what, OK, f"{found.program}: {found.version}", why)
    fix = f"get it from {sdk.WHERE_TO_GET_IT}; name its folder in {sdk.VARIABLE}"
    return Finding(what, NOTE, f"{sdk.VARIABLE} is not set", why, fix)


def examine_cpu(cpuinfo: Path) -> Iterator[Finding]:
    """Say which kernels a bundle for `host` would use here."""
    from llamac.targets.soc import load_soc  # noqa: PLC0415 (reads files)

    flags = cpu_flags(cpuinfo)
    if platform.machine().lower() not in ("x86_64", "amd64"):
        found = f"{platform.machine()}; bundles for `host` are x86-64"
        why = "this version compiles on x86-64 only; bundles for this CPU run here"
        yield Finding("CPU", FAIL, found, why, "compile on an x86-64 CPU and copy the bundle")
        return
    host = load_soc("host")
    wanted = dict.fromkeys(feature for level in host.levels for feature in level.features)
    present = [feature for feature in wanted if feature in flags]
    yield Finding("CPU features", OK, " ".join(present) or "baseline", "choose the kernels")
    level = next(level for level in host.levels if set(level.features) <= flags)
    why = "the set of kernels that a bundle for `host` would use here"
    if level.features:
        yield Finding("level", OK, level.name, why)
    else:
        fix = "nothing is wrong, but a CPU with AVX2 is several times faster"
        yield Finding("level", NOTE, f"{level.name}, correct but slow", why, fix)


def cpu_flags(cpuinfo: Path) -> set[str]:
    """Return the CPU's features as Linux lists them, in the words of SoC files."""
    try:
        text = cpuinfo.read_text("ascii", errors="replace")
    except OSError:
        return set()
    found = re.search(r"^flags\s*:\s*(.*)$", text, re.MULTILINE)
    # Linux writes avx512_vnni and avx_vnni where LLVM writes avx512vnni and avxvnni.
    return set(found.group(1).replace("_", "").split()) if found else set()


def examine_memory() -> Iterator[Finding]:
    """Check free memory."""
    from llamac.runtime.system import available_memory, usable_cpus  # noqa: PLC0415

    yield Finding("usable cores", OK, str(len(usable_cpus())), "one thread each by default")
    free = available_memory()
    why = f"compiling a 1B model needs about {format_bytes(MEMORY_BYTES)}"
    if free is None:
        yield Finding("free memory", OK, "unknown", why)
    elif free >= MEMORY_BYTES:
        yield Finding("free memory", OK, format_bytes(free), why)
    else:
        yield Finding("free memory", NOTE, format_bytes(free), why, "end other programs")


def examine_folders() -> Iterator[Finding]:
    """Check the disk here and where temporary files and caches go."""
    for what, folder, why in (
        ("disk here", Path.cwd(), "bundles are written where you say, often here"),
        ("temporary files", Path(tempfile.gettempdir()), "the compiler's objects on their way"),
        ("cache", cache_folder(), "C libraries that zig compiled (about 250 MB), and kernels"),
    ):
        yield examine_folder(what, folder, why)


def examine_folder(what: str, folder: Path, why: str) -> Finding:
    """Check that a folder, or the nearest one above it that exists, can be written and has room."""
    place = folder
    while not place.exists():
        place = place.parent
    free = shutil.disk_usage(place).free
    found = f"{folder}, {format_bytes(free)} free"
    if not os.access(place, os.W_OK):
        return Finding(what, FAIL, f"{folder} is not writable", why, f"make {place} writable")
    if free < DISK_BYTES:
        return Finding(what, NOTE, found, why, f"make room: {format_bytes(DISK_BYTES)} is plenty")
    return Finding(what, OK, found, why)


def examine_plugins() -> Iterator[Finding]:
    """Load every plug-in and ask what it lacks; the one for this machine's CPU must be ready."""
    from llamac.targets.registry import distribution_of, target_names  # noqa: PLC0415
    from llamac.targets.soc import load_soc  # noqa: PLC0415

    needed = {processor.plugin for processor in load_soc("host").processors}
    why = "compiles for this machine"
    for name in sorted(needed - set(target_names())):
        fix = "install llamac again: its entry points are missing"
        yield Finding(f"plug-in {name}", FAIL, "not installed", why, fix)
    for name in target_names():
        status = FAIL if name in needed else NOTE
        yield from _examine_plugin(name, distribution_of(name), status)


def _examine_plugin(name: str, origin: str, status_if_missing: str) -> Iterator[Finding]:
    from llamac.targets.registry import load_target  # noqa: PLC0415
    from llamac.targets.soc import SoC, load_soc, soc_files  # noqa: PLC0415

    what, why = f"plug-in {name}", "compiles for the SoCs that name it"

    def serves(soc: SoC) -> bool:
        return any(processor.plugin == name for processor in soc.processors)

    missing: Sequence[Missing] = ()
    served: list[SoC] = []
    try:
        plugin = load_target(name)
        for soc in filter(serves, map(load_soc, ["host", *soc_files()])):
            served.append(soc)
            missing = plugin(soc).check()
            if not missing:  # no other SoC matters: Apple's, for example, are data only
                break
    except LlamacError as error:
        yield Finding(what, status_if_missing, f"{error.message}: {error.cause}", why, error.fix)
        return
    for lack in missing:
        yield Finding(what, status_if_missing, f"lacks {lack.what}", lack.why, lack.fix)
    if not missing:
        yield Finding(what, OK, f"{origin}, ready" if served else f"{origin}, no SoC names it", why)
