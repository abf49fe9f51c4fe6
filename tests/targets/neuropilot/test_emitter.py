"""The interface of files, what is in them, and models that are refused."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from numpy.typing import NDArray

pytest.importorskip("ai_edge_litert", reason="optional extra: pip install 'llamac[apu]'")

from ai_edge_litert import schema_py_generated as schema

from llamac.compiler import reference
from llamac.runtime.errors import CoverageError, ValuesInvalid
from llamac.targets.hadamard import hadamard_grid, hadamard_signs
from llamac.targets.neuropilot.emitter import write_chunk
from llamac.targets.neuropilot.shards import layer_weight_bytes, layers_per_chunk

TAKEN = (
    "ADD BATCH_MATMUL CONCATENATION FULLY_CONNECTED LOGISTIC MUL RESHAPE RSQRT SOFTMAX TRANSPOSE"
)


class Altered:
    """Weights with one tensor replaced."""

    def __init__(self, weights: Any, name: str, value: NDArray[Any]) -> None:
        self.names, self.info = weights.names, weights.info
        self._weights, self._name, self._value = weights, name, value

    def read(self, name: str) -> NDArray[Any]:
        found: NDArray[Any] = self._value if name == self._name else self._weights.read(name)
        return found


def write(kit: Any, path: Path, form: str = "spinquant", **changes: Any) -> Any:
    """Write a layer of the tiny model; `changes` replace arguments of `write_chunk`."""
    checkpoint = kit.tiny(form)
    scheme = changes.get("scheme", "a16w8")
    arguments = {
        "chunk": kit.chunks(checkpoint, changes.pop("tokens", 8), 64)[1],
        "weights": kit.RowWeights(checkpoint, "a16w4" if scheme == "a16w4" else "a16w8"),
        "ranges": kit.tiny_ranges(form),
        "scheme": scheme,
        "path": path,
    }
    return write_chunk(**(arguments | changes))


@pytest.mark.parametrize("tokens", [1, 8])
def test_inputs_and_outputs(tokens: int, kit: Any, tmp_path: Path) -> None:
    """Names, order, shapes; int16 with the scales that the interface says."""
    interface = write(kit, tmp_path / "x.tflite", tokens=tokens).tensors
    graph = schema.Model.GetRootAs((tmp_path / "x.tflite").read_bytes(), 0).Subgraphs(0)
    ends = {
        name: [graph.Tensors(int(i)) for i in indices]
        for name, indices in (("in", graph.InputsAsNumpy()), ("out", graph.OutputsAsNumpy()))
    }
    shapes = {
        name: [(t.Name().decode(), tuple(t.ShapeAsNumpy().tolist())) for t in tensors]
        for name, tensors in ends.items()
    }
    assert shapes["in"] == [
        ("hidden", (1, tokens, 128)),
        ("rope_cos", (tokens, 1, 16, 1)),
        ("rope_sin", (tokens, 1, 16, 1)),
        ("mask", (tokens, 64 + tokens)),
        ("layers.1.k_cache", (2, 4, 32, 16)),
        ("layers.1.v_cache", (2, 64, 32)),
    ]
    assert shapes["out"] == [
        ("layers.1.k_new", (2, tokens, 32)),
        ("layers.1.v_new", (2, tokens, 32)),
        ("hidden_out", (1, tokens, 128)),
    ]
    assert interface.keys() == {name for side in shapes.values() for name, _ in side}
    for tensor in ends["in"] + ends["out"]:
        made = interface[tensor.Name().decode()]
        assert tensor.Type() == schema.TensorType.INT16
        assert tensor.Quantization().ScaleAsNumpy().tolist() == [made.scale]
        assert (made.dtype, made.zero_point) == ("int16", 0)
    for side in "kv":
        assert interface[f"layers.1.{side}_new"] == interface[f"layers.1.{side}_cache"]


def test_only_operations_that_the_plug_in_takes(kit: Any, tmp_path: Path) -> None:
    """And fewer than 100 for a layer; a decode needs fewer steps than a prefill."""
    counts = {}
    for tokens in (1, 8):
        write(kit, tmp_path / "x.tflite", "qlora", tokens=tokens)
        model = schema.Model.GetRootAs((tmp_path / "x.tflite").read_bytes(), 0)
        codes = {model.OperatorCodes(i).BuiltinCode() for i in range(model.OperatorCodesLength())}
        assert codes <= {getattr(schema.BuiltinOperator, name) for name in TAKEN.split()}
        counts[tokens] = model.Subgraphs(0).OperatorsLength()
    assert max(counts.values()) < 120


@pytest.mark.parametrize("scheme", ["a16w8", "a16w4"])
def test_the_same_bytes_again(scheme: str, kit: Any, tmp_path: Path) -> None:
    for name in ("a", "b"):
        write(kit, tmp_path / name, "qlora", scheme=scheme)
    assert (tmp_path / "a").read_bytes() == (tmp_path / "b").read_bytes()


def test_int4_is_half_as_large(kit: Any, tmp_path: Path) -> None:
    for scheme in ("a16w8", "a16w4"):
        write(kit, tmp_path / scheme, scheme=scheme)
    num_codes = layer_weight_bytes(kit.tiny("spinquant").weights, "a16w8")
    saved = (tmp_path / "a16w8").stat().st_size - (tmp_path / "a16w4").stat().st_size
    assert abs(saved - num_codes // 2) < 200
    assert layer_weight_bytes(kit.tiny("spinquant").weights, "a16w4") == num_codes // 2


@pytest.mark.parametrize("length", [2, 256, 8192])
def test_two_products_are_the_hadamard_transform(length: int) -> None:
    x = np.random.default_rng(1).standard_normal((2, length))
    rows, columns = hadamard_grid(length)
    grid = hadamard_signs(rows) @ x.reshape(2, rows, columns) @ hadamard_signs(columns)
    found = grid.reshape(2, -1) / np.sqrt(length)
    np.testing.assert_allclose(found, reference.hadamard(x), atol=1e-12)


@pytest.mark.parametrize(
    ("megabytes", "layers", "per_chunk"),
    [(61, 16, 4), (30, 16, 4), (101, 28, 2), (50, 28, 4), (300, 5, 1), (80, 5, 3)],
)
def test_chunks_are_equal_and_small(megabytes: int, layers: int, per_chunk: int) -> None:
    assert layers_per_chunk(megabytes * 10**6, layers) == per_chunk


def test_unknown_schemes_are_refused(kit: Any, tmp_path: Path) -> None:
    with pytest.raises(CoverageError, match="no scheme 'a8w8'"):
        write(kit, tmp_path / "x", scheme="a8w8")


@pytest.mark.parametrize(
    "label",
    [
        "layers.1.attention.wq",
        "layers.1.attention.wv.attention.scores",
        "layers.1.ffn_norm.mean_square",
        "layers.1.ffn_norm.unit",
        "layers.1.feed_forward.w3.swiglu.hadamard.columns",
    ],
)
def test_a_missing_range_is_named(label: str, kit: Any, tmp_path: Path) -> None:
    ranges = {name: seen for name, seen in kit.tiny_ranges("spinquant").items() if name != label}
    with pytest.raises(ValuesInvalid, match=f"the range of {label} is not known"):
        write(kit, tmp_path / "x", ranges=ranges)
    assert not list(tmp_path.iterdir())


def test_the_ranges_of_another_form_lack_the_adaptors(kit: Any, tmp_path: Path) -> None:
    with pytest.raises(ValuesInvalid, match=r"wq\.adaptor\.A is not known"):
        write(kit, tmp_path / "x", "qlora", ranges=kit.tiny_ranges("spinquant"))


def test_groups_are_refused(kit: Any, tmp_path: Path) -> None:
    """The checkpoint's own weights, with a scale for each 32 columns."""
    with pytest.raises(CoverageError, match=r"weights in groups \(layers\.1\.attention\.wq"):
        write(kit, tmp_path / "x", weights=kit.tiny("spinquant").weights)


