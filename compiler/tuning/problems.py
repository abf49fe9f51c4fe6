"""Problems of the families with knobs: operands as a model has them, and the reference's verdict.

Values are random and the same in every run. Large weights repeat a few hundred rows: no kernel
looks at values, and the reference only computes the work items that are judged.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np

from llamac.compiler import reference
from llamac.compiler.floats import round_to, to_bfloat16
from llamac.compiler.reference import Float64, Quantized
from llamac.compiler.verify_compare import (
    SUM_ROUNDING,
    Comparison,
    compare_close,
    compare_codes,
    compare_equal,
)
from llamac.schedules.attention import AttentionShape
from llamac.schedules.hadamard import HadamardShape
from llamac.schedules.intrin.isa import Isa
from llamac.schedules.lora import LoraShape
from llamac.schedules.matmul import MatmulShape
from llamac.schedules.qmatmul import GROUP, QMatmulShape
from llamac.schedules.qmatmul_epilogue import ROWS
from llamac.schedules.qmatmul_int8_lanes import QMatmulInt8Shape
from llamac.schedules.quantize import has_offsets
from llamac.schedules.sampling import ArgmaxShape
from llamac.targets.cpu import packing
from llamac.targets.cpu.kernels import KernelSpec
from llamac.targets.kernel_cost import macs_of
from llamac.targets.program import ProgramKernel
from llamac.targets.tuning.measure import Array, Problem

POSITION = 1000  # of the first token that attends, if the cache has room for it
# Products that an emulator computes of a kernel, and the reference: work items beyond are left out.
JUDGED_PRODUCTS = 24 << 20
# Of int4 scales: results of products are then about 1, so that no gate of SwiGLU closes everywhere.
UNIT = np.float32(1 / 16)
MOST_ROWS = 1024  # of weights that differ
_HVX_HALF = 32


@dataclass(frozen=True)
class _Operands:
    """Operands of a family.

    Attributes:
        inputs: tensors of the kernel.
        streamed: which of them are weights.
        rows: of weights that a work item reads; 0 if its items are no rows.
        expected: what the reference makes of the first `rows` rows: the comparisons of outputs.
    """

    inputs: list[Array]
    streamed: tuple[int, ...]
    rows: int
    compare: Callable[[Sequence[Array], int], list[Comparison]]


def make_problem(spec: KernelSpec, level: Isa) -> Problem:
    """Make the problem of a kernel at a level.

    Raises:
        KeyError: its family has no knobs.
    """
    isa = spec.isa_of(level)
    operands = _FAMILIES[spec.family](spec.shape, isa)
    kernel = ProgramKernel(spec.name, spec.family, spec.shape_fields(), 0)
    products = macs_of(kernel, _position(spec.shape) if spec.family == "attention" else 0)
    items = None
    if operands.rows:
        per_item = max(1, products * operands.rows // _weight_rows(spec.shape))
        items = max(1, JUDGED_PRODUCTS // per_item)
        items = min(items, _weight_rows(spec.shape) // operands.rows)

    def judge(outputs: Sequence[Array]) -> str:
        with np.errstate(all="ignore"):
            parts = operands.compare(outputs, (items or 0) * operands.rows)
        return next((str(part) for part in parts if not part.passed), "")

    return Problem(spec, isa, operands.inputs, operands.streamed, items, products, judge)


def _weight_rows(shape: Any) -> int:
    return int(shape.rank if isinstance(shape, LoraShape) else shape.n)


def _rng() -> np.random.Generator:
    return np.random.default_rng(7)


def _activations(m: int, k: int) -> Quantized:
    rng = _rng()
    return Quantized(
        rng.integers(-128, 128, (m, k)).astype(np.int8),
        rng.uniform(0.001, 0.1, m).astype(np.float32),
        rng.integers(-128, 128, m).astype(np.int32),
    )


def _code_tensors(isa: Isa, x: Quantized, *, offsets: bool) -> list[Array]:
    """Codes as the kernel reads them, (scale, zero point), and sums of groups where it has them."""
    qparams = np.stack([x.scale, x.zero_point.astype(np.float32)], axis=1)
    tensors = [packing.arrange_codes(x.codes, isa.codes), qparams]
    return [*tensors, -8 * reference.group_sums(x.codes, GROUP)] if offsets else tensors


def _different_rows(n: int) -> int:
    """Rows of weights that are made; they repeat, in whole blocks of every layout."""
    return next((rows for rows in range(MOST_ROWS, 63, -64) if n % rows == 0), n)


def _repeat(packed: Array, rows: int, n: int) -> Array:
    """A packed tensor of `rows` rows as one of n, along its first axis."""
    return np.tile(packed, (n // rows, *([1] * (packed.ndim - 1))))


def _first(rows: Array, count: int) -> Array:
    """The first `count` rows of weights that repeat."""
    return rows[np.arange(count) % len(rows)]


def _gate_and_up(product: Float64, half: int) -> Float64:
    """SwiGLU of columns in which blocks of gate and up alternate."""
    pairs = product.reshape(len(product), -1, 2, half)
    gate, up = (pairs[:, :, i].reshape(len(product), -1) for i in (0, 1))
    return reference.swiglu(gate, up)


def _finish(
    shape: QMatmulShape | MatmulShape,
    outputs: Sequence[Array],
    product: Float64,
    half: int,
    residual: Array | None,
) -> list[Comparison]:
    """Compare the first columns of a matrix kernel's result, after what it fuses."""
    if shape.epilogue == "swiglu":
        expected = _gate_and_up(product, half)
        return [compare_close("result", outputs[0][:, : expected.shape[1]], expected)]
    got = outputs[0][:, : product.shape[1]]
    if residual is None:
        return [compare_close("result", got, product)]
    expected = product + residual[:, : product.shape[1]]
    scale = np.abs(product).max(-1, keepdims=True)
    slack = SUM_ROUNDING * np.abs(expected)
    return [compare_close("result", got, expected, scale=scale, slack=slack)]


