"""Calling MediaTek's offline compiler: found, asked, called, refusing. Against a test double."""

from __future__ import annotations

import os
import sys
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import pytest

pytest.importorskip("ai_edge_litert", reason="optional extra: pip install 'llamac[apu]'")

from llamac.runtime.errors import BuildFailed, ToolchainMissing
from llamac.targets.neuropilot import sdk
from llamac.targets.neuropilot.plugin import NeuroPilot
from llamac.targets.soc import load_soc
from llamac.tools.doctor import examine_neuropilot_sdk

DOUBLE = Path(__file__).with_name("ncc_double.py")


@pytest.fixture(params=["host/bin", "neuron_sdk/host/bin", "bin"])
def folder(request: pytest.FixtureRequest) -> str:
    """Where SDKs have had their programs."""
    return str(request.param)


@pytest.fixture
def install(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Callable[..., Path]:
    """Make an SDK with the double in it, and name it in the variable."""

    def make(folder: str = "host/bin") -> Path:
        root = tmp_path / "sdk"
        (root / folder).mkdir(parents=True)
        program = root / folder / sdk.PROGRAM
        program.write_text(f'#!/bin/sh\nexec {sys.executable} {DOUBLE} "$@"\n')
        program.chmod(0o755)
        monkeypatch.setenv(sdk.VARIABLE, str(root))
        return root

    return make


@pytest.fixture
def tflite(tmp_path: Path) -> Path:
    """A small graph."""
    sys.path.insert(0, str(DOUBLE.parent))
    try:
        import small_tflite  # noqa: PLC0415
    finally:
        sys.path.pop(0)
    path: Path = small_tflite.write_every_op(tmp_path / "small.tflite", "INT8")
    return path


def test_without_the_variable_there_is_no_sdk(monkeypatch: pytest.MonkeyPatch) -> None:
    """Whatever is on PATH."""
    monkeypatch.delenv(sdk.VARIABLE, raising=False)
    assert sdk.find_compiler(load_soc("mt6991")) is None
    found = examine_neuropilot_sdk()
    assert (found.status, found.found) == ("note", f"{sdk.VARIABLE} is not set")


def test_it_is_found_where_sdks_have_it(folder: str, install: Callable[..., Path]) -> None:
    root = install(folder)
    found = sdk.find_sdk()
    assert found == sdk.Sdk(root / folder / "ncc-tflite", "ncc-tflite TEST DOUBLE 8.0")
    shown = examine_neuropilot_sdk()
    assert shown.status == "ok" and "TEST DOUBLE 8.0" in shown.found


def test_options_are_those_of_the_soc() -> None:
    """Version, local memory and number of accelerators; then what the SoC file adds."""
    soc = load_soc("mt6991")
    expected = ("--arch=mdla5.5", "--l1-size-kb=7168", "--num-mdla=4", "--relax-fp32", "--opt=3")
    assert sdk.compile_options(soc) == expected
    assert soc.apu is not None
    more = replace(soc, apu=replace(soc.apu, compiler_options=("--opt-footprint",)))
    assert sdk.compile_options(more) == (*expected, "--opt-footprint")


def test_it_compiles(install: Callable[..., Path], tflite: Path, tmp_path: Path) -> None:
    """One file is written, and nothing else stays, not in the working folder either."""
    install()
    compiler = sdk.find_compiler(load_soc("mt6991"))
    assert compiler is not None
    (tmp_path / "out").mkdir()
    before = sorted(os.listdir())
    sdk.compile_dla(compiler, tflite, tmp_path / "out" / "small.dla")
    assert [p.name for p in (tmp_path / "out").iterdir()] == ["small.dla"]
    assert (tmp_path / "out" / "small.dla").read_bytes().startswith(b"NOT A REAL DLA")
    assert sorted(os.listdir()) == before


# -- Mistakes -------------------------------------------------------------------------------------


def test_a_folder_without_it(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Said by doctor, by the plug-in's check, and when it compiles."""
    monkeypatch.setenv(sdk.VARIABLE, str(tmp_path))
    with pytest.raises(ToolchainMissing, match="no ncc-tflite in") as caught:
        sdk.find_sdk()
    assert "host/bin/ncc-tflite" in caught.value.cause and "unset it" in caught.value.fix
    assert examine_neuropilot_sdk().status == "note"
    [missing] = NeuroPilot(load_soc("mt6991")).check()
    assert missing.what == "the offline compiler of MediaTek's SDK"


def test_one_that_does_not_start(
    install: Callable[..., Path], monkeypatch: pytest.MonkeyPatch
) -> None:
    root = install()
    monkeypatch.setenv("NCC_DOUBLE_FAILS", "version")
    with pytest.raises(ToolchainMissing, match="does not tell its version") as caught:
        sdk.find_sdk()
    assert caught.value.cause == "no license"
    (root / "host/bin/ncc-tflite").write_bytes(b"\x7fELF of another machine")
    with pytest.raises(ToolchainMissing, match="cannot be started"):
        sdk.find_sdk()


def test_an_sdk_that_is_too_old(
    install: Callable[..., Path], monkeypatch: pytest.MonkeyPatch
) -> None:
    """The accelerator is named, and those that it knows."""
    install()
    monkeypatch.setenv("NCC_DOUBLE_KNOWS", "mdla2.0 mdla3.0")
    with pytest.raises(ToolchainMissing, match=r"does not know mdla5\.5") as caught:
        sdk.find_compiler(load_soc("mt6991"))
    assert "mdla2.0, mdla3.0" in caught.value.cause
    monkeypatch.setenv("NCC_DOUBLE_KNOWS", "mdla2.0 mdla5.5")
    assert sdk.find_compiler(load_soc("mt6991")) is not None


def test_a_soc_whose_accelerator_is_not_known(install: Callable[..., Path]) -> None:
    """mt6989: nobody who may be quoted tells it."""
    install()
    with pytest.raises(ToolchainMissing, match="no version of the MDLA of mt6989") as caught:
        sdk.find_compiler(load_soc("mt6989"))
    assert "copy of the SoC file" in caught.value.fix


@pytest.mark.parametrize(
    ("variable", "value", "message", "cause"),
    [
        ("NCC_DOUBLE_REFUSES", "SOFTMAX", "ended with code 3", "SOFTMAX is not supported by"),
        ("NCC_DOUBLE_FAILS", "silent", "wrote nothing", "it said nothing"),
    ],
)
def test_what_it_refuses_is_said(
    variable: str,
    value: str,
    message: str,
    cause: str,
    install: Callable[..., Path],
    tflite: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """The graph, the operation and the options; no file is left."""
    install()
    compiler = sdk.find_compiler(load_soc("mt6991"))
    assert compiler is not None
    monkeypatch.setenv(variable, value)
    with pytest.raises(BuildFailed, match=message) as caught:
        sdk.compile_dla(compiler, tflite, tflite.with_suffix(".dla"))
    assert cause in caught.value.cause and "--arch=mdla5.5" in caught.value.fix
    assert [p.suffix for p in tflite.parent.glob("small.*")] == [".tflite"]
