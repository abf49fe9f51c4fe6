"""The libraries of an Arm bundle: what each C library must find in its own, and that they run.

There is no bionic here. What its linker demands is read from the file, and `bionic_loader.c` loads
it with bionic's names alone. Loading on a phone is not shown by any test.
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
from llamac.targets.bionic import API_LEVEL, SYMBOLS
from llamac.targets.emulator import find_emulator
from llamac.targets.toolchain import find_toolchain, link_executable

PAGE_BYTES = 16384
CPU = "cortex-a76"
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
    assert len(exported) == 16


@pytest.fixture(scope="module")
def bionic_loader(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A static program that loads a library with bionic's names."""
    folder = tmp_path_factory.mktemp("loader")
    names = "".join(f"SYMBOL({name})\n" for name in SYMBOLS["libc.so"])
    (folder / "symbols.inc").write_text(names)
    link_executable(
        find_toolchain(),
        sources=[Path(__file__).with_name("bionic_loader.c")],
        include_dirs=[folder, Path(llamac.runtime.__file__).parent / "c"],
        out=folder / "bionic_loader",
        target="aarch64-linux-musl",
        cflags=["-static", "-Wall", "-Wextra", "-Werror"],
    )
    return folder / "bionic_loader"


PROMPT = (1, 5, 9, 20, 121, 367, 260, 12, 7, 33)
COUNT = 24


def run_loader(loader: Path, library: Path, bundle: Path) -> subprocess.CompletedProcess[str]:
    arguments = (loader, library, bundle / "weights.bin", COUNT, *PROMPT)
    command = find_emulator(CPU).command(*map(str, arguments))
    return subprocess.run(command, capture_output=True, text=True, check=False)


@pytest.mark.needs("qemu-aarch64")
def test_android_s_library_loads_with_bionic_s_names_alone(
    bundle: Path, library: Callable[[str], Path], bionic_loader: Path
) -> None:
    """Its errors have the system's text, it pins threads, and it says what the runner says."""
    done = run_loader(bionic_loader, library("android"), bundle)
    assert done.returncode == 0, done.stderr
    with load(bundle, threads=2, machine=find_emulator(CPU)) as model, model.session() as session:
        session.append(PROMPT)
        expected = []
        for _ in range(COUNT):
            expected.append(session.argmax())
            session.append(expected[-1:])
    assert [int(line) for line in done.stdout.split()] == expected


@pytest.mark.needs("qemu-aarch64")
@pytest.mark.parametrize(
    ("flavour", "problem"),
    [("musl", "cannot locate symbol: "), ("glibc", "library not found: lib")],
)
def test_that_loader_refuses_the_other_flavours(
    bundle: Path, library: Callable[[str], Path], bionic_loader: Path, flavour: str, problem: str
) -> None:
    """It is no wider than bionic."""
    done = run_loader(bionic_loader, library(flavour), bundle)
    assert done.returncode == 3
    assert done.stderr.startswith(problem)
