"""Pieces of the graph against their definitions, its interface, and models that it refuses."""

from __future__ import annotations

import math
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import pytest
from numpy.typing import NDArray

from llamac.compiler import reference
from llamac.runtime.errors import CoverageError, ValuesInvalid
from llamac.targets.qnn_htp.emitter import (
    MASKED,
    exact_factors,
    hadamard_pair,
    mask_rows,
    pack_int4,
    write_chunk,
)


class Altered:
    """Weights of a checkpoint with one tensor multiplied."""

    def __init__(self, weights: Any, name: str, factor: float) -> None:
        self.names, self.info = weights.names, weights.info
        self._weights, self._name, self._factor = weights, name, factor

    def read(self, name: str) -> NDArray[Any]:
        values = np.asarray(self._weights.read(name))
        return values * np.float32(self._factor) if name == self._name else values


def test_codes_are_packed_with_the_even_column_below() -> None:
    """Unpacked as ONNX Runtime documents it, the codes are the same."""
    codes = np.random.default_rng(0).integers(-8, 8, (3, 64), np.int8)
    packed = pack_int4(codes, 32)
    assert packed.shape == (3, 2, 16)
    low, high = (packed & 15).astype(np.int8) - 8, (packed >> 4).astype(np.int8) - 8
    np.testing.assert_array_equal(np.stack([low, high], -1).reshape(3, 64), codes)


@pytest.mark.parametrize("length", [2, 256, 8192])
def test_two_products_are_the_hadamard_transform(length: int) -> None:
    """L X R is the transform of all of x, to the rounding of two float16 factors."""
    x = np.random.default_rng(1).standard_normal((2, length))
    left, right = (m.astype(np.float64) for m in hadamard_pair(length))
    found = left @ x.reshape(2, len(left), len(right)) @ right
    np.testing.assert_allclose(found.reshape(2, -1), reference.hadamard(x), atol=1e-6)


@pytest.mark.parametrize("value", [1 / math.sqrt(8192), 1 / math.sqrt(256), 0.1])
def test_two_factors_come_closer_than_one(value: float) -> None:
    """A single float16 may be 2e-4 off."""
    first, second = exact_factors(value)
    assert abs(first * second / value - 1) < 1e-6


def test_the_mask_shows_the_past_and_the_triangle() -> None:
    """Token i sees `position` keys of the cache and the first i + 1 of the new ones."""
    mask = mask_rows(2, 3, 4)
    assert mask.dtype == np.float16
    seen = ["1100100", "1100110", "1100111"]
    expected = [[0 if digit == "1" else MASKED for digit in row] for row in seen]
    np.testing.assert_array_equal(mask, expected)


def test_the_onnx_file_is_valid_and_keeps_weights_outside(
    tiny: Any, chunks_of: Any, tmp_path: Path
) -> None:
    """Names and order of inputs and outputs, and one file of weights."""
    checkpoint = tiny("spinquant")
    write_chunk(chunks_of(checkpoint, 8, 64, 2)[1], checkpoint.weights, tmp_path / "x.onnx")
    onnx.checker.check_model(str(tmp_path / "x.onnx"))
    graph = onnx.load(tmp_path / "x.onnx", load_external_data=False).graph
    caches = [f"layers.{i}.{side}_cache" for i in (2, 3) for side in "kv"]
    assert [i.name for i in graph.input] == ["hidden", "rope_cos", "rope_sin", "mask", *caches]
    new = [name.replace("cache", "new") for name in caches]
    assert [o.name for o in graph.output] == [*new, "hidden_out"]
    num_codes = sum(
        math.prod(checkpoint.weights.info(name).shape)
        for name in checkpoint.weights.names()
        if name.startswith(("layers.2", "layers.3"))
        if checkpoint.weights.info(name).dtype == "int8"
    )
    assert (tmp_path / "x.onnx.data").stat().st_size > num_codes // 2


def test_float_weights_are_refused(tiny: Any, chunks_of: Any, tmp_path: Path) -> None:
    """The scheme has int4 weights only; the error says where."""
    checkpoint = tiny("bf16")
    chunk = chunks_of(checkpoint, 1, 64)[0]
    with pytest.raises(CoverageError, match=r"layers\.0\.attention\.wq\.weight"):
        write_chunk(chunk, checkpoint.weights, tmp_path / "x.onnx")


@pytest.mark.parametrize(
    ("factor", "message"),
    [
        (1e8, "outside float16's range"),
        (1e-4, "below float16's normal"),
        (-1e-4, "below float16's normal"),
    ],
)
def test_scales_that_float16_loses_are_refused(
    factor: float, message: str, tiny: Any, chunks_of: Any, tmp_path: Path
) -> None:
    """Neither infinities nor denormals reach the graph."""
    checkpoint, name = tiny("spinquant"), "layers.0.attention.wk.scales"
    chunk = chunks_of(checkpoint, 1, 64)[0]
    with pytest.raises(ValuesInvalid, match=f"{name}.*{message}"):
        write_chunk(chunk, Altered(checkpoint.weights, name, factor), tmp_path / "x.onnx")


@pytest.mark.parametrize("factor", [-1.0, 0.0])
def test_scales_may_be_negative_or_0(
    factor: float, tiny: Any, chunks_of: Any, tmp_path: Path
) -> None:
    """As those of GGUF's Q4_0; `tests/e2e/test_gguf.py` computes with them."""
    checkpoint, name = tiny("spinquant"), "layers.0.attention.wk.scales"
    chunk = chunks_of(checkpoint, 1, 64)[0]
    write_chunk(chunk, Altered(checkpoint.weights, name, factor), tmp_path / "x.onnx")
    tensors = onnx.load(tmp_path / "x.onnx").graph.initializer
    [stored] = [onnx.numpy_helper.to_array(t) for t in tensors if t.name == name]
    expected = checkpoint.weights.read(name).reshape(-1).astype(np.float16) * np.float16(factor)
    np.testing.assert_array_equal(stored, expected)
