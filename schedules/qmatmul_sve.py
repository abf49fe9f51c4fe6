"""int4 products of `qmatmul_quads.py` by SVE: as many rows at once as a vector has words.

The packed rows of a block lie side by side for each j, so a vector of 256 or 512 bits holds the
bytes of 8 or 16 rows. Segments of 128 bits work like NEON's registers:

    one token     the 16 codes of a half group stand in every segment; sdot by lane
    many tokens   the codes of a pair stand in every segment; smmla with two rows of each segment

`zip` puts rows (2s, 2s + 1) into segment s, of the lower rows first and then of the upper. The
accumulators of a pair of tokens are unzipped by 64 bits in the end, which puts rows into order.
"""

from __future__ import annotations

from typing import Any

from tvm.tirx.script.builder import ir as T

from llamac.schedules.intrin.arm_scalable import ArmSve, accumulator, num_words, splat
from llamac.schedules.loop import loop
from llamac.schedules.qmatmul_epilogue import ROWS
from llamac.schedules.qmatmul_tensors import CHUNKS, Tensors
from llamac.schedules.qmatmul_wide import WideBlocks
from llamac.schedules.quantize import GROUP


class SveBlocks(WideBlocks):
    """One token by lanes, many by matrix products."""

    def __init__(self, tensors: Tensors, isa: ArmSve, unroll: int) -> None:
        super().__init__(tensors)
        self._isa, self._unroll = isa, unroll

    def multiply(self, block: Any, panel: Any, tokens: int, place: int) -> None:
        """Vector by vector of rows."""
        t = self.tensors
        with loop(T.truncdiv(T.int64(ROWS), num_words())) as v:
            row0 = T.Bind(v * num_words())
            pairs = 1 if t.shape.m == 1 else (tokens + 1) // 2
            accs = [accumulator() for _ in range(1 if t.shape.m == 1 else 2 * pairs)]
            with loop(t.groups // self._unroll) as step:
                for u in range(self._unroll):
                    group = step * self._unroll + u
                    if t.shape.m == 1:
                        self._add_token(accs[0], block, row0, group)
                    else:
                        self._add_pairs(accs, block, row0, panel, group)
            self._store(accs, row0 + place)

    def _packed(self, block: Any, row0: Any, group: Any, j: int) -> Any:
        return self._isa.load_bytes(self.tensors.weights, block, group, row0 * 4 + j * 4 * ROWS)

    def _scales(self, block: Any, row0: Any, group: Any) -> Any:
        t = self.tensors
        place = (block, group, row0)
        return self._isa.load_wide_scales(t.scales, t.scale_shift, *place, keep=t.kept_bits)

    def _add_token(self, acc: Any, block: Any, row0: Any, group: Any) -> None:
        isa, t = self._isa, self.tensors
        x = [isa.load_segment(t.codes, 0, group * GROUP + i) for i in (0, 16)]
        total = splat(T.int32(0), 4)
        chunks = [
            rows for j in range(4) for rows in isa.unpack_wide(self._packed(block, row0, group, j))
        ]
        for c, rows in enumerate(chunks):
            total = isa.dot_segment_lane(total, rows, x[c // 4], c % 4)
        scale = self._scales(block, row0, group)
        T.buffer_store(acc, isa.fma_words(total, scale, acc[0]), [0])

    def _add_pairs(self, accs: list[Any], block: Any, row0: Any, panel: Any, group: Any) -> None:
        isa = self._isa
        rows = self._row_pairs(block, row0, group)
        scale = self._scales(block, row0, group)
        scales = isa.zip_pairs(scale, scale)
        for pair in range(len(accs) // 2):
            place = pair * 2 * GROUP
            codes = [
                isa.load_segment(self.tensors.codes, panel, group, place + i * 16)
                for i in range(CHUNKS // 2)
            ]
            for half in (0, 1):
                total = splat(T.int32(0), 4)
                for x, w in zip(codes, rows[half], strict=True):
                    total = isa.matmul_segments(total, x, w)
                acc = accs[2 * pair + half]
                T.buffer_store(acc, isa.fma_words(total, scales[half], acc[0]), [0])

    def _row_pairs(self, block: Any, row0: Any, group: Any) -> list[list[Any]]:
        """Of the lower and the upper rows the four vectors that meet those of a pair of tokens."""
        isa = self._isa
        halves: list[list[Any]] = [[], []]
        for j in (0, 2):
            packed = [self._packed(block, row0, group, j + i) for i in (0, 1)]
            for half, zipped in enumerate(isa.zip_words(*packed)):
                halves[half] += isa.unpack_wide(zipped)
        return halves

    def _store(self, accs: list[Any], place: Any) -> None:
        """Store the sums, a row of the buffer for each token."""
        isa = self._isa
        if len(accs) == 1:
            isa.store_floats(self.sums, accs[0][0], place)
            return
        for pair in range(len(accs) // 2):
            lower, upper = (T.Bind(accs[2 * pair + half][0]) for half in (0, 1))
            for token, sums in enumerate(isa.unzip_pairs(lower, upper)):
                isa.store_floats(self.sums, sums, place + (2 * pair + token) * ROWS)
