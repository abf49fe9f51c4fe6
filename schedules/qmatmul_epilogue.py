"""What follows an int4 x int8 product: the LoRA branch, a residual or SwiGLU, and the result.

Rows of the weights come in blocks, of 16 but on HVX. A block's results for a token are rows / lanes
vectors.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, Protocol

from tvm.tirx.script.builder import ir as T

from llamac.schedules.intrin.isa import Isa
from llamac.schedules.kernel import KernelBuilder

ROWS = 16


class EpilogueShape(Protocol):
    """The fields of a shape that an epilogue reads; see `QMatmulShape`."""

    @property
    def m(self) -> int:
        """Tokens."""

    @property
    def n(self) -> int:
        """Output columns."""

    @property
    def epilogue(self) -> str:
        """Its name."""

    @property
    def lora_rank(self) -> int:
        """Rank of each LoRA branch, 0 for none."""

    @property
    def lora_scale(self) -> float:
        """Factor of the LoRA branch."""

    @property
    def lora_splits(self) -> tuple[int, ...]:
        """Output columns of each fused projection."""

    @property
    def columns(self) -> int:
        """Columns of the result."""


class Epilogue:
    """The last tensors of a kernel, in the order of its arguments, and what is done with them."""

    def __init__(self, b: KernelBuilder, shape: EpilogueShape, isa: Isa, rows: int = ROWS) -> None:
        self.shape, self.isa, self._rows = shape, isa, rows
        if shape.lora_rank:
            total = shape.lora_rank * len(shape.lora_splits)
            self._lora_t = b.input("lora_t", (shape.m, total), "float32")
            self._lora_b = b.input("lora_b", (shape.n // rows, shape.lora_rank, rows), "uint16")
        if shape.epilogue == "residual":
            self._residual = b.input("residual", (shape.m, shape.n), "float32")
        self._result = b.output("result", (shape.m, shape.columns), "float32")

    @property
    def is_swiglu(self) -> bool:
        """Whether a work item is a pair of blocks, gate and up."""
        return self.shape.epilogue == "swiglu"

    def add_lora(self, value: Any, block: Any, row: Any, v: int, split: int | None) -> Any:
        """Add scale * (t @ B.T): rank products of a scalar of t and a vector of B.

        Args:
            value: vector v of a block's results for a token.
            block: of rows.
            row: the token.
            v: which vector of the block.
            split: the fused projection; None: find it from the block.
        """
        isa, rank = self.isa, self.shape.lora_rank
        if not rank:
            return value
        which = split if split is not None else split_of(block, self.shape.lora_splits, self._rows)
        first = which * rank
        branch = isa.splat(0.0)
        for r in range(rank):
            weights = self._lora_b[block, r, T.ramp(v * isa.lanes, 1, isa.lanes)]
            t = isa.splat(self._lora_t[row, first + r])
            branch = T.Bind(isa.fma(t, isa.bfloat16_to_float32(weights), branch))
        return T.Bind(isa.fma(branch, isa.splat(float(self.shape.lora_scale)), value))

    def store(self, value: Any, row: Any, column: Any) -> None:
        """Store a vector of the result, with the residual added."""
        if self.shape.epilogue == "residual":
            value = value + self.isa.load(self._residual, row, column)
        self.isa.store(self._result, value, row, column)


def split_of(block: Any, splits: Sequence[int], rows: int = ROWS) -> Any:
    """Index of the projection, of projections of given widths, that a packed block belongs to."""
    index: Any = T.int64(0)
    end = 0
    for width in splits[:-1]:
        end += width // rows
        index = index + T.Cast("int64", block >= end)
    return index
