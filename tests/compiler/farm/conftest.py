"""A farm on loopback: two emulated Arm devices, an emulated Hexagon, and this machine."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest

from llamac.compiler.farm.tracker import Address
from llamac.targets.toolchain import find_toolchain, link_executable

ARM, DSP, HOST = "sm8650-cortex-x4", "sm8650-v75", "host-x86-64"

# Programs that kernels must not be. `echo` reads a call and says that it changed nothing.
PROGRAMS = {
    "crash": "int main(void) { __builtin_trap(); }",
    "endless": "int main(void) { for (volatile int i = 0;; i++) {} }",
    "silent": "int main(void) { return 0; }",
    "large": '#include <stdio.h>\nint main(void) { for (;;) fputs("no end", stdout); }',
}
_TARGETS = {ARM: "aarch64-linux-musl", HOST: "x86_64-linux-musl"}


@pytest.fixture(scope="session")
def loopback(helper: Callable[[str], ModuleType]) -> ModuleType:
    """Processes of a farm."""
    return helper("compiler/farm/loopback")


@pytest.fixture(scope="module")
def empty_farm(loopback: ModuleType, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Any]:
    """A tracker without devices."""
    pytest.importorskip("tornado")
    farm = loopback.Farm(tmp_path_factory.mktemp("farm"))
    farm.start_tracker()
    try:
        assert loopback.eventually(lambda: "Ctrl-C" in farm.log(), 60)
        yield farm
    finally:
        farm.close()


@pytest.fixture(scope="module")
def farm(loopback: ModuleType, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Any]:
    """The farm, when all of it is free."""
    pytest.importorskip("tornado")
    farm = loopback.Farm(tmp_path_factory.mktemp("farm"))
    farm.start_tracker()
    for device, key in (("qemu", ARM), ("qemu", ARM), ("qemu", DSP), ("local", HOST)):
        farm.serve(device, key)
    try:
        for key, count in ((ARM, 2), (DSP, 1), (HOST, 1)):
            farm.wait_until_free(key, count)
        yield farm
    finally:
        farm.close()


@pytest.fixture(scope="session")
def bad_program(tmp_path_factory: pytest.TempPathFactory) -> Callable[[str, str], bytes]:
    """A program that is no kernel, for the devices of a key."""
    folder = tmp_path_factory.mktemp("programs")

    def build(name: str, key: str) -> bytes:
        source, out = folder / f"{name}.c", folder / f"{name}-{key}"
        if not out.exists():
            source.write_text(PROGRAMS[name])
            link_executable(
                find_toolchain(),
                sources=[source],
                include_dirs=[],
                out=out,
                target=_TARGETS[key],
                cflags=["-static"],
            )
        return out.read_bytes()

    return build


@pytest.fixture
def nowhere() -> Address:
    """Where nothing listens."""
    return Address("127.0.0.1", 9)


@pytest.fixture(scope="session")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Of programs that tests run by themselves."""
    return tmp_path_factory.mktemp("runs")
