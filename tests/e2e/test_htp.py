"""Bundles of the tiny model for CPU and HTP, on Qualcomm's library for x86-64."""

from __future__ import annotations

import importlib.util
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest

from llamac.compiler.built_model import opener
from llamac.compiler.verify import verify_bundle
from llamac.runtime import load
from llamac.runtime.digest import file_sha256
from llamac.runtime.errors import AcceleratorError, BundleCorrupt, BundleInvalid, UsageError
from llamac.runtime.manifest import read_manifest
from llamac.targets.base import Artifact
from llamac.targets.qnn_htp.stand_in import VARIABLE, find_stand_in
from llamac.targets.registry import make_target
from llamac.targets.soc import load_soc
from llamac.targets.stand_in import StandIn

SOC = "sm8650"
NUM_TOKENS = 32
PROMPT = "Tell me a story about a fox."
# HTP does not round activations to int8, so where the two best logits are this close, relative to
# their spread, it may choose the other one.
NEAR_TIE = 0.02

pytestmark = pytest.mark.skipif(
    importlib.util.find_spec("onnxruntime_qnn") is None,
    reason="optional extra: pip install 'llamac[qnn]' (Qualcomm's licence)",
)


@pytest.fixture(scope="session")
def htp_bundle(compiled: Callable[..., Path], tiny: Path) -> Callable[..., Path]:
    """The bundle of a form, with decode and one prefill length on the HTP unless said otherwise."""

    def make(form: str = "spinquant", **placement: str) -> Path:
        options = {"target": SOC, "processors": ("cpu", "htp"), "chunks": (8,)}
        if placement:
            options["placement"] = Placement(placement)
        return compiled(tiny / form, context_length=256, **options)

    return make


class Placement(dict[str, str]):
    """A placement that can be part of a key."""

    def __hash__(self) -> int:  # type: ignore[override]
        return hash(tuple(sorted(self.items())))

    def __lt__(self, other: object) -> bool:
        return False


def story(bundle: Path, machine: StandIn | None) -> tuple[list[int], list[np.ndarray]]:
    """Greedy tokens of a short story, and the logits before each."""
    with load(bundle, threads=1, machine=machine) as model, model.session() as session:
        tokens, logits = [], []
        session.append(model.tokenizer.encode(PROMPT, bos=True))
        for _ in range(NUM_TOKENS):
            tokens.append(session.argmax())
            logits.append(session.logits)
            session.append(tokens[-1:])
        return tokens, logits


@pytest.mark.parametrize("form", ["spinquant", "qlora"])
def test_the_htp_tells_the_cpu_s_story(
    form: str, htp_bundle: Callable[..., Path], compiled: Callable[..., Path], tiny: Path
) -> None:
    """Equal tokens up to a step, if any, where the CPU's own choice was a near tie."""
    tokens, _ = story(htp_bundle(form), find_stand_in())
    expected, logits = story(compiled(tiny / form), None)
    for place, (token, best) in enumerate(zip(tokens, expected, strict=True)):
        if token != best:
            row = logits[place]
            margin = float(row[best] - row[token]) / float(row.std())
            print(f"{form}: token {place} is {token} and not {best}, {margin:.3f} apart")
            assert margin <= NEAR_TIE
            return


@pytest.mark.parametrize("form", ["spinquant", "qlora"])
def test_every_step_equals_the_reference(
    form: str, htp_bundle: Callable[..., Path], tiny: Path
) -> None:
    report = verify_bundle(htp_bundle(form), tiny / form, max_tokens=16, machine=find_stand_in())
    assert report.passed, report.failures
    graphs = [o for o in report.operations if o.family == "graph"]
    assert {o.function for o in graphs} == {"decode", "prefill_8"}
    assert report.level == "neon-on-x86"


