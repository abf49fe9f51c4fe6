"""The libraries of an Arm bundle: what each C library must find in its own, and that they run.

There is no bionic here. What its linker demands is read from the file, `bionic_loader.c` loads it
with bionic's names alone, and so does musl's own loader. Loading on a phone is not shown by any
test.
"""

from __future__ import annotations

import re
import subprocess
from collections.abc import Callable
from pathlib import Path

import pytest

import llamac.runtime
from llamac.runtime import load
from llamac.runtime.manifest import Manifest, read_manifest
from llamac.targets.arm_cpu import LINUX_TARGETS
from llamac.targets.bionic import API_LEVEL, SYMBOLS
from llamac.targets.emulator import find_emulator
from llamac.targets.toolchain import find_toolchain, link_executable
from llamac.tools.device_roots import RECIPE_FILE

PAGE_BYTES = 16384
HEADER = Path(llamac.runtime.__file__).parent / "c" / "llamac.h"
DECLARED = set(re.findall(r"^LLAMAC_API .*?\b(llamac_\w+)\(", HEADER.read_text(), re.MULTILINE))
CPU = "cortex-a76"
MUSL = LINUX_TARGETS["musl"]
NEEDED = {"glibc": {"libc.so.6", "libpthread.so.0"}, "musl": {"libc.so"}, "android": {"libc.so"}}


@pytest.fixture(scope="module")
def bundle(arm_bundle: Callable[[str], Path]) -> Path:
    """The tiny model with every Arm level."""
    return arm_bundle("spinquant")


@pytest.fixture(scope="module")
def manifest(bundle: Path) -> Manifest:
    return read_manifest(bundle)


@pytest.fixture(scope="module")
def library(bundle: Path, manifest: Manifest) -> Callable[[str], Path]:
    """Path of the library of a flavour."""
    return lambda flavour: bundle / manifest.libraries()[flavour]


def readelf(library: Path, *options: str) -> str:
    return subprocess.run(
        ["readelf", "-W", *options, str(library)], capture_output=True, text=True, check=True
    ).stdout


def undefined(library: Path) -> set[str]:
    """Symbols that others must provide; with "@" and the version if it names one."""
    lines = (line.split() for line in readelf(library, "--dyn-syms").splitlines())
    return {fields[7] for fields in lines if len(fields) > 7 and fields[6] == "UND"}


def needed(library: Path) -> set[str]:
    return set(re.findall(r"\(NEEDED\).*\[(.*)\]", readelf(library, "-d")))


def bionic_problems(library: Path) -> set[str]:
    """What keeps the linker of Android API 28, or of a phone with 16 KiB pages, from loading it."""
    dynamic, segments = readelf(library, "-d"), readelf(library, "-l")
    introduced = {name: api for names in SYMBOLS.values() for name, api in names.items()}
    allowed = {name for name, api in introduced.items() if api <= API_LEVEL}
    loads = re.findall(r"LOAD .* (0x[0-9a-f]+)$", segments, re.MULTILINE)
    relro = re.search(r"GNU_RELRO +\S+ (0x\w+) \S+ \S+ (0x\w+)", segments)
    checks = {
        "is not for AArch64": re.search(r"Machine: +AArch64", readelf(library, "-h")) is not None,
        "needs other libraries": needed(library) <= set(SYMBOLS),
        "needs nothing": bool(needed(library)),
        "has another name": "soname: [libmodel.so]" in dynamic,
        "has no old hash": "(HASH)" in dynamic,
        "has no GNU hash": "(GNU_HASH)" in dynamic,
        "relocates text": "TEXTREL" not in dynamic,
        "has a search path": not re.search(r"RPATH|RUNPATH", dynamic),
        "has versions of symbols": not re.search(r"VERNEED|VERSYM|VERDEF", dynamic),
        "has packed relocations": not re.search(r"RELR|ANDROID_REL", dynamic),
        "has small segments": len(loads) > 2 and all(int(x, 16) >= PAGE_BYTES for x in loads),
        "has half a page read-only": relro is not None
        and sum(int(x, 16) for x in relro.groups()) % PAGE_BYTES == 0,
        "has writable code": not re.search(r"LOAD .* RWE ", segments),
        "has an executable stack": not re.search(r"GNU_STACK .* RWE ", segments),
        "has thread-local storage": not re.search(r"^ +TLS ", segments, re.MULTILINE),
    }
    problems = {problem for problem, is_fine in checks.items() if not is_fine}
    return problems | {f"needs {name}" for name in undefined(library) - allowed}


def test_the_manifest_names_a_library_for_each_c_library(bundle: Path, manifest: Manifest) -> None:
    """All small, and equal in size but for what their C libraries ask for."""
    libraries = manifest.libraries()
    assert libraries == {flavour: f"lib/{flavour}/libmodel.so" for flavour in NEEDED}
    sizes = [manifest.files[name].bytes for name in libraries.values()]
    assert max(sizes) < 1.05 * min(sizes)
    assert max(sizes) < 2 << 20


def test_the_manifest_says_that_no_phone_loaded_it(manifest: Manifest) -> None:
    """And who linked it."""
    note = manifest.files["lib/android/libmodel.so"].note
    assert "not loaded on bionic" in note
    assert f"API {API_LEVEL} by zig " in note
    assert not manifest.files["lib/glibc/libmodel.so"].note


@pytest.mark.needs("readelf")
def test_android_s_library_has_what_bionic_demands(library: Callable[[str], Path]) -> None:
    assert bionic_problems(library("android")) == set()


