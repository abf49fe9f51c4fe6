"""Embedding: gather a row of the table for each token.

    x[t, k] = table[tokens[t], k] * scales[tokens[t]]           int8 per channel
    x[t, k] = table[tokens[t], k]                               bfloat16

The table is [V, K] row by row, or, when the output layer shares it, in that kernel's blocks of 16 rows
(`qmatmul_int8.py`: [V/16][K/4][16 x 4 bytes]; `matmul.py`: [V/16][K][16]), read with a stride.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from tvm.tirx import PrimFunc
from tvm.tirx.script.builder import ir as T

from llamac.schedules.intrin.isa import Isa
from llamac.schedules.kernel import KernelBuilder, store

VERSION = 1
KNOBS: Mapping[str, tuple[int, ...]] = {}
ROWS = 16


@dataclass(frozen=True)
class EmbeddingShape:
    """Table [vocab, dim], dim a multiple of 32.

    Attributes:
        tokens: rows to gather.
        vocab: rows of the table; a multiple of 16 in blocks.
        dim: columns.
        form: "int8" with a float32 scale per row, or "bf16" as bits in uint16.
        blocks: the table is in the output layer's blocks.
    """

    tokens: int
    vocab: int
    dim: int
    form: str = "int8"
    blocks: bool = False

    @property
    def table_shape(self) -> tuple[int, ...]:
        """Shape of the table as the kernel reads it."""
        if not self.blocks:
            return (self.vocab, self.dim)
        if self.form == "int8":
            return (self.vocab // ROWS, self.dim // 4, 4 * ROWS)
        return (self.vocab // ROWS, self.dim, ROWS)


def valid(shape: EmbeddingShape, isa: Isa, knobs: Mapping[str, int]) -> bool:
    """Whether rows are whole vectors."""
    return shape.dim % 32 == 0 and not (shape.blocks and shape.vocab % ROWS) and not knobs


def default(shape: EmbeddingShape, isa: Isa) -> dict[str, int]:
    """No knobs."""
    return {}


def make(shape: EmbeddingShape, isa: Isa, *, name: str | None = None) -> PrimFunc:
    """Build `embedding(tokens i32[T], table, scales f32[V]) -> x f32[T, K]`; work = T.

    The bfloat16 form has no scales.
    """
    level = isa.name.replace("-", "_")
    name = name or f"embedding_f32_{shape.form}_{shape.tokens}x{shape.dim}_{level}"
    with KernelBuilder(name, shape.tokens) as b:
        tokens = b.input("tokens", (shape.tokens,), "int32")
        dtype = "int8" if shape.form == "int8" else "uint16"
        table = b.input("table", shape.table_shape, dtype)
        scales = b.input("scales", (shape.vocab,), "float32") if shape.form == "int8" else None
        x = b.output("x", (shape.tokens, shape.dim), "float32")
        with b.items() as t:
            row = T.Bind(T.Cast("int64", tokens[t]))
            scale = T.Bind(scales[row]) if scales is not None else None
            if shape.blocks:
                _from_blocks(shape, table, row, scale, x, t)
            else:
                _from_rows(shape, isa, table, row, scale, x, t)
    return b.func


def _from_rows(
    shape: EmbeddingShape, isa: Isa, table: Any, row: Any, scale: Any, x: Any, t: Any
) -> None:
    """Widen a row, a vector at a time."""
    with T.serial(0, T.int64(shape.dim // isa.lanes)) as i:
        value = isa.load(table, row, i * isa.lanes)
        if scale is None:
            isa.store(x, isa.bfloat16_to_float32(value), t, i * isa.lanes)
        else:
            isa.store(x, isa.to_float32(value) * isa.splat(scale), t, i * isa.lanes)


def _from_blocks(shape: EmbeddingShape, table: Any, row: Any, scale: Any, x: Any, t: Any) -> None:
    """Pick one row out of its block: a few bytes at a time, but only one row per token."""
    block, lane = T.Bind(T.floordiv(row, ROWS)), T.Bind(T.floormod(row, ROWS))
    with T.serial(0, T.int64(shape.dim)) as k:
        if scale is None:
            bits = T.shift_left(T.Cast("uint32", table[block, k, lane]), T.uint32(16))
            store(x, T.reinterpret("float32", bits), t, k)
        else:
            code = table[block, T.floordiv(k, 4), lane * 4 + T.floormod(k, 4)]
            store(x, T.Cast("float32", code) * scale, t, k)
