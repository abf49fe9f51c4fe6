"""int8 per-channel weights x int8 per-token activations: the output layer.

    y[m, n] = sx * sw[n] * ( dot(x[m], w[n]) - zp * wsum[n] )          wsum[n] = sum(w[n]), int32

The dot instructions of x86 want one unsigned operand, so the activation code is moved by 128
(a flipped top bit), taken out with the zero point: dot(x + 128, w) - (zp + 128) * wsum.
Arm's take both as they are, and four codes of a vector by lane, so that one load serves sixteen
columns (`qmatmul_int8_lanes.py`). Everything up to the last two factors is exact in int32
(k <= 2^31 / (255 * 255)).

Packed layout: weights [N/16][K/4][16 rows x 4 bytes] int8.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from tvm.tirx import PrimFunc
from tvm.tirx.script.builder import ir as T

from llamac.schedules import qmatmul_int8_lanes as lanes
from llamac.schedules.intrin.arm import ArmNeon
from llamac.schedules.intrin.isa import Isa
from llamac.schedules.kernel import KernelBuilder, for_token_tiles, local, sum_chains
from llamac.schedules.qmatmul_int8_lanes import ROWS, QMatmulInt8Shape
from llamac.schedules.quantize import codes_shape

VERSION = 1
# A flipped top bit in each byte of an int32 word: int8 code -> uint8 code + 128.
FLIP = -2139062144  # 0x80808080

KNOBS: Mapping[str, tuple[int, ...]] = {
    "mr": (1, 2, 4, 6, 8),  # tokens per tile
    "chains": (1, 2, 4, 8),  # independent accumulators a row, to hide the latency of the dot
    "prefetch": (0, 16, 32, 64),  # cache lines ahead; the hardware stops at every page of 4 KiB
}


def valid(shape: QMatmulInt8Shape, isa: Isa, knobs: Mapping[str, int]) -> bool:
    """Whether the accumulators fit the registers."""
    if isinstance(isa, ArmNeon):
        return lanes.valid(shape, knobs)
    vectors = ROWS // isa.lanes
    live = knobs["mr"] * knobs["chains"] * vectors + 3
    return (
        live <= isa.registers
        and (knobs["mr"] <= shape.m or knobs["mr"] == 1)
        and (shape.k // 4) % knobs["chains"] == 0
    )


def default(shape: QMatmulInt8Shape, isa: Isa) -> dict[str, int]:
    """Four chains for a GEMV, one chain and eight tokens for a GEMM."""
    if isinstance(isa, ArmNeon):
        return lanes.default(shape)
    if shape.m == 1:
        return {"mr": 1, "chains": 4 if isa.lanes >= 8 else 1, "prefetch": 32}
    return {"mr": min(shape.m, 8 if isa.registers >= 32 else 2), "chains": 1, "prefetch": 0}


def make(
    shape: QMatmulInt8Shape,
    isa: Isa,
    *,
    mr: int,
    chains: int,
    prefetch: int = 0,
    name: str | None = None,
) -> PrimFunc:
    """Build the kernel.

    Arguments of the kernel: codes int8 [m, k] (paired on Arm, see `quantize.py`), qparams float32
    [m, 2], weights int8 [n/16, k/4, 64], scales float32 [n], wsum int32 [n], and the output float32
    [m, n].
    """
    level = isa.name.replace("-", "_")
    name = name or f"qmatmul_f32_qai8dx_qsi8cx_{shape.m}x{shape.n}x{shape.k}_{level}"
    with KernelBuilder(name, shape.work) as b:
        tensors = {
            "codes": b.input("codes", codes_shape(isa, shape.m, shape.k), "int8"),
            "qparams": b.input("qparams", (shape.m, 2), "float32"),
            "weights": b.input("weights", (shape.n // ROWS, shape.k // 4, 4 * ROWS), "int8"),
            "scales": b.input("scales", (shape.n,), "float32"),
            "wsum": b.input("wsum", (shape.n,), "int32"),
            "result": b.output("result", (shape.m, shape.n), "float32"),
        }
        with b.items() as block:

            def emit(row0: Any, rows: int) -> None:
                if isinstance(isa, ArmNeon):
                    lanes.Tile(shape, isa, tensors, chains).emit(block, row0, rows)
                else:
                    _tile(shape, isa, tensors, block, row0, rows, (chains, prefetch))

            for_token_tiles(shape.m, mr, emit)
    return b.func


def _tile(
    shape: QMatmulInt8Shape,
    isa: Isa,
    tensors: Mapping[str, Any],
    block: Any,
    row0: Any,
    rows: int,
    stream: tuple[int, int],
) -> None:
    """Compute `rows` tokens from `row0` for one block of 16 columns."""
    width, vectors = isa.lanes, ROWS // isa.lanes
    chains, prefetch = stream
    acc = local(f"int32x{width}", rows * vectors * chains)
    for i in range(rows * vectors * chains):
        T.buffer_store(acc, isa.splat(T.int32(0)), [i])
    with T.serial(0, T.int64(shape.k // 4 // chains)) as step:
        for c in range(chains):
            k4 = step * chains + c
            if prefetch:
                isa.prefetch(tensors["weights"], block, k4 + prefetch, 0)
            words = [
                T.Bind(isa.splat_bytes(_unsigned_word(tensors["codes"], row0 + r, k4 * 4)))
                for r in range(rows)
            ]
            for v in range(vectors):
                weights = T.Bind(
                    isa.load(tensors["weights"], block, k4, v * 4 * width, lanes=4 * width)
                )
                for r in range(rows):
                    i = (r * vectors + v) * chains + c
                    word = T.reinterpret(f"uint8x{4 * width}", words[r])
                    T.buffer_store(acc, isa.dot_u8s8(acc[i], word, weights), [i])
    for r in range(rows):
        scale = isa.splat(tensors["qparams"][row0 + r, 0])
        zero = T.Cast("int32", tensors["qparams"][row0 + r, 1]) + 128
        for v in range(vectors):
            total = sum_chains(acc, (r * vectors + v) * chains, chains)
            column = block * ROWS + v * width
            exact = total - isa.splat(zero) * isa.load(tensors["wsum"], column)
            factor = scale * isa.load(tensors["scales"], column)
            isa.store(tensors["result"], factor * isa.to_float32(exact), row0 + r, column)


def _unsigned_word(codes: Any, row: Any, k: Any) -> Any:
    """Four activation codes plus 128 each, as one int32."""
    return T.bitwise_xor(T.reinterpret("int32", codes[row, T.ramp(k, 1, 4)]), T.int32(FLIP))
