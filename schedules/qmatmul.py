"""int4 group-32 weights x int8 per-token activations: GEMV (decode) and GEMM (prefill).

Per output n and token m, with activation codes x in int8 (scale sx, zero point zp) and weight codes
w in -8..7 with one scale s per group g of 32 columns:

    y[m, n] = sx * ( sum_g s[n, g] * dot(x[m, g], w[n, g])  -  zp * ksum[n] )
    ksum[n] = sum_g s[n, g] * sum(w[n, g])                                       (packed, float32)

Weights are stored as unsigned nibbles u = w + 8, so dot(x, w) = dot(x, u) - 8 * sum(x). The second
part is `offsets[m, g] = -8 * sum(x[m, g])`, made once per token by the quantize kernel: the
accumulator starts with it, and the hot loop is load, mask, shift, two dot products.

Packed layout, the same for all levels of a processor family (16 rows are a block):

    weights [N/16][K/32][4][16 rows x 4 bytes]: byte j*64 + row*4 + b holds k = 8j + b in its low
            and k = 8j + 4 + b in its high nibble, so that each half feeds one dot instruction;
    scales  [N/16][K/32][16] float16 or bfloat16.

Optional: a LoRA branch y += scale * (t @ B.T) with t = A x made by `schedules/lora.py`, and one
epilogue: `residual` adds a float tensor, `swiglu` takes blocks in (gate, up) pairs and stores
silu(gate) * up.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from tvm.tirx import PrimFunc
from tvm.tirx.script.builder import ir as T

from llamac.schedules.intrin.isa import Isa
from llamac.schedules.kernel import KernelBuilder, for_token_tiles, local
from llamac.schedules.qmatmul_epilogue import ROWS, Epilogue

VERSION = 1
GROUP = 32  # columns per scale
GROUP_BYTES = ROWS * GROUP // 2

KNOBS: Mapping[str, tuple[int, ...]] = {
    "mr": (1, 2, 4, 6, 8, 10, 12),  # tokens per tile: float and integer accumulators in registers
    "unroll": (1, 2, 4),  # groups per iteration of the hot loop
    "prefetch": (0, 4, 8, 16, 32),  # groups ahead; the hardware stops at every page of 4 KiB
}


@dataclass(frozen=True)
class QMatmulShape:
    """y [m, n] = x [m, k] times packed weights [n, k].

    Attributes:
        m: tokens.
        n: output columns; for the swiglu epilogue gate and up together.
        k: input columns, a multiple of 32.
        scale_dtype: "float16" or "bfloat16".
        epilogue: "none", "residual" or "swiglu".
        lora_rank: rank of each LoRA branch, 0 for none.
        lora_scale: factor of the LoRA branch.
        lora_splits: output columns of each fused projection, in order; t holds rank values of each.
        signed_scales: scales may be negative, as half of those of GGUF's Q4_0 are. Only Arm's
            float16 scales need to know: see `qmatmul_quads.py`.
    """

    m: int
    n: int
    k: int
    scale_dtype: str = "float16"
    epilogue: str = "none"
    lora_rank: int = 0
    lora_scale: float = 1.0
    lora_splits: tuple[int, ...] = ()
    signed_scales: bool = False

    @property
    def blocks(self) -> int:
        """Packed blocks of 16 rows."""
        return self.n // ROWS

    @property
    def work(self) -> int:
        """Work items: blocks, or pairs of blocks for swiglu."""
        return self.blocks // 2 if self.epilogue == "swiglu" else self.blocks

    @property
    def columns(self) -> int:
        """Columns of the result."""
        return self.n // 2 if self.epilogue == "swiglu" else self.n


def valid(shape: QMatmulShape, isa: Isa, knobs: Mapping[str, int]) -> bool:
    """Whether the tile fits the registers and divides the shape."""
    vectors = ROWS // isa.lanes
    live = 2 * knobs["mr"] * vectors + 3
    return (
        live <= isa.registers
        and (knobs["mr"] <= shape.m or knobs["mr"] == 1)
        and (shape.k // GROUP) % knobs["unroll"] == 0
    )


def default(shape: QMatmulShape, isa: Isa) -> dict[str, int]:
    """The largest tile that fits; a GEMV, bound by memory, prefetches across page boundaries."""
    if shape.m == 1:
        return {"mr": 1, "unroll": 2 if shape.k // GROUP % 2 == 0 else 1, "prefetch": 8}
    mr = min(shape.m, 8 if isa.registers >= 32 else max(1, isa.lanes // 4))
    return {"mr": mr, "unroll": 1, "prefetch": 0}


def make(
    shape: QMatmulShape,
    isa: Isa,
    *,
    mr: int,
    unroll: int,
    prefetch: int = 0,
    name: str | None = None,
) -> PrimFunc:
    """Build the kernel.

    Arguments of the kernel: codes int8 [m, k], qparams float32 [m, 2] (scale, zero point), offsets
    int32 [m, k/32], weights uint8 [n/16, k/32, 256], scales [n/16, k/32, 16], ksum float32 [n],
    then t float32 [m, rank * splits] and B bfloat16 [n/16, rank, 16] with a LoRA branch, then
    residual float32 [m, n], and the output float32 [m, n] or [m, n/2].
    """
    with KernelBuilder(name or _name(shape, isa), shape.work) as b:
        tile = _Tile(b, shape, isa, unroll, prefetch)
        with b.items() as item:

            def emit(row0: Any, rows: int) -> None:
                tile.emit(item, row0, rows)

            for_token_tiles(shape.m, mr, emit)
    return b.func


def _name(shape: QMatmulShape, isa: Isa) -> str:
    level = isa.name.replace("-", "_")
    return f"qmatmul_f32_qai8dx_qsi4c32_{shape.m}x{shape.n}x{shape.k}_{level}"


class _Tile:
    """The tensors of one kernel and the code for a tile of tokens times one work item."""

    def __init__(
        self, b: KernelBuilder, shape: QMatmulShape, isa: Isa, unroll: int, prefetch: int
    ) -> None:
        groups, scale_bits = (
            shape.k // GROUP,
            "uint16" if shape.scale_dtype == "bfloat16" else "float16",
        )
        self.shape, self.isa, self.unroll, self.prefetch = shape, isa, unroll, prefetch
        self.codes = b.input("codes", (shape.m, shape.k), "int8")
        self.qparams = b.input("qparams", (shape.m, 2), "float32")
        self.offsets = b.input("offsets", (shape.m, groups), "int32")
        self.weights = b.input("weights", (shape.blocks, groups, GROUP_BYTES), "uint8")
        self.scales = b.input("scales", (shape.blocks, groups, ROWS), scale_bits)
        self.ksum = b.input("ksum", (shape.n,), "float32")
        self.epilogue = Epilogue(b, shape, isa)

    def emit(self, item: Any, row0: Any, rows: int) -> None:
        """Compute `rows` tokens from `row0` for one work item and store them."""
        isa, lanes = self.isa, self.isa.lanes
        if self.epilogue.is_swiglu:
            gate = self._block(item * 2, row0, rows, split=0)
            up = self._block(item * 2 + 1, row0, rows, split=1)
            values = [isa.silu(gate[i]) * up[i] for i in range(len(gate))]
        else:
            values = self._block(item, row0, rows, split=None)
        vectors = ROWS // lanes
        for r in range(rows):
            for v in range(vectors):
                self.epilogue.store(values[r * vectors + v], row0 + r, item * ROWS + v * lanes)

    def _block(self, block: Any, row0: Any, rows: int, split: int | None) -> list[Any]:
        """Results of one block of 16 columns for `rows` tokens, as rows x (16 / lanes) vectors."""
        isa, vectors = self.isa, ROWS // self.isa.lanes
        acc = local(f"float32x{isa.lanes}", rows * vectors)
        for i in range(rows * vectors):
            T.buffer_store(acc, isa.splat(0.0), [i])
        groups = self.shape.k // GROUP
        with T.serial(0, T.int64(groups // self.unroll)) as outer:
            for u in range(self.unroll):
                self._group(acc, block, outer * self.unroll + u, row0, rows)
        results = []
        for r in range(rows):
            scale = isa.splat(self.qparams[row0 + r, 0])
            zero = isa.splat(self.qparams[row0 + r, 1])
            for v in range(vectors):
                ksum = isa.load(self.ksum, block * ROWS + v * isa.lanes)
                value = T.Bind(scale * (acc[r * vectors + v] - zero * ksum))
                results.append(self.epilogue.add_lora(value, block, row0 + r, v, split))
        return results

    def _group(self, acc: Any, block: Any, group: Any, row0: Any, rows: int) -> None:
        """Add one group of 32 columns: eight dot products a row, then scale to float."""
        isa, lanes, vectors = self.isa, self.isa.lanes, ROWS // self.isa.lanes
        if self.prefetch:
            for line in range(0, GROUP_BYTES, 64):
                isa.prefetch(self.weights, block, group + self.prefetch, line)
            isa.prefetch(self.scales, block, group + self.prefetch, 0)
        mask, four = isa.splat(T.uint8(15), 4 * lanes), isa.splat(T.uint8(4), 4 * lanes)
        for v in range(vectors):
            sums = [isa.splat(self.offsets[row0 + r, group]) for r in range(rows)]
            for j in range(4):
                packed = T.Bind(
                    isa.load(self.weights, block, group, j * 64 + v * 4 * lanes, lanes=4 * lanes)
                )
                low = T.Bind(T.bitwise_and(packed, mask))
                high = T.Bind(T.bitwise_and(T.shift_right(packed, four), mask))
                for half, nibbles in enumerate((low, high)):
                    for r in range(rows):
                        word = self._word(row0 + r, group * GROUP + j * 8 + half * 4)
                        sums[r] = T.Bind(isa.dot_u4s8(sums[r], nibbles, isa.splat_bytes(word)))
            scale = T.Bind(
                isa.load_scales(self.scales, self.shape.scale_dtype, block, group, v * lanes)
            )
            for r in range(rows):
                i = r * vectors + v
                T.buffer_store(acc, isa.fma(isa.to_float32(sums[r]), scale, acc[i]), [i])

    def _word(self, row: Any, k: Any) -> Any:
        """Four activation codes as one int32."""
        return T.reinterpret("int32", self.codes[row, T.ramp(k, 1, 4)])
