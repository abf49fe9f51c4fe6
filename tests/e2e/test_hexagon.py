"""Bundles of the tiny model for the Hexagon DSP under qemu-hexagon."""

from __future__ import annotations

import json
import subprocess
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from llamac.compiler.compile_config import CompileConfig
from llamac.compiler.config import LLAMA_3_2_1B
from llamac.compiler.pipeline import compile_bundle
from llamac.compiler.progress import SilentProgress
from llamac.compiler.verify import verify_bundle
from llamac.runtime import load
from llamac.runtime.manifest import Manifest, read_manifest
from llamac.targets.emulator import ARCHITECTURES, find_emulator
from llamac.targets.program import Program
from llamac.targets.soc import load_soc
from llamac.tools.cli import main
from llamac.tools.make_synthetic import FORMS, make_synthetic

pytestmark = pytest.mark.needs("qemu-hexagon")

SOC = "sm8650"
SLOW_FORMS = [pytest.param(form, marks=pytest.mark.slow) for form in ("qlora", "bf16")]
NUM_TOKENS = 48
# Where the two best logits are this close, relative to their spread, a processor may choose the
# other one: they add floats in different orders.
NEAR_TIE = 1e-3
EM_HEXAGON = 164


@pytest.fixture(scope="session")
def dsp_bundle(compiled: Callable[..., Path], tiny: Path) -> Callable[[str], Path]:
    """The bundle of a form of the tiny model for the DSP."""
    return lambda form: compiled(tiny / form, target=SOC, processors=("hvx",))


def story(bundle: Path, arch: str | None) -> tuple[list[int], list[np.ndarray]]:
    """Chosen tokens and logits of a short story; here (None) or on an emulated processor."""
    machine = None if arch is None else find_emulator(arch=arch)
    with load(bundle, threads=2, machine=machine) as model, model.session() as session:
        tokens, logits = [], []
        session.append(model.tokenizer.encode("Tell me a story about a fox.", bos=True))
        for _ in range(NUM_TOKENS):
            tokens.append(session.argmax())
            logits.append(session.logits)
            session.append(tokens[-1:])
        return tokens, logits


@pytest.mark.parametrize("form", ["spinquant", *SLOW_FORMS])
def test_the_dsp_tells_the_host_s_story(
    form: str, dsp_bundle: Callable[[str], Path], compiled: Callable[..., Path], tiny: Path
) -> None:
    """Equal tokens up to a step, if any, where the two best ones were as good as equal."""
    tokens, logits = story(dsp_bundle(form), "hexagon")
    expected, expected_logits = story(compiled(tiny / form), None)
    for place, (token, best) in enumerate(zip(tokens, expected, strict=True)):
        row = expected_logits[place]
        if token != best:
            margin = float(row[best] - row[token]) / float(row.std())
            assert margin <= NEAR_TIE, f"token {place}: {token} and not {best}, {margin:.2e} apart"
            return
        difference = float(np.abs(logits[place] - row).max() / row.std())
        assert difference < 0.2, f"token {place}: logits differ by {difference:.2e}"


@pytest.mark.parametrize("form", ["spinquant", SLOW_FORMS[0]])
def test_every_operation_equals_the_reference(
    form: str, dsp_bundle: Callable[[str], Path], tiny: Path
) -> None:
    """At compile time those that a probe needs, and here those of all prefill functions."""
    bundle = dsp_bundle(form)
    checked = read_manifest(bundle).verification
    assert checked.status == "passed" and "qemu-hexagon" in checked.where
    machine = find_emulator(arch="hexagon")
    report = verify_bundle(bundle, tiny / form, machine=machine, all_functions=True)
    assert report.passed, report.failures


@pytest.mark.slow
@pytest.mark.parametrize(("soc", "version"), [("sm8350", "v68"), ("sm8850", "v81")])
def test_bundles_of_the_oldest_and_the_newest_dsp(
    soc: str, version: str, compiled: Callable[..., Path], tiny: Path
) -> None:
    """Compiled for their versions, with instructions that the emulated v67 has as well."""
    bundle = compiled(tiny / "spinquant", target=soc, processors=("hvx",), verify=False)
    report = verify_bundle(bundle, tiny / "spinquant", machine=find_emulator(arch="hexagon"))
    assert report.level == f"{version}-hvx-simulated"
    assert report.passed, report.failures


@pytest.mark.slow
def test_a_layer_of_the_1b_shape_equals_the_reference(tmp_path: Path) -> None:
    """With a small vocabulary: every step of decode and of a chunk of 8."""
    model = tmp_path / "one-layer"
    sizes = replace(LLAMA_3_2_1B, num_layers=1, vocab_size=2048)
    make_synthetic(model, sizes, FORMS["spinquant"])
    config = CompileConfig(
        model=model,
        target=SOC,
        processors=("hvx",),
        out=tmp_path / "bundle",
        chunks=(8,),
        context_length=256,
        verify=False,
    )
    compile_bundle(config, SilentProgress())
    machine = find_emulator(arch="hexagon")
    report = verify_bundle(config.out, model, max_tokens=4, machine=machine, all_functions=True)
    assert report.passed, report.failures