def _residual(shape: QMatmulShape | MatmulShape) -> Array | None:
    if shape.epilogue != "residual":
        return None
    return _rng().normal(size=(shape.m, shape.n)).astype(np.float32)


def _int4(shape: QMatmulShape, isa: Isa, *, hvx: bool = False) -> _Operands:
    rng, count = _rng(), _different_rows(shape.n)
    half = _HVX_HALF if hvx else ROWS
    x = _activations(shape.m, shape.k)
    codes = rng.integers(-8, 8, (count, shape.k)).astype(np.int8)
    scales = rng.uniform(0.5, 1.5, (count, shape.k // GROUP)).astype(np.float32)
    scales *= UNIT / np.sqrt(shape.k, dtype=np.float32)
    stored = packing.to_scale_dtype(scales, shape.scale_dtype)
    signed = not hvx and not has_offsets(isa)
    inputs = _code_tensors(isa, x, offsets=not signed)
    pack = packing.int4_hvx if hvx else packing.int4_signed if signed else packing.int4_codes
    columns = packing.hvx_scales if hvx else packing.block_columns
    streamed = (len(inputs), len(inputs) + 1)
    tables = [pack(codes), columns(stored), packing.int4_ksum(codes, stored)]
    inputs += [_repeat(table, count, shape.n) for table in tables]
    splits = max(1, len(shape.lora_splits))
    t = rng.normal(size=(shape.m, shape.lora_rank * splits)).astype(np.float32)
    b = to_bfloat16(rng.normal(size=(count, shape.lora_rank)).astype(np.float32))
    if shape.lora_rank:
        blocks = packing.block_columns(b, 2 * _HVX_HALF) if hvx else packing.block_columns(b)
        inputs += [t, _repeat(blocks, count, shape.n)]
    residual = _residual(shape)
    inputs += [] if residual is None else [residual]

    def compare(outputs: Sequence[Array], rows: int) -> list[Comparison]:
        rounded = round_to(scales, shape.scale_dtype)
        product = reference.qlinear_int4(x, _first(codes, rows), _first(rounded, rows))
        if shape.lora_rank:
            product += _lora_part(shape, t, _first(b, rows), half)
        return _finish(shape, outputs, product, half, residual)

    rows = 2 * half if hvx or shape.epilogue == "swiglu" else half
    return _Operands(inputs, streamed, rows, compare)


def _lora_part(shape: QMatmulShape, t: Array, b: Array, half: int) -> Float64:
    """Scale * t @ B.T, with the part of t that belongs to the projection of each row."""
    rows = np.arange(len(b))
    if shape.epilogue == "swiglu":
        projection = rows // half % 2
    else:
        projection = np.searchsorted(np.cumsum(shape.lora_splits), rows, side="right")
    parts = t.reshape(shape.m, -1, shape.lora_rank).astype(np.float64)
    products = np.stack([reference.linear(parts[:, i], b) for i in range(parts.shape[1])])
    part: Float64 = np.take_along_axis(products, projection[None, None], axis=0)[0]
    return shape.lora_scale * part


def _int8(shape: QMatmulInt8Shape, isa: Isa, *, hvx: bool = False) -> _Operands:
    rng, count = _rng(), _different_rows(shape.n)
    x = _activations(shape.m, shape.k)
    codes = rng.integers(-127, 128, (count, shape.k)).astype(np.int8)
    scales = rng.uniform(0.001, 0.1, count).astype(np.float32)
    inputs = _code_tensors(isa, x, offsets=hvx)
    pack = packing.int8_hvx if hvx else packing.int8_codes
    tables = [pack(codes), scales, codes.sum(axis=1, dtype=np.int32)]
    streamed = (len(inputs),)
    inputs += [_repeat(table, count, shape.n) for table in tables]

    def compare(outputs: Sequence[Array], rows: int) -> list[Comparison]:
        expected = reference.qlinear_int8(x, _first(codes, rows), _first(scales, rows))
        return [compare_close("result", outputs[0][:, :rows], expected)]

    return _Operands(inputs, streamed, _HVX_HALF if hvx else ROWS, compare)


def _float(shape: MatmulShape, isa: Isa) -> _Operands:
    rng, count = _rng(), _different_rows(shape.n)
    x = rng.normal(size=(shape.m, shape.k)).astype(np.float32)
    weights = rng.normal(scale=shape.k**-0.5, size=(count, shape.k))
    weight = to_bfloat16(weights.astype(np.float32))
    inputs = [x, _repeat(packing.block_columns(weight), count, shape.n)]
    residual = _residual(shape)
    inputs += [] if residual is None else [residual]

    def compare(outputs: Sequence[Array], rows: int) -> list[Comparison]:
        product = reference.linear(x, _first(weight, rows))
        return _finish(shape, outputs, product, ROWS, residual)

    rows = 2 * ROWS if shape.epilogue == "swiglu" else ROWS
    return _Operands(inputs, (1,), rows, compare)


def _lora(shape: LoraShape, isa: Isa) -> _Operands:
    rng = _rng()
    x = rng.normal(size=(shape.tokens, shape.k)).astype(np.float32)
    a = to_bfloat16(rng.normal(size=(shape.rank, shape.k)).astype(np.float32))

    def compare(outputs: Sequence[Array], rows: int) -> list[Comparison]:
        expected = reference.linear(x, a[:rows])
        scale = np.abs(reference.linear(x, a)).max(-1, keepdims=True)
        return [compare_close("t", outputs[0][:, :rows], expected, scale=scale)]

    return _Operands([x, a], (1,), 1, compare)


def _hadamard(shape: HadamardShape, isa: Isa) -> _Operands:
    x = _rng().normal(size=(shape.tokens, shape.k)).astype(np.float32)

    def compare(outputs: Sequence[Array], rows: int) -> list[Comparison]:
        y = outputs[-1]
        parts = [compare_close("y", y, reference.hadamard(x))]
        if shape.quantize:
            codes = packing.restore_codes(outputs[0], shape.tokens, isa.codes)
            parts += compare_codes(codes, outputs[1], y, "torchao", exact=True)
        return parts

    return _Operands([x], (), 0, compare)


def _argmax(shape: ArgmaxShape, isa: Isa) -> _Operands:
    logits = _rng().normal(size=(1, shape.vocab)).astype(np.float32)

    def compare(outputs: Sequence[Array], rows: int) -> list[Comparison]:
        return [compare_equal("token", outputs[0], reference.argmax(logits))]

    return _Operands([logits], (), 0, compare)


def _position(shape: AttentionShape) -> int:
    return min(POSITION, shape.cache.capacity - shape.tokens)


def _attention(shape: AttentionShape, isa: Isa) -> _Operands:
    rng, cache, position = _rng(), shape.cache, _position(shape)
    end = position + shape.tokens
    q = rng.normal(size=(shape.tokens, shape.heads, cache.head_dim)).astype(np.float32)
    keys, values = rng.normal(size=(2, end, cache.kv_heads, cache.head_dim)).astype(np.float32)
    if cache.dtype == "int8":
        sides = [reference.quantize_kv(side) for side in (keys, values)]
        used = [reference.dequantize_kv(side) for side in sides]
        stored = [side.codes for side in sides]
        params = [np.stack([s.scale, s.zero_point.astype(np.float32)], axis=-1) for s in sides]
    else:
        stored = [side.astype(np.float16) for side in (keys, values)]
        used, params = [side.astype(np.float64) for side in stored], []
    k, v, *rest = (_padded(side, cache.capacity) for side in (*stored, *params))
    k = k.reshape(cache.kv_heads, -1, cache.block, cache.head_dim).swapaxes(2, 3)
    meta = np.array([position, 0], np.int32)
    inputs = [q.reshape(shape.tokens, -1), np.ascontiguousarray(k), v, *rest, meta]

    def compare(outputs: Sequence[Array], rows: int) -> list[Comparison]:
        expected = reference.attention(q, used[0], used[1], position)
        return [compare_close("out", outputs[0], expected.reshape(shape.tokens, -1))]

    return _Operands(inputs, (), 0, compare)


def _padded(rows: Array, capacity: int) -> Array:
    """[P, Hkv, ...] -> [Hkv, capacity, ...] with zeros after the last position."""
    full = np.zeros((rows.shape[1], capacity, *rows.shape[2:]), rows.dtype)
    full[:, : len(rows)] = rows.swapaxes(0, 1)
    return full


_FAMILIES: dict[str, Callable[[Any, Isa], _Operands]] = {
    "attention": _attention,
    "hadamard": _hadamard,
    "lora": _lora,
    "matmul": _float,
    "qmatmul": _int4,
    "qmatmul_quads": _int4,
    "qmatmul_hvx": lambda shape, isa: _int4(shape, isa, hvx=True),
    "qmatmul_int8": _int8,
    "sampling": _argmax,
    "qmatmul_int8_hvx": lambda shape, isa: _int8(shape, isa, hvx=True),
}
