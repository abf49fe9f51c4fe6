"""int8 per-channel weights x int8 per-token activations on HVX: the output layer.

    y[m, n] = sx[m] * s[n] * ( dot(x[m], w[n]) - zp[m] * wsum[n] )

`vrmpy` wants the bytes of a vector unsigned, so weights are stored as u = w + 128, and

    dot(x, w) = dot(x, u) - 128 * sum(x) = dot(x, u) + 16 * sum(offsets)

with the offsets -8 * sum(x) of the groups of 32 codes, which the quantization stores for int4
products. All of it is exact in int32 up to the last two factors (k <= 2^31 / (255 * 128)).

    weights [N/32][K/4][32 rows x 4 bytes] uint8.

A vector is loaded for 128 products and a packet loads one vector, so a GEMV makes at most 128
products in a packet, and a GEMM of two tokens or more 256.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from tvm.tirx import PrimFunc
from tvm.tirx.script.builder import ir as T

from llamac.schedules.intrin.hexagon import HexagonHvx
from llamac.schedules.kernel import KernelBuilder, for_token_tiles, local, store
from llamac.schedules.qmatmul_int8_lanes import QMatmulInt8Shape
from llamac.schedules.quantize import GROUP

VERSION = 1
ROWS = 32  # of a vector, and of a work item

KNOBS: Mapping[str, tuple[int, ...]] = {
    "mr": (1, 2, 4, 8),  # tokens per tile, an accumulator each
    "unroll": (1, 2, 4),  # groups of 32 columns per iteration
}


def valid(shape: QMatmulInt8Shape, isa: HexagonHvx, knobs: Mapping[str, int]) -> bool:
    """Whether the tile divides the shape and its words fit the scalar registers."""
    return (
        shape.n % ROWS == 0
        and shape.k // GROUP % knobs["unroll"] == 0
        and (knobs["mr"] <= shape.m or knobs["mr"] == 1)
    )


def default(shape: QMatmulInt8Shape, isa: HexagonHvx) -> dict[str, int]:
    """Four tokens."""
    return {"mr": min(shape.m, 4), "unroll": 1}


def make(
    shape: QMatmulInt8Shape, isa: HexagonHvx, *, mr: int, unroll: int, name: str | None = None
) -> PrimFunc:
    """Build the kernel.

    Arguments of the kernel: codes int8 [m, k], qparams float32 [m, 2], offsets int32 [m, k/32],
    weights uint8 [n/32, k/4, 128], scales float32 [n], wsum int32 [n], and the output float32
    [m, n].
    """
    symbol = name or f"qmatmul_f32_qai8dx_qsi8cx_{shape.m}x{shape.n}x{shape.k}_{isa.suffix}"
    with KernelBuilder(symbol, shape.n // ROWS, alignment=isa.alignment) as b:
        tensors = {
            "codes": b.input("codes", (shape.m, shape.k), "int8"),
            "qparams": b.input("qparams", (shape.m, 2), "float32"),
            "offsets": b.input("offsets", (shape.m, shape.k // GROUP), "int32"),
            "weights": b.input("weights", (shape.n // ROWS, shape.k // 4, 4 * ROWS), "uint8"),
            "scales": b.input("scales", (shape.n,), "float32"),
            "wsum": b.input("wsum", (shape.n,), "int32"),
            "result": b.output("result", (shape.m, shape.n), "float32"),
        }
        with b.items() as item:
            block = T.Bind(T.Cast("int32", item))

            def emit(row0: Any, rows: int) -> None:
                _tile(shape, isa, tensors, block, (T.Cast("int32", row0), rows), unroll)

            for_token_tiles(shape.m, mr, emit)
    return b.func


def _tile(
    shape: QMatmulInt8Shape,
    isa: HexagonHvx,
    tensors: Mapping[str, Any],
    block: Any,
    tile: tuple[Any, int],
    unroll: int,
) -> None:
    """Compute a tile, (first token, tokens), for one block of 32 columns."""
    row0, rows = tile
    acc, total = local("int32x32", rows), local("int32", rows)
    for r in range(rows):
        store(acc, isa.splat(T.int32(0)), r)
        store(total, T.int32(0), r)
    with T.serial(0, T.int32(shape.k // GROUP // unroll)) as step:
        for u in range(unroll):
            group = step * unroll + u
            for r in range(rows):
                store(total, total[r] + tensors["offsets"][row0 + r, group], r)
            for j in range(GROUP // 4):
                place = (block, group * (GROUP // 4) + j, T.ramp(T.int32(0), 1, 4 * ROWS))
                vector = T.Bind(T.reinterpret("int32x32", tensors["weights"][place]))
                for r in range(rows):
                    k = group * GROUP + 4 * j
                    word = T.reinterpret("int32", tensors["codes"][row0 + r, T.ramp(k, 1, 4)])
                    store(acc, isa.dot_word_u8s8(acc[r], vector, word), r)
    column = block * ROWS
    for r in range(rows):
        row = row0 + r
        zero = isa.splat(T.Cast("int32", tensors["qparams"][row, 1]))
        exact = (
            acc[r] + isa.splat(total[r] * T.int32(16)) - zero * isa.load(tensors["wsum"], column)
        )
        factor = isa.splat(tensors["qparams"][row, 0]) * isa.load(tensors["scales"], column)
        isa.store(tensors["result"], factor * isa.to_float32(exact), row, column)