def test_the_bundle_says_what_it_is_for(dsp_bundle: Callable[[str], Path]) -> None:
    """A program for the DSP, whose tensors are where HVX can load them; libraries are phones'."""
    bundle = dsp_bundle("spinquant")
    manifest: Manifest = read_manifest(bundle)
    target = manifest.target
    assert (target.arch, target.os, target.plugin) == ("hexagon", "linux", "hexagon-hvx")
    assert target.processors == ("hvx",)
    hexagon = load_soc(SOC).hexagon
    assert hexagon is not None
    assert [level.name for level in target.levels] == [f"{hexagon.version}-hvx-simulated"]
    assert set(manifest.libraries()) == {"android", "glibc"}
    program = Program.from_json((bundle / manifest.file("program")).read_text("utf-8"))
    assert all(tensor.offset % 128 == 0 for tensor in program.tensors)
    products = {k.family for k in program.kernels if {"m", "n", "k"} <= k.shape.keys()}
    assert products == {"qmatmul_hvx", "qmatmul_int8_hvx"}
    head = (bundle / manifest.file("runner")).read_bytes()[:20]
    assert (head[4], int.from_bytes(head[18:20], "little")) == (1, EM_HEXAGON)


def test_packets_are_counted_by_kernel(
    dsp_bundle: Callable[[str], Path], capsys: pytest.CaptureFixture[str]
) -> None:
    """Every step once, the same in every run; products use HVX and as many as there are weights."""

    def count() -> list[dict[str, Any]]:
        bundle = str(dsp_bundle("spinquant"))
        assert main(["bench", bundle, "--emulate", "--count", "--json"]) == 0
        document = json.loads(capsys.readouterr().out)
        assert (document["level"], document["hot_loops"]) == ("v75-hvx-simulated", None)
        functions: list[dict[str, Any]] = document["functions"]
        return functions

    functions = count()
    assert [(f["function"], f["tokens"]) for f in functions] == [("decode", 1), ("prefill_32", 32)]
    for cost in functions:
        assert sum(k["calls"] for k in cost["kernels"]) == 45
        assert sum(k["packets"] for k in cost["kernels"]) == cost["packets"]
        assert cost["packets_per_token"] == cost["packets"] / cost["tokens"]
        for k in cost["kernels"]:
            assert k["packets"] <= k["instructions"] <= 4 * k["packets"]
            assert (k["vector_instructions"] > 0) == ("hvx" in k["family"])
    int4 = [k for k in functions[0]["kernels"] if k["family"] == "qmatmul_hvx"]
    layer = 256 * 128 + 128 * 128 + 512 * 128 + 128 * 256
    assert sum(k["macs_per_token"] for k in int4) == 4 * layer
    assert all(0.05 < k["packets_per_mac"] < 0.5 for k in int4)
    assert count() == functions


def test_packets_are_shown_in_a_table(
    dsp_bundle: Callable[[str], Path], capsys: pytest.CaptureFixture[str]
) -> None:
    arguments = ["--plain", "bench", str(dsp_bundle("spinquant")), "--emulate", "--count"]
    assert main([*arguments, "--prompt-tokens", "1"]) == 0
    out, err = capsys.readouterr()
    title, header, first, *_ = out.splitlines()
    assert "v75-hvx-simulated, decode at position 1: " in title
    assert title.endswith(" packets per token")
    assert header.split()[2:] == (
        "packets/token share instructions/token HVX/token MACs/token packets/MAC".split()
    )
    assert len(first.split()) in (7, 9)
    assert "packets of kernels are counted" in err and "llvm-mca" not in err


@pytest.mark.needs("readelf")
def test_the_program_has_nothing_left_to_relocate(dsp_bundle: Callable[[str], Path]) -> None:
    """Nobody would do it: lld once left a slot of thread-local storage in static programs."""
    bundle = dsp_bundle("spinquant")
    runner = bundle / read_manifest(bundle).file("runner")
    done = subprocess.run(
        ["readelf", "-rW", str(runner)], capture_output=True, text=True, check=True
    )
    assert "There are no relocations in this file." in done.stdout


# -- mistakes ------------------------------------------------------------------------------------


def test_without_the_emulator_it_is_refused(
    dsp_bundle: Callable[[str], Path], refused: Callable[..., str]
) -> None:
    text = refused("run", dsp_bundle("spinquant"), "Hi", error="cpu-unsupported")
    assert f"the bundle is for hexagon linux and android ({SOC})" in text
    assert "--emulate" in text


def test_a_cpu_model_of_another_architecture_is_refused(
    dsp_bundle: Callable[[str], Path], refused: Callable[..., str]
) -> None:
    options = ("--emulate", "--cpu", "cortex-a76")
    text = refused("run", dsp_bundle("spinquant"), "Hi", *options, error="usage")
    assert "qemu-hexagon cannot emulate the CPU 'cortex-a76'" in text


@pytest.mark.needs("qemu-aarch64")
def test_an_emulator_of_another_architecture_is_refused(
    dsp_bundle: Callable[[str], Path],
    refused: Callable[..., str],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setenv(ARCHITECTURES["hexagon"].variable, "qemu-aarch64")
    text = refused("verify", dsp_bundle("spinquant"), "m", "--emulate", error="toolchain-missing")
    assert "qemu-aarch64 does not emulate hexagon" in text


@pytest.mark.parametrize(
    ("soc", "processors", "words"),
    [
        ("rpi5", "hvx", "rpi5 has no processor 'hvx'"),
        (SOC, "cpu,hvx", "compiles no model for cpu, hvx of"),
        (SOC, "cpu,dsp", f"{SOC} has no processor 'dsp'"),
    ],
)
def test_processors_that_cannot_be_had(
    soc: str, processors: str, words: str, tiny: Path, tmp_path: Path, refused: Callable[..., str]
) -> None:
    """Before the checkpoint is read; nothing is written."""
    out = tmp_path / "out"
    options = ("--target", soc, "--processors", processors, "-o", out)
    assert words in refused("compile", tiny / "spinquant", *options, error="target-unknown")
    assert not out.exists()
