"""From .tflite to network file: what is refused, with the operation's and the tensor's names.

What is written is looked at in tests/runtime/neuron, through the eyes of an adapter.
"""

from __future__ import annotations

import struct
from collections.abc import Callable, Mapping
from pathlib import Path
from types import ModuleType
from typing import Any

import numpy as np
import pytest

from llamac.runtime.errors import CoverageError
from llamac.targets.neuropilot.network import Network, write_network

HEADER_BYTES = 104
Build = Callable[[Any], tuple[list[int], list[int]]]


@pytest.fixture
def translate(small_tflite: ModuleType, tmp_path: Path) -> Callable[..., Network]:
    """Translate a model that a function describes: translate(build) -> Network."""

    def run(build: Build) -> Network:
        model = small_tflite.SmallTflite()
        sides = build(model)
        return write_network(model.write(tmp_path / "m.tflite", *sides), tmp_path / "m.neuron")

    return run


@pytest.fixture
def refused(translate: Callable[..., Network], tmp_path: Path) -> Callable[..., None]:
    """Check that a model is refused: refused(build, what, why)."""

    def check(build: Build, what: str, why: str) -> None:
        with pytest.raises(CoverageError) as error:
            translate(build)
        assert what in error.value.message
        assert why in error.value.cause
        assert not list(tmp_path.glob("*.neuron*"))

    return check


def _binary(name: str, options: Mapping[str, Any] = {}, **changes: Any) -> Build:
    """A model of one operation of x and a constant c, where c or y are changed."""

    def build(model: Any) -> tuple[list[int], list[int]]:
        c: dict[str, Any] = {"scale": 1e-3, "data": np.ones(8, np.int16), "shape": (1, 8)}
        c |= {key: value for key, value in changes.items() if key != "y"}
        x = model.tensor("x", (1, 8), scale=1e-3)
        y = model.tensor("y", **({"scale": 1e-3, "shape": (1, 8)} | changes.get("y", {})))
        model.op(name, [x, model.tensor("c", **c)], [y], options)
        return [x], [y]

    return build


def _linear(weight: Mapping[str, Any], **options: Any) -> Build:
    """A FULLY_CONNECTED with other weights."""

    def build(model: Any) -> tuple[list[int], list[int]]:
        x, y = (model.tensor(name, (2, 4), scale=1e-3) for name in "xy")
        codes = np.ones((4, 4), np.int8)
        w = model.tensor("w", **({"shape": (4, 4), "dtype": "INT8", "data": codes} | weight))
        model.op("FULLY_CONNECTED", [x, w], [y], options)
        return [x], [y]

    return build


def test_an_unknown_operation(refused: Callable[..., None]) -> None:
    refused(_binary("SQUARED_DIFFERENCE"), "SQUARED_DIFFERENCE 'y' has no form", "not known")


def test_tensors_without_a_type(refused: Callable[..., None]) -> None:
    """Asymmetric int16, int8 without scales, types of other worlds."""
    c = "tensor 'c' of ADD 'y'"
    refused(_binary("ADD", zero_point=3), c, "INT16, 1 scales, zero point 3")
    refused(_binary("ADD", y={"scale": None}), "tensor 'y' of the graph", "it is INT16, for")
    data = np.ones(8, np.int8)
    refused(_binary("ADD", dtype="INT8", scale=None, data=data), c, "it is INT8, for")
    refused(_binary("ADD", dtype="UINT16", data=np.ones(8, np.uint16)), c, "it is UINT16")
    refused(_binary("ADD", dtype="INT4", data=data), c, "it is INT4, 1 scales")


def test_weights_without_a_type(refused: Callable[..., None]) -> None:
    """Meta's groups of 32 are the case that matters."""
    w, scales = "tensor 'w' of FULLY_CONNECTED 'y'", [0.1, 0.2, 0.3, 0.4]
    refused(_linear({"scale": scales, "zero_point": 1}), w, "its channels have zero points")
    refused(_linear({"scale": scales[:3]}), w, "3 scales for shape (4, 4)")
    refused(_linear({"scale": scales, "dim": 2}), w, "4 scales for shape (4, 4)")
    refused(_linear({"scale": [*scales[:3], 0.0]}), w, "a scale is not positive")
    refused(_linear({"scale": [*scales[:3], np.inf]}), w, "a scale is not positive")
    refused(_linear({"scale": scales}, weightsFormat=1), w, "shuffled")
    short = np.ones((4, 3), np.int8)
    refused(_linear({"scale": scales, "data": short}), w, "it has 12 bytes of data, not 16")


def test_weights_in_groups(refused: Callable[..., None], small_tflite: ModuleType) -> None:
    def build(model: Any) -> tuple[list[int], list[int]]:
        sides = _linear({"scale": [0.1] * 4})(model)
        details = small_tflite.schema.QuantizationDetails
        [w] = [tensor for tensor in model.subgraph.tensors if tensor.name == "w"]
        w.quantization.detailsType = details.BlockwiseQuantization
        w.quantization.details = small_tflite.schema.BlockwiseQuantizationT()
        return sides

    refused(build, "tensor 'w' of FULLY_CONNECTED 'y'", "in groups, not per channel")


