"""Kernels that do nothing but what limits all others: products in registers, and reading memory.

What they reach on a processor is its roof: a GEMM cannot multiply faster, a GEMV not read faster.

    products    accumulators [rows x columns] of a tile, as a GEMM has them; operands of 8 steps
                that stay in the first-level cache
    reads       sums of a long tensor, with the widest loads
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

from tvm.tirx import PrimFunc
from tvm.tirx.script.builder import ir as T

from llamac.schedules.intrin.isa import Isa
from llamac.schedules.kernel import KernelBuilder, local, sum_chains

STEPS = 8  # of operands, which then take less than 6 KiB
READ_VECTORS = 8  # sums, so that no load waits for an addition
READ_BYTES = 64 << 10  # of a work item
BYTES_PER_LANE = 4


@dataclass(frozen=True)
class ProductsRoof:
    """Multiply-accumulates of one kind.

    Attributes:
        kind: "u4s8" or "u8s8", dot products of bytes as int4 and int8 weights need them, or
            "float32".
        repeats: times that a work item multiplies a tile.
    """

    kind: str
    repeats: int = 4096

    def tile(self, isa: Isa) -> tuple[int, int]:
        """Rows and columns of the accumulators, in vectors."""
        return (4, 5) if isa.registers >= 32 else (2, 4)

    def products(self, isa: Isa) -> int:
        """Multiply-accumulates of a work item."""
        rows, columns = self.tile(isa)
        per_lane = 1 if self.kind == "float32" else BYTES_PER_LANE
        return rows * columns * isa.lanes * per_lane * self.repeats


def make_products(roof: ProductsRoof, isa: Isa, work: int = 1) -> PrimFunc:
    """Build the kernel.

    Arguments of the kernel: left [8, rows, vector], right [8, columns, vector], which are uint8 and
    int8 or both float32, and the output [work, vector], the sum of all accumulators.
    """
    rows, columns = roof.tile(isa)
    is_float = roof.kind == "float32"
    width = isa.lanes if is_float else BYTES_PER_LANE * isa.lanes
    sum_dtype = "float32" if is_float else "int32"
    with KernelBuilder(f"roof_{roof.kind}_{isa.suffix}", work) as b:
        left = b.input("left", (STEPS, rows, width), "float32" if is_float else "uint8")
        right = b.input("right", (STEPS, columns, width), "float32" if is_float else "int8")
        result = b.output("result", (work, isa.lanes), sum_dtype)
        with b.items() as item:
            acc = local(f"{sum_dtype}x{isa.lanes}", rows * columns)
            for i in range(rows * columns):
                T.buffer_store(acc, _zero(isa, is_float), [i])
            with T.serial(0, T.int64(roof.repeats)) as repeat:
                # Not a loop of its own: LLVM would multiply once and only add again and again.
                step = T.Bind(T.bitwise_and(repeat, T.int64(STEPS - 1)))
                xs = [T.Bind(isa.load(left, step, r, 0, lanes=width)) for r in range(rows)]
                for c in range(columns):
                    w = T.Bind(isa.load(right, step, c, 0, lanes=width))
                    for r, x in enumerate(xs):
                        i = r * columns + c
                        T.buffer_store(acc, _product(isa, roof.kind, acc[i], x, w), [i])
            isa.store(result, sum_chains(acc, 0, rows * columns), item, 0)
    return b.func


def _zero(isa: Isa, is_float: bool) -> Any:
    return isa.splat(0.0) if is_float else isa.splat(T.int32(0))


def _product(isa: Isa, kind: str, acc: Any, x: Any, w: Any) -> Any:
    if kind == "float32":
        return isa.fma(x, w, acc)
    return isa.dot_u4s8(acc, x, w) if kind == "u4s8" else isa.dot_u8s8(acc, x, w)


def make_reads(num_bytes: int, isa: Isa, *, prefetch: int) -> PrimFunc:
    """Build the kernel that reads a tensor; an item is 64 KiB of it.

    Arguments of the kernel: values int32 [items, 16384], and the output int32 [items, lanes].

    Args:
        num_bytes: of the tensor, a multiple of 64 KiB.
        isa: of the loads.
        prefetch: bytes ahead at which each cache line is asked for, 0: not at all.
    """
    items, values_per_item = num_bytes // READ_BYTES, READ_BYTES // 4
    block = READ_VECTORS * isa.lanes
    with KernelBuilder(f"roof_reads_{prefetch}_{isa.suffix}", items) as b:
        values = b.input("values", (items, values_per_item), "int32")
        result = b.output("result", (items, isa.lanes), "int32")
        with b.items() as item:
            sums = local(f"int32x{isa.lanes}", READ_VECTORS)
            for i in range(READ_VECTORS):
                T.buffer_store(sums, isa.splat(T.int32(0)), [i])
            with T.serial(0, T.int64(values_per_item // block)) as step:
                if prefetch:
                    for line in range(0, 4 * block, 64):
                        isa.prefetch(values, item, step * block + (prefetch + line) // 4)
                for i in range(READ_VECTORS):
                    vector = isa.load(values, item, step * block + i * isa.lanes)
                    T.buffer_store(sums, sums[i] + vector, [i])
            isa.store(result, sum_chains(sums, 0, READ_VECTORS), item, 0)
    return b.func
