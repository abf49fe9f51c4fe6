"""The narrow half of a LoRA branch: t = A x, on activations that were not quantized.

    t[m, r] = sum_k x[m, k] * a[r, k]

The wide half, y += scale * B t, is part of the matrix kernel (`qmatmul.py`). A is stored row by row
as the bfloat16 bits of the checkpoint; the rows of all projections that are computed together are
stacked.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

from tvm.tirx import PrimFunc
from tvm.tirx.script.builder import ir as T

from llamac.schedules.intrin.isa import Isa
from llamac.schedules.kernel import KernelBuilder, local, store, sum_chains

VERSION = 1
KNOBS: Mapping[str, tuple[int, ...]] = {"chains": (1, 2, 4)}  # accumulators, to hide fma latency


@dataclass(frozen=True)
class LoraShape:
    """x [tokens, k] times A [rank, k]; k is a multiple of 32, rank counts all stacked branches."""

    tokens: int
    rank: int
    k: int


def valid(shape: LoraShape, isa: Isa, knobs: Mapping[str, int]) -> bool:
    """Whether rows are cut into whole steps."""
    return shape.k % (isa.lanes * knobs["chains"]) == 0


def default(shape: LoraShape, isa: Isa) -> dict[str, int]:
    """As many chains as divide a row."""
    return {"chains": next(c for c in (4, 2, 1) if shape.k % (isa.lanes * c) == 0)}


def make(shape: LoraShape, isa: Isa, *, chains: int, name: str | None = None) -> PrimFunc:
    """Build `lora_a(x f32[T, K], a bf16[R, K]) -> t f32[T, R]`; work = R, so A is read once."""
    level = isa.name.replace("-", "_")
    name = name or f"lora_a_{shape.tokens}x{shape.rank}x{shape.k}_{level}"
    with KernelBuilder(name, shape.rank, alignment=isa.alignment) as b:
        x = b.input("x", (shape.tokens, shape.k), "float32")
        a = b.input("a", (shape.rank, shape.k), "uint16")
        t = b.output("t", (shape.tokens, shape.rank), "float32")
        with b.items() as r, T.serial(0, T.int64(shape.tokens)) as m:
            acc = local(f"float32x{isa.lanes}", chains)
            for c in range(chains):
                store(acc, isa.splat(0.0), c)
            with T.serial(0, T.int64(shape.k // (isa.lanes * chains))) as step:
                for c in range(chains):
                    k = (step * chains + c) * isa.lanes
                    weight = isa.bfloat16_to_float32(isa.load(a, r, k))
                    store(acc, isa.fma(isa.load(x, m, k), weight, acc[c]), c)
            store(t, isa.reduce_add(sum_chains(acc, 0, chains)), m, r)
    return b.func