@pytest.mark.parametrize(
    ("placement", "on_htp"),
    [
        ({"prefill": "htp", "decode": "cpu"}, {"prefill_8"}),
        ({"prefill": "cpu", "decode": "htp"}, {"decode"}),
    ],
)
def test_phases_on_different_processors_share_one_cache(
    placement: dict[str, str],
    on_htp: set[str],
    htp_bundle: Callable[..., Path],
    tiny: Path,
) -> None:
    """Every step after the hand-over reads what the other processor wrote, and is compared."""
    bundle = htp_bundle("spinquant", **placement)
    manifest = read_manifest(bundle)
    where = {function.name: function.processor for function in manifest.functions}
    assert {name for name, processor in where.items() if processor == "htp"} == on_htp
    assert {graph.function for graph in manifest.graphs} == on_htp
    report = verify_bundle(bundle, tiny / "spinquant", max_tokens=16, machine=find_stand_in())
    assert report.passed, report.failures
    both, _ = story(htp_bundle("spinquant"), find_stand_in())
    mixed, _ = story(bundle, find_stand_in())
    assert mixed[:8] == both[:8]


def test_keys_and_values_are_handed_over_bit_by_bit(htp_bundle: Callable[..., Path]) -> None:
    """What the graph returns stands in the cache that the CPU's attention reads."""
    from llamac.compiler.verify_steps import SessionMemory  # noqa: PLC0415
    from llamac.targets.program import Program  # noqa: PLC0415

    bundle = htp_bundle("spinquant", prefill="htp", decode="cpu")
    program = Program.from_json((bundle / "program.json").read_text("utf-8"))
    prefill = program.function("prefill_8")
    with load(bundle, threads=1, machine=find_stand_in()) as model:
        native = model.native.open_session(1, ())
        memory = SessionMemory(native)
        native.eval(np.arange(5, dtype=np.int32))
        families = [program.kernels[step.kernel].family for step in prefill.steps]
        graph, append = families.index("graph"), families.index("append")
        native.write_memory(1, program.tensors[prefill.meta].offset, np.int32([5, 7]).tobytes())
        native.run_steps("prefill_8", 0, append + 1)
        operands = [program.tensors[i] for i in prefill.steps[append].operands]
        new = {t.name: memory.read(t) for t in operands if t.space == "arena"}
        caches = {t.name: memory.cache_rows(t, 13) for t in operands if t.space == "kv"}
        native.close()
    rows = [value for value in new.values() if value.ndim == 3]
    assert graph < append and len(rows) == 2
    for value, cache in zip(rows, caches.values(), strict=True):
        assert np.any(value)
        assert value.transpose(1, 0, 2).tobytes() == cache[5:13].tobytes()


def test_binaries_are_reproducible_and_described(
    htp_bundle: Callable[..., Path], tiny: Path, compiled: Callable[..., Path]
) -> None:
    first = read_manifest(htp_bundle("spinquant"))
    again = compiled(
        tiny / "spinquant",
        target=SOC,
        processors=("htp", "cpu"),
        chunks=(8,),
        context_length=256,
        verify=False,
    )
    assert first.build_id == read_manifest(again).build_id
    for graph in first.graphs:
        assert file_sha256(again / graph.file) == first.files[graph.file].sha256
        assert (graph.form, graph.scheme) == ("qnn-context", "float16")
        qnn = graph.qnn
        assert qnn is not None
        assert (qnn.soc_model, qnn.arch, qnn.vtcm_bytes) == (57, 75, 8 << 20)
        assert qnn.build_id.startswith("v2.51.0")
        assert graph.inputs[0].name and graph.outputs


def test_the_command_line_generates_text_and_shows_graphs(
    htp_bundle: Callable[..., Path], llamac: Callable[..., object]
) -> None:
    bundle = htp_bundle("spinquant")
    done = llamac("run", bundle, PROMPT, "--emulate", "--max-tokens", 4)
    assert len(done.stdout.split()) >= 2 and "LIBNATIVE" not in done.stdout  # type: ignore[attr-defined]
    assert "Qualcomm's HTP library for x86-64" in done.stderr  # type: ignore[attr-defined]
    shown = llamac("inspect", bundle).stdout  # type: ignore[attr-defined]
    assert "SoC number 57, v75" in shown and "layers on htp" in shown
    assert "layers.0.k_cache" in shown


