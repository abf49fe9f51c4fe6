"""What the library file needs and exports, and what checkers of memory and threads say."""

from __future__ import annotations

import itertools
import re
import subprocess
from pathlib import Path
from typing import Any

import pytest

from llamac.targets.toolchain import find_toolchain, link_executable


def _readelf(option: str, library: Path) -> str:
    return subprocess.run(
        ["readelf", "-W", option, str(library)], capture_output=True, text=True, check=True
    ).stdout


@pytest.mark.needs("readelf")
def test_needs_only_libc(fake_library: Path) -> None:
    """No TVM, no C++, no dynamic loader by name."""
    needed = re.findall(r"\(NEEDED\).*\[(.*)\]", _readelf("-d", fake_library))
    assert set(needed) <= {"libc.so.6", "libm.so.6"}
    assert "libc.so.6" in needed


@pytest.mark.needs("readelf")
def test_no_text_relocations_and_no_search_path(fake_library: Path) -> None:
    """The code can be shared between processes, and nothing of this machine is inside."""
    dynamic = _readelf("-d", fake_library)
    assert not re.search(r"TEXTREL|RPATH|RUNPATH", dynamic)
    assert "(HASH)" in dynamic
    assert "(GNU_HASH)" in dynamic


@pytest.mark.needs("readelf")
def test_no_thread_local_storage(fake_library: Path) -> None:
    """Thread-local storage would need __tls_get_addr of the dynamic loader."""
    assert "TLS" not in _readelf("-l", fake_library)
    assert "__tls_get_addr" not in _readelf("--dyn-syms", fake_library)


@pytest.mark.needs("readelf")
def test_segments_fit_pages_of_16_kib(fake_library: Path) -> None:
    """Systems with 16 KiB pages can load it."""
    loads = re.findall(r"LOAD .* (0x[0-9a-f]+)$", _readelf("-l", fake_library), re.MULTILINE)
    assert len(loads) >= 2
    assert all(int(alignment, 16) >= 16384 for alignment in loads)


@pytest.mark.needs("readelf")
def test_exports_the_header_s_functions(fake_library: Path, c_sources: Path) -> None:
    """Exactly what llamac.h declares is visible."""
    symbols = [
        line.split()
        for line in _readelf("--dyn-syms", fake_library).splitlines()
        if re.search(r"(GLOBAL|WEAK) +DEFAULT +\d+ ", line)
    ]
    header = (c_sources / "llamac.h").read_text()
    declared = set(re.findall(r"LLAMAC_API [^;]*?\b(llamac_\w+)\(", header))
    assert len(declared) == 17
    assert {fields[7] for fields in symbols} == declared


def test_every_function_of_the_header_is_documented(c_sources: Path) -> None:
    """A comment stands right before each declaration."""
    lines = (c_sources / "llamac.h").read_text().splitlines()
    for before, line in itertools.pairwise(lines):
        if line.startswith("LLAMAC_API"):
            assert before.endswith("*/"), line


@pytest.fixture(scope="module")
def generate(fake: Any, checkout: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The C example, linked against the fake model."""
    out = tmp_path_factory.mktemp("example") / "generate"
    link_executable(
        find_toolchain(),
        sources=[checkout / "examples" / "c" / "generate.c"],
        objects=[fake.library],
        include_dirs=[fake.c_sources],
        out=out,
        target=fake.host,
        cflags=(f"-Wl,-rpath,{fake.library.parent}", "-Wall", "-Wextra", "-Werror"),
    )
    return out


def _greedy(fake: Any, tokens: list[int], count: int) -> list[int]:
    """What the example must print."""
    result = list(tokens)
    for _ in range(count):
        result.append(int(fake.expected(result).argmax()))
    return result[len(tokens) :]


def test_c_example_generates(fake: Any, generate: Path) -> None:
    """The example in examples/c prints the tokens that NumPy computes."""
    command = [str(generate), str(fake.weights_path), "9", "3", "1", "4", "1", "5"]
    done = subprocess.run(command, capture_output=True, text=True, check=True)
    assert list(map(int, done.stdout.split())) == _greedy(fake, [3, 1, 4, 1, 5], 9)


def test_c_example_reports_errors(fake: Any, generate: Path) -> None:
    """A bad token ends it with the library's message."""
    command = [str(generate), str(fake.weights_path), "9", "3", "99"]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    assert (done.returncode, done.stdout) == (1, "")
    assert "token 1 is 99" in done.stderr


@pytest.mark.slow
@pytest.mark.needs("valgrind")
@pytest.mark.parametrize("tokens", ["3 1 4 1 5 9 2 6 5", "3 1 13 1 5"])
def test_valgrind_finds_nothing(fake: Any, generate: Path, tokens: str) -> None:
    """No invalid access, no use of uninitialized memory, and no leak after a whole run."""
    command = [
        "valgrind",
        "--error-exitcode=99",
        "--leak-check=full",
        "--errors-for-leak-kinds=all",
    ]
    if "13" in tokens.split():  # the example exits without closing after an error
        command[2:] = []
    command += [str(generate), str(fake.weights_path), "5", *tokens.split()]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    assert done.returncode == (1 if "13" in tokens.split() else 0), done.stderr


@pytest.mark.slow
@pytest.mark.parametrize("sanitizer", ["thread", "address,undefined"])
def test_sanitizers_find_nothing(fake: Any, checkout: Path, tmp_path: Path, sanitizer: str) -> None:
    """The library, compiled with checks for data races or bad memory use, runs clean."""
    out = tmp_path / "generate"
    sources = [checkout / "examples" / "c" / "generate.c", *fake.sources]
    command = ["cc", "-std=c11", "-O1", "-g", f"-fsanitize={sanitizer}", "-pthread"]
    command += [f"-I{fake.c_sources}", *map(str, sources), "-o", str(out)]
    built = subprocess.run(command, capture_output=True, text=True, check=False)
    if built.returncode != 0 and "cannot find" in built.stderr:
        pytest.skip(f"missing program: the compiler has no runtime for -fsanitize={sanitizer}")
    assert built.returncode == 0, built.stderr
    for _ in range(10):
        command = [str(out), str(fake.weights_path), "9", "3", "1", "4", "1", "5"]
        done = subprocess.run(command, capture_output=True, text=True, check=False)
        assert done.returncode == 0, done.stderr
        assert list(map(int, done.stdout.split())) == _greedy(fake, [3, 1, 4, 1, 5], 9)
