"""The emulator that tests of SME trust: an outer product of int8 in assembly, against C."""

from __future__ import annotations

import subprocess
from pathlib import Path

import pytest

from llamac.targets.toolchain import find_toolchain, link_executable


@pytest.fixture(scope="module")
def outer_product(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The static program of smopa.c."""
    program = tmp_path_factory.mktemp("sme") / "smopa"
    link_executable(
        find_toolchain(),
        sources=[Path(__file__).with_name("smopa.c")],
        out=program,
        target="aarch64-linux-musl",
        cflags=["-static"],
    )
    return program


@pytest.mark.parametrize("vector_bytes", [16, 32, 64, 128, 256])
def test_it_computes_int8_outer_products(
    vector_bytes: int, sme_emulator: Path, outer_product: Path
) -> None:
    """For every length of vectors; QEMU 7.2 fails here."""
    cpu = f"max,sme-default-vector-length={vector_bytes}"
    done = subprocess.run(
        [sme_emulator, "-cpu", cpu, outer_product], capture_output=True, text=True, check=False
    )
    words = vector_bytes // 4
    assert done.stdout == f"0 wrong of {words**2}, vectors of {vector_bytes} bytes\n", done.stderr
    assert done.returncode == 0