def test_codes_of_another_scheme_are_refused(kit: Any, tmp_path: Path) -> None:
    weights = kit.RowWeights(kit.tiny("spinquant"), "a16w8")
    with pytest.raises(ValuesInvalid, match=r"wq\.weight holds int8 codes from -127 to 127"):
        write(kit, tmp_path / "x", scheme="a16w4", weights=weights)


@pytest.mark.parametrize("wrong", [0.0, -1.0, np.nan, np.inf])
def test_scales_that_are_none_are_refused(wrong: float, kit: Any, tmp_path: Path) -> None:
    name = "layers.1.attention.wk.scales"
    weights = kit.RowWeights(kit.tiny("spinquant"), "a16w8")
    scales = weights.read(name).copy()
    scales[5] = wrong
    for value in (scales, scales[:-1]):
        with pytest.raises(ValuesInvalid, match=r"wk\.scales"):
            write(kit, tmp_path / "x", weights=Altered(weights, name, value))


def test_composites_without_a_form_are_refused(kit: Any, tmp_path: Path) -> None:
    """Before anything is written; and runs without attention."""
    chunk = kit.chunks(kit.tiny("spinquant"), 8, 64)[1]
    strange = replace(chunk.steps[0], kind="llamac.layer_norm")
    with pytest.raises(CoverageError, match="layer_norm"):
        write(kit, tmp_path / "x", chunk=replace(chunk, steps=(strange, *chunk.steps[1:])))
    with pytest.raises(CoverageError, match="without attention"):
        write(kit, tmp_path / "x", chunk=replace(chunk, steps=chunk.steps[:1]))
    assert not list(tmp_path.iterdir())
