"""Float weights (bfloat16) x float32 activations: the BF16 baseline.

    y[m, n] = sum_k x[m, k] * w[n, k]

Packed layout: weights [N/16][K][16 rows] bfloat16, so that one load is one column of a block. The
epilogues are those of `qmatmul.py`: `residual` adds, `swiglu` takes blocks in (gate, up) pairs.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from tvm.tirx import PrimFunc
from tvm.tirx.script.builder import ir as T

from llamac.schedules.intrin.isa import Isa
from llamac.schedules.kernel import KernelBuilder, for_token_tiles, local, sum_chains

VERSION = 1
ROWS = 16

KNOBS: Mapping[str, tuple[int, ...]] = {
    "mr": (1, 2, 4, 6, 8, 12),  # tokens per tile
    "chains": (1, 2, 4, 8),  # independent accumulators a row, to hide the latency of the fma
    "prefetch": (0, 32, 64, 128),  # columns ahead; the hardware stops at every page of 4 KiB
}


@dataclass(frozen=True)
class MatmulShape:
    """y [m, n] = x [m, k] times bfloat16 weights [n, k]; n a multiple of 16 (32 for swiglu)."""

    m: int
    n: int
    k: int
    epilogue: str = "none"

    @property
    def work(self) -> int:
        """Work items: blocks, or pairs of blocks for swiglu."""
        return self.n // ROWS // (2 if self.epilogue == "swiglu" else 1)

    @property
    def columns(self) -> int:
        """Columns of the result."""
        return self.n // 2 if self.epilogue == "swiglu" else self.n


def valid(shape: MatmulShape, isa: Isa, knobs: Mapping[str, int]) -> bool:
    """Whether the accumulators fit the registers."""
    live = knobs["mr"] * knobs["chains"] * (ROWS // isa.lanes) + 2
    return (
        live <= isa.registers
        and (knobs["mr"] <= shape.m or knobs["mr"] == 1)
        and shape.k % knobs["chains"] == 0
    )


def default(shape: MatmulShape, isa: Isa) -> dict[str, int]:
    """Four chains for a GEMV; for a GEMM two chains, or one of short vectors, of 2 to 8 tokens."""
    if shape.m == 1:
        return {"mr": 1, "chains": 4 if isa.lanes >= 8 else 2, "prefetch": 64}
    most = 2 if isa.registers < 32 else 8 if isa.lanes > 4 else 6
    return {"mr": min(shape.m, most), "chains": 2 if isa.lanes > 4 else 1, "prefetch": 0}


def make(
    shape: MatmulShape,
    isa: Isa,
    *,
    mr: int,
    chains: int,
    prefetch: int = 0,
    name: str | None = None,
) -> PrimFunc:
    """Build the kernel.

    Arguments of the kernel: x float32 [m, k], weights bfloat16 [n/16, k, 16], then residual float32
    [m, n] for that epilogue, and the output float32 [m, n] or [m, n/2].
    """
    level = isa.name.replace("-", "_")
    name = name or f"matmul_f32_f32_bf16_{shape.m}x{shape.n}x{shape.k}_{level}"
    with KernelBuilder(name, shape.work) as b:
        tensors = {
            "x": b.input("x", (shape.m, shape.k), "float32"),
            "weights": b.input("weights", (shape.n // ROWS, shape.k, ROWS), "uint16"),
        }
        if shape.epilogue == "residual":
            tensors["residual"] = b.input("residual", (shape.m, shape.n), "float32")
        tensors["result"] = b.output("result", (shape.m, shape.columns), "float32")
        with b.items() as item:

            def emit(row0: Any, rows: int) -> None:
                _tile(shape, isa, tensors, item, row0, rows, (chains, prefetch))

            for_token_tiles(shape.m, mr, emit)
    return b.func


def _tile(
    shape: MatmulShape,
    isa: Isa,
    tensors: Mapping[str, Any],
    item: Any,
    row0: Any,
    rows: int,
    stream: tuple[int, int],
) -> None:
    """Compute `rows` tokens from `row0` for one work item and store them."""
    if shape.epilogue == "swiglu":
        gate = _block(shape, isa, tensors, item * 2, row0, rows, stream)
        up = _block(shape, isa, tensors, item * 2 + 1, row0, rows, stream)
        values = [isa.silu(g) * u for g, u in zip(gate, up, strict=True)]
    else:
        values = _block(shape, isa, tensors, item, row0, rows, stream)
    vectors = ROWS // isa.lanes
    for i, value in enumerate(values):
        row, column = row0 + i // vectors, item * ROWS + i % vectors * isa.lanes
        if shape.epilogue == "residual":
            values[i] = value + isa.load(tensors["residual"], row, column)
        isa.store(tensors["result"], values[i], row, column)


def _block(
    shape: MatmulShape,
    isa: Isa,
    tensors: Mapping[str, Any],
    block: Any,
    row0: Any,
    rows: int,
    stream: tuple[int, int],
) -> list[Any]:
    """Results of one block of 16 columns for `rows` tokens, as rows x (16 / lanes) vectors."""
    lanes, vectors = isa.lanes, ROWS // isa.lanes
    chains, prefetch = stream
    acc = local(f"float32x{lanes}", rows * vectors * chains)
    for i in range(rows * vectors * chains):
        T.buffer_store(acc, isa.splat(0.0), [i])
    with T.serial(0, T.int64(shape.k // chains)) as step:
        for c in range(chains):
            k = step * chains + c
            if prefetch and c % 2 == 0:  # two columns are a cache line
                isa.prefetch(tensors["weights"], block, k + prefetch, 0)
            for v in range(vectors):
                bits = isa.load(tensors["weights"], block, k, v * lanes)
                weights = T.Bind(isa.bfloat16_to_float32(bits))
                for r in range(rows):
                    i = (r * vectors + v) * chains + c
                    x = isa.splat(tensors["x"][row0 + r, k])
                    T.buffer_store(acc, isa.fma(x, weights, acc[i]), [i])
    return [T.Bind(sum_chains(acc, i * chains, chains)) for i in range(rows * vectors)]
