"""The int4 product of `qmatmul_hvx.py` with weights that come through a scratch: VTCM on a DSP.

While a block of 64 rows is multiplied, the weights of the next one are on their way:

    start(begin)
    for block in begin .. end - 1:    wait; start(block + 1) if it is below end; multiply(block)

The scratch has room for two blocks, even ones and odd ones. A copy is one descriptor of the user
DMA (from v68 on), or a loop of vectors where there is no DMA: emulators have none. A call starts
and ends without a copy on its way, so that calls share nothing; each thread needs a scratch of its
own.

    scratch      [2][K/32][1024] uint8, as `weights` there;
    descriptors  [2][4] uint32: next, control, source, destination; in main memory.

Scales and the rest are read from where they are: they have an eighth of the bytes of weights.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from typing import Any

from tvm.tirx import PrimFunc
from tvm.tirx.script.builder import ir as T

from llamac.schedules import qmatmul_hvx
from llamac.schedules.intrin.hexagon import HexagonHvx
from llamac.schedules.kernel import KernelBuilder, for_token_tiles, store
from llamac.schedules.loop import loop, when
from llamac.schedules.qmatmul import GROUP, QMatmulShape
from llamac.schedules.qmatmul_hvx import HALF, Tile

VERSION = 1
KNOBS = qmatmul_hvx.KNOBS
FIRST_WITH_DMA = 68
GROUP_BYTES = GROUP * HALF
VECTOR = 128
DLTENSOR_DATA = 1  # of TVM's StructFieldKind
LONGEST_COPY = (1 << 24) - 1  # of a descriptor, in bytes


def valid(
    shape: QMatmulShape, isa: HexagonHvx, knobs: Mapping[str, int], *, dma: bool = False
) -> bool:
    """Whether the product has a kernel, and the DSP a DMA that copies a block at once."""
    fits = shape.k // GROUP * GROUP_BYTES <= LONGEST_COPY
    has_dma = isa.version >= FIRST_WITH_DMA and fits
    return qmatmul_hvx.valid(shape, isa, knobs) and (has_dma or not dma)


default = qmatmul_hvx.default


def make(
    shape: QMatmulShape, isa: HexagonHvx, *, mr: int, dma: bool, name: str | None = None
) -> PrimFunc:
    """Build the kernel; its arguments are scratch, descriptors, and those of `qmatmul_hvx.make`.

    Args:
        shape: n is a multiple of 64.
        isa: a version of HVX.
        mr: tokens per tile.
        dma: copy by the user DMA, or by a loop, which leaves the descriptors alone.
        name: symbol of the kernel.
    """
    how = "dma" if dma else "copy"
    sizes = f"{shape.m}x{shape.n}x{shape.k}"
    symbol = name or f"qmatmul_f32_qai8dx_qsi4c32_{how}_{sizes}_{isa.suffix}"
    with KernelBuilder(symbol, qmatmul_hvx.work(shape), alignment=isa.alignment) as b:
        tile = _StagedTile(b, shape, isa, dma)
        with b.items(_started(b, tile)) as item:
            block = T.Bind(T.Cast("int32", item))
            tile.wait(block)
            following = T.Bind(block + 1)
            with when(following < T.Cast("int32", b.end)):
                tile.start(following)

            def emit(row0: Any, rows: int) -> None:
                tile.emit(block, T.Cast("int32", row0), rows)

            for_token_tiles(shape.m, mr, emit)
    return b.func


@contextmanager
def _started(b: KernelBuilder, tile: _StagedTile) -> Iterator[None]:
    """The first copy of a call that has something to do."""
    with when(b.begin < b.end):
        tile.start(T.Bind(T.Cast("int32", b.begin)))
    yield


class _StagedTile(Tile):
    """A tile whose weights are read from the scratch."""

    def __init__(self, b: KernelBuilder, shape: QMatmulShape, isa: HexagonHvx, dma: bool) -> None:
        self._dma = dma
        scratch = (2, shape.k // GROUP, GROUP_BYTES)
        self._scratch = b.input("scratch", scratch, "uint8")
        self._descriptors = b.input("descriptors", (2, 4), "uint32")
        super().__init__(b, shape, isa)

    def start(self, block: Any) -> None:
        """Begin to copy the weights of a block to its half of the scratch."""
        half = T.Bind(block % 2)
        if self._dma:
            self._start_dma(block, half)
            return
        with loop(self.groups) as group:
            for first in range(0, GROUP_BYTES, VECTOR):
                vector = self.isa.load(self._weights, block, group, first, lanes=VECTOR)
                self.isa.store(self._scratch, vector, half, group, first, lanes=VECTOR)

    def wait(self, block: Any) -> None:
        """Wait for the copy of a block, which is then multiplied.

        LLVM knows `dmwait` as a function without memory. Its result has bit 0 clear, as nothing
        runs any more, which LLVM does not know: so it loads from the scratch behind it.
        """
        running: Any = T.int32(0)
        if self._dma:
            status = T.Bind(T.call_llvm_intrin("int32", "llvm.hexagon.Y6.dmwait"))
            running = T.bitwise_and(status, T.int32(1))
        self._half = T.Bind((block + running) % 2)

    def _start_dma(self, block: Any, half: Any) -> None:
        """Write a descriptor of a plain copy (type 0, through the caches) and start it."""
        store(self._descriptors, T.uint32(0), half, 0)  # no descriptor follows
        control = self.groups * GROUP_BYTES  # length in bits 0-23, type 0, not done
        store(self._descriptors, T.uint32(control), half, 1)
        self._store_pointer(half, 2, T.address_of(self._weights[block, 0, 0]))
        self._store_pointer(half, 3, T.address_of(self._scratch[half, 0, 0]))
        place = T.address_of(self._descriptors[half, 0])
        T.evaluate(T.call_llvm_intrin("void", "llvm.hexagon.Y6.dmstart", place))

    def _store_pointer(self, half: Any, word: int, pointer: Any) -> None:
        """Store an address: as the data of a DLTensor, its first field, which TVM has a way for."""
        place = T.address_of(self._descriptors[half, word])
        T.evaluate(T.tvm_struct_set(place, 0, DLTENSOR_DATA, pointer))

    def _vector(self, block: Any, group: Any, j: int) -> Any:
        place = T.ramp(T.int32(j * VECTOR), 1, VECTOR)
        return T.reinterpret("int32x32", self._scratch[self._half, group, place])
