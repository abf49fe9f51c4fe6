"""GEMM tiles of `qmatmul_quads.py` in NEON: up to 16 tokens times four rows.

A tile's accumulators stay in registers while it goes along the columns, group by group: unpacked
codes of the quad meet the codes of every token, and the sum of a group is converted, scaled and
added. Here four codes of a token meet four rows by lane; `qmatmul_smmla.py` multiplies matrices.
"""

from __future__ import annotations

from typing import Any

from tvm.tirx.script.builder import ir as T

from llamac.schedules.kernel import local
from llamac.schedules.loop import loop
from llamac.schedules.qmatmul_epilogue import ROWS
from llamac.schedules.qmatmul_tensors import CHUNKS, QUAD, QUADS, HiddenZeros, Tensors
from llamac.schedules.quantize import CHUNK_PAIRS, GROUP, PANEL


def emit_panels(tile: Tile, item: Any, mr: int) -> None:
    """Compute and store a work item: quads, panels of 16 tokens, tiles of at most `mr` of them."""
    m = tile.tensors.shape.m
    tile.start(item)

    def panel(quad: Any, index: Any, tokens: int) -> None:
        for first in range(0, tokens, mr):
            tile.emit(item, quad, index, first, min(mr, tokens - first))

    with loop(QUADS) as quad:
        tile.unpack(item, quad)
        if m >= PANEL:
            with loop(m // PANEL) as index:
                panel(quad, index, PANEL)
        if m % PANEL:
            panel(quad, T.int64(m // PANEL), m % PANEL)


class Tile:
    """Some tokens of a panel times a quad; a subclass multiplies.

    Several panels meet the same quad. Its weights are unpacked once for all of them if
    `unpack_once`: 4 bytes a column and a float32 a group and row go through a buffer that the
    first-level cache holds.
    """

    scale_vectors = 1

    def __init__(self, tensors: Tensors, unroll: int, unpack_once: bool) -> None:
        self.tensors, self._unroll = tensors, unroll
        count = tensors.groups * (2 if tensors.epilogue.is_swiglu else 1)
        self._kept = None
        if unpack_once:
            self._kept = (
                local("int8x16", count * CHUNKS),
                local("float32x4", count * self.scale_vectors),
            )

    def emit(self, item: Any, quad: Any, panel: Any, first: int, tokens: int) -> None:
        """Compute and store the results of a quad (of gate and up: two) for some tokens.

        Args:
            item: work item.
            quad: of a block.
            panel: of 16 tokens.
            first: the tile's first token in the panel, even.
            tokens: of the tile.
        """
        t, isa = self.tensors, self.tensors.isa
        place = (quad, panel, first, tokens)
        if t.epilogue.is_swiglu:
            values = self._quad(item * 2, *place, 0)
            ups = self._quad(item * 2 + 1, *place, 1)
        else:
            values, ups = self._quad(item, *place, None), []
        for i, value in enumerate(values):
            # Stored at once: LLVM would keep all of the activations in registers otherwise.
            result = isa.silu(value) * ups[i] if ups else value
            t.epilogue.store(result, panel * PANEL + first + i, item * ROWS + quad * QUAD)

    def start(self, item: Any) -> None:
        """Prepare a work item."""
        self.zeros = HiddenZeros(self.tensors.isa, item, PANEL)

    def unpack(self, item: Any, quad: Any) -> None:
        """Unpack the weights of a quad of a work item for all panels, if that is wanted."""
        if self._kept is None:
            return
        codes, scales = self._kept
        blocks = [item * 2, item * 2 + 1] if self.tensors.epilogue.is_swiglu else [item]
        for slot, block in enumerate(blocks):
            with loop(self.tensors.groups) as group:
                place = group + slot * self.tensors.groups
                for i, value in enumerate(self.codes_of(block, quad, group)):
                    T.buffer_store(codes, value, [place * CHUNKS + i])
                for i, value in enumerate(self.scales_of(block, quad, group)):
                    T.buffer_store(scales, value, [place * self.scale_vectors + i])

    def _quad(
        self, block: Any, quad: Any, panel: Any, first: int, tokens: int, split: int | None
    ) -> list[Any]:
        """Results of a quad, a vector for each token."""
        t = self.tensors
        acc = local("float32x4", tokens + tokens % 2)
        for i in range(tokens + tokens % 2):
            T.buffer_store(acc, t.isa.splat(0.0), [i])
        with loop(t.groups // self._unroll) as step:
            for u in range(self._unroll):
                group = step * self._unroll + u
                if self._kept is None:
                    weights = self.codes_of(block, quad, group), self.scales_of(block, quad, group)
                else:
                    weights = self._load_kept((split or 0) * t.groups + group)
                self.group(acc, weights, panel, group, first, tokens)
        return t.finish(self.sums(acc, tokens), block, quad, panel * PANEL + first, split)

    def _load_kept(self, place: Any) -> tuple[list[Any], list[Any]]:
        """Codes and scales of a group that `unpack` has kept."""
        assert self._kept is not None
        codes, scales = self._kept
        return (
            [T.Bind(codes[place * CHUNKS + i]) for i in range(CHUNKS)],
            [T.Bind(scales[place * self.scale_vectors + i]) for i in range(self.scale_vectors)],
        )

    def pair_codes(self, panel: Any, group: Any, pair: int) -> list[Any]:
        """The four vectors of a pair of tokens, int8x16: 8 codes of each."""
        t = self.tensors
        places = [pair * (2 * GROUP) + i * 16 for i in range(4)]
        return [T.Bind(t.isa.load(t.codes, panel, group, place, lanes=16)) for place in places]

    def codes_of(self, block: Any, quad: Any, group: Any) -> list[Any]:
        """Unpack a group of a quad: eight int8x16."""
        raise NotImplementedError

    def scales_of(self, block: Any, quad: Any, group: Any) -> list[Any]:
        """`scale_vectors` vectors float32x4 with the scales of a group of a quad."""
        raise NotImplementedError

    def group(
        self,
        acc: Any,
        weights: tuple[list[Any], list[Any]],
        panel: Any,
        group: Any,
        first: int,
        tokens: int,
    ) -> None:
        """Add one group of 32 columns, of codes and scales as the two methods above give them."""
        raise NotImplementedError

    def sums(self, acc: Any, tokens: int) -> list[Any]:
        """The accumulators as one vector of four rows for each token."""
        raise NotImplementedError


class LaneTile(Tile):
    """Dot products by lane: an accumulator is four rows for one token."""

    def codes_of(self, block: Any, quad: Any, group: Any) -> list[Any]:
        """Four codes of four rows in each vector, in the order of their columns."""
        t = self.tensors
        return [rows for j in range(4) for rows in t.isa.unpack(t.packed(block, group, quad, j))]

    def scales_of(self, block: Any, quad: Any, group: Any) -> list[Any]:
        """The scales of four rows."""
        return [self.tensors.scale(block, group, quad)]

    def group(
        self,
        acc: Any,
        weights: tuple[list[Any], list[Any]],
        panel: Any,
        group: Any,
        first: int,
        tokens: int,
    ) -> None:
        """Token by token; two of them share the vectors of a pair."""
        t, isa = self.tensors, self.tensors.isa
        chunks, [scale] = weights
        zeros = self.zeros.of(group)
        for token in range(first, first + tokens):
            if token % 2 == 0:
                x = [T.reinterpret("int32x4", v) for v in self.pair_codes(panel, group, token // 2)]
            # Vector t has the chunks CHUNK_PAIRS[t], of the second token in its upper lanes.
            words = {
                c: (x[v], token % 2 * 2 + place)
                for v, pair in enumerate(CHUNK_PAIRS)
                for place, c in enumerate(pair)
            }
            i = token - first
            total = isa.dot_group(zeros(i), chunks, [words[c] for c in range(CHUNKS)])
            T.buffer_store(acc, t.scaled(total, scale, acc[i]), [i])

    def sums(self, acc: Any, tokens: int) -> list[Any]:
        """They are that already."""
        return [acc[i] for i in range(tokens)]
