"""The composites of the IR: what each one means, in plain Relax operators.

A composite is a private Relax function with the attribute `Composite` (its kind) and `llamac.attrs`
(what else decides its meaning). Its body is executable: a target without a kernel for it can
legalize the body, and tests run it. Shapes: T tokens, K input and N output columns, H heads, D head
size, C cache capacity.

    llamac.embedding   tokens [T], table [V, K] (, scales [V])               -> [T, K]
    llamac.rms_norm    x [T, K], gamma [K]                                   -> [T, K]
    llamac.qlinear     x [T, K], codes [N, K], scales (, A [r, K], B [N, r]) -> [T, N]
    llamac.linear      x [T, K], weight [N, K]                               -> [T, N]
    llamac.hadamard    x [T, K]                                              -> [T, K]
    llamac.rope        x [T, H * D], table [P, D/2, 2], meta [2]             -> [T, H * D]
    llamac.attention   q, k, v, meta, caches                                 -> [T, H * D], caches
    llamac.swiglu      gate [T, F], up [T, F]                                -> [T, F]
    llamac.add         x, y                                                  -> x + y
    llamac.take_row    x [T, K], meta [2]                                    -> [1, K]
    llamac.argmax      x [1, V]                                              -> [1]

`meta` is int32 [2]: the position of the first token, and the row of the last valid token of the
chunk.
"""

from __future__ import annotations

import json
import math
from collections.abc import Callable, Sequence
from typing import Any, TypeAlias

import numpy as np
from tvm import relax
from tvm.relax import BlockBuilder, Expr, Var

from llamac.compiler.reference import hadamard as reference_hadamard

op: Any = relax.op
Attrs: TypeAlias = dict[str, Any]
Body: TypeAlias = Callable[[BlockBuilder, Sequence[Var], Attrs], Any]

INT8_EPSILON = 2.0**-23


class CompositeBuilder:
    """Adds composite functions to a module, one for each kind, attributes and argument types."""

    def __init__(self, builder: BlockBuilder) -> None:
        self._builder = builder
        self._functions: dict[str, relax.GlobalVar] = {}

    def call(self, kind: str, args: Sequence[Expr], **attrs: Any) -> Var:
        """Emit a call of composite `llamac.<kind>` into the open dataflow block."""
        types = [arg.ty for arg in args]
        key = f"{kind}|{json.dumps(attrs, sort_keys=True)}|{types}"
        if key not in self._functions:
            self._functions[key] = self._define(kind, types, attrs)
        return self._builder.emit(relax.Call(self._functions[key], list(args)))

    def _define(self, kind: str, types: Sequence[Any], attrs: Attrs) -> relax.GlobalVar:
        inner = BlockBuilder()
        params = [relax.Var(f"arg{i}", ty) for i, ty in enumerate(types)]
        with inner.function("main", params, private=True):
            with inner.dataflow():
                result = inner.emit_output(BODIES[kind](inner, params, attrs))
            inner.emit_func_output(result)
        function = inner.finalize()["main"].with_attrs(
            {"Composite": f"llamac.{kind}", "llamac.attrs": json.dumps(attrs, sort_keys=True)}
        )
        return self._builder.add_func(function, f"llamac_{kind}_{len(self._functions)}")


def f32(value: float) -> Expr:
    """A float32 scalar constant."""
    return relax.const(np.float32(value), "float32")


def _shape(expr: Expr) -> list[int]:
    return [int(n) for n in expr.ty.shape]


def _rint(x: Expr) -> Expr:
    """Round half to even, in operators that every target has."""
    floor = op.floor(x)
    rest = op.subtract(x, floor)
    half = op.multiply(floor, f32(0.5))
    is_odd = op.greater(op.subtract(half, op.floor(half)), f32(0.25))
    is_tie = op.equal(rest, f32(0.5))
    up = op.logical_or(op.greater(rest, f32(0.5)), op.logical_and(is_tie, is_odd))
    return op.add(floor, op.astype(up, "float32"))


def _quantize(b: BlockBuilder, x: Expr) -> tuple[Expr, Expr, Expr]:
    """The activation rule "torchao" over the last axis: codes, scale, zero point in float32."""
    low = op.minimum(op.min(x, axis=-1, keepdims=True), f32(0))
    high = op.maximum(op.max(x, axis=-1, keepdims=True), f32(0))
    step = op.divide(op.subtract(high, low), f32(255))
    scale = b.emit(op.maximum(step, f32(INT8_EPSILON)))
    zero = op.clip(op.subtract(f32(-128), _rint(b.emit(op.divide(low, scale)))), -128, 127)
    zero = b.emit(zero)
    scaled = b.emit(op.multiply(x, op.divide(f32(1), scale)))
    codes = op.clip(op.add(_rint(scaled), zero), -128, 127)
    return b.emit(codes), scale, zero


