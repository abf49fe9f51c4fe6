"""The tile of `qmatmul_tiles.py` with int8 matrix products: two tokens x two rows an instruction.

`smmla` multiplies 8 codes of two tokens with 8 codes of two rows. Per group and quad, vectors j and
j + 1 of the packed weights are zipped by words, which puts the bytes of one row side by side, and
then unpacked: four zips for 2048 products of a tile of 16 tokens.

    zip1(j, j+1) = [row 0: j, j+1 | row 1: j, j+1]     low nibbles:  chunks (2j, 2j+2)
    zip2(j, j+1) = [row 2: j, j+1 | row 3: j, j+1]     high nibbles: chunks (2j+1, 2j+3)

These are the chunk pairs (0, 2), (1, 3), (4, 6), (5, 7) in which the activation codes lie. An
accumulator holds [token 0: row 0, row 1 | token 1: row 0, row 1]; at the end of a tile two of them
become two vectors of four rows.
"""

from __future__ import annotations

from typing import Any

from tvm.tirx.script.builder import ir as T

from llamac.schedules.intrin.arm import ArmI8mm
from llamac.schedules.intrin.isa import join, pick
from llamac.schedules.qmatmul_tiles import Tile


class SmmlaTile(Tile):
    """Matrix products: accumulators 2 p and 2 p + 1 are a pair of tokens times two rows each."""

    scale_vectors = 2

    def group(
        self,
        acc: Any,
        weights: tuple[list[Any], list[Any]],
        panel: Any,
        group: Any,
        first: int,
        tokens: int,
    ) -> None:
        """Pair by pair of tokens."""
        t = self.tensors
        isa = t.isa
        assert isinstance(isa, ArmI8mm)
        zeros = self.zeros.of(group)
        rows, scales = weights
        for pair in range(first // 2, (first + tokens + 1) // 2):
            codes = self.pair_codes(panel, group, pair)
            for side in (0, 1):
                i = 2 * (pair - first // 2) + side
                total = zeros(i)
                for x, w in zip(codes, rows[4 * side : 4 * side + 4], strict=True):
                    total = T.Bind(isa.matmul_2x2(total, x, w))
                T.buffer_store(acc, t.scaled(total, scales[side], acc[i]), [i])

    def codes_of(self, block: Any, quad: Any, group: Any) -> list[Any]:
        """For rows (0, 1), then (2, 3), the four vectors that meet those of a pair of tokens."""
        t = self.tensors
        words = [T.reinterpret("int32x4", t.packed(block, group, quad, j)) for j in range(4)]
        pairs: list[list[Any]] = [[], []]
        for j in (0, 2):
            both = join([words[j], words[j + 1]])
            for side, lanes in enumerate(((0, 4, 1, 5), (2, 6, 3, 7))):
                zipped = T.Bind(T.reinterpret("int8x16", pick(both, lanes)))
                pairs[side] += t.isa.unpack(zipped)
        return pairs[0] + pairs[1]

    def scales_of(self, block: Any, quad: Any, group: Any) -> list[Any]:
        """The scales of rows (0, 1) and (2, 3), each twice."""
        scale = self.tensors.scale(block, group, quad)
        return [T.Bind(pick(scale, (r, r + 1, r, r + 1))) for r in (0, 2)]

    def sums(self, acc: Any, tokens: int) -> list[Any]:
        """Two accumulators of a pair of tokens become a vector for each token."""
        results = []
        for token in range(tokens):
            i, half = token // 2 * 2, token % 2 * 2
            rows = [pick(T.Bind(acc[i + side]), (half, half + 1)) for side in (0, 1)]
            results.append(T.Bind(join(rows)))
        return results
