"""Archives of torch.export from anybody: damaged, hostile, of other versions."""

from __future__ import annotations

import io
import json
import pickle
import zipfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch import nn

from llamac.compiler.frontends.pt2 import open_pt2
from llamac.compiler.frontends.pt2_form import is_pt2
from llamac.runtime.errors import (
    CheckpointUnreadable,
    CheckpointUnsafe,
    LlamacError,
    ModelUnsupported,
)

Change = Callable[[Any], None]
GRAPH, WEIGHTS = "m/models/model.json", "m/data/weights/model_weights_config.json"
pytestmark = pytest.mark.filterwarnings(
    "ignore::FutureWarning", "ignore::DeprecationWarning", "ignore:No complete tensor"
)


class Small(nn.Module):
    """Not a Llama, but every kind of argument."""

    def __init__(self) -> None:
        super().__init__()
        self.table, self.linear = nn.Embedding(8, 4), nn.Linear(4, 8, bias=False)
        self.register_buffer("turned", torch.arange(12.0).reshape(3, 4).T)

    def forward(self, tokens: torch.Tensor) -> torch.Tensor:
        x = self.table(tokens)
        first, last = torch.split(x, 2, dim=-1)
        mask = torch.full((x.shape[1], x.shape[1]), float("-inf")).triu(1)
        x = torch.cat([first, last], -1) + mask.exp().sum() + self.turned.sum()
        return self.linear(x.to(torch.float32))


