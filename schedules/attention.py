"""Causal attention of grouped queries over the KV cache, in one pass over the positions.

For query token t at position p = meta[0] + t and query head h of key/value head g, over i <= p:

    s[i] = q . k[g, i] / sqrt(D)  w[i] = exp(s[i] - max s)    out = sum_i w[i] v[g, i] / sum_i w[i]

The positions are visited in tiles (of 64, say). A row, that is one (token, head), keeps a running
maximum m, a running sum and an unscaled output; a tile with a larger maximum m' first shrinks both
by exp(m - m'). So the scratch is a few KiB of stack whatever the context is, and every key and
value is read once per tile of queries. The heads of a kv head are done together: they share loads.

The cache layout is that of `rope.py`. Keys are transposed in blocks of 16 positions, so in q . k
lanes are positions and an element of q is broadcast; for the values lanes are columns of D and a
weight is broadcast. Positions after p are never used: their scores are masked and their values not
read, whatever the memory holds (a padded chunk leaves garbage there).

An int8 cache has a scale a and a zero point z per position; its codes become a * code - a * z where
they are loaded, which is one fma.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from tvm import tirx
from tvm.tirx import PrimFunc
from tvm.tirx.script.builder import ir as T

from llamac.schedules.intrin.isa import Isa, pick, vector
from llamac.schedules.kernel import KernelBuilder, local, opaque, store
from llamac.schedules.loop import loop, when
from llamac.schedules.rope import BLOCK, HVX_HALF, CacheShape, CacheTensors

VERSION = 1
KNOBS: Mapping[str, tuple[int, ...]] = {
    "tile": (16, 32, 64, 128),  # positions visited together
    "queries": (
        1,
        2,
        4,
        8,
        16,
        32,
    ),  # tokens of a work item; they share the widened cache
    "score_vectors": (1, 2, 4, 8),  # vectors of positions times heads: accumulators of q . k
    "value_vectors": (1, 2, 4, 8),  # vectors of columns times heads: accumulators of the output
}
LOWEST = -1e30  # below every score; finite, so that differences are never NaN
WIDE_BYTES = 16384  # default size of a tile of widened keys: two of them fit a first-level cache


@dataclass(frozen=True)
class AttentionShape:
    """A chunk of queries and the cache they look at.

    Attributes:
        tokens: T, of the chunk.
        heads: query heads, a multiple of `cache.kv_heads`.
        cache: the cache.
    """

    tokens: int
    heads: int
    cache: CacheShape

    @property
    def group(self) -> int:
        """Query heads per key/value head."""
        return self.heads // self.cache.kv_heads


def valid(shape: AttentionShape, isa: Isa, knobs: Mapping[str, int]) -> bool:
    """Whether tiles divide the shape and accumulators fit the registers."""
    columns = max(1, shape.cache.head_dim // isa.lanes)
    scores, values = knobs["score_vectors"], knobs["value_vectors"]
    return (
        shape.cache.is_valid
        and shape.cache.hvx == (isa.lanes > BLOCK)  # vectors of keys lie in one block
        and shape.heads % shape.cache.kv_heads == 0
        and shape.cache.capacity % knobs["tile"] == 0
        and shape.tokens % knobs["queries"] == 0
        and (knobs["tile"] // isa.lanes) % scores == 0
        and columns % values == 0
        and (_fits(shape.group, scores, isa) or scores == 1)
        and (_fits(shape.group, values, isa) or values == 1)
    )


def _fits(group: int, vectors: int, isa: Isa) -> bool:
    """Whether group x vectors accumulators, the vectors and one broadcast fit the registers."""
    return group * vectors + vectors + 1 <= isa.registers


def default(shape: AttentionShape, isa: Isa) -> dict[str, int]:
    """Large tiles, as many accumulators as fit, queries that share a tile of widened keys."""
    head_dim, tokens = shape.cache.head_dim, shape.tokens
    most = 64 if tokens == 1 else WIDE_BYTES // (4 * head_dim)
    tile = max(n for n in (16, 32, 64) if n <= most and shape.cache.capacity % n == 0)
    queries = max(n for n in (1, 2, 4, 8) if tokens % n == 0)

    def most_vectors(available: int) -> int:
        fitting = (n for n in (2, 4) if available % n == 0 and _fits(shape.group, n, isa))
        return max(fitting, default=1)

    return {
        "tile": tile,
        "queries": queries,
        "score_vectors": most_vectors(tile // isa.lanes),
        "value_vectors": most_vectors(max(1, head_dim // isa.lanes)),
    }


def make(shape: AttentionShape, isa: Isa, *, name: str | None = None, **knobs: int) -> PrimFunc:
    """Build `attention`; work = kv_heads * tokens / queries.

    Arguments of the kernel: q f32 [T, H D], the cache tensors, meta i32 [2] (position of token 0;
    the rest is unused), and the output f32 [T, H D].
    """
    width = shape.heads * shape.cache.head_dim
    items = shape.tokens // knobs["queries"]
    with KernelBuilder(
        name or _name(shape, isa), shape.cache.kv_heads * items, alignment=isa.alignment
    ) as b:
        q = b.input("q", (shape.tokens, width), "float32")
        cache = CacheTensors(b, shape.cache)
        meta = b.input("meta", (2,), "int32")
        out = b.output("out", (shape.tokens, width), "float32")
        with b.items() as item:
            kv_head, first = opaque(item // items), opaque(item % items * knobs["queries"])
            position = opaque(T.Cast("int64", meta[0]) + first)
            _Item(shape, isa, knobs, (q, cache, out), (kv_head, first)).emit(position)
    return b.func


def _name(shape: AttentionShape, isa: Isa) -> str:
    c = shape.cache
    sizes = f"{shape.tokens}x{shape.heads}x{c.kv_heads}x{c.head_dim}_c{c.capacity}"
    return f"attention_f32_f32_{c.dtype}_{sizes}_{isa.suffix}"


class _Item:
    """A kv head and a few tokens: the rows are (token, head of the group), token first."""

    def __init__(
        self,
        shape: AttentionShape,
        isa: Isa,
        knobs: Mapping[str, int],
        tensors: tuple[tirx.Buffer, CacheTensors, tirx.Buffer],
        start: tuple[Any, Any],
    ) -> None:
        self.isa, self.knobs, self.group = isa, knobs, shape.group
        self.head_dim, self.is_int8 = shape.cache.head_dim, shape.cache.dtype == "int8"
        self.block, self.is_hvx = shape.cache.block, shape.cache.hvx
        self.q, self.cache, self.out = tensors
        self.kv_head, self.first = start
        self.tile, self.queries = knobs["tile"], knobs["queries"]
        self.columns = min(isa.lanes, self.head_dim)  # lanes of a vector of values
        rows = self.queries * self.group
        self.best = local("float32", rows)
        self.total = local("float32", rows * isa.lanes)
        self.sums = local("float32", rows * self.head_dim)
        self.weights = local("float32", self.group * self.tile)
        self.shrink = local("float32", self.group)
        self.is_wide = self.queries > 1
        if self.is_wide:
            self.wide_k = local("float32", self.head_dim * self.tile)
            self.wide_v = local("float32", self.tile * self.head_dim)

    def emit(self, position: Any) -> None:
        """Attend from the tokens that start at `position`."""
        self._start()
        with loop((position + (self.queries - 1)) // self.tile + 1) as tile:
            base = opaque(tile * self.tile)
            if self.is_wide:
                self._widen(base)
            with loop(self.queries) as query:
                count = opaque(T.min(position + query + 1 - base, T.int64(self.tile)))
                with when(count > 0):
                    self._scores(base, query)
                    self._weights(base, query * self.group, count)
                    self._values(base, query * self.group, count)
        self._finish()

    def _start(self) -> None:
        isa = self.isa
        with loop(self.queries * self.group) as row:
            store(self.best, T.float32(LOWEST), row)
            isa.store(self.total, isa.splat(0.0), row * isa.lanes)
            for j in range(0, self.head_dim, self.columns):
                zero = isa.splat(0.0, self.columns)
                isa.store(self.sums, zero, row * self.head_dim + j, lanes=self.columns)

    def _widen(self, base: Any) -> None:
        """Convert the keys and values of a tile to float32 once for all queries."""
        isa = self.isa
        for offset in range(0, self.tile, isa.lanes):
            params = self._key_params(base + offset)
            with loop(self.head_dim) as d:
                key = self._cached_key(base + offset, d, params)
                isa.store(self.wide_k, key, d * self.tile + offset)
        with loop(self.tile) as i:
            params = self._value_params(base + i)
            for j in range(0, self.head_dim, self.columns):
                value = self._cached_value(base + i, j, params)
                isa.store(self.wide_v, value, i * self.head_dim + j, lanes=self.columns)

    def _key_params(self, position: Any) -> tuple[Any, Any] | None:
        """(a, -a z) of the int8 keys from `position`, one lane each."""
        if not self.is_int8:
            return None
        lanes = self.isa.lanes
        pairs = self.isa.load(self.cache.k_params, self.kv_head, position, 0, lanes=2 * lanes)
        scale, zero = (T.Bind(pick(T.Bind(pairs), range(i, 2 * lanes, 2))) for i in (0, 1))
        return scale, T.Bind(self.isa.splat(0.0) - scale * zero)

    def _cached_key(self, position: Any, d: Any, params: tuple[Any, Any] | None) -> Any:
        """Element d of the keys from `position`, one lane each."""
        block, slot = position // self.block, position % self.block
        if self.is_hvx:
            halves = self.isa.load(self.cache.k, self.kv_head, block, d, 0, lanes=self.block)
            words = T.Bind(T.reinterpret(f"uint32x{HVX_HALF}", halves))
            return T.Bind(self.isa.half_to_float32(words, slot // HVX_HALF))
        value = self.isa.to_float32(self.isa.load(self.cache.k, self.kv_head, block, d, slot))
        return T.Bind(value if params is None else self.isa.fma(value, *params))

    def _value_params(self, position: Any) -> tuple[Any, Any] | None:
        """(a, -a z) of one int8 value, in all lanes."""
        if not self.is_int8:
            return None
        scale, zero = (T.Bind(self.cache.v_params[self.kv_head, position, i]) for i in (0, 1))
        shift = T.float32(0) - scale * zero
        return tuple(T.Bind(self.isa.splat(x, self.columns)) for x in (scale, shift))

    def _cached_value(self, position: Any, column: Any, params: tuple[Any, Any] | None) -> Any:
        """Columns of one value."""
        lanes = self.columns
        codes = self.isa.load(self.cache.v, self.kv_head, position, column, lanes=lanes)
        value = self.isa.to_float32(codes, lanes)
        return T.Bind(value if params is None else self.isa.fma(value, *params))

    def _scores(self, base: Any, query: Any) -> None:
        """Put the scaled scores of a token's heads with the tile's positions into `weights`."""
        isa, group, width = self.isa, self.group, self.knobs["score_vectors"]
        with loop(self.tile // (width * isa.lanes)) as part:
            offsets = [part * (width * isa.lanes) + v * isa.lanes for v in range(width)]
            acc = local(vector("float32", isa.lanes), group * width)
            for i in range(group * width):
                store(acc, isa.splat(0.0), i)
            params = [None if self.is_wide else self._key_params(base + o) for o in offsets]
            with loop(self.head_dim) as d:
                keys = [self._key(base, o, d, p) for o, p in zip(offsets, params, strict=True)]
                for h in range(group):
                    element = T.Bind(isa.splat(self.q[self.first + query, self._column(h) + d]))
                    for v, key in enumerate(keys):
                        i = h * width + v
                        store(acc, isa.fma(element, key, acc[i]), i)
            scale = isa.splat(1.0 / math.sqrt(self.head_dim))
            for h in range(group):
                for v, offset in enumerate(offsets):
                    isa.store(self.weights, acc[h * width + v] * scale, h * self.tile + offset)

    def _key(self, base: Any, offset: Any, d: Any, params: tuple[Any, Any] | None) -> Any:
        if not self.is_wide:
            return self._cached_key(base + offset, d, params)
        return T.Bind(self.isa.load(self.wide_k, d * self.tile + offset))

    def _column(self, member: Any) -> Any:
        """First column of a head of the group in q and out."""
        return (self.kv_head * self.group + member) * self.head_dim

    def _weights(self, base: Any, row0: Any, count: Any) -> None:
        """Turn the scores of the first `count` positions into weights, the others into 0."""
        isa = self.isa
        with loop(self.group) as h:
            row = T.Bind(row0 + h)
            best = T.Bind(T.max(self.best[row], self._largest_score(h, count)))
            shrink = T.Bind(isa.exp(self.best[row] - best))
            store(self.best, best, row)
            store(self.shrink, shrink, h)
            total = local(vector("float32", isa.lanes))
            store(total, isa.load(self.total, row * isa.lanes) * isa.splat(shrink), 0)
            with loop(self.tile // isa.lanes) as v:
                score, used = self._score(h, v, count)
                weight = isa.exp(score - isa.splat(best))
                weight = T.Bind(T.Select(used, weight, isa.splat(0.0)))
                store(total, total[0] + weight, 0)
                isa.store(self.weights, weight, h * self.tile + v * isa.lanes)
            isa.store(self.total, total[0], row * isa.lanes)

    def _largest_score(self, member: Any, count: Any) -> Any:
        """The largest of the first `count` scores of a head."""
        isa = self.isa
        top = local(vector("float32", isa.lanes))
        store(top, isa.splat(LOWEST), 0)
        with loop(self.tile // isa.lanes) as v:
            score, used = self._score(member, v, count)
            store(top, T.max(top[0], T.Select(used, score, isa.splat(LOWEST))), 0)
        return isa.reduce_max(top[0])

    def _score(self, member: Any, v: Any, count: Any) -> tuple[Any, Any]:
        """Vector `v` of a head's scores, and which lanes are below `count`."""
        isa = self.isa
        score = T.Bind(isa.load(self.weights, member * self.tile + v * isa.lanes))
        lane = T.ramp(T.Cast("int32", v) * isa.lanes, 1, isa.lanes)
        return score, lane < isa.splat(T.Cast("int32", count))

    def _values(self, base: Any, row0: Any, count: Any) -> None:
        """Add the weighted values of the first `count` positions to the sums of a token's heads."""
        isa, lanes, width = self.isa, self.columns, self.knobs["value_vectors"]
        with loop(self.head_dim // (width * lanes)) as part:
            columns = [part * (width * lanes) + v * lanes for v in range(width)]
            places = [
                (row0 + h) * self.head_dim + column for h in range(self.group) for column in columns
            ]
            acc = local(vector("float32", lanes), len(places))
            for i, place in enumerate(places):
                shrink = isa.splat(self.shrink[i // width], lanes)
                store(acc, isa.load(self.sums, place, lanes=lanes) * shrink, i)
            with loop(count) as p:
                params = None if self.is_wide else self._value_params(base + p)
                values = [self._value(base, p, column, params) for column in columns]
                for h in range(self.group):
                    weight = T.Bind(isa.splat(self.weights[h * self.tile + p], lanes))
                    for v, value in enumerate(values):
                        i = h * width + v
                        store(acc, isa.fma(weight, value, acc[i]), i)
            for i, place in enumerate(places):
                isa.store(self.sums, acc[i], place, lanes=lanes)

    def _value(self, base: Any, p: Any, column: Any, params: tuple[Any, Any] | None) -> Any:
        if not self.is_wide:
            return self._cached_value(base + p, column, params)
        place = p * self.head_dim + column
        return T.Bind(self.isa.load(self.wide_v, place, lanes=self.columns))

    def _finish(self) -> None:
        """Divide the sums by the total weights and store them."""
        isa, lanes = self.isa, self.columns
        with loop(self.queries) as query, loop(self.group) as h:
            row = query * self.group + h
            total = isa.reduce_add(isa.load(self.total, row * isa.lanes))
            inverse = T.Bind(isa.splat(T.float32(1) / total, lanes))
            for j in range(0, self.head_dim, lanes):
                value = isa.load(self.sums, row * self.head_dim + j, lanes=lanes) * inverse
                isa.store(self.out, value, self.first + query, self._column(h) + j, lanes=lanes)