# -- mistakes ------------------------------------------------------------------------------------


def test_a_flipped_byte_is_found_before_the_library_sees_it(
    htp_bundle: Callable[..., Path], copied: Callable[[Path], Path]
) -> None:
    bundle = copied(htp_bundle("spinquant"))
    path = bundle / read_manifest(bundle).graphs[0].file
    data = bytearray(path.read_bytes())
    data[len(data) // 2] ^= 1
    path.write_bytes(data)
    with pytest.raises(BundleCorrupt, match=path.name):
        load(bundle, machine=find_stand_in())


def test_without_the_vendor_s_library_it_says_so_and_offers_the_cpu(
    htp_bundle: Callable[..., Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv(VARIABLE, str(tmp_path))
    with pytest.raises(AcceleratorError) as caught:
        load(htp_bundle("spinquant"), machine=find_stand_in())
    assert "libQnn" in caught.value.message and str(tmp_path) in caught.value.message
    assert "--processors cpu" in caught.value.fix


def test_a_bundle_without_its_library_for_emulation_is_refused(
    htp_bundle: Callable[..., Path], copied: Callable[[Path], Path]
) -> None:
    bundle = copied(htp_bundle("spinquant"))
    path = bundle / "manifest.json"
    path.write_text(path.read_text("utf-8").replace('"role": "emulation"', '"role": "other"'))
    with pytest.raises(BundleInvalid, match="no library for emulation"):
        load(bundle, machine=find_stand_in())


def test_a_level_cannot_be_chosen(htp_bundle: Callable[..., Path]) -> None:
    with pytest.raises(UsageError, match="cannot be chosen here"):
        load(htp_bundle("spinquant"), level="neon", machine=find_stand_in())


@pytest.mark.parametrize(
    ("arguments", "error", "words"),
    [
        (("--processors", "htp"), "target-unknown", "compile with --processors cpu,htp"),
        (("--processors", "hvx,htp"), "target-unknown", "no model for hvx, htp"),
        (("--kv-cache", "int8"), "usage", "--kv-cache int8 is not known to qnn-htp"),
        (("--place", "prefill=cpu,decode=cpu"), "usage", "leaves nothing for htp"),
        (("--place", "sampling=cpu"), "usage", "phases are prefill and decode"),
        (("--target", "sm8350"), "usage", "the scheme a16w4 needs --calibrate FILE"),
        (("--target", "mt6993"), "target-unknown", "has no processor 'htp'"),
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
    options = ("--target", SOC, "--processors", "cpu,htp", *arguments, "-o", out)
    assert words in refused("compile", tiny / "spinquant", *options, error=error)
    assert not out.exists()


def test_counting_and_cpu_models_are_refused(
    htp_bundle: Callable[..., Path], refused: Callable[..., str]
) -> None:
    bundle = htp_bundle("spinquant")
    text = refused("bench", bundle, "--emulate", "--count", error="usage")
    assert "cannot count a bundle with graphs" in text
    text = refused("run", bundle, "Hi", "--emulate", "--cpu", "cortex-a76", error="usage")
    assert "--cpu cannot be chosen" in text


def test_large_graphs_are_not_executed_while_compiling(tmp_path: Path) -> None:
    """The manifest says why, and how to do it later."""
    names = {"lib/emulation/libmodel.so": "emulation", "htp/decode.bin": "graph"}
    artifacts = [Artifact(Path(name), role) for name, role in names.items()]
    (tmp_path / "htp").mkdir()
    with (tmp_path / "htp" / "decode.bin").open("wb") as file:
        file.truncate(200_000_000)
    target = make_target("arm-cpu", load_soc(SOC))
    open_model, where = opener(target, tmp_path, artifacts, "weights.bin")
    assert open_model is None
    assert "200 MB of graphs" in where and "llamac verify BUNDLE MODEL --emulate" in where