def test_shapes_that_are_not_static(refused: Callable[..., None]) -> None:
    def build(model: Any) -> tuple[list[int], list[int]]:
        sides = _binary("ADD")(model)
        model.subgraph.tensors[0].shapeSignature = [-1, 8]
        return sides

    refused(build, "tensor 'x' of the graph", "its shape is (1, 8): static")
    refused(_binary("ADD", shape=(1,) * 8 + (8,)), "tensor 'c' of ADD", "at most 8 dimensions")


def test_values_that_do_not_fit(refused: Callable[..., None]) -> None:
    """Biases have 64 bits in the file and 32 in the adapter."""
    wide = np.array([0, 1 << 31, 0, 0], np.int64)

    def build(model: Any) -> tuple[list[int], list[int]]:
        x, y = (model.tensor(name, (2, 4), scale=1e-3) for name in "xy")
        w = model.tensor("w", (4, 4), "INT8", [0.1] * 4, np.ones((4, 4), np.int8))
        b = model.tensor("b", (4,), "INT64", [1e-4] * 4, wide)
        model.op("FULLY_CONNECTED", [x, w, b], [y])
        return [x], [y]

    refused(build, "tensor 'b' of FULLY_CONNECTED 'y'", "does not fit into 32 bits")


def test_activation_functions(refused: Callable[..., None]) -> None:
    """TANH has number 4, which means nothing to the adapter; CONCATENATION takes none at all."""
    refused(_binary("ADD", {"fusedActivationFunction": 4}), "ADD 'y' has no form", "number 4")
    options = {"axis": 0, "fusedActivationFunction": 1}
    y = {"shape": (2, 8)}
    refused(_binary("CONCATENATION", options, y=y), "CONCATENATION 'y'", "activation function")


def test_edges_of_the_graph(refused: Callable[..., None]) -> None:
    def twice(model: Any) -> tuple[list[int], list[int]]:
        inputs, outputs = _binary("ADD")(model)
        return inputs, outputs + inputs

    def constant(model: Any) -> tuple[list[int], list[int]]:
        inputs, outputs = _binary("ADD")(model)
        return inputs, [*outputs, 2]

    refused(twice, "tensor 'x' of the graph", "more than once")
    refused(constant, "tensor 'c' of the graph", "it is constant")


def test_a_file_of_another_kind(tmp_path: Path) -> None:
    pytest.importorskip("ai_edge_litert", reason="optional extra: pip install 'llamac[apu]'")
    for data in (b"", b"1234TFL2", b"PK" * 100):
        (tmp_path / "m.tflite").write_bytes(data)
        with pytest.raises(CoverageError, match=r"m\.tflite is no \.tflite file"):
            write_network(tmp_path / "m.tflite", tmp_path / "m.neuron")


def test_the_same_bytes_every_time(small_tflite: ModuleType, tmp_path: Path) -> None:
    tflite = small_tflite.write_every_op(tmp_path / "m.tflite")
    one, two = (write_network(tflite, tmp_path / f"{i}.neuron") for i in range(2))
    assert one.file.sha256 == two.file.sha256
    assert one.file.path.read_bytes() == two.file.path.read_bytes()


def test_the_interface(small_tflite: ModuleType, tmp_path: Path) -> None:
    """Names, shapes, dtypes, in the graph's order; the header has the hash of the rest."""
    network = write_network(
        small_tflite.write_every_op(tmp_path / "m.tflite"), tmp_path / "m.neuron"
    )
    found = [(t.name, t.shape, t.dtype) for t in (*network.inputs, *network.outputs)]
    assert found == [
        ("x", (1, 4, 8), "int16"),
        ("past", (1, 4, 8), "int16"),
        ("probabilities", (1, 2, 4, 4), "int16"),
        ("both", (1, 8, 8), "int16"),
        ("real", (1, 4, 8), "float32"),
    ]
    data = network.file.path.read_bytes()
    assert network.file.file_bytes == len(data)
    magic, version, header, size = struct.unpack_from("<8sIIQ", data)
    assert (magic, version, header, size) == (b"LLAMACNN", 1, HEADER_BYTES, len(data))
    assert data[24:56].hex() == network.file.sha256


def test_int4_takes_half_a_byte(translate: Callable[..., Network], tmp_path: Path) -> None:
    """Packed as in the .tflite, at the start of the constants."""
    codes = np.arange(-8, 8, dtype=np.int8).reshape(4, 4)
    translate(_linear({"dtype": "INT4", "scale": [0.1] * 4, "data": codes}))
    data = (tmp_path / "m.neuron").read_bytes()
    assert data[4096:4104].hex() == "98badcfe10325476"
    assert len(data) == 4096 + 3 * 64  # weights, a zero bias, an activation function


def test_options_that_are_no_inputs(
    translate: Callable[..., Network], small_tflite: ModuleType
) -> None:
    """A shape that is an option becomes an operand; an axis is counted from the front."""

    def build(model: Any) -> tuple[list[int], list[int]]:
        x = model.tensor("x", (2, 4), scale=1e-3)
        flat, both = model.tensor("flat", (8,), scale=1e-3), model.tensor("y", (16,), scale=1e-3)
        model.op("RESHAPE", [x], [flat], {"newShape": [8]})
        model.op("CONCATENATION", [flat, flat], [both], {"axis": -1})
        return [x], [both]

    data = translate(build).file.path.read_bytes()[4096:]
    assert np.frombuffer(data[:4], "<i4").tolist() == [8]
    assert np.frombuffer(data[64:68], "<i4").tolist() == [0]
