"""Functions are cut into runs of whole layers, and only where the residual stream alone flows."""

from __future__ import annotations

import itertools
from typing import Any

import pytest

from llamac.runtime.errors import CoverageError
from llamac.targets.chunk import Spec, Step, _make_chunk


@pytest.mark.parametrize(
    ("per_chunk", "layers"),
    [(1, [(0,), (1,), (2,), (3,)]), (3, [(0, 1, 2), (3,)]), (4, [(0, 1, 2, 3)])],
)
def test_layers_are_dealt_out(
    per_chunk: int, layers: list[tuple[int, ...]], tiny: Any, chunks_of: Any
) -> None:
    """Every layer is in one chunk, and a chunk takes what the one before leaves."""
    chunks = chunks_of(tiny("spinquant"), 1, 64, per_chunk)
    assert [chunk.layers for chunk in chunks] == layers
    for before, after in itertools.pairwise(chunks):
        assert before.sink == after.source


def test_a_chunk_holds_its_layer_and_nothing_else(tiny: Any, chunks_of: Any) -> None:
    """No embedding, output layer or final norm, and every weight of the layer."""
    checkpoint = tiny("spinquant")
    chunk = chunks_of(checkpoint, 8, 64)[3]
    assert (chunk.name, chunk.tokens) == ("prefill_8_layers_3_3", 8)
    assert chunk.specs[chunk.source] == Spec((8, 128), "float32")
    used = {name for step in chunk.steps for name in step.args if chunk.specs[name].is_param}
    weights = {name for name in checkpoint.weights.names() if name.startswith("layers.3.")}
    others = {"meta", "rope.table", "layers.3.k_cache", "layers.3.v_cache"}
    assert used == weights | others
    kinds = [step.kind.removeprefix("llamac.") for step in chunk.steps]
    assert kinds.count("qlinear") == 7
    assert kinds.count("hadamard") == kinds.count("attention") == 1


def test_a_second_value_over_the_edge_is_refused() -> None:
    """A layer that hands on more than the residual stream cannot be cut off."""
    steps = [
        Step("llamac.add", {}, ("x", "x"), ("y",)),
        Step("llamac.add", {}, ("y", "x"), ("z",)),
        Step("llamac.add", {}, ("y", "z"), ("out",)),
    ]
    specs = {name: Spec((1, 4), "float32") for name in ("x", "y", "z", "out")}
    with pytest.raises(CoverageError, match="take 1 values and give 2"):
        _make_chunk("decode", (0,), steps[:2], steps, specs)
