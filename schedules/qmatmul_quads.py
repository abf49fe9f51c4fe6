"""int4 group-32 weights x int8 per-token activations on Arm: GEMV (decode) and GEMM (prefill).

The same product as in `qmatmul.py`, in the form that Arm's instructions want:

    y[m, n] = sx * ( f * sum_g s'[n, g] * dot(x[m, g], w[n, g])  -  zp * ksum[n] )

Nibbles are signed. A shift left and a mask turn a byte of two of them into 16 * w each, and the
conversion of the sum to float takes the 16 out again: `scvtf` has fraction bits. (Plain NEON sums
products in 16 bits, which has no room for the 16: one more shift.) A float16 scale is
not converted: its bits, shifted left by 13, are the float32 s' = s * 2^-112 (scales are not
negative), and f = 2^112. One widening shift does it, on a pipe that the dot products leave free;
`fcvtl` would cost two slots of a busy one. A bfloat16 scale is shifted by 16 and is exact.

Packed layout, one for all levels of the architecture (four rows are a quad, four quads a block):

    weights [N/16][K/32][4 j][4 quads][4 rows x 4 bytes]: byte b of a row holds k = 8j + b in its
            low and k = 8j + 4 + b in its high nibble, so that 16 bytes feed two `sdot` by lane, and
            longer vectors (SVE, SME) read more rows of the same j;
    scales  [N/16][K/32][16] float16 or bfloat16.

With `smmla`, two neighbouring vectors j are zipped before they are unpacked: then each vector holds
8 codes of two rows (`qmatmul_smmla.py`). The activation codes come paired for that; see
`quantize.py`. Epilogues and LoRA are those of `qmatmul_epilogue.py`.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from tvm.tirx import PrimFunc
from tvm.tirx.script.builder import ir as T

from llamac.schedules.intrin.arm import ArmDotprod, ArmI8mm, ArmNeon
from llamac.schedules.intrin.isa import pick
from llamac.schedules.kernel import KernelBuilder, local
from llamac.schedules.loop import loop
from llamac.schedules.qmatmul import QMatmulShape
from llamac.schedules.qmatmul_epilogue import ROWS, Epilogue
from llamac.schedules.quantize import CHUNK_PAIRS, GROUP, PANEL, codes_shape

VERSION = 1
QUAD = 4  # rows of a quad, lanes of a vector
QUADS = ROWS // QUAD
GROUP_BYTES = ROWS * GROUP // 2
CHUNKS = GROUP // 4  # of four codes, what a lane of a dot product takes

KNOBS: Mapping[str, tuple[int, ...]] = {
    "mr": (4, 8, 12, 16),  # tokens per tile of four rows; a GEMV has one
    "unroll": (1, 2, 4),  # groups per iteration of the hot loop
    "prefetch": (0, 4, 8, 16, 32),  # groups ahead, of a GEMV
    "unpack_once": (0, 1),  # of a GEMM: a quad for all panels, through memory
}


def valid(shape: QMatmulShape, isa: ArmNeon, knobs: Mapping[str, int]) -> bool:
    """Whether tiles fit a panel and the unrolled loop divides the columns."""
    tile = knobs["mr"] == 1 if shape.m == 1 else knobs["mr"] in KNOBS["mr"]
    return tile and (shape.k // GROUP) % knobs["unroll"] == 0


def default(shape: QMatmulShape, isa: ArmNeon) -> dict[str, int]:
    """Accumulators in half of the registers, fewer where products are summed in two halves."""
    unroll = 2 if shape.k // GROUP % 2 == 0 else 1
    if shape.m == 1:
        return {"mr": 1, "unroll": unroll, "prefetch": 0}
    mr = 16 if isinstance(isa, ArmDotprod) else 8
    return {"mr": mr, "unroll": 1, "prefetch": 0, "unpack_once": int(shape.m > 2 * PANEL)}


def make(
    shape: QMatmulShape,
    isa: ArmNeon,
    *,
    mr: int,
    unroll: int,
    prefetch: int = 0,
    unpack_once: int = 0,
    name: str | None = None,
) -> PrimFunc:
    """Build the kernel.

    Arguments of the kernel: codes int8 [1, k] or paired [m/16, k/32, 512], qparams float32 [m, 2]
    (scale, zero point), weights uint8 [n/16, k/32, 256], scales [n/16, k/32, 16], ksum float32 [n],
    then t and B with a LoRA branch, residual float32 [m, n], and the output float32 [m, n] or
    [m, n/2].
    """
    symbol = name or f"qmatmul_f32_qai8dx_qsi4c32_{shape.m}x{shape.n}x{shape.k}_{isa.suffix}"
    with KernelBuilder(symbol, shape.work) as b:
        tensors = Tensors(b, shape, isa)
        with b.items() as item:
            if shape.m == 1:
                _Gemv(tensors, unroll, prefetch).emit(item)
            else:
                _emit_panels(_tile_of(tensors, unroll, bool(unpack_once)), item, mr)
    return b.func


def _tile_of(tensors: Tensors, unroll: int, unpack_once: bool) -> Tile:
    if isinstance(tensors.isa, ArmI8mm):
        from llamac.schedules.qmatmul_smmla import SmmlaTile  # noqa: PLC0415 (it imports Tile)

        return SmmlaTile(tensors, unroll, unpack_once)
    return LaneTile(tensors, unroll, unpack_once)


class Tensors:
    """The arguments of a kernel and how its levels read them."""

    def __init__(self, b: KernelBuilder, shape: QMatmulShape, isa: ArmNeon) -> None:
        groups = shape.k // GROUP
        self.is_bfloat16 = shape.scale_dtype == "bfloat16"
        self.shape, self.isa, self.groups = shape, isa, groups
        self.codes = b.input("codes", codes_shape(isa, shape.m, shape.k), "int8")
        self.qparams = b.input("qparams", (shape.m, 2), "float32")
        self.weights = b.input("weights", (shape.blocks, groups, GROUP_BYTES), "uint8")
        bits = "uint16" if self.is_bfloat16 else "float16"
        self.scales = b.input("scales", (shape.blocks, groups, ROWS), bits)
        self.ksum = b.input("ksum", (shape.n,), "float32")
        self.epilogue = Epilogue(b, shape, isa)

    @property
    def factor(self) -> float:
        """What the scales in the accumulators lack."""
        return 1.0 if self.is_bfloat16 else 2.0**112

    def scaled(self, total: Any, scale: Any, acc: Any) -> Any:
        """Acc + scale * total, of a total that `dot_group` made."""
        return self.isa.fma(self.isa.fixed_to_float32(total, self.isa.nibble_shift), scale, acc)

    def packed(self, block: Any, group: Any, quad: Any, j: int) -> Any:
        """Vector j of a quad: 16 bytes."""
        place = quad * (4 * QUAD) + j * (4 * ROWS)
        value = self.isa.load(self.weights, block, group, place, lanes=16)
        return T.Bind(T.reinterpret("int8x16", value))

    def scale(self, block: Any, group: Any, quad: Any) -> Any:
        """Scales of a quad as float32x4, times 2^-112 if they are float16."""
        bits = T.reinterpret("uint16x4", self.isa.load(self.scales, block, group, quad * QUAD))
        shift = T.broadcast(T.uint32(16 if self.is_bfloat16 else 13), QUAD)
        return T.Bind(T.reinterpret("float32x4", T.shift_left(T.Cast("uint32x4", bits), shift)))

    def finish(
        self, accs: Sequence[Any], block: Any, quad: Any, row0: Any, split: Any
    ) -> list[Any]:
        """The results of a quad for some tokens, from an accumulator of each."""
        isa = self.isa
        factor = isa.splat(self.factor)
        ksum = T.Bind(isa.load(self.ksum, block * ROWS + quad * QUAD))
        values = []
        for i, acc in enumerate(accs):
            if i % 2 == 0:  # one load for two tokens; the products take a lane of it
                count = min(2, len(accs) - i)
                params = T.Bind(isa.load(self.qparams, row0 + i, 0, lanes=2 * count))
            scale, zero = (isa.splat(pick(params, [i % 2 * 2 + j])) for j in (0, 1))
            value = T.Bind(scale * isa.fma(T.Bind(isa.splat(0.0) - zero), ksum, acc * factor))
            values.append(self.epilogue.add_lora(value, block, row0 + i, quad, split))
        return values


class _Gemv:
    """One token times a block of 16 rows: four accumulators of four rows."""

    def __init__(self, tensors: Tensors, unroll: int, prefetch: int) -> None:
        self._t, self._unroll, self._prefetch = tensors, unroll, prefetch

    def emit(self, item: Any) -> None:
        """Compute and store the results of a work item."""
        t, isa = self._t, self._t.isa
        if t.epilogue.is_swiglu:
            gate, up = self._block(item * 2, split=0), self._block(item * 2 + 1, split=1)
            values = [isa.silu(g) * u for g, u in zip(gate, up, strict=True)]
        else:
            values = self._block(item, split=None)
        for quad, value in enumerate(values):
            t.epilogue.store(value, 0, item * ROWS + quad * QUAD)

    def _block(self, block: Any, split: int | None) -> list[Any]:
        t = self._t
        acc = local("float32x4", QUADS)
        for quad in range(QUADS):
            T.buffer_store(acc, t.isa.splat(0.0), [quad])
        with loop(t.groups // self._unroll) as step:
            for u in range(self._unroll):
                self._group(acc, block, step * self._unroll + u)
        return [t.finish([acc[quad]], block, quad, 0, split)[0] for quad in range(QUADS)]

    def _group(self, acc: Any, block: Any, group: Any) -> None:
        """Add one group of 32 columns."""
        t, isa = self._t, self._t.isa
        if self._prefetch:
            for line in range(0, GROUP_BYTES, 64):
                isa.prefetch(t.weights, block, group + self._prefetch, line)
            isa.prefetch(t.scales, block, group + self._prefetch, 0)
        x = [
            T.Bind(T.reinterpret("int32x4", isa.load(t.codes, 0, group * GROUP + i, lanes=16)))
            for i in (0, 16)
        ]
        for quad in range(QUADS):
            chunks = [
                rows for j in range(4) for rows in isa.unpack(t.packed(block, group, quad, j))
            ]
            total = isa.dot_group(chunks, [(x[c // 4], c % 4) for c in range(CHUNKS)])
            T.buffer_store(acc, t.scaled(total, t.scale(block, group, quad), acc[quad]), [quad])


def _emit_panels(tile: Tile, item: Any, mr: int) -> None:
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
            gate, up = self._quad(item * 2, *place, 0), self._quad(item * 2 + 1, *place, 1)
            values = [isa.silu(g) * u for g, u in zip(gate, up, strict=True)]
        else:
            values = self._quad(item, *place, None)
        for i, value in enumerate(values):
            t.epilogue.store(value, panel * PANEL + first + i, item * ROWS + quad * QUAD)

    def start(self, item: Any) -> None:
        """Prepare a work item."""

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
        for token in range(first, first + tokens):
            if token % 2 == 0:
                x = [T.reinterpret("int32x4", v) for v in self.pair_codes(panel, group, token // 2)]
            # Vector t has the chunks CHUNK_PAIRS[t], of the second token in its upper lanes.
            words = {
                c: (x[v], token % 2 * 2 + place)
                for v, pair in enumerate(CHUNK_PAIRS)
                for place, c in enumerate(pair)
            }
            total = isa.dot_group(chunks, [words[c] for c in range(CHUNKS)])
            i = token - first
            T.buffer_store(acc, t.scaled(total, scale, acc[i]), [i])

    def sums(self, acc: Any, tokens: int) -> list[Any]:
        """They are that already."""
        return [acc[i] for i in range(tokens)]
