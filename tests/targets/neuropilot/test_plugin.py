"""The plug-in: what it writes for the tiny model, what it says of it, and what it refuses."""

from __future__ import annotations

import sys
from collections.abc import Callable
from dataclasses import replace
from functools import cache
from pathlib import Path
from typing import Any

import numpy as np
import pytest

pytest.importorskip("ai_edge_litert", reason="optional extra: pip install 'llamac[apu]'")

from ai_edge_litert import schema_py_generated as schema

from llamac.compiler.layers import LayerModel, prepare_layers
from llamac.compiler.llama import ModelOptions, build_llama
from llamac.compiler.offload import linear_inputs
from llamac.runtime.errors import CoverageError, ToolchainMissing, ValuesInvalid
from llamac.runtime.graph_entry import GraphEntry, check_graphs
from llamac.schedules.graph import NeuronGraph
from llamac.schedules.intrin.arm import ArmDotprod
from llamac.targets.base import Layers, Offloaded
from llamac.targets.cpu.plan import plan_program
from llamac.targets.cpu.selection import select_kernels
from llamac.targets.neuropilot.plugin import NeuroPilot
from llamac.targets.registry import make_target
from llamac.targets.soc import load_soc

CAPACITY, FUNCTIONS = 64, ("decode", "prefill_8")
HEADER_BYTES = 104


@pytest.fixture(scope="module")
def module(kit: Any) -> Callable[[str], Any]:
    """The IR of a form of the tiny model, with an int16 cache."""
    options = ModelOptions(CAPACITY, (8,), "int16")
    return lambda form: build_llama(kit.tiny(form), options)


@pytest.fixture(scope="module")
def prepared(
    kit: Any, module: Callable[[str], Any], tmp_path_factory: pytest.TempPathFactory
) -> Callable[..., LayerModel]:
    """The layers of a form of the tiny model in a scheme, calibrated on a few tokens."""

    @cache
    def prepare(form: str, scheme: str) -> LayerModel:
        checkpoint = kit.tiny(form)
        [found] = [s for s in target_of("mt6991").schemes() if s.name == scheme]
        inputs = linear_inputs(module(form), "decode")
        tokens = kit.random_tokens(checkpoint, 64, 3)
        folder = tmp_path_factory.mktemp("layers")
        return prepare_layers(checkpoint, found, inputs, tokens, folder, lambda *_: None)

    return prepare


def target_of(soc: str) -> NeuroPilot:
    return NeuroPilot(load_soc(soc))


@pytest.fixture
def offload(
    module: Callable[[str], Any], prepared: Callable[..., LayerModel], tmp_path: Path
) -> Callable[..., Offloaded]:
    """Offload the tiny model: offload(folder, soc, scheme, form)."""

    def run(
        name: str, soc: str = "mt6991", scheme: str = "a16w8", form: str = "spinquant"
    ) -> Offloaded:
        model = prepared(form, scheme)
        (tmp_path / name).mkdir()
        given = Layers(model.scheme, model.checkpoint.weights, model.ranges)
        progress: list[tuple[str, int, int]] = []
        made = target_of(soc).offload(
            module(form),
            FUNCTIONS,
            given,
            tmp_path / name,
            lambda *step: progress.append(step),
        )
        assert [step[1:] for step in progress] == [(i, len(progress) - 1) for i in range(3)]
        return made

    return run


@pytest.mark.parametrize("form", ["spinquant", "qlora"])
def test_each_graph_is_written_in_both_forms(
    form: str, offload: Callable[..., Offloaded], tmp_path: Path
) -> None:
    """Files, their roles and notes, and entries that fit them."""
    made = offload("out", form=form)
    files = {str(a.path): a for a in made.artifacts}
    assert files.keys() == {str(p.relative_to(tmp_path / "out")) for p in tmp_path.glob("out/*/*")}
    assert [graph.function for graph in made.graphs] == list(FUNCTIONS)
    check_graphs(made.graphs, files)
    for graph in made.graphs:
        assert graph.neuron is not None and graph.qnn is None
        assert (graph.form, graph.scheme) == ("neuron-network", "a16w8")
        assert (graph.neuron.soc, graph.neuron.neuropilot) == ("mt6991", 8)
        assert files[graph.file].role == "graph"
        assert "phone" in files[graph.file].note
        assert files[graph.neuron.tflite].role == "graph-source"
        assert "portable" in files[graph.neuron.tflite].note
        header = (tmp_path / "out" / graph.file).read_bytes()[:HEADER_BYTES]
        assert header[24:56].hex() == graph.neuron.network_sha256


def test_edges_are_described_with_their_scales(
    offload: Callable[..., Offloaded], tmp_path: Path
) -> None:
    """In the order of a step's operands; the .tflite has the same scales under the same names."""
    made = offload("out")
    graph: GraphEntry = made.graphs[1]
    assert [t.name for t in graph.inputs[:6]] == [
        *("hidden", "rope_cos", "rope_sin", "mask"),
        *("layers.0.k_cache", "layers.0.v_cache"),
    ]
    assert [t.name for t in graph.outputs[:2]] == ["hidden_out", "layers.0.k_new"]
    assert graph.inputs[0].shape == (1, 8, 128)
    assert {t.dtype for t in (*graph.inputs, *graph.outputs)} == {"int16"}
    assert graph.neuron is not None
    tflite = (tmp_path / "out" / graph.neuron.tflite).read_bytes()
    whole = schema.Model.GetRootAs(tflite, 0).Subgraphs(0)
    tensors = [whole.Tensors(i) for i in range(whole.TensorsLength())]
    scales = {t.Name().decode(): t.Quantization().ScaleAsNumpy() for t in tensors if t.Type() == 7}
    for tensor in (*graph.inputs, *graph.outputs):
        assert tensor.scale is not None and tensor.zero_point == 0
        assert np.float32(tensor.scale) == scales[tensor.name]


