"""Roofs of this machine: what one thread can multiply and read at most, measured.

    roof of a call  =  max( products / products per microsecond,  weights / bytes per microsecond )

The best of a few rounds counts, because whatever else runs only lowers it. Weights count where a
model reads them from memory: in kernels for one token.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import Any

import numpy as np

from llamac.schedules.intrin.isa import Isa
from llamac.schedules.kernel import compile_kernels, work_items
from llamac.schedules.roofs import STEPS, ProductsRoof, make_products, make_reads

ROUNDS = 9
PREFETCHES = (0, 2048)  # bytes ahead
READ_COPIES = 4  # of the last cache
_KINDS = {"qmatmul": "u4s8", "qmatmul_int8": "u8s8", "matmul": "float32"}


@dataclass(frozen=True)
class Roofs:
    """What one thread does in a microsecond at most.

    Attributes:
        products: multiply-accumulates, by the kinds of `ProductsRoof`.
        bytes: read from memory.
    """

    products: Mapping[str, float] = field(default_factory=dict)
    bytes: float = 0.0

    def at_least(self, other: Roofs) -> Roofs:
        """The higher of each."""
        products = {k: max(v, other.products.get(k, 0.0)) for k, v in self.products.items()}
        return Roofs(products, max(self.bytes, other.bytes))

    def of_call(self, family: str, products: int, weight_bytes: int) -> float:
        """The least microseconds of a call of a family that `has_roof`.

        Args:
            family: of the kernel.
            products: of the call.
            weight_bytes: that it reads from memory.
        """
        return max(products / self.products[_KINDS[family]], weight_bytes / self.bytes)


def has_roof(family: str) -> bool:
    """Whether products or weights limit a family; other things limit the others."""
    return family in _KINDS


def measure_roofs(isa: Isa, cache_bytes: int) -> Roofs:
    """Measure in this thread; takes about a second.

    Args:
        isa: an instruction set that this CPU has.
        cache_bytes: size of the last cache.
    """
    products = {kind: products_per_us(kind, isa) for kind in ("u4s8", "u8s8", "float32")}
    return Roofs(products, bytes_per_us(isa, READ_COPIES * cache_bytes))


def products_per_us(kind: str, isa: Isa) -> float:
    """Multiply-accumulates of a kind in a microsecond."""
    import tvm  # noqa: PLC0415 (the process may have just started)

    roof = ProductsRoof(kind)
    func = make_products(roof, isa)
    rows, columns = roof.tile(isa)
    left, right = (tuple(int(n) for n in p.shape) for p in func.params[:2])
    operands = [
        tvm.runtime.tensor(np.ones(shape, str(p.dtype)))
        for shape, p in zip((left, right), func.params[:2], strict=True)
    ]
    assert left[:2] == (STEPS, rows) and right[:2] == (STEPS, columns)
    return roof.products(isa) / _least_us(func, isa, operands)


def bytes_per_us(isa: Isa, num_bytes: int) -> float:
    """Bytes read from memory in a microsecond, with the better of two ways to read."""
    import tvm  # noqa: PLC0415

    functions = [make_reads(num_bytes, isa, prefetch=ahead) for ahead in PREFETCHES]
    shape = tuple(int(n) for n in functions[0].params[0].shape)
    values = tvm.runtime.tensor(np.ones(shape, np.int32))
    return num_bytes / min(_least_us(func, isa, [values]) for func in functions)


def _least_us(func: Any, isa: Isa, operands: list[Any]) -> float:
    """Microseconds of the shortest call with all items."""
    import tvm  # noqa: PLC0415

    name = str(func.attrs["global_symbol"])
    kernel: Callable[..., None] = compile_kernels({name: func}, isa)[name]
    output = func.params[len(operands)]
    result = tvm.runtime.tensor(np.zeros([int(n) for n in output.shape], str(output.dtype)))
    least = float("inf")
    for _ in range(ROUNDS):
        start = time.perf_counter()
        kernel(*operands, result, 0, work_items(func))
        least = min(least, time.perf_counter() - start)
    return least * 1e6
