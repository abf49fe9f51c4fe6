"""Rotary embedding of q and k, and the append of k and v to the KV cache.

Pairs (2i, 2i+1) are rotated by the angle of their position. With the table rows
row0 = c0, c0, c1, c1, ... and row1 = -s0, s0, -s1, s1, ... a vector needs one shuffle:

    y = x * row0 + swap_pairs(x) * row1

Keys lie in blocks of 16 positions, transposed, so that attention computes 16 scores in the lanes of
a vector; values lie in rows:

    k_cache [Hkv, C/16, D, 16]        v_cache [Hkv, C, D]

The cache is float16, or int8 codes by the rule "torchao" per (position, head), with (scale, zero
point) beside them in k_params and v_params [Hkv, C, 2].
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from tvm import tirx
from tvm.tirx import PrimFunc
from tvm.tirx.script.builder import ir as T

from llamac.schedules.intrin.isa import Isa, pick, vector
from llamac.schedules.kernel import KernelBuilder, local, store
from llamac.schedules.loop import loop
from llamac.schedules.quantize import Range, code_lanes, row_params

VERSION = 1
KNOBS: Mapping[str, tuple[int, ...]] = {}

BLOCK = 16  # positions of a transposed block of keys
HVX_HALF = 32  # and of each of the halves of HVX's


@dataclass(frozen=True)
class CacheShape:
    """A KV cache of one layer.

    Attributes:
        kv_heads: key/value heads.
        head_dim: 8, 16, 32, 64 or 128.
        capacity: positions, a multiple of 16.
        dtype: "float16" or "int8"; "int16" for graphs alone, see `append.py`.
        hvx: keys are float16 in blocks of 64 positions, p and p + 32 in one word.
    """

    kv_heads: int
    head_dim: int
    capacity: int
    dtype: str = "float16"
    hvx: bool = False

    @property
    def block(self) -> int:
        """Positions of a block of keys."""
        return 2 * HVX_HALF if self.hvx else BLOCK

    def slot(self, position: Any) -> Any:
        """Place of a position in its block."""
        inner = position % self.block
        return inner % HVX_HALF * 2 + inner // HVX_HALF if self.hvx else inner

    @property
    def is_whole(self) -> bool:
        """Whether rows are cut into whole vectors, and keys into whole blocks."""
        return self.head_dim in {8, 16, 32, 64, 128} and self.capacity % self.block == 0

    @property
    def is_valid(self) -> bool:
        """Whether kernels can be made that read it."""
        return self.is_whole and self.dtype in ({"float16"} if self.hvx else {"float16", "int8"})

    @property
    def has_params(self) -> bool:
        """Whether each row has a scale and a zero point."""
        return self.dtype == "int8"

    @property
    def parts(self) -> tuple[str, ...]:
        """Its tensors, in the order of kernels' operands."""
        scales = ("k_params", "v_params") if self.has_params else ()
        return ("k_cache", "v_cache", *scales)

    @property
    def k_shape(self) -> tuple[int, int, int, int]:
        """Shape of the keys."""
        return (self.kv_heads, self.capacity // self.block, self.head_dim, self.block)

    @property
    def v_shape(self) -> tuple[int, int, int]:
        """Shape of the values."""
        return (self.kv_heads, self.capacity, self.head_dim)

    @property
    def params_shape(self) -> tuple[int, int, int]:
        """Shape of (scale, zero point) of int8 keys or values."""
        return (self.kv_heads, self.capacity, 2)


class CacheTensors:
    """The cache as arguments of a kernel: k_cache, v_cache, then k_params, v_params when int8."""

    def __init__(self, b: KernelBuilder, shape: CacheShape) -> None:
        self.k = b.input("k_cache", shape.k_shape, shape.dtype)
        self.v = b.input("v_cache", shape.v_shape, shape.dtype)
        if shape.has_params:
            self.k_params = b.input("k_params", shape.params_shape, "float32")
            self.v_params = b.input("v_params", shape.params_shape, "float32")


@dataclass(frozen=True)
class RopeShape:
    """A chunk of tokens and the cache it goes to.

    Attributes:
        tokens: T, of the chunk.
        heads: query heads, a multiple of `cache.kv_heads`.
        positions: rows of the table; every position of a chunk must be below.
        cache: the cache.
    """

    tokens: int
    heads: int
    positions: int
    cache: CacheShape

    @property
    def width(self) -> int:
        """Columns of q, k and v together."""
        return (self.heads + 2 * self.cache.kv_heads) * self.cache.head_dim


def valid(shape: RopeShape, isa: Isa, knobs: Mapping[str, int]) -> bool:
    """Whether the shape is one that kernels can be made for."""
    return shape.cache.is_valid and shape.heads % shape.cache.kv_heads == 0 and not knobs


def default(shape: RopeShape, isa: Isa) -> dict[str, int]:
    """No knobs."""
    return {}


def make(shape: RopeShape, isa: Isa, *, name: str | None = None) -> PrimFunc:
    """Build `rope_append`; work = tokens * kv_heads.

    Arguments of the kernel: qkv f32 [T, (H + 2 Hkv) D] (q, then k, then v), table f32 [P, 2, D],
    meta i32 [2] (position of token 0; the rest is unused), the cache tensors (written in place),
    and the output q f32 [T, H D], rotated.
    """
    cache = shape.cache
    with KernelBuilder(
        name or _name(shape, isa), shape.tokens * cache.kv_heads, alignment=isa.alignment
    ) as b:
        tensors = _Tensors(b, shape)
        with b.items() as item:
            token, kv_head = T.Bind(item // cache.kv_heads), T.Bind(item % cache.kv_heads)
            _Item(tensors, shape, isa, token, kv_head).emit()
    return b.func


def _name(shape: RopeShape, isa: Isa) -> str:
    c = shape.cache
    sizes = f"{shape.tokens}x{shape.heads}x{c.kv_heads}x{c.head_dim}_c{c.capacity}"
    return f"rope_append_f32_f32_{c.dtype}_{sizes}_{isa.suffix}"


class _Tensors:
    """The arguments of the kernel."""

    def __init__(self, b: KernelBuilder, shape: RopeShape) -> None:
        head_dim = shape.cache.head_dim
        self.qkv = b.input("qkv", (shape.tokens, shape.width), "float32")
        self.table = b.input("table", (shape.positions, 2, head_dim), "float32")
        self.meta = b.input("meta", (2,), "int32")
        self.cache = CacheTensors(b, shape.cache)
        self.q = b.output("q", (shape.tokens, shape.heads * head_dim), "float32")


class _Item:
    """One token and one kv head: its query heads, its key and its value."""

    def __init__(
        self, tensors: _Tensors, shape: RopeShape, isa: Isa, token: Any, kv_head: Any
    ) -> None:
        self.tensors, self.shape, self.isa = tensors, shape, isa
        self.token, self.kv_head = token, kv_head
        self.position = T.Bind(T.Cast("int64", tensors.meta[0]) + token)
        self.lanes = min(isa.lanes, shape.cache.head_dim)
        self.columns = range(0, shape.cache.head_dim, self.lanes)

    def emit(self) -> None:
        """Rotate the queries, append key and value."""
        tensors, cache = self.tensors, self.shape.cache
        heads, kv_heads, head_dim = self.shape.heads, cache.kv_heads, cache.head_dim
        group = heads // kv_heads
        with loop(group) as member:
            first = T.Bind((self.kv_head * group + member) * head_dim)
            for j in self.columns:
                value = self._rotated(first, j)
                self.isa.store(tensors.q, value, self.token, first + j, lanes=self.lanes)
        key, value = (heads + self.kv_head) * head_dim, (heads + kv_heads + self.kv_head) * head_dim
        keys = [self._rotated(key, j) for j in self.columns]
        values = [self._load(value, j) for j in self.columns]
        if cache.dtype == "int8":
            keys = self._quantize(keys, tensors.cache.k_params)
            values = self._quantize(values, tensors.cache.v_params)
        else:
            keys, values = ([T.Bind(self.isa.to_float16(v)) for v in row] for row in (keys, values))
        self._append(keys, values)

    def _load(self, first: Any, column: int) -> Any:
        """The vector at `column` of the head that starts at `first`."""
        value = self.isa.load(self.tensors.qkv, self.token, first + column, lanes=self.lanes)
        return T.Bind(value)

    def _rotated(self, first: Any, column: int) -> Any:
        """The same, rotated by the token's position."""
        value = self._load(first, column)
        row0, row1 = (
            self.isa.load(self.tensors.table, self.position, i, column, lanes=self.lanes)
            for i in (0, 1)
        )
        swapped = pick(value, [i ^ 1 for i in range(self.lanes)])
        return T.Bind(self.isa.fma(value, row0, swapped * row1))

    def _quantize(self, vectors: list[Any], params: tirx.Buffer) -> list[Any]:
        """Store scale and zero point of a key or value; return its int8 codes."""
        isa, lanes = self.isa, self.lanes
        ends = Range(isa, 1, lanes)
        for value in vectors:
            ends.add(0, value)
        scale, inverse, zero = row_params(isa, *ends.ends())
        store(params, scale, self.kv_head, self.position, 0)
        store(params, zero, self.kv_head, self.position, 1)
        inverses, zeros = T.Bind(isa.splat(inverse, lanes)), T.Bind(isa.splat(zero, lanes))
        codes = (code_lanes(isa, value, inverses, zeros) for value in vectors)
        return [T.Bind(T.Cast(vector("int8", lanes), code)) for code in codes]

    def _append(self, keys: list[Any], values: list[Any]) -> None:
        """Store a value as a row, and a key as a column of its block."""
        cache, head_dim = self.tensors.cache, self.shape.cache.head_dim
        column = local(self.shape.cache.dtype, head_dim)
        for j, key, value in zip(self.columns, keys, values, strict=True):
            self.isa.store(cache.v, value, self.kv_head, self.position, j, lanes=self.lanes)
            self.isa.store(column, key, j, lanes=self.lanes)
        with loop(head_dim) as d:
            shape = self.shape.cache
            block, slot = self.position // shape.block, shape.slot(self.position)
            store(cache.k, column[d], self.kv_head, block, d, slot)