def test_the_module_calls_the_graphs(offload: Callable[..., Offloaded]) -> None:
    """The CPU keeps embedding and output; the cache is int16 without scales of rows."""
    made = offload("out")
    program = plan_program(select_kernels(made.module, "float16", ArmDotprod()))
    shapes = program.graphs()
    assert [shape.file for shape in shapes] == [graph.file for graph in made.graphs]
    for shape, graph in zip(shapes, made.graphs, strict=True):
        assert graph.neuron is not None
        assert shape.vendor == NeuronGraph(
            "mt6991", graph.neuron.network_sha256, graph.neuron.tflite
        )
    families = [program.kernels[s.kernel].family for s in program.function("decode").steps]
    assert families.count("graph") == 1 and families.count("append") == 4
    assert "attention" not in families
    caches = [t for t in program.tensors if t.space == "kv"]
    assert {t.dtype for t in caches} == {"int16"} and len(caches) == 8


def test_the_same_input_gives_the_same_bytes(
    offload: Callable[..., Offloaded], tmp_path: Path
) -> None:
    first, again = (offload(name) for name in ("first", "again"))
    assert first.graphs == again.graphs
    for artifact in first.artifacts:
        paths = (tmp_path / name / artifact.path for name in ("first", "again"))
        assert len({path.read_bytes() for path in paths}) == 1


def test_int4_weights_take_half_the_place(
    offload: Callable[..., Offloaded], tmp_path: Path
) -> None:
    """Packed in both forms, whatever the version; NeuroPilot 9 demands its adapter."""
    sizes = {}
    for soc, scheme in (("mt6991", "a16w8"), ("mt6991", "a16w4"), ("mt6993", "a16w4")):
        made = offload(f"{soc}-{scheme}", soc, scheme)
        sizes[soc, scheme] = [
            (tmp_path / f"{soc}-{scheme}" / a.path).stat().st_size for a in made.artifacts
        ]
        assert {g.neuron.neuropilot for g in made.graphs if g.neuron} == {
            9 if soc == "mt6993" else 8
        }
    for wide, packed in zip(sizes["mt6991", "a16w8"], sizes["mt6991", "a16w4"], strict=True):
        assert packed < 0.75 * wide


# -- Schemes and what is refused ------------------------------------------------------------------


@pytest.mark.parametrize("soc", ["mt6983", "mt6985", "mt6989", "mt6991", "mt6897"])
def test_schemes_of_neuropilot_8(soc: str) -> None:
    """int8 weights first; of int4 ones the summary says what becomes of them."""
    first, second = target_of(soc).schemes()
    assert (first.name, first.weights, second.name, second.weights) == (
        *("a16w8", "int8"),
        *("a16w4", "int4"),
    )
    assert {first.kv_dtype, second.kv_dtype} == {"int16"}
    assert first.is_calibrated and second.is_calibrated
    assert "as int8" in second.summary and "as int8" not in first.summary


def test_schemes_of_neuropilot_9() -> None:
    first, second = target_of("mt6993").schemes()
    assert (first.name, second.name) == ("a16w4", "a16w8")
    assert "as int8" not in first.summary


def test_a_soc_without_a_version_is_refused() -> None:
    """It is data: `make_target` says why and what to do."""
    target = target_of("genio1200")
    assert target.schemes() == ()
    with pytest.raises(ToolchainMissing, match="version of NeuroPilot for genio1200") as caught:
        make_target("neuropilot", load_soc("genio1200"))
    assert "--processors cpu" in caught.value.fix


def test_the_missing_extra_is_named(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "ai_edge_litert", None)
    monkeypatch.setattr("importlib.util.find_spec", lambda _: None)
    [missing] = target_of("mt6991").check()
    assert missing.what == "ai-edge-litert"
    assert missing.fix == "pip install 'llamac[apu]'"


def test_with_the_extra_nothing_is_missing() -> None:
    assert not target_of("mt6991").check()


def test_ranges_that_no_text_showed_are_refused(
    module: Callable[[str], Any], prepared: Callable[..., LayerModel], tmp_path: Path
) -> None:
    """The value is named, and no half file is left."""
    model = prepared("spinquant", "a16w8")
    ranges = {k: v for k, v in model.ranges.items() if k != "layers.2.attention.wq"}
    given = Layers(model.scheme, model.checkpoint.weights, ranges)
    with pytest.raises(ValuesInvalid, match=r"layers\.2\.attention\.wq"):
        target_of("mt6991").offload(
            module("spinquant"), FUNCTIONS, given, tmp_path, lambda *_: None
        )
    assert not list((tmp_path / "apu").iterdir())


def test_weights_in_groups_are_refused(
    kit: Any, module: Callable[[str], Any], prepared: Callable[..., LayerModel], tmp_path: Path
) -> None:
    model = prepared("spinquant", "a16w8")
    given = Layers(replace(model.scheme, name="a16w4"), kit.tiny("spinquant").weights, model.ranges)
    with pytest.raises(CoverageError, match="weights in groups"):
        target_of("mt6991").offload(
            module("spinquant"), FUNCTIONS, given, tmp_path, lambda *_: None
        )
