"""ONNX files from anybody: damaged, hostile, with tensors where they should not be."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest

pytest.importorskip("onnx")

import onnx
from onnx import TensorProto, helper, numpy_helper

from llamac.compiler.frontends.onnx_file import OnnxFile
from llamac.compiler.frontends.onnx_form import is_onnx
from llamac.compiler.frontends.onnx_graph import OnnxGraph
from llamac.runtime.errors import (
    CheckpointMissing,
    CheckpointUnreadable,
    CheckpointUnsafe,
    LlamacError,
    ModelUnsupported,
)

VALUES = np.arange(12, dtype=np.float32).reshape(3, 4)
Change = Callable[[Any], None]


def make_model(nodes: list[Any], tensors: list[Any]) -> Any:
    """A model from x [1, T] of integers to y."""
    x = helper.make_tensor_value_info("x", TensorProto.INT64, [1, "T"])
    y = helper.make_tensor_value_info("y", TensorProto.FLOAT, None)
    graph = helper.make_graph(nodes, "graph", [x], [y], tensors)
    return helper.make_model(graph, opset_imports=[helper.make_opsetid("", 21)])


def table(data: Any = VALUES) -> Any:
    return numpy_helper.from_array(np.asarray(data), "table")


@pytest.fixture
def save(tmp_path: Path) -> Callable[..., Path]:
    """Save a model that looks up rows of a table: save(change, external=False) -> its path."""

    def make(change: Change = lambda _: None, *, external: bool = False) -> Path:
        model = make_model([helper.make_node("Gather", ["table", "x"], ["y"])], [table()])
        path = tmp_path / "model.onnx"
        if external:
            options = {"location": "data.bin", "size_threshold": 0}
            onnx.save(model, path, save_as_external_data=True, **options)
            model = onnx.load(path, load_external_data=False)
        change(model)
        path.write_bytes(model.SerializeToString())
        return path

    return make


def evaluate(path: Path) -> np.ndarray:
    graph = OnnxGraph(OnnxFile(path)).graph()
    [found] = graph.evaluate(["y"], {"x": np.array([[2, 0]])})
    return found


@pytest.mark.parametrize("external", [False, True])
def test_tensors_are_read(external: bool, save: Callable[..., Path]) -> None:
    assert np.array_equal(evaluate(save(external=external)), VALUES[[[2, 0]]])


@pytest.mark.parametrize(
    ("kind", "values"),
    [
        (TensorProto.FLOAT16, [0.5, -2, 3, 1]),
        (TensorProto.BFLOAT16, [0.5, -2, 3, 1]),
        (TensorProto.DOUBLE, [0.5, -2, 3, 1]),
        (TensorProto.INT8, [-128, 127, 3, 1]),
        (TensorProto.INT4, [-8, 7, 3, -1]),
        (TensorProto.UINT4, [15, 7, 0, 1]),
    ],
)
@pytest.mark.parametrize("is_raw", [True, False])
def test_every_type(kind: int, values: list[float], is_raw: bool, tmp_path: Path) -> None:
    """As bytes, and as lists of numbers."""
    tensor = helper.make_tensor("table", kind, [2, 2], values)
    if is_raw:
        tensor = numpy_helper.from_array(numpy_helper.to_array(tensor), "table")
    model = make_model([helper.make_node("Gather", ["table", "x"], ["y"])], [tensor])
    path = tmp_path / "model.onnx"
    path.write_bytes(model.SerializeToString())
    read = OnnxFile(path).tensor(model.graph.initializer[0])
    assert np.array_equal(read.array(), np.array(values).reshape(2, 2))
    assert read.stored().shape == (2, 2)


def set_external(**values: str) -> Change:
    """Change where the table's data are said to be."""

    def change(model: Any) -> None:
        entries = model.graph.initializer[0].external_data
        for entry in entries:
            entry.value = values.get(entry.key, entry.value)

    return change


@pytest.mark.parametrize(
    "location", ["../data.bin", "/etc/passwd", "folder/data.bin", "", ".", "..", "link.bin"]
)
def test_other_places_are_never_opened(
    location: str, save: Callable[..., Path], tmp_path: Path
) -> None:
    """Neither outside the folder nor through a link in it."""
    (tmp_path / "link.bin").symlink_to("/etc/passwd")
    path = save(set_external(location=location), external=True)
    with pytest.raises((CheckpointUnsafe, CheckpointMissing)):
        evaluate(path)