@pytest.fixture(scope="module")
def saved(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("pt2") / "m.pt2"
    tokens = torch.zeros(1, 5, dtype=torch.int64)
    count = torch.export.Dim("count", min=2, max=64)
    program = torch.export.export(Small().eval(), (tokens,), dynamic_shapes=({1: count},))
    torch.export.save(program, path)
    return path


@pytest.fixture
def change(saved: Path, tmp_path: Path) -> Callable[..., Path]:
    """Rewrite a member: change("m/...", function of its JSON) -> the new archive."""

    def make(member: str, edit: Change, compression: int = zipfile.ZIP_STORED) -> Path:
        path = tmp_path / "m.pt2"
        with zipfile.ZipFile(saved) as old, zipfile.ZipFile(path, "w", compression) as new:
            for info in old.infolist():
                data = old.read(info)
                if info.filename == member:
                    document = json.loads(data)
                    edit(document)
                    data = json.dumps(document).encode()
                new.writestr(info.filename, data)
        return path

    return make


def test_it_computes_what_pytorch_computes(saved: Path) -> None:
    """With weights that are views of the file, one with strides of its own."""
    graph = open_pt2(saved)
    tokens = np.array([[3, 1, 7, 7]])
    [found] = graph.evaluate(graph.outputs, {next(iter(graph.inputs)): tokens})
    expected = torch.export.load(saved).module()(torch.from_numpy(tokens))
    assert np.allclose(found, expected.detach().numpy(), rtol=1e-5, atol=1e-6)
    shapes = {weight.shape for weight in graph.weights.values()}
    assert shapes == {(8, 4), (4, 3)}


def test_other_files_are_no_archives(tmp_path: Path, saved: Path) -> None:
    assert is_pt2(saved)
    other = tmp_path / "other"
    torch.save({"w": torch.zeros(2)}, other)
    assert not is_pt2(other) and not is_pt2(tmp_path) and not is_pt2(tmp_path / "none")
    other.write_bytes(b"PK\x03\x04" + bytes(100))
    assert not is_pt2(other)


def first(document: Any) -> Any:
    """The first tensor of a configuration."""
    return next(iter(document["config"].values()))


def set_meta(**values: Any) -> Change:
    return lambda document: first(document)["tensor_meta"].update(values)


@pytest.mark.parametrize(
    ("edit", "error", "words"),
    [
        (set_meta(sizes=[{"as_int": 1 << 40}, {"as_int": 4}]), CheckpointUnreadable, "larger than"),
        (set_meta(sizes=[{"as_int": -8}, {"as_int": 4}]), CheckpointUnreadable, "negative"),
        (set_meta(strides=[{"as_int": 1 << 50}, {"as_int": 1}]), CheckpointUnreadable, "larger"),
        (set_meta(storage_offset={"as_int": 1}), CheckpointUnreadable, "larger than its file"),
        (set_meta(dtype=77), CheckpointUnreadable, "unknown type"),
        (set_meta(strides=[]), CheckpointUnreadable, r"not as expected|unknown type"),
        (lambda d: first(d).update(use_pickle=True), CheckpointUnsafe, "is pickled"),
        (lambda d: first(d).update(path_name="../../weight_0"), CheckpointUnreadable, "no file"),
        (lambda d: first(d).pop("tensor_meta"), CheckpointUnreadable, "not as expected"),
        (lambda d: d.clear(), CheckpointUnreadable, "not as expected"),
    ],
)
def test_tensors_that_are_not_what_they_say(
    edit: Change, error: type[LlamacError], words: str, change: Callable[..., Path]
) -> None:
    with pytest.raises(error, match=words):
        open_pt2(change(WEIGHTS, edit))


def node(document: Any, target: str) -> Any:
    """The first node with that operation."""
    nodes = document["graph_module"]["graph"]["nodes"]
    return next(n for n in nodes if target in n["target"])


@pytest.mark.parametrize(
    "target",
    [
        "torch.ops.aten.from_file.default",
        "torch.load",
        "_operator.attrgetter",
        "torch.ops.aten.linear.__class__",
        "#os:system",
        "math.sqrt",
        "torch.ops.profiler._record_function_enter.default",
    ],
)
def test_names_are_not_called(target: str, change: Callable[..., Path]) -> None:
    """Whatever a node asks for, only what is on the list is ever looked up."""

    def edit(document: Any) -> None:
        node(document, "aten.exp").update(target=target)

    path = change(GRAPH, edit)
    with pytest.raises(ModelUnsupported, match=r"does not know|cannot be computed"):
        graph = open_pt2(path)
        graph.evaluate(graph.outputs, {next(iter(graph.inputs)): np.zeros((1, 4), np.int64)})


@pytest.mark.parametrize(
    ("edit", "error", "words"),
    [
        (lambda d: d["schema_version"].update(major=9), ModelUnsupported, "has version 9"),
        (lambda d: d.pop("graph_module"), CheckpointUnreadable, "not as expected"),
        (
            lambda d: node(d, "aten.exp")["inputs"][0].update(arg={"as_graph": {}}),
            ModelUnsupported,
            "argument of the kind as_graph",
        ),
    ],
)
def test_graphs_of_another_form(
    edit: Change, error: type[LlamacError], words: str, change: Callable[..., Path]
) -> None:
    with pytest.raises(error, match=words):
        open_pt2(change(GRAPH, edit))


@pytest.mark.parametrize("sizes", [[1 << 40], [1 << 20, 1 << 20], [-1, 5]])
def test_sizes_in_a_graph_are_not_believed(sizes: list[int], change: Callable[..., Path]) -> None:
    """An operation that asks for a terabyte is refused before it is called."""

    def edit(document: Any) -> None:
        node(document, "aten.full").update(target="torch.ops.aten.zeros.default")
        node(document, "aten.zeros")["inputs"] = [
            {"name": "size", "arg": {"as_ints": sizes}, "kind": 1}
        ]

    graph = open_pt2(change(GRAPH, edit))
    with pytest.raises(ModelUnsupported, match="cannot be computed"):
        graph.evaluate(graph.outputs, {next(iter(graph.inputs)): np.zeros((1, 4), np.int64)})


def test_compressed_archives_are_refused(change: Callable[..., Path]) -> None:
    """Weights could not be mapped, and a small file could become a large one."""
    path = change(GRAPH, lambda _: None, zipfile.ZIP_DEFLATED)
    with pytest.raises(CheckpointUnreadable, match="is compressed"):
        open_pt2(path)


def test_nothing_is_unpickled(saved: Path, tmp_path: Path) -> None:
    """Sample inputs are pickled in every file; here they would end the process."""

    class Bomb:
        def __reduce__(self) -> Any:
            return (exec, ("raise SystemExit('unpickled')",))

    path = tmp_path / "m.pt2"
    with zipfile.ZipFile(saved) as old, zipfile.ZipFile(path, "w") as new:
        for info in old.infolist():
            is_sample = info.filename.endswith(".pt")
            new.writestr(info.filename, pickle.dumps(Bomb()) if is_sample else old.read(info))
    assert open_pt2(path).outputs


@pytest.mark.parametrize("seed", range(4))
def test_mutated_files(seed: int, saved: Path, tmp_path: Path) -> None:
    """Bytes changed, cut off, or repeated: a graph that computes or an error with a code."""
    data, generator = saved.read_bytes(), np.random.default_rng(seed)
    path, refused = tmp_path / "m.pt2", 0
    for _ in range(150):
        changed = bytearray(data)
        for place in generator.integers(0, len(data), generator.integers(1, 6)):
            changed[place] = generator.integers(0, 256)
        if generator.random() < 0.2:
            del changed[generator.integers(1, len(data)) :]
        path.write_bytes(changed)
        try:
            graph = open_pt2(path)
            given = {name: np.zeros((1, 4), np.int64) for name in graph.inputs}
            graph.evaluate(graph.outputs, given)
        except LlamacError as error:
            assert error.code and error.cause and error.fix
            refused += 1
    assert refused > 20


def test_a_file_that_is_no_archive(tmp_path: Path) -> None:
    path = tmp_path / "m.pt2"
    for data in (b"", b"no archive", io.BytesIO(bytes(1000)).getvalue()):
        path.write_bytes(data)
        with pytest.raises(CheckpointUnreadable):
            open_pt2(path)
