"""New keys and values that a graph computed go into the KV cache; no bit of them changes.

The cache is that of `rope.py`, keys in transposed blocks. A graph and the kernels of the CPU read
and write the same one, so that they can take turns from token to token.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

from tvm.tirx import PrimFunc
from tvm.tirx.script.builder import ir as T

from llamac.schedules.intrin.isa import Isa
from llamac.schedules.kernel import KernelBuilder, opaque, store
from llamac.schedules.loop import loop
from llamac.schedules.rope import BLOCK, CacheShape, CacheTensors

VERSION = 1
KNOBS: Mapping[str, tuple[int, ...]] = {}


@dataclass(frozen=True)
class AppendShape:
    """A chunk of T tokens and the float16 cache it goes to."""

    tokens: int
    cache: CacheShape


def valid(shape: AppendShape, isa: Isa, knobs: Mapping[str, int]) -> bool:
    """Whether the cache holds what graphs compute."""
    return shape.cache.is_valid and shape.cache.dtype == "float16" and not knobs


def default(shape: AppendShape, isa: Isa) -> dict[str, int]:
    """No knobs."""
    return {}


def make(shape: AppendShape, isa: Isa, *, name: str | None = None) -> PrimFunc:
    """Build the kernel; work = key/value heads.

    Arguments of the kernel: k_new and v_new f16 [Hkv, T, D], meta i32 [2] (position of token 0),
    and the cache tensors, which are written in place. There are no outputs.
    """
    cache, tokens = shape.cache, shape.tokens
    new = (cache.kv_heads, tokens, cache.head_dim)
    sizes = f"{tokens}x{cache.kv_heads}x{cache.head_dim}_c{cache.capacity}"
    with KernelBuilder(name or f"append_f16_{sizes}_{isa.suffix}", cache.kv_heads) as b:
        k_new, v_new = (b.input(name, new, "float16") for name in ("k_new", "v_new"))
        meta = b.input("meta", (2,), "int32")
        tensors = CacheTensors(b, cache)
        with b.items() as head:
            first = opaque(T.Cast("int64", meta[0]))
            with loop(tokens) as token, loop(cache.head_dim) as d:
                position = T.Bind(first + token)
                store(tensors.v, v_new[head, token, d], head, position, d)
                place = (head, position // BLOCK, d, position % BLOCK)
                store(tensors.k, k_new[head, token, d], *place)
    return b.func
