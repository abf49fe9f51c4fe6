"""Bundles of the tiny model for CPU and APU, on LiteRT's interpreter."""

from __future__ import annotations

import sys
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import numpy as np
import pytest

pytest.importorskip("ai_edge_litert", reason="optional extra: pip install 'llamac[apu]'")

from llamac.compiler.verify import verify_bundle
from llamac.runtime import load
from llamac.runtime.errors import AcceleratorError, BundleCorrupt, DeviceError, UsageError
from llamac.runtime.library import Library, NativeModel
from llamac.runtime.manifest import read_manifest
from llamac.targets.hosted_graphs import GraphHost
from llamac.targets.neuropilot.stand_in import find_stand_in, graph_host
from llamac.tools.tiny_corpus import documents

SOC, SCHEME = "mt6991", "a16w8"
NUM_TOKENS = 32
PROMPT = "Tell me a story about a fox."
# An APU does not round activations to int8, so where the two best logits are this close, relative
# to their spread, it may choose the other one.
NEAR_TIE = 0.02
EMULATION = Path("lib", "emulation", "libmodel.so")


@pytest.fixture(scope="session")
def pages(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A text to calibrate with, like those that the model was trained on."""
    path = tmp_path_factory.mktemp("text") / "pages.txt"
    path.write_text("\n".join(turn.text for story in documents(60, 7) for turn in story), "utf-8")
    return path


@pytest.fixture(scope="session")
def apu_bundle(compiled: Callable[..., Path], tiny: Path, pages: Path) -> Callable[..., Path]:
    """The bundle of a form, whose layers are all on the APU; compiling it verifies it."""

    def make(form: str = "spinquant", scheme: str = SCHEME) -> Path:
        options = {"target": SOC, "processors": ("cpu", "apu"), "chunks": (8,)}
        return compiled(
            tiny / form, context_length=256, scheme=scheme, calibration=pages, **options
        )

    return make


def story(bundle: Path, machine: Any) -> tuple[list[int], list[np.ndarray]]:
    """Greedy tokens of a short story, and the logits before each."""
    with load(bundle, threads=1, machine=machine) as model, model.session() as session:
        tokens, logits = [], []
        session.append(model.tokenizer.encode(PROMPT, bos=True))
        for _ in range(NUM_TOKENS):
            tokens.append(session.argmax())
            logits.append(session.logits)
            session.append(tokens[-1:])
        return tokens, logits


def test_the_commands_compile_verify_and_run(
    llamac: Callable[..., Any], tiny: Path, pages: Path, tmp_path: Path
) -> None:
    """As a user does it; two texts, one of which is the calibration's."""
    out, model = tmp_path / "tiny-apu", tiny / "spinquant"
    options = ("--target", SOC, "--processors", "cpu,apu", "--scheme", SCHEME, "--chunks", 8)
    done = llamac("compile", model, *options, "--context", 256, "--calibrate", pages, "-o", out)
    assert "Neuron Adapter" in done.stderr and "portable" in done.stderr
    assert read_manifest(out).verification.status == "passed"
    verified = llamac("verify", out, model, "--emulate", "--calibrate", pages).stdout
    assert "passed" in verified and "decode_layers_0_3" in verified
    done = llamac("run", out, PROMPT, "--emulate", "--max-tokens", 12)
    assert len(done.stdout.split()) >= 6 and "LiteRT" in done.stderr
    shown = llamac("inspect", out, "--check").stdout
    assert "layers on apu" in shown and "mt6991, NeuroPilot 8 or newer" in shown
    assert "apu/decode_layers_0_3.tflite" in shown


@pytest.mark.parametrize("form", ["spinquant", "qlora"])
def test_the_apu_tells_the_cpu_s_story(
    form: str, apu_bundle: Callable[..., Path], compiled: Callable[..., Path], tiny: Path
) -> None:
    """Equal tokens up to a step, if any, where the CPU's own choice was a near tie."""
    tokens, _ = story(apu_bundle(form), find_stand_in())
    expected, logits = story(compiled(tiny / form), None)
    for place, (token, best) in enumerate(zip(tokens, expected, strict=True)):
        if token != best:
            row = logits[place]
            margin = float(row[best] - row[token]) / float(row.std())
            print(f"{form}: token {place} is {token} and not {best}, {margin:.3f} apart")
            assert margin <= NEAR_TIE
            return


@pytest.mark.parametrize(("form", "scheme"), [("spinquant", "a16w4"), ("qlora", "a16w8")])
def test_every_step_equals_the_reference(
    form: str, scheme: str, apu_bundle: Callable[..., Path], tiny: Path, pages: Path
) -> None:
    report = verify_bundle(
        apu_bundle(form, scheme),
        tiny / form,
        max_tokens=16,
        machine=find_stand_in(),
        calibration=pages.read_text("utf-8"),
    )
    assert report.passed, report.failures
    graphs = [o for o in report.operations if o.family == "graph"]
    assert {o.function for o in graphs} == {"decode", "prefill_8"}
    assert report.level == "neon-on-x86"


def test_a_bundle_says_which_sdk_compiled_it(
    llamac: Callable[..., Any],
    tiny: Path,
    pages: Path,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """With a test double in the place of MediaTek's compiler; emulation goes on as before."""
    program = tmp_path / "sdk" / "host" / "bin" / "ncc-tflite"
    program.parent.mkdir(parents=True)
    double = Path(__file__).parents[1] / "targets" / "neuropilot" / "ncc_double.py"
    program.write_text(f'#!/bin/sh\nexec {sys.executable} {double} "$@"\n')
    program.chmod(0o755)
    monkeypatch.setenv("LLAMAC_NEUROPILOT_SDK", str(tmp_path / "sdk"))
    out, options = tmp_path / "out", ("--target", SOC, "--processors", "cpu,apu", "--chunks", 8)
    llamac("compile", tiny / "qlora", *options, "--context", 64, "--calibrate", pages, "-o", out)
    manifest = read_manifest(out)
    for graph in manifest.graphs:
        assert graph.form == "neuron-dla" and graph.neuron is not None
        dla = graph.neuron.dla
        assert dla is not None and dla.sdk == "ncc-tflite TEST DOUBLE 8.0"
        assert manifest.files[dla.file].role == "graph"
        phone = next(p for p in out.rglob("libmodel*.so") if p != out / EMULATION)
        assert dla.file.encode() in phone.read_bytes()
    shown = llamac("inspect", out, "--check").stdout
    assert "by ncc-tflite TEST DOUBLE 8.0 (--arch=mdla5.5" in shown
    assert "LiteRT" in llamac("run", out, PROMPT, "--emulate", "--max-tokens", 4).stderr


def test_layers_stay_on_the_cpu(
    llamac: Callable[..., Any], tiny: Path, pages: Path, tmp_path: Path
) -> None:
    """The first and the third, with their own weights and a cache of the CPU's: all is verified."""
    out, model = tmp_path / "out", tiny / "spinquant"
    options = ("--target", SOC, "--processors", "cpu,apu", "--chunks", 8, "--context", 128)
    chosen = ("--cpu-layers", "0,2-2", "--calibrate", pages)
    llamac("compile", model, *options, *chosen, "-o", out)
    manifest = read_manifest(out)
    assert manifest.scheme is not None and manifest.scheme.cpu_layers == (0, 2)
    assert {graph.layers for graph in manifest.graphs} == {(1,), (3,)}
    assert {name.split(".")[1] for name in manifest.scheme.loss_db} == {"1", "3"}
    assert manifest.verification.status == "passed"
    report = verify_bundle(
        out,
        model,
        max_tokens=24,
        machine=find_stand_in(),
        calibration=pages.read_text("utf-8"),
        all_functions=True,
    )
    assert report.passed, report.failures
    families = {o.family for o in report.operations}
    assert {"graph", "append", "attention", "rope"} <= families
    assert "layers on cpu" in llamac("inspect", out).stdout
    assert "LiteRT" in llamac("run", out, PROMPT, "--emulate", "--max-tokens", 4).stderr


# -- the process that executes the graphs ---------------------------------------------------------


class Refusing:
    """A graph that cannot be opened, or not be executed."""

    def __init__(self, error: BaseException | None = None) -> None:
        self._error = error

    def run(self, inputs: Mapping[str, np.ndarray], outputs: Mapping[str, np.ndarray]) -> None:
        assert "hidden" in inputs and "hidden_out" in outputs
        if self._error:
            raise self._error
        outputs["hidden_out"][:] = 0


def open_with(host: GraphHost, bundle: Path) -> NativeModel:
    library = Library(bundle / EMULATION)
    host.serve(library)
    return NativeModel(library, bundle / "weights.bin", None)


def test_a_graph_that_is_refused_closes_those_before(apu_bundle: Callable[..., Path]) -> None:
    """Status and text arrive, whatever Python raises."""
    opened: list[Path] = []

    def open_graph(path: Path) -> Refusing:
        opened.append(path)
        if len(opened) == 2:
            raise ZeroDivisionError("no\nway")
        return Refusing()

    host = GraphHost(open_graph)
    with pytest.raises(AcceleratorError, match="graph prefill_8_layers_0_3: no way"):
        open_with(host, apu_bundle())
    assert [path.suffix for path in opened] == [".tflite"] * 2
    assert host.num_open == 0


@pytest.mark.parametrize(
    ("error", "words"),
    [
        (AcceleratorError("it broke", cause="c", fix="f"), "prefill_8_layers_0_3: it broke"),
        (KeyboardInterrupt(), "prefill_8_layers_0_3: KeyboardInterrupt"),
        (ValueError("x" * 1000), "prefill_8_layers_0_3: xxx"),
    ],
)
def test_a_call_that_fails_is_an_error_of_the_evaluation(
    error: BaseException, words: str, apu_bundle: Callable[..., Path]
) -> None:
    """The position stays, and the model can be closed."""
    host = GraphHost(lambda _: Refusing(error))
    model = open_with(host, apu_bundle())
    assert host.num_open == 2
    session = model.open_session(1, ())
    with pytest.raises(DeviceError, match=words):
        session.eval(np.arange(5, dtype=np.int32))
    assert session.position() == 0
    session.close()
    model.close()
    assert host.num_open == 0


def test_a_model_keeps_to_who_opened_it(apu_bundle: Callable[..., Path]) -> None:
    """Another host for the same library changes models that are opened later, no others."""
    bundle = apu_bundle()
    with load(bundle, threads=1, machine=find_stand_in()) as model, model.session() as session:
        other = open_with(GraphHost(lambda _: Refusing()), bundle)
        session.append([1, 2, 3])
        first = session.logits.copy()
        changed = other.open_session(1, ())
        changed.eval(np.array([1, 2, 3], np.int32))
        assert np.any(first != changed.logits())
        changed.close()
        other.close()
    assert graph_host().num_open == 0


def test_without_a_host_it_says_what_it_is_for(
    apu_bundle: Callable[..., Path], copied: Callable[[Path], Path]
) -> None:
    """A library that nobody serves: a copy is another library to the loader."""
    bundle = copied(apu_bundle())
    with pytest.raises(AcceleratorError, match="llamac run --emulate"):
        NativeModel(Library(bundle / EMULATION), bundle / "weights.bin", None)


def test_a_tflite_of_another_build_is_refused(
    apu_bundle: Callable[..., Path], copied: Callable[[Path], Path]
) -> None:
    """Its tensors have other sizes: said when it is called, in words."""
    bundle = copied(apu_bundle())
    decode, prefill = (bundle / f"apu/{n}_layers_0_3.tflite" for n in ("decode", "prefill_8"))
    prefill.write_bytes(decode.read_bytes())
    model = open_with(graph_host(), bundle)
    session = model.open_session(1, ())
    with pytest.raises(DeviceError, match="the library differ in hidden"):
        session.eval(np.arange(5, dtype=np.int32))
    session.close()
    model.close()


# -- mistakes -------------------------------------------------------------------------------------


@pytest.mark.parametrize("suffix", [".tflite", ".neuron"])
def test_a_flipped_byte_is_found_before_anybody_executes_it(
    suffix: str, apu_bundle: Callable[..., Path], copied: Callable[[Path], Path]
) -> None:
    bundle = copied(apu_bundle())
    path = (bundle / read_manifest(bundle).graphs[0].file).with_suffix(suffix)
    data = bytearray(path.read_bytes())
    data[len(data) // 2] ^= 1
    path.write_bytes(data)
    with pytest.raises(BundleCorrupt, match=path.name):
        load(bundle, machine=find_stand_in())


def test_a_level_cannot_be_chosen(apu_bundle: Callable[..., Path]) -> None:
    with pytest.raises(UsageError, match="cannot be chosen here"):
        load(apu_bundle(), level="neon", machine=find_stand_in())


@pytest.mark.parametrize(
    ("arguments", "error", "words"),
    [
        (("--processors", "apu"), "target-unknown", "compile with --processors cpu,apu"),
        (("--scheme", "float16"), "usage", "neuropilot has a16w8, a16w4 on this SoC"),
        (("--kv-cache", "float16"), "usage", "keys and values as int16"),
        (("--place", "decode=cpu"), "usage", "cannot divide a model in the scheme a16w8"),
        (("--target", "genio1200"), "toolchain-missing", "a version of NeuroPilot for genio1200"),
        ((), "usage", "needs --calibrate FILE"),
        (("--cpu-layers", "9", "--calibrate", __file__), "usage", "it has 4 layers, 0 to 3"),
        (("--cpu-layers", "1..2"), "usage", "is not like 0,14-15"),
    ],
)
def test_what_cannot_be_compiled_is_refused(
    arguments: tuple[str, ...],
    error: str,
    words: str,
    tiny: Path,
    tmp_path: Path,
    refused: Callable[..., str],
) -> None:
    """Nothing is written."""
    out = tmp_path / "out"
    options = ("--target", SOC, "--processors", "cpu,apu", *arguments, "-o", out)
    assert words in refused("compile", tiny / "spinquant", *options, error=error)
    assert not out.exists()
