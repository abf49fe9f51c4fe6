"""Files are what the schema says, although their weights were never in a flatbuffer's builder."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest

pytest.importorskip("ai_edge_litert", reason="optional extra: pip install 'llamac[apu]'")

from ai_edge_litert import schema_py_generated as schema

from llamac.runtime.errors import CoverageError
from llamac.targets.neuropilot import tflite_file
from llamac.targets.neuropilot.interpreter import run_model
from llamac.targets.neuropilot.operations import Operations
from llamac.targets.neuropilot.tflite_file import TfliteFile, pack_int4

CODES = np.random.default_rng(0).integers(-8, 8, (6, 32), np.int8)
SCALES = np.linspace(0.01, 0.02, 6, dtype=np.float32)


def write(path: Path, dtype: str) -> None:
    """Two products, one after the other, with an odd number of bytes between their weights."""
    with TfliteFile(path, "products") as file:
        ops = Operations(file)
        x = file.input("x", (2, 32), 1e-4)
        y = ops.fully_connected(x, file.weight("w", CODES, SCALES, dtype), 6, 2e-4)
        square = np.eye(5, 6, dtype=np.int8)
        weight = file.weight("v", square, np.ones(5, np.float32), "int8")
        file.output(ops.fully_connected(y, weight, 5, 2e-4), "y")


def test_codes_are_packed_with_the_first_one_below() -> None:
    codes = np.array([[-8, 7, -1], [0, 3, 5]], np.int8)
    assert pack_int4(codes).tolist() == [0x78, 0x0F, 0x53]
    assert pack_int4(codes[:1]).tolist() == [0x78, 0x0F]


@pytest.mark.parametrize("dtype", ["int8", "int4"])
def test_weights_are_where_the_description_says(dtype: str, tmp_path: Path) -> None:
    """Read by the schema's own reader; data aligned to 16 bytes; scales for each row."""
    write(tmp_path / "x.tflite", dtype)
    data = (tmp_path / "x.tflite").read_bytes()
    assert data[4:8] == b"TFL3"
    model = schema.Model.GetRootAs(data, 0)
    graph = model.Subgraphs(0)
    tensors = {graph.Tensors(i).Name().decode(): i for i in range(graph.TensorsLength())}
    weight = graph.Tensors(tensors["w"])
    stored = model.Buffers(weight.Buffer()).DataAsNumpy()
    expected = CODES.reshape(-1).view(np.uint8) if dtype == "int8" else pack_int4(CODES)
    np.testing.assert_array_equal(stored, expected)
    np.testing.assert_array_equal(weight.Quantization().ScaleAsNumpy(), SCALES)
    assert weight.Quantization().QuantizedDimension() == 0
    for name in ("w", "v"):
        place = model.Buffers(graph.Tensors(tensors[name]).Buffer()).DataAsNumpy()
        assert (place.ctypes.data - np.frombuffer(data, np.uint8).ctypes.data) % 16 == 0


@pytest.mark.parametrize("dtype", ["int8", "int4"])
def test_the_interpreter_finds_them_too(dtype: str, tmp_path: Path) -> None:
    write(tmp_path / "x.tflite", dtype)
    x = np.random.default_rng(1).integers(-9000, 9000, (2, 32)).astype(np.int16)
    y = run_model(tmp_path / "x.tflite", {"x": x})["y"]
    exact = (x * 1e-4) @ (CODES * SCALES[:, None].astype(np.float64)).T
    assert np.abs(y * 2e-4 - exact[:, :5]).max() < 1.5 * 2e-4


def test_two_files_are_equal_and_nothing_else_is_left(tmp_path: Path) -> None:
    for name in ("a", "b"):
        write(tmp_path / name, "int4")
    assert (tmp_path / "a").read_bytes() == (tmp_path / "b").read_bytes()
    assert sorted(path.name for path in tmp_path.iterdir()) == ["a", "b"]


def test_an_error_leaves_nothing(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Neither one while operations are added, nor one while the file is put together."""
    with pytest.raises(KeyError), TfliteFile(tmp_path / "x", "x") as file:
        file.weight("w", CODES, SCALES, "float32")
    monkeypatch.setattr(tflite_file, "MAX_BYTES", 1000)
    with pytest.raises(CoverageError, match="larger than 1000 bytes"):
        write(tmp_path / "y", "int8")
    assert not list(tmp_path.iterdir())
