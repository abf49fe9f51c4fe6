"""Greedy sampling: the index of the largest logit.

The lowest index wins a tie, and NaN is never chosen: a value is taken only if it is greater than
the best so far, which NaN is not. Without any logit above -inf the result is 0.

Each lane of a few vectors keeps its own best value and where it was; lanes are compared at the end.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from tvm import tirx
from tvm.tirx import PrimFunc
from tvm.tirx.script.builder import ir as T

from llamac.schedules.intrin.isa import Isa, vector
from llamac.schedules.kernel import KernelBuilder, local, opaque, store
from llamac.schedules.loop import loop, when

VERSION = 1
KNOBS: Mapping[str, tuple[int, ...]] = {"vectors": (1, 2, 4)}  # independent chains of comparisons

NOWHERE = 2**31 - 1


@dataclass(frozen=True)
class ArgmaxShape:
    """Logits [1, vocab]; any vocab."""

    vocab: int


def valid(shape: ArgmaxShape, isa: Isa, knobs: Mapping[str, int]) -> bool:
    """Whether values and places of all chains fit the registers."""
    return 2 * knobs["vectors"] + 3 <= isa.registers


def default(shape: ArgmaxShape, isa: Isa) -> dict[str, int]:
    """Enough chains to hide the latency of comparing and blending."""
    return {"vectors": 4}


def make(shape: ArgmaxShape, isa: Isa, *, vectors: int, name: str | None = None) -> PrimFunc:
    """Build `argmax(logits f32[1,V]) -> index i32[1]`; work = 1."""
    step = vectors * isa.lanes
    with KernelBuilder(
        name or f"argmax_i32_f32_{shape.vocab}_{isa.suffix}", 1, alignment=isa.alignment
    ) as b:
        logits = b.input("logits", (1, shape.vocab), "float32")
        index = b.output("index", (1,), "int32")
        with b.items() as item:
            best = local(vector("float32", isa.lanes), vectors)
            place = local(vector("int32", isa.lanes), vectors)  # first column of the vector
            for i in range(vectors):
                store(best, isa.splat(-math.inf), i)
                store(place, isa.splat(T.int32(0)), i)
            with loop(shape.vocab // step) as chunk:
                for i in range(vectors):
                    column = chunk * step + i * isa.lanes
                    value = T.Bind(isa.load(logits, item, column))
                    greater = value > best[i]  # evaluated where it is used: before best changes
                    here = isa.splat(T.Cast("int32", column))
                    store(place, T.Select(greater, here, place[i]), i)
                    store(best, T.Select(greater, value, best[i]), i)
            top, where = _first_best(isa, best, place, vectors)
            best_one, place_one = local("float32"), local("int32")
            store(best_one, top, 0)
            store(place_one, where, 0)
            with loop(shape.vocab, start=shape.vocab // step * step) as column:
                with when(logits[item, column] > best_one[0]):
                    store(place_one, T.Cast("int32", column), 0)
                    store(best_one, logits[item, column], 0)
            store(index, place_one[0], item)
    return b.func


def _first_best(isa: Isa, best: tirx.Buffer, place: tirx.Buffer, vectors: int) -> tuple[Any, Any]:
    """The largest of all lanes and the lowest index that has it."""
    largest = best[0]
    for i in range(1, vectors):
        largest = T.Bind(T.max(largest, best[i]))
    top = opaque(isa.reduce_max(largest), "float32")
    lowest = isa.splat(T.int32(NOWHERE))
    for i in range(vectors):
        index = place[i] + T.ramp(T.int32(0), 1, isa.lanes)
        lowest = T.Bind(T.min(lowest, T.Select(best[i] >= isa.splat(top), index, lowest)))
    return top, isa.reduce_min(lowest)
