"""int4 products of `qmatmul_quads.py` by SME: outer products of 16 tokens and 16 rows.

With streaming vectors of 512 bits, the 64 bytes of a block that belong to one j are one vector,
whose low and high nibbles are four columns of 16 rows each. They meet a vector with the codes of
the same columns of 16 tokens (codes in "panels", see `quantize.py`): one `smopa` adds all 1024
products to a tile of 16 tokens x 16 rows. A group of 32 columns is eight of them. Then its sums
leave the tile row by row, become floats, meet the scales and are added up in 16 registers.

Groups take turns in the tiles, so that one can be multiplied while another is read.
"""

from __future__ import annotations

from typing import Any

from tvm.tirx.script.builder import ir as T

from llamac.schedules.intrin.arm_scalable import FLOATS, WORDS, ArmSme, accumulator
from llamac.schedules.loop import loop
from llamac.schedules.qmatmul_epilogue import ROWS
from llamac.schedules.qmatmul_tensors import Tensors
from llamac.schedules.qmatmul_wide import WideBlocks
from llamac.schedules.quantize import PANEL

_IN_FLIGHT = 4  # rows that are read before the first of them has been added


class SmeBlocks(WideBlocks):
    """Panels of 16 tokens, whose last one may be filled in part."""

    def __init__(self, tensors: Tensors, isa: ArmSme, tiles: int) -> None:
        super().__init__(tensors)
        self._isa, self._tiles = isa, tiles

    def multiply(self, block: Any, panel: Any, tokens: int, place: int) -> None:
        """All 16 rows of the block at once."""
        accs = [accumulator() for _ in range(tokens)]
        with loop(self.tensors.groups // self._tiles) as step:
            self._isa.clear_tiles(self._tiles)
            groups = [step * self._tiles + tile for tile in range(self._tiles)]
            for tile, group in enumerate(groups):
                self._multiply_group(tile, block, panel, group)
            for tile, group in enumerate(groups):
                self._add_group(accs, tile, block, group)
        for token, acc in enumerate(accs):
            self._isa.store_floats(self.sums, acc[0], place + token * ROWS)

    def _multiply_group(self, tile: int, block: Any, panel: Any, group: Any) -> None:
        isa, t = self._isa, self.tensors
        for j in range(4):
            packed = isa.load_bytes(t.weights, block, group, T.int64(j * 4 * ROWS))
            for half, rows in enumerate(isa.unpack_wide(packed)):
                place = T.int64((2 * j + half) * 4 * PANEL)
                isa.outer_product(tile, isa.load_bytes(t.codes, panel, group, place), rows)

    def _add_group(self, accs: list[Any], tile: int, block: Any, group: Any) -> None:
        isa, t = self._isa, self.tensors
        place = (block, group, T.int64(0))
        scales = isa.load_wide_scales(t.scales, t.scale_shift, *place, keep=t.kept_bits)
        read: list[Any] = []
        for token, acc in enumerate(accs):
            # Merging into what was added to its sum before saves a copy.
            spare = read[token - _IN_FLIGHT] if token >= _IN_FLIGHT else scales
            words = isa.read_row(tile, token, T.reinterpret(WORDS, spare))
            read.append(T.Bind(T.Cast(FLOATS, words)))
            T.buffer_store(acc, isa.fma_floats(read[token], scales, acc[0]), [0])