def _matmul_t(x: Expr, weight: Expr) -> Expr:
    return op.matmul(x, op.permute_dims(weight))


def _embedding(b: BlockBuilder, args: Sequence[Var], attrs: Attrs) -> Expr:
    tokens, table, *scales = args
    rows = op.astype(op.take(table, tokens, axis=0, mode="clip"), "float32")
    if not scales:
        return rows
    return op.multiply(rows, op.expand_dims(op.take(scales[0], tokens, axis=0, mode="clip"), 1))


def _rms_norm(b: BlockBuilder, args: Sequence[Var], attrs: Attrs) -> Expr:
    x, gamma = args
    mean = op.mean(op.multiply(x, x), axis=-1, keepdims=True)
    return op.multiply(op.multiply(x, op.rsqrt(op.add(mean, f32(attrs["eps"])))), gamma)


def _qlinear(b: BlockBuilder, args: Sequence[Var], attrs: Attrs) -> Expr:
    x, codes, scales, *lora = args
    n, k = _shape(codes)
    q, scale, zero = _quantize(b, x)
    weight = op.astype(codes, "float32")
    if attrs["weight"] == "int4":
        grouped = op.reshape(weight, (n, k // attrs["group"], attrs["group"]))
        weight = op.reshape(op.multiply(grouped, op.expand_dims(scales, 2)), (n, k))
    else:
        weight = op.multiply(weight, op.expand_dims(scales, 1))
    y = op.multiply(_matmul_t(op.subtract(q, zero), b.emit(weight)), scale)
    if lora:
        a, up = (op.astype(w, "float32") for w in lora)
        branch = _matmul_t(b.emit(_matmul_t(x, a)), up)
        y = op.add(y, op.multiply(branch, f32(attrs["lora_scale"])))
    return y


def _linear(b: BlockBuilder, args: Sequence[Var], attrs: Attrs) -> Expr:
    return _matmul_t(args[0], op.astype(args[1], "float32"))


def _hadamard(b: BlockBuilder, args: Sequence[Var], attrs: Attrs) -> Expr:
    """H of length r * c is the Kronecker product of H_r and H_c: two small matrix products."""
    tokens, k = _shape(args[0])
    rows = 1 << (k.bit_length() - 1) // 2
    left, right = (
        relax.const(reference_hadamard(np.eye(n)).astype(np.float32)) for n in (rows, k // rows)
    )
    grid = op.reshape(args[0], (tokens, rows, k // rows))
    return op.reshape(op.matmul(op.matmul(left, grid), right), (tokens, k))


def _positions(meta: Expr, tokens: int) -> Expr:
    first = op.take(meta, relax.const(np.array([0], np.int32)), axis=0, mode="clip")
    return op.add(first, relax.const(np.arange(tokens, dtype=np.int32)))


def _rope(b: BlockBuilder, args: Sequence[Var], attrs: Attrs) -> Expr:
    x, table, meta = args
    (tokens, width), head_dim = _shape(x), attrs["head_dim"]
    pairs = op.reshape(x, (tokens, width // head_dim, head_dim // 2, 2))
    even, odd = (op.strided_slice(pairs, axes=[3], begin=[i], end=[i + 1]) for i in (0, 1))
    turn = b.emit(op.expand_dims(op.take(table, _positions(meta, tokens), axis=0, mode="clip"), 1))
    cos, sin = (op.strided_slice(turn, axes=[3], begin=[i], end=[i + 1]) for i in (0, 1))
    real = op.subtract(op.multiply(even, cos), op.multiply(odd, sin))
    imag = op.add(op.multiply(even, sin), op.multiply(odd, cos))
    return op.reshape(op.concat([real, imag], axis=3), (tokens, width))


def _append(b: BlockBuilder, cache: Expr, rows: Expr, meta: Expr) -> Expr:
    """Write `rows` [T, Hkv, D] at positions meta[0] .. of `cache` [Hkv, C, D]."""
    tokens, heads, width = _shape(rows)
    capacity = _shape(cache)[1]
    slots = relax.const(np.arange(capacity, dtype=np.int32).reshape(-1, 1))
    hit = b.emit(op.equal(slots, op.expand_dims(_positions(meta, tokens), 0)))
    new = op.matmul(op.astype(hit, "float32"), op.reshape(rows, (tokens, heads * width)))
    new = op.permute_dims(op.reshape(new, (capacity, heads, width)), (1, 0, 2))
    is_new = op.reshape(op.max(op.astype(hit, "int32"), axis=1), (1, capacity, 1))
    is_new = op.greater(is_new, relax.const(np.int32(0)))
    return b.emit(op.where(is_new, op.astype(new, cache.ty.dtype.dtype), cache))


def _attention(b: BlockBuilder, args: Sequence[Var], attrs: Attrs) -> Expr:
    q, k, v, meta, *caches = args
    tokens, heads, kv_heads, head_dim = (
        _shape(q)[0],
        attrs["heads"],
        attrs["kv_heads"],
        attrs["head_dim"],
    )
    k, v = (b.emit(op.reshape(x, (tokens, kv_heads, head_dim))) for x in (k, v))
    if attrs["kv_dtype"] == "int8":
        caches, (keys, values) = _append_int8(b, caches, (k, v), meta)
    else:
        caches = [_append(b, cache, rows, meta) for cache, rows in zip(caches, (k, v), strict=True)]
        keys, values = (op.astype(cache, "float32") for cache in caches)
    capacity, per = _shape(caches[0])[1], heads // kv_heads
    grouped = op.permute_dims(op.reshape(q, (tokens, kv_heads, per, head_dim)), (1, 2, 0, 3))
    rows = op.reshape(grouped, (kv_heads, per * tokens, head_dim))
    scores = op.matmul(rows, op.permute_dims(keys, (0, 2, 1)))
    scores = op.multiply(scores, f32(1 / math.sqrt(head_dim)))
    scores = op.reshape(scores, (kv_heads, per, tokens, capacity))
    slots = relax.const(np.arange(capacity, dtype=np.int32))
    seen = op.less_equal(slots, op.expand_dims(_positions(meta, tokens), 1))
    scores = op.where(seen, scores, f32(-3.0e38))
    weights = op.reshape(op.nn.softmax(scores, axis=-1), (kv_heads, per * tokens, capacity))
    out = op.reshape(op.matmul(weights, values), (kv_heads, per, tokens, head_dim))
    out = op.reshape(op.permute_dims(out, (2, 0, 1, 3)), (tokens, heads * head_dim))
    return relax.Tuple([b.emit(out), *caches])


def _append_int8(
    b: BlockBuilder, caches: Sequence[Expr], rows: Sequence[Expr], meta: Expr
) -> tuple[list[Expr], list[Expr]]:
    """Append to caches (k codes, v codes, k params, v params); also return both dequantized."""
    updated: list[Expr] = []
    for cache, x in zip(caches[:2], rows, strict=True):
        codes, scale, zero = _quantize(b, x)
        updated.append(_append(b, cache, codes, meta))
        params = b.emit(op.concat([scale, zero], axis=2))
        updated.append(_append(b, caches[2 + len(updated) // 2], params, meta))
    order = [updated[0], updated[2], updated[1], updated[3]]
    floats = []
    for codes, params in zip(order[:2], order[2:], strict=True):
        scale, zero = (op.strided_slice(params, axes=[2], begin=[i], end=[i + 1]) for i in (0, 1))
        floats.append(b.emit(op.multiply(op.subtract(op.astype(codes, "float32"), zero), scale)))
    return order, floats


def _swiglu(b: BlockBuilder, args: Sequence[Var], attrs: Attrs) -> Expr:
    gate, up = args
    return op.multiply(op.multiply(gate, op.sigmoid(gate)), up)


def _add(b: BlockBuilder, args: Sequence[Var], attrs: Attrs) -> Expr:
    return op.add(args[0], args[1])


def _take_row(b: BlockBuilder, args: Sequence[Var], attrs: Attrs) -> Expr:
    last = op.take(args[1], relax.const(np.array([1], np.int32)), axis=0, mode="clip")
    return op.take(args[0], last, axis=0, mode="clip")


def _argmax(b: BlockBuilder, args: Sequence[Var], attrs: Attrs) -> Expr:
    return op.astype(op.argmax(args[0], axis=-1), "int32")


BODIES: dict[str, Body] = {
    "embedding": _embedding,
    "rms_norm": _rms_norm,
    "qlinear": _qlinear,
    "linear": _linear,
    "hadamard": _hadamard,
    "rope": _rope,
    "attention": _attention,
    "swiglu": _swiglu,
    "add": _add,
    "take_row": _take_row,
    "argmax": _argmax,
}
