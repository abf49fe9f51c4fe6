"""Embedding: rows of a table, widened to float32.

    x[t] = table[tokens[t]] * scales[tokens[t]]     int8 codes with one scale per row
    x[t] = table[tokens[t]]                         bfloat16

The table is [V, K] row by row, or in the blocks of the output layer when both share one table.

Token ids must be in 0 .. V-1; the runtime checks them before it starts a chunk.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from tvm.tirx import PrimFunc
from tvm.tirx.script.builder import ir as T

from llamac.schedules.intrin.isa import Isa
from llamac.schedules.kernel import KernelBuilder, opaque, store
from llamac.schedules.loop import loop

VERSION = 1
KNOBS: Mapping[str, tuple[int, ...]] = {}
ROWS = 16  # rows of a packed block
HVX_ROWS = 32  # and of one of HVX, whose codes are unsigned
HVX_ZERO = 128


@dataclass(frozen=True)
class EmbeddingShape:
    """x [tokens, k] from a table [vocab, k]; k is a multiple of 32.

    Attributes:
        tokens: rows to look up.
        vocab: rows of the table; whole blocks.
        k: columns.
        dtype: "int8" or "bfloat16".
        blocks: the table is the output layer's, in that kernel's blocks of 16 rows.
        hvx: the blocks are those of HVX, 32 rows of int8 codes + 128 (`qmatmul_int8_hvx.py`).
    """

    tokens: int
    vocab: int
    k: int
    dtype: str = "int8"
    blocks: bool = False
    hvx: bool = False

    @property
    def rows(self) -> int:
        """Rows of a block."""
        return HVX_ROWS if self.hvx else ROWS

    @property
    def table_dtype(self) -> str:
        """Type of the table as the kernel reads it."""
        if self.dtype == "bfloat16":
            return "uint16"
        return "uint8" if self.hvx else "int8"

    @property
    def table_shape(self) -> tuple[int, ...]:
        """Shape of the table as the kernel reads it (see `qmatmul_int8.py` and `matmul.py`)."""
        if not self.blocks:
            return (self.vocab, self.k)
        if self.dtype == "int8":
            return (self.vocab // self.rows, self.k // 4, 4 * self.rows)
        return (self.vocab // ROWS, self.k, ROWS)


def valid(shape: EmbeddingShape, isa: Isa, knobs: Mapping[str, int]) -> bool:
    """Whether rows are cut into whole vectors and the type is known."""
    in_blocks = not shape.blocks or shape.vocab % shape.rows == 0
    is_known = shape.dtype in ({"int8"} if shape.hvx else {"int8", "bfloat16"})
    return shape.k % 32 == 0 and is_known and in_blocks and not knobs


def default(shape: EmbeddingShape, isa: Isa) -> dict[str, int]:
    """No knobs."""
    return {}


def make(shape: EmbeddingShape, isa: Isa, *, name: str | None = None) -> PrimFunc:
    """Build `embedding(tokens i32[T], table [, scales f32[V]]) -> x f32[T,K]`; work = T.

    The table is int8 (or uint8 codes + 128) with scales, or bfloat16 (as uint16 bits) without.
    """
    is_int8 = shape.dtype == "int8"
    with KernelBuilder(name or _name(shape, isa), shape.tokens, alignment=isa.alignment) as b:
        tokens = b.input("tokens", (shape.tokens,), "int32")
        table = b.input("table", shape.table_shape, shape.table_dtype)
        scales = b.input("scales", (shape.vocab,), "float32") if is_int8 else None
        x = b.output("x", (shape.tokens, shape.k), "float32")
        with b.items() as item:
            row = opaque(T.Cast("int64", tokens[item]))
            scale = None if scales is None else T.Bind(scales[row])
            emit = _from_blocks if shape.blocks else _from_rows
            emit(shape, isa, table, row, scale, x, item)
    return b.func


def _from_rows(
    shape: EmbeddingShape, isa: Isa, table: Any, row: Any, scale: Any, x: Any, item: Any
) -> None:
    """Widen a row, a vector at a time."""
    with loop(shape.k // isa.lanes) as i:
        value = isa.load(table, row, i * isa.lanes)
        if scale is None:
            isa.store(x, isa.bfloat16_to_float32(value), item, i * isa.lanes)
        else:
            isa.store(x, isa.to_float32(value) * isa.splat(scale), item, i * isa.lanes)


def _from_blocks(
    shape: EmbeddingShape, isa: Isa, table: Any, row: Any, scale: Any, x: Any, item: Any
) -> None:
    """Pick one row out of its block: element by element, but only one row per token."""
    block, lane = row // shape.rows, row % shape.rows
    with loop(shape.k) as k:
        if scale is None:
            bits = T.shift_left(T.Cast("uint32", table[block, k, lane]), T.uint32(16))
            store(x, T.reinterpret("float32", bits), item, k)
        else:
            code = T.Cast("int32", table[block, k // 4, lane * 4 + k % 4])
            if shape.hvx:
                code = code - T.int32(HVX_ZERO)
            store(x, T.Cast("float32", code) * scale, item, k)


def _name(shape: EmbeddingShape, isa: Isa) -> str:
    rhs = "qsi8cx" if shape.dtype == "int8" else "bf16"
    layout = f"{'_hvx' if shape.hvx else ''}_blocks" if shape.blocks else ""
    return f"embedding_f32_i32_{rhs}{layout}_{shape.tokens}x{shape.vocab}x{shape.k}_{isa.suffix}"
