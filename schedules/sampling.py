"""Greedy sampling: the index of the largest logit; the lowest index on ties, NaN never wins.

Each lane keeps its best value and index; at the end the lanes are compared one after another.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from tvm.tirx import PrimFunc
from tvm.tirx.script.builder import ir as T

from llamac.schedules.intrin.isa import Isa, pick
from llamac.schedules.kernel import KernelBuilder, local, store

VERSION = 1
KNOBS: Mapping[str, tuple[int, ...]] = {}
LOWEST = -3.4028234663852886e38


@dataclass(frozen=True)
class ArgmaxShape:
    """Logits [1, vocab]."""

    vocab: int


def valid(shape: ArgmaxShape, isa: Isa, knobs: Mapping[str, int]) -> bool:
    """Whether there is something to choose from."""
    return shape.vocab > 0 and not knobs


def default(shape: ArgmaxShape, isa: Isa) -> dict[str, int]:
    """No knobs."""
    return {}


def make(shape: ArgmaxShape, isa: Isa, *, name: str | None = None) -> PrimFunc:
    """Build `argmax(logits f32[1, V]) -> token i32[1]`; work = 1."""
    level = isa.name.replace("-", "_")
    with KernelBuilder(name or f"argmax_{shape.vocab}_{level}", 1) as b:
        logits = b.input("logits", (1, shape.vocab), "float32")
        token = b.output("token", (1,), "int32")
        with b.items() as row:
            value, index = local("float32"), local("int32")
            store(value, T.float32(LOWEST), 0)
            store(index, T.int32(0), 0)
            if shape.vocab >= isa.lanes:
                _scan_vectors(shape, isa, logits, row, value, index)
            with T.serial(T.int64(shape.vocab // isa.lanes * isa.lanes), T.int64(shape.vocab)) as i:
                _challenge(logits[row, i], T.Cast("int32", i), value, index)
            store(token, index[0], 0)
    return b.func


def _scan_vectors(
    shape: ArgmaxShape, isa: Isa, logits: Any, row: Any, value: Any, index: Any
) -> None:
    """Scan whole vectors; later equal values do not replace earlier ones of the same lane."""
    lanes = isa.lanes
    best, where = local(f"float32x{lanes}"), local(f"int32x{lanes}")
    store(best, isa.splat(LOWEST), 0)
    store(where, T.ramp(T.int32(0), T.int32(1), lanes), 0)
    with T.serial(0, T.int64(shape.vocab // lanes)) as i:
        x = T.Bind(isa.load(logits, row, i * lanes))
        here = T.ramp(T.Cast("int32", i * lanes), T.int32(1), lanes)
        better = x > best[0]
        store(where, T.Select(better, here, where[0]), 0)
        store(best, T.Select(better, x, best[0]), 0)
    for lane in range(lanes):
        _challenge(pick(best[0], [lane]), pick(where[0], [lane]), value, index)


def _challenge(x: Any, at: Any, value: Any, index: Any) -> None:
    """Replace the best if `x` is larger, or equal and earlier."""
    x, at = T.Bind(x), T.Bind(at)
    wins = T.Bind(T.Or(x > value[0], T.And(x == value[0], at < index[0])))
    store(index, T.Select(wins, at, index[0]), 0)
    store(value, T.Select(wins, x, value[0]), 0)
