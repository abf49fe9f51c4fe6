"""New keys and values that a graph computed go into the KV cache; no bit of them changes.

The cache is that of `rope.py`, keys in transposed blocks. A graph and the kernels of the CPU read
and write the same one, so that they can take turns from token to token.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from tvm.tirx import PrimFunc
from tvm.tirx.script.builder import ir as T

from llamac.schedules.intrin.isa import Isa
from llamac.schedules.kernel import KernelBuilder, opaque, store
from llamac.schedules.loop import loop
from llamac.schedules.quantized import Quantization
from llamac.schedules.rope import BLOCK, CacheShape, CacheTensors

VERSION = 1
KNOBS: Mapping[str, tuple[int, ...]] = {}


@dataclass(frozen=True)
class AppendShape:
    """A chunk of T tokens and the cache it goes to.

    Attributes:
        tokens: T.
        cache: float16, or int8 or int16 codes with one scale for all.
        k_codes, v_codes: of keys and values that are codes.
    """

    tokens: int
    cache: CacheShape
    k_codes: Quantization | None = None
    v_codes: Quantization | None = None


def valid(shape: AppendShape, isa: Isa, knobs: Mapping[str, int]) -> bool:
    """Whether the cache holds what graphs compute."""
    codes = [c.dtype for c in (shape.k_codes, shape.v_codes) if c is not None]
    dtype = shape.cache.dtype
    expected = [] if dtype == "float16" else [dtype] * 2
    is_known = dtype in ("float16", "int8", "int16") and not shape.cache.hvx
    return shape.cache.is_whole and is_known and codes == expected and not knobs


def default(shape: AppendShape, isa: Isa) -> dict[str, int]:
    """No knobs."""
    return {}


def make(shape: AppendShape, isa: Isa, *, name: str | None = None) -> PrimFunc:
    """Build the kernel; work = key/value heads.

    Arguments of the kernel: k_new and v_new [Hkv, T, D] in the dtype of the cache, meta i32 [2]
    (position of token 0), and the cache tensors, which are written in place. There are no outputs.
    Of an int8 cache the scale and zero point of each new row are written too, so that the kernels
    of a CPU can read it. Nobody but graphs reads an int16 cache.
    """
    cache, tokens = shape.cache, shape.tokens
    new = (cache.kv_heads, tokens, cache.head_dim)
    sizes = f"{tokens}x{cache.kv_heads}x{cache.head_dim}_c{cache.capacity}"
    with KernelBuilder(name or f"append_{cache.dtype}_{sizes}_{isa.suffix}", cache.kv_heads) as b:
        k_new, v_new = (b.input(name, new, cache.dtype) for name in ("k_new", "v_new"))
        meta = b.input("meta", (2,), "int32")
        tensors = CacheTensors(b, cache)
        with b.items() as head:
            first = opaque(T.Cast("int64", meta[0]))
            if cache.has_params:
                with loop(tokens) as token:
                    _params(tensors, shape, head, T.Bind(first + token))
            with loop(tokens) as token, loop(cache.head_dim) as d:
                position = T.Bind(first + token)
                store(tensors.v, v_new[head, token, d], head, position, d)
                place = (head, position // BLOCK, d, position % BLOCK)
                store(tensors.k, k_new[head, token, d], *place)
    return b.func


def _params(tensors: CacheTensors, shape: AppendShape, head: Any, position: Any) -> None:
    """Scale and zero point of a row of int8 keys, and of values."""
    for params, codes in ((tensors.k_params, shape.k_codes), (tensors.v_params, shape.v_codes)):
        if codes is None:
            continue
        store(params, T.float32(codes.scale), head, position, 0)
        store(params, T.float32(float(codes.zero_point)), head, position, 1)
