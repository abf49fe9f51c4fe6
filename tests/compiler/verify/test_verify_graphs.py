"""The kernels around graphs, with codes at the graphs' edges: what is right, and each fault."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import asdict
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from numpy.typing import NDArray

from llamac.compiler.config import rope_table
from llamac.compiler.frontends.meta import from_meta
from llamac.compiler.verify_compare import Comparison
from llamac.compiler.verify_families import StepRun
from llamac.compiler.verify_graphs import GraphReference
from llamac.schedules.append import AppendShape
from llamac.schedules.convert import ConvertShape
from llamac.schedules.positions import PositionsShape
from llamac.schedules.quantized import Quantization
from llamac.schedules.rope import CacheShape
from llamac.targets.program import ProgramKernel

TINY = Path(__file__).resolve().parents[3] / "examples" / "tiny-llama" / "spinquant"
STREAM = Quantization("uint16", 0.013, 30000)
TURN = Quantization("int16", 1 / 32767)
MASK = Quantization("uint16", 0.002, 65535)
KEYS, VALUES = Quantization("int8", 0.11), Quantization("int8", 0.07)
FIRST, TOKENS = 5, 3

Array = NDArray[Any]


@pytest.fixture(scope="module")
def graphs() -> GraphReference:
    return GraphReference(from_meta(TINY))


def _run(
    shape: Any,
    inputs: tuple[Array, ...],
    outputs: tuple[Array, ...],
    before: Mapping[str, Array] | None = None,
    after: Mapping[str, Array] | None = None,
) -> StepRun:
    kernel = ProgramKernel("kernel", "family", asdict(shape), 1)
    return StepRun(kernel, inputs, (), (), before or {}, after or {}, outputs)


def _failures(comparisons: list[Comparison]) -> list[str]:
    return [c.what for c in comparisons if not c.passed]


def _stream() -> Array:
    x = np.random.default_rng(1).normal(0, 60, (TOKENS, 64)).astype(np.float32)
    x[0, :2] = 1e4, -1e4  # beyond the codes
    return x


def test_conversion_to_codes(graphs: GraphReference) -> None:
    x, shape = _stream(), ConvertShape(TOKENS, 64, to_graph=True, codes=STREAM)
    codes = STREAM.quantize(x)[None]
    assert _failures(graphs.convert(_run(shape, (x,), (codes,)))) == []
    # A code that is one off is wrong, wherever its value is not half-way.
    codes[0, 1, 7] += 1
    assert _failures(graphs.convert(_run(shape, (x,), (codes,)))) == ["y"]


def test_conversion_from_codes(graphs: GraphReference) -> None:
    codes, shape = STREAM.quantize(_stream())[None], ConvertShape(TOKENS, 64, False, STREAM)
    y = STREAM.dequantize(codes[0]).astype(np.float32)
    assert _failures(graphs.convert(_run(shape, (codes,), (y,)))) == []
    y[2, 3] += STREAM.scale
    assert _failures(graphs.convert(_run(shape, (codes,), (y,)))) == ["y"]


@pytest.mark.parametrize("fault", [None, "cos", "sin", "mask"])
def test_positions_in_codes(graphs: GraphReference, fault: str | None) -> None:
    config = from_meta(TINY).config
    capacity, half = 32, config.head_dim // 2
    shape = PositionsShape(TOKENS, 64, config.head_dim, capacity, TURN, MASK)
    table = rope_table(config, FIRST + TOKENS)[FIRST:]
    made = {
        name: TURN.quantize(table[..., i]).reshape(TOKENS, 1, half, 1)
        for i, name in enumerate(("cos", "sin"))
    }
    seen = np.arange(capacity + TOKENS)[None] < FIRST
    own = np.arange(capacity + TOKENS)[None] - capacity
    seen = seen | ((own >= 0) & (own <= np.arange(TOKENS)[:, None]))
    made["mask"] = np.where(seen, 65535, 0).astype(np.uint16)
    if fault:
        made[fault].flat[FIRST] ^= 1
    run = _run(shape, (np.array([FIRST, TOKENS - 1], np.int32),), tuple(made.values()))
    assert _failures(graphs.positions(run)) == ([fault] if fault else [])


@pytest.mark.parametrize("fault", [None, "k_cache", "v_cache", "k_params", "v_params", "beside"])
def test_new_rows_of_codes(graphs: GraphReference, fault: str | None) -> None:
    rng, cache = np.random.default_rng(3), CacheShape(2, 16, 32, "int8")
    new = [rng.integers(-127, 128, (2, TOKENS, 16)).astype(np.int8) for _ in "kv"]
    before = {f"{s}_cache": rng.integers(-9, 9, (32, 2, 16)).astype(np.int8) for s in "kv"}
    before |= {f"{s}_params": np.zeros((32, 2, 2), np.float32) for s in "kv"}
    after = {name: rows.copy() for name, rows in before.items()}
    place = slice(FIRST, FIRST + TOKENS)
    for side, rows, codes in zip("kv", new, (KEYS, VALUES), strict=True):
        after[f"{side}_cache"][place] = rows.transpose(1, 0, 2)
        after[f"{side}_params"][place] = (np.float32(codes.scale), codes.zero_point)
    if fault == "beside":
        after["v_cache"][FIRST - 1, 0, 0] += 1
    elif fault:
        after[fault][FIRST, 1, 0] += 1
    meta = np.array([FIRST, TOKENS - 1], np.int32)
    shape = AppendShape(TOKENS, cache, KEYS, VALUES)
    failures = _failures(graphs.append(_run(shape, (*new, meta), (), before, after)))
    names = {"k_params": "k scales", "v_params": "v scales", "beside": "v cache", None: None}
    expected = names.get(fault, str(fault).replace("_", " "))
    assert failures == ([expected] if expected else [])