@pytest.mark.needs("readelf")
def test_the_check_for_bionic_finds_what_is_wrong_with_the_others(
    library: Callable[[str], Path],
) -> None:
    """It can fail: glibc's library has versions and another libc, musl's another errno."""
    glibc, musl = bionic_problems(library("glibc")), bionic_problems(library("musl"))
    assert {"needs other libraries", "has versions of symbols"} < glibc
    assert "needs memcpy@GLIBC_2.17" in {problem.partition(" (")[0] for problem in glibc}
    assert {"needs __errno_location", "needs bcmp"} <= musl


@pytest.mark.needs("readelf")
@pytest.mark.parametrize("flavour", NEEDED)
def test_each_library_needs_its_c_library_alone(
    flavour: str, library: Callable[[str], Path]
) -> None:
    """And exports the C interface."""
    path = library(flavour)
    assert needed(path) <= NEEDED[flavour]
    assert {name.partition("@")[0] for name in undefined(path)} >= {"memcpy", "pthread_create"}
    versions = {name.partition("@")[2] for name in undefined(path)}
    assert (versions == {""}) == (flavour != "glibc")
    exported = set(re.findall(r" (llamac_\w+)$", readelf(path, "--dyn-syms"), re.MULTILINE))
    assert exported == DECLARED


PROMPT = (1, 5, 9, 20, 121, 367, 260, 12, 7, 33)
COUNT = 24


@pytest.fixture(scope="module")
def expected(bundle: Path) -> list[int]:
    """What the runner says."""
    with load(bundle, threads=2, machine=find_emulator(CPU)) as model, model.session() as session:
        session.append(PROMPT)
        tokens: list[int] = []
        for _ in range(COUNT):
            tokens.append(session.argmax())
            session.append(tokens[-1:])
    return tokens


@pytest.fixture(scope="module")
def program(tmp_path_factory: pytest.TempPathFactory) -> Callable[..., Path]:
    """Build one of the loaders here."""
    folder = tmp_path_factory.mktemp("loaders")
    names = "".join(f"SYMBOL({name})\n" for name in SYMBOLS["libc.so"])
    (folder / "symbols.inc").write_text(names)

    def build(source: str, target: str, *flags: str) -> Path:
        out = folder / f"{source}-{target}"
        if not out.exists():
            link_executable(
                find_toolchain(),
                sources=[Path(__file__).with_name(source)],
                include_dirs=[folder, Path(llamac.runtime.__file__).parent / "c"],
                out=out,
                target=target,
                cflags=[*flags, "-Wall", "-Wextra", "-Werror"],
            )
        return out

    return build


def run_loader(
    loader: Path, library: Path, bundle: Path, *options: str
) -> subprocess.CompletedProcess[str]:
    """Run a loader with a library on an emulated CPU; options are QEMU's."""
    emulator = find_emulator(CPU)
    arguments = (loader, library, bundle / "weights.bin", COUNT, *PROMPT)
    command = [emulator.program, "-cpu", emulator.cpu, *options, *map(str, arguments)]
    return subprocess.run(command, capture_output=True, text=True, check=False)


def tokens_of(done: subprocess.CompletedProcess[str]) -> list[int]:
    assert done.returncode == 0, done.stderr
    return [int(line) for line in done.stdout.split()]


@pytest.mark.needs("qemu-aarch64")
def test_android_s_library_loads_with_bionic_s_names_alone(
    bundle: Path, library: Callable[[str], Path], program: Callable[..., Path], expected: list[int]
) -> None:
    """Its errors have the system's text, it pins threads, and it says what the runner says."""
    loader = program("bionic_loader.c", MUSL, "-static")
    assert tokens_of(run_loader(loader, library("android"), bundle)) == expected


@pytest.mark.needs("qemu-aarch64")
@pytest.mark.parametrize(
    ("flavour", "problem"),
    [("musl", "cannot locate symbol: "), ("glibc", "library not found: lib")],
)
def test_that_loader_refuses_the_other_flavours(
    bundle: Path,
    library: Callable[[str], Path],
    program: Callable[..., Path],
    flavour: str,
    problem: str,
) -> None:
    """It is no wider than bionic."""
    done = run_loader(program("bionic_loader.c", MUSL, "-static"), library(flavour), bundle)
    assert done.returncode == 3
    assert done.stderr.startswith(problem)


@pytest.fixture(scope="module")
def sysroot(devices: Path) -> Callable[[str], Path]:
    """The folder of an arm64 system with a C library."""

    def find(c_library: str) -> Path:
        root = devices / {"glibc": "arm64-python", "musl": "arm64-musl"}[c_library]
        if not (root / RECIPE_FILE).is_file():
            pytest.skip(f"no arm64 system with {c_library}: make devices")
        return root / "sysroot"

    return find


@pytest.mark.needs("qemu-aarch64")
@pytest.mark.parametrize("flavour", ["glibc", "musl", "android"])
def test_the_loaders_of_glibc_and_musl_load_it(
    bundle: Path,
    library: Callable[[str], Path],
    program: Callable[..., Path],
    sysroot: Callable[[str], Path],
    expected: list[int],
    flavour: str,
) -> None:
    """Those of Debian; musl's takes the Android flavour too, given bionic's name of errno."""
    c_library = "glibc" if flavour == "glibc" else "musl"
    loader = program("system_loader.c", LINUX_TARGETS[c_library], "-dynamic", "-rdynamic")
    done = run_loader(loader, library(flavour), bundle, "-L", str(sysroot(c_library)))
    assert tokens_of(done) == expected