@pytest.mark.parametrize(
    ("values", "words"),
    [
        ({"offset": "44"}, "bytes at 44"),
        ({"offset": "-1"}, "bytes at -1"),
        ({"length": "4"}, "is 4 bytes"),
        ({"offset": "x"}, "offset or length"),
        ({"length": str(1 << 60)}, "bytes at 0"),
    ],
)
def test_places_in_a_file_are_compared_with_it(
    values: dict[str, str], words: str, save: Callable[..., Path]
) -> None:
    with pytest.raises(CheckpointUnreadable, match=words):
        evaluate(save(set_external(**values), external=True))


def test_a_missing_file_is_named(save: Callable[..., Path], tmp_path: Path) -> None:
    path = save(external=True)
    (tmp_path / "data.bin").unlink()
    with pytest.raises(CheckpointMissing, match=r"needs data\.bin"):
        evaluate(path)


def set_tensor(**values: Any) -> Change:
    """Change fields of the table's tensor."""

    def change(model: Any) -> None:
        for name, value in values.items():
            if name == "dims":
                model.graph.initializer[0].ClearField("dims")
                model.graph.initializer[0].dims.extend(value)
            else:
                setattr(model.graph.initializer[0], name, value)

    return change


@pytest.mark.parametrize(
    ("change", "words"),
    [
        (set_tensor(dims=[1 << 30, 1 << 30]), "has the shape"),
        (set_tensor(dims=[-3, -4]), "has the shape"),
        (set_tensor(dims=[4, 4]), "has 48 bytes, not 64"),
        (set_tensor(data_type=99), "is of type 99"),
        (set_tensor(raw_data=b""), "has 0 bytes"),
    ],
)
def test_tensors_that_are_not_what_they_say(
    change: Change, words: str, save: Callable[..., Path]
) -> None:
    with pytest.raises(CheckpointUnreadable, match=words):
        evaluate(save(change))


@pytest.mark.parametrize(
    "node",
    [
        helper.make_node("Loop", ["x"], ["y"], body=helper.make_graph([], "b", [], [])),
        helper.make_node("NoSuchOperator", ["x"], ["y"]),
        helper.make_node("Gather", ["table", "x"], ["y"], domain="org.example"),
        helper.make_node("FusedMatMul", ["table", "x"], ["y"], domain="com.microsoft"),
    ],
)
def test_operators_that_are_not_known_are_named(node: Any, tmp_path: Path) -> None:
    path = tmp_path / "model.onnx"
    path.write_bytes(make_model([node], [table()]).SerializeToString())
    with pytest.raises(ModelUnsupported, match=f"does not know: {node.op_type}"):
        OnnxGraph(OnnxFile(path)).graph()


@pytest.mark.parametrize("operator", ["ConstantOfShape", "Expand", "Tile"])
def test_sizes_in_a_graph_are_not_believed(operator: str, tmp_path: Path) -> None:
    """A terabyte is refused before anything is allocated."""
    sizes = numpy_helper.from_array(np.array([1 << 20, 1 << 20]), "sizes")
    reads = ["sizes"] if operator == "ConstantOfShape" else ["table", "sizes"]
    nodes = [
        helper.make_node(operator, reads, ["large"]),
        helper.make_node("Gather", ["large", "x"], ["y"]),
    ]
    path = tmp_path / "model.onnx"
    path.write_bytes(make_model(nodes, [table(VALUES[:1, :1]), sizes]).SerializeToString())
    with pytest.raises(ModelUnsupported, match="asks for"):
        evaluate(path)


def test_it_is_told_by_its_beginning(save: Callable[..., Path], tmp_path: Path) -> None:
    path = save()
    assert is_onnx(path) and is_onnx(tmp_path)
    other = tmp_path / "other"
    for data in (b"", b"\x08", b"GGUF\x03", b"PK\x03\x04", b"\x08\xff\x12", b'{"a": 1}'):
        other.write_bytes(data)
        assert not is_onnx(other)
    (tmp_path / "config.json").write_text("{}")
    assert not is_onnx(tmp_path)


@pytest.mark.parametrize("seed", range(4))
def test_mutated_files(seed: int, save: Callable[..., Path]) -> None:
    """A result or an error with a code, whatever the bytes are."""
    path = save()
    data, generator, refused = path.read_bytes(), np.random.default_rng(seed), 0
    for _ in range(300):
        changed = bytearray(data)
        for place in generator.integers(0, len(data), generator.integers(1, 5)):
            changed[place] = generator.integers(0, 256)
        if generator.random() < 0.2:
            del changed[generator.integers(1, len(data)) :]
        path.write_bytes(changed)
        try:
            evaluate(path)
        except LlamacError as error:
            assert error.code and error.cause and error.fix
            refused += 1
    assert refused > 50
