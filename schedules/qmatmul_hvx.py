"""int4 group-32 weights x int8 per-token activations on HVX: GEMV and GEMM.

The products are those of `schedules/qmatmul.py`; the layout is HVX's own. A block is 64 rows, and a
byte holds the same column of two of them: B = L + 16 * H with unsigned nibbles, L of row r and H of
row r + 32. `vrmpy` multiplies four bytes of 32 rows by a word of four signed activations. With
S = sum(x) over a group,

    high[r] = sum(H * x) - 8 S          starts from -8 S, takes vectors shifted right by 4
    both[r] = sum(B * x) - 17 * 8 S     starts from 17 times that, takes vectors as they are
    low[r]  = both[r] - 16 * high[r]    once per group; it is sum(L * x) - 8 S

so that no vector is ever masked: per 256 products a load, a shift and two `vrmpy`, which is one
packet. A mask for the low nibbles would be a fifth instruction, and a packet holds four.

    weights [N/64][K/32][8 j][32 rows x 4 bytes]: byte b of row r of vector j holds
            w[r, 4j + b] + 8 in its low and w[r + 32, 4j + b] + 8 in its high nibble;
    scales  [N/64][K/32][32 rows][2] float16 or bfloat16: rows r and r + 32 in one word;
    lora_b  [N/64][rank][64].

For swiglu a block holds 32 rows of gate and, in the high nibbles, 32 rows of up.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from tvm.tirx import PrimFunc
from tvm.tirx.script.builder import ir as T

from llamac.schedules.intrin.hexagon import HexagonHvx
from llamac.schedules.kernel import KernelBuilder, for_token_tiles, local, store
from llamac.schedules.qmatmul import GROUP, QMatmulShape
from llamac.schedules.qmatmul_epilogue import Epilogue

VERSION = 1
HALF = 32  # rows of a vector
BLOCK = 2 * HALF  # rows of a block
VECTORS = GROUP // 4  # of 128 bytes, in a group of a block

KNOBS: Mapping[str, tuple[int, ...]] = {
    "mr": (1, 2, 3, 4, 5, 6),  # tokens per tile, two accumulators each
}


def work(shape: QMatmulShape) -> int:
    """Work items: blocks, each of 64 columns of the result or 32 for swiglu."""
    return shape.n // BLOCK


def valid(shape: QMatmulShape, isa: HexagonHvx, knobs: Mapping[str, int]) -> bool:
    """Whether rows make whole blocks of one projection each, and sums fit the registers."""
    width = HALF if shape.epilogue == "swiglu" else BLOCK
    return (
        shape.n % BLOCK == 0
        and all(columns % width == 0 for columns in shape.lora_splits)
        and 4 * knobs["mr"] + 6 <= isa.registers
        and (knobs["mr"] <= shape.m or knobs["mr"] == 1)
    )


def default(shape: QMatmulShape, isa: HexagonHvx) -> dict[str, int]:
    """Four tokens: words of more no longer fit the scalar registers."""
    return {"mr": min(shape.m, 4)}


def make(
    shape: QMatmulShape,
    isa: HexagonHvx,
    *,
    mr: int,
    name: str | None = None,
    sums_only: bool = False,
) -> PrimFunc:
    """Build the kernel; its arguments are those of `qmatmul.make`, in the layout above.

    Args:
        shape: n is a multiple of 64.
        isa: a version of HVX.
        mr: tokens per tile.
        name: symbol of the kernel.
        sums_only: store the exact sums of the groups, int32 [n/64, k/32, m, 64], rows r before
            rows r + 32, and neither scales nor anything after them: the integer part, to be counted
            where floats are simulated.
    """
    symbol = name or f"qmatmul_f32_qai8dx_qsi4c32_{shape.m}x{shape.n}x{shape.k}_{isa.suffix}"
    with KernelBuilder(symbol, work(shape), alignment=isa.alignment) as b:
        tile: _Sums | Tile = (_Sums if sums_only else Tile)(b, shape, isa)
        with b.items() as item:
            block = T.Bind(T.Cast("int32", item))  # as wide as addresses: 16 % fewer packets

            def emit(row0: Any, rows: int) -> None:
                tile.emit(block, T.Cast("int32", row0), rows)

            for_token_tiles(shape.m, mr, emit)
    return b.func


class Products:
    """The integer part: sums over a group of 32 columns."""

    def __init__(self, b: KernelBuilder, shape: QMatmulShape, isa: HexagonHvx) -> None:
        self.shape, self.isa, self.groups = shape, isa, shape.k // GROUP
        blocks = shape.n // BLOCK
        self._codes = b.input("codes", (shape.m, shape.k), "int8")
        self._qparams = b.input("qparams", (shape.m, 2), "float32")
        self._offsets = b.input("offsets", (shape.m, self.groups), "int32")
        self._weights = b.input("weights", (blocks, self.groups, GROUP * HALF), "uint8")

    def sums(self, block: Any, group: Any, row0: Any, rows: int) -> list[tuple[Any, Any]]:
        """(low, high) for each token: int32x32 of rows r and of rows r + 32."""
        isa = self.isa
        both, high = [], []
        for r in range(rows):
            offset = T.Bind(self._offsets[row0 + r, group])
            # One token waits for the product with 17, and is faster if an addition follows instead:
            # 3242 packets of 3494. Four tokens fill the packets and have no place for the addition.
            factor, start = (17, offset) if rows > 1 else (1, T.int32(0))
            both.append(T.Bind(isa.splat(offset * T.int32(factor))))
            high.append(T.Bind(isa.splat(start)))
        for j in range(0, VECTORS, 2):
            pairs = [self._words(row0 + r, group * GROUP + j * 4) for r in range(rows)]
            for i in (0, 1):
                packed = T.Bind(self._vector(block, group, j + i))
                upper = T.Bind(isa.shift_bytes_right(packed, 4))
                for r in range(rows):
                    both[r] = T.Bind(isa.dot_word_u8s8(both[r], packed, pairs[r][i]))
                    high[r] = T.Bind(isa.dot_word_u8s8(high[r], upper, pairs[r][i]))
        four = isa.splat(T.int32(4))
        low = [T.Bind(b - T.shift_left(h, four)) for b, h in zip(both, high, strict=True)]
        if rows == 1:
            high = [T.Bind(high[0] + isa.splat(offset))]
        return list(zip(low, high, strict=True))

    def _vector(self, block: Any, group: Any, j: int) -> Any:
        return T.reinterpret(
            "int32x32", self._weights[block, group, T.ramp(T.int32(j * 4 * HALF), 1, 4 * HALF)]
        )

    def _words(self, row: Any, k: Any) -> tuple[Any, Any]:
        """Two words of four activation codes."""
        first, second = (self._codes[row, T.ramp(k + i, 1, 4)] for i in (0, 4))
        return T.Bind(T.reinterpret("int32", first)), T.Bind(T.reinterpret("int32", second))


class _Sums(Products):
    """The integer part alone."""

    def __init__(self, b: KernelBuilder, shape: QMatmulShape, isa: HexagonHvx) -> None:
        super().__init__(b, shape, isa)
        blocks = shape.n // BLOCK
        self._result = b.output("sums", (blocks, self.groups, shape.m, BLOCK), "int32")

    def emit(self, block: Any, row0: Any, rows: int) -> None:
        """Store all sums of `rows` tokens from `row0`."""
        with T.serial(0, T.int32(self.groups)) as group:
            for r, pair in enumerate(self.sums(block, group, row0, rows)):
                for i in (0, 1):
                    place = (block, group, row0 + r, T.int32(i * HALF))
                    self.isa.store(self._result, pair[i], *place)


class Tile(Products):
    """The whole product: sums times scales in float32, then the epilogue."""

    def __init__(self, b: KernelBuilder, shape: QMatmulShape, isa: HexagonHvx) -> None:
        super().__init__(b, shape, isa)
        blocks = shape.n // BLOCK
        scale_bits = "uint16" if shape.scale_dtype == "bfloat16" else "float16"
        self._scales = b.input("scales", (blocks, self.groups, BLOCK), scale_bits)
        self._ksum = b.input("ksum", (shape.n,), "float32")
        self._epilogue = Epilogue(b, shape, isa, BLOCK)

    def emit(self, block: Any, row0: Any, rows: int) -> None:
        """Compute `rows` tokens from `row0` for one block and store them."""
        isa = self.isa
        acc = local("float32x32", 2 * rows)
        for i in range(2 * rows):
            store(acc, isa.splat(0.0), i)
        with T.serial(0, T.int32(self.groups)) as group:
            scales = self._group_scales(block, group)
            for r, pair in enumerate(self.sums(block, group, row0, rows)):
                for i in (0, 1):
                    value = T.Bind(isa.to_float32(pair[i]))
                    store(acc, isa.fma(value, scales[i], acc[2 * r + i]), 2 * r + i)
        for r in range(rows):
            values = [self._finish(acc[2 * r + i], block, row0 + r, i) for i in (0, 1)]
            if self._epilogue.is_swiglu:
                values = [T.Bind(isa.silu(values[0]) * values[1])]
            for i, value in enumerate(values):
                column = block * (HALF * len(values)) + i * HALF
                self._epilogue.store(value, row0 + r, column)

    def _finish(self, total: Any, block: Any, row: Any, half: int) -> Any:
        """The row's scale, the zero point and the LoRA branch of one half of a block."""
        isa = self.isa
        scale, zero = (isa.splat(self._qparams[row, i]) for i in (0, 1))
        ksum = isa.load(self._ksum, block * BLOCK + half * HALF)
        value = T.Bind(scale * (total - zero * ksum))
        split = half if self._epilogue.is_swiglu else None
        return self._epilogue.add_lora(value, block, row, half, split)

    def _group_scales(self, block: Any, group: Any) -> tuple[Any, Any]:
        """float32x32 of rows r and of rows r + 32: the halves of one vector of words."""
        stored = self._scales[block, group, T.ramp(T.int32(0), 1, BLOCK)]
        words = T.Bind(T.reinterpret("uint32x32", stored))
        return self.isa.halves_to_float32(words, self.shape.scale_dtype)
