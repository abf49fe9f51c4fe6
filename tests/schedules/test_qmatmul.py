"""int4 x int8 products equal the reference: epilogues, LoRA, both scale types, knobs, ranges.

On x86 they are of the family qmatmul, on Arm of qmatmul_quads.
"""

from __future__ import annotations

import itertools

import numpy as np
import pytest

from llamac.compiler import reference
from llamac.compiler.floats import from_bfloat16, round_to, to_bfloat16
from llamac.schedules import qmatmul, qmatmul_quads
from llamac.schedules.intrin.arm import ArmNeon
from llamac.schedules.intrin.arm_levels import ARM_LEVELS
from llamac.schedules.intrin.arm_scalable import Scalable
from llamac.schedules.intrin.x86 import X86_LEVELS, X86Portable
from llamac.schedules.qmatmul import GROUP, ROWS, QMatmulShape
from llamac.targets.cpu import packing

# Every m, epilogue and scale type, and LoRA with one, two and three fused projections.
SHAPES = [
    QMatmulShape(1, 48, 96),
    QMatmulShape(1, 64, 64, "bfloat16", "residual"),
    QMatmulShape(1, 64, 96, "float16", "swiglu"),
    QMatmulShape(3, 48, 64, "float16", "residual"),
    QMatmulShape(3, 64, 96, "bfloat16", "swiglu"),
    QMatmulShape(8, 32, 96, "bfloat16"),
    QMatmulShape(8, 64, 32, "float16", "swiglu"),
    QMatmulShape(20, 32, 64, "float16", "swiglu"),
    QMatmulShape(35, 16, 96, "bfloat16", "residual"),
    QMatmulShape(48, 64, 96, "bfloat16", "swiglu"),
    QMatmulShape(1, 112, 64, "float16", "none", 4, 2.0, (64, 16, 32)),
    QMatmulShape(3, 64, 96, "bfloat16", "swiglu", 5, 0.5, (32, 32)),
    QMatmulShape(8, 32, 64, "float16", "residual", 16, -1.5, (32,)),
    *(QMatmulShape(m, 64, 96, "float16", "swiglu", signed_scales=True) for m in (1, 3, 20)),
    QMatmulShape(8, 64, 96, "bfloat16", signed_scales=True),
]
REAL = [(2048, 2048), (3072, 2048), (16384, 2048), (2048, 8192), (5120, 3072)]  # (n, k)


def family(isa):
    return qmatmul_quads if isinstance(isa, ArmNeon) else qmatmul


def make(shape, isa, **knobs):
    return family(isa).make(shape, isa, **(knobs or family(isa).default(shape, isa)))


def weights(shape, seed=0):
    """Canonical codes [n, k] and scales [n, k/32]."""
    rng = np.random.default_rng(seed)
    codes = rng.integers(-8, 8, (shape.n, shape.k)).astype(np.int8)
    scales = rng.uniform(0.001, 0.1, (shape.n, shape.k // GROUP)).astype(np.float32)
    if shape.signed_scales:
        scales *= rng.choice(np.array([-1, 0, 1], np.float32), scales.shape, p=[0.5, 0.1, 0.4])
    return codes, scales


def activations(shape, seed=1):
    rng = np.random.default_rng(seed)
    return reference.Quantized(
        rng.integers(-128, 128, (shape.m, shape.k)).astype(np.int8),
        rng.uniform(0.001, 0.1, shape.m).astype(np.float32),
        rng.integers(-128, 128, shape.m).astype(np.int32),
    )


def operands(isa, shape, x, codes, scales):
    """What the kernel reads of activations and weights."""
    stored = packing.to_scale_dtype(scales, shape.scale_dtype)
    qparams = np.stack([x.scale, x.zero_point.astype(np.float32)], axis=1)
    tables = [packing.block_columns(stored), packing.int4_ksum(codes, stored)]
    if isinstance(isa, ArmNeon):
        return [
            packing.arrange_codes(x.codes, isa.codes),
            qparams,
            packing.int4_signed(codes),
            *tables,
        ]
    offsets = -8 * reference.group_sums(x.codes, GROUP)
    return [x.codes, qparams, offsets, packing.int4_codes(codes), *tables]


def lora_branch(shape, t, b):
    """scale * t @ B.T for each fused projection, with that projection's part of t."""
    parts, row = [], 0
    for i, width in enumerate(shape.lora_splits):
        part = t[:, i * shape.lora_rank : (i + 1) * shape.lora_rank]
        parts.append(shape.lora_scale * reference.linear(part, b[row : row + width]))
        row += width
    return np.concatenate(parts, axis=1)


def problem(shape, isa):
    """Inputs of the kernel, and its result in float64.

    Rows of the weights are given one projection after the other; for swiglu their blocks alternate
    in what the kernel reads.
    """
    rng = np.random.default_rng(2)
    (codes, scales), x = weights(shape), activations(shape)
    expected = reference.qlinear_int4(x, codes, round_to(scales, shape.scale_dtype))
    order = np.arange(shape.n)
    if shape.epilogue == "swiglu":
        order = order.reshape(2, -1, ROWS).transpose(1, 0, 2).reshape(-1)
    inputs = operands(isa, shape, x, codes[order], scales[order])
    if shape.lora_rank:
        t = rng.normal(size=(shape.m, shape.lora_rank * len(shape.lora_splits)))
        t = t.astype(np.float32)
        b = to_bfloat16(rng.normal(size=(shape.n, shape.lora_rank)).astype(np.float32))
        expected = expected + lora_branch(shape, t, b)
        inputs += [t, packing.block_columns(b[order])]
    if shape.epilogue == "residual":
        inputs.append(rng.normal(size=(shape.m, shape.n)).astype(np.float32))
        expected = expected + inputs[-1]
    if shape.epilogue == "swiglu":
        expected = reference.swiglu(*np.split(expected, 2, axis=1))
    return inputs, expected


def assert_close(y, expected):
    scale = np.abs(expected).max(-1, keepdims=True)
    assert (np.abs(y - expected) <= 1e-5 * scale).all()


@pytest.mark.parametrize("shape", SHAPES, ids=str)
def test_product(run_kernel, each_isa, shape):
    inputs, expected = problem(shape, each_isa)
    (y,) = run_kernel(make(shape, each_isa), each_isa, *inputs)
    assert y.shape == (shape.m, shape.columns)
    assert_close(y, expected)


@pytest.mark.parametrize("knobs", [(1, 2), (2, 1), (4, 4), (6, 1), (8, 2), (12, 2), (16, 1)])
def test_knobs(run_kernel, each_isa, knobs):
    """Tiles that divide the tokens and tiles that leave some over."""
    shape, knobs = QMatmulShape(29, 32, 128), dict(zip(("mr", "unroll"), knobs, strict=True))
    if not family(each_isa).valid(shape, each_isa, knobs):
        return
    inputs, expected = problem(shape, each_isa)
    (y,) = run_kernel(make(shape, each_isa, **knobs), each_isa, *inputs)
    assert_close(y, expected)


@pytest.mark.parametrize("epilogue", ["residual", "swiglu"])
@pytest.mark.parametrize("mr", [8, 16])
def test_weights_unpacked_once_for_all_panels(run_kernel, arm_isa, mr, epilogue):
    shape = QMatmulShape(37, 64, 96, epilogue=epilogue)
    inputs, expected = problem(shape, arm_isa)
    func = make(shape, arm_isa, mr=mr, unroll=1, unpack_once=1)
    assert_close(run_kernel(func, arm_isa, *inputs)[0], expected)


@pytest.mark.parametrize("vector_bytes", [32, 64])
@pytest.mark.parametrize("shape", [SHAPES[2], SHAPES[7], SHAPES[8]], ids=str)
def test_one_binary_serves_vectors_of_every_length(run_kernel, vector_bytes, shape):
    [sve] = [level for level in ARM_LEVELS if level.name == "sve"]
    inputs, expected = problem(shape, sve)
    cpu = f"max,sme=off,sve-default-vector-length={vector_bytes}"
    (y,) = run_kernel(make(shape, sve), sve, *inputs, cpu=cpu)
    assert_close(y, expected)


EXTREMES = list(itertools.product((-128, 127), (-8, 7), (-128, 0, 127)))


def test_integers_are_exact(run_kernel, each_isa):
    """With scales that are powers of two nothing is rounded: sums at their ends, and random."""
    shape = QMatmulShape(1, 32, 256)
    func = make(shape, each_isa)
    scales = np.full((shape.n, shape.k // GROUP), 0.5, np.float32)

    def check(x, codes):
        (y,) = run_kernel(func, each_isa, *operands(each_isa, shape, x, codes, scales))
        dot = x.centred().astype(np.int64) @ codes.T.astype(np.int64)
        np.testing.assert_array_equal(y, dot * 0.125)

    quarter = np.full(1, 0.25, np.float32)
    for code, weight, zero in EXTREMES:
        x = np.full((1, shape.k), code, np.int8), quarter, np.full(1, zero, np.int32)
        check(reference.Quantized(*x), np.full((shape.n, shape.k), weight, np.int8))
    check(activations(shape)._replace(scale=quarter), weights(shape)[0])


def test_each_weight_meets_its_activation(run_kernel, each_isa):
    """One weight other than 0 in each row, all columns in turn: a misplaced nibble is seen."""
    shape = QMatmulShape(1, 64, 64)
    codes = np.zeros((shape.n, shape.k), np.int8)
    codes[np.arange(shape.n), np.arange(shape.n) * 27 % shape.k] = 1
    x = reference.Quantized(
        np.arange(shape.k, dtype=np.int8)[None], np.ones(1, np.float32), np.zeros(1, np.int32)
    )
    scales = np.ones((shape.n, 2), np.float32)
    (y,) = run_kernel(make(shape, each_isa), each_isa, *operands(each_isa, shape, x, codes, scales))
    np.testing.assert_array_equal(y[0], np.arange(shape.n) * 27 % shape.k)


@pytest.mark.parametrize("epilogue", ["none", "swiglu"])
def test_a_call_writes_only_its_columns(run_kernel, each_isa, epilogue):
    """Work items are blocks of 16 columns of the result."""
    shape = QMatmulShape(3, 64 if epilogue == "none" else 128, 32, epilogue=epilogue)
    inputs, _ = problem(shape, each_isa)
    func = make(shape, each_isa)
    (whole,) = run_kernel(func, each_isa, *inputs)
    for begin, end in ((0, 0), (0, 1), (1, 3), (3, 4)):
        (part,) = run_kernel(func, each_isa, *inputs, begin=begin, end=end)
        columns = np.s_[begin * ROWS : end * ROWS]
        np.testing.assert_array_equal(part[:, columns], whole[:, columns])
        others = np.ascontiguousarray(np.delete(part, columns, axis=1))
        assert (others.view(np.uint8) == 0x5A).all()


def test_levels_agree_to_the_last_bits(run_kernel, each_isa):
    """Rounding differs between levels only by fused multiply-adds, so far less than the limit."""
    shape = SHAPES[0]
    (y,), (z,) = (
        run_kernel(make(shape, level), level, *problem(shape, level)[0])
        for level in (each_isa, X86Portable())
    )
    assert np.abs(y - z).max() <= 2e-6 * np.abs(z).max()


@pytest.mark.parametrize("m", [1, 2, 7, 8, 128])
@pytest.mark.parametrize("nk", REAL, ids=str)
def test_defaults_are_valid(any_isa, m, nk):
    shape = QMatmulShape(m, *nk)
    assert family(any_isa).valid(shape, any_isa, family(any_isa).default(shape, any_isa))


def test_tiles_that_spill_or_do_not_divide_are_not_valid():
    avx512, _, avx2, _ = X86_LEVELS
    shape = QMatmulShape(16, 32, 96)
    assert qmatmul.valid(shape, avx512, {"mr": 12, "unroll": 1})
    assert not qmatmul.valid(shape, avx2, {"mr": 12, "unroll": 1})
    assert not qmatmul.valid(shape, avx512, {"mr": 4, "unroll": 2})
    assert not qmatmul.valid(QMatmulShape(2, 32, 96), avx512, {"mr": 4, "unroll": 1})


def test_a_kept_quad_fits_the_stack_of_a_thread(arm_isa):
    """All shapes of 1B and 3B fit; of longer rows the default keeps nothing."""
    kept = [qmatmul_quads.default(QMatmulShape(128, *nk), arm_isa) for nk in REAL]
    keeps = not isinstance(arm_isa, Scalable)
    assert [knobs.get("unpack_once", 0) for knobs in kept] == [int(keeps)] * len(REAL)
    long = QMatmulShape(128, 32, 16384)
    assert not qmatmul_quads.default(long, arm_isa).get("unpack_once", 0)
    knobs = {"mr": 16, "unroll": 1, "unpack_once": 1}
    assert not qmatmul_quads.valid(long, arm_isa, knobs)


FLOAT16_SCALES = np.array([65504, 2.0**-14, 2.0**-15, 2.0**-24, 0], np.float32)


@pytest.mark.parametrize("m", [1, 8])
@pytest.mark.parametrize("scale", [s * sign for s in FLOAT16_SCALES.tolist() for sign in (1, -1)])
def test_signed_scales_are_exact_over_all_of_float16(run_kernel, each_isa, m, scale):
    """Largest, smallest normal, subnormal, and zeros of both signs, alone in a row."""
    shape = QMatmulShape(m, 16, 64, signed_scales=True)
    (codes, _), x = weights(shape), activations(shape)
    scales = np.full((shape.n, 2), scale, np.float32)
    (y,) = run_kernel(make(shape, each_isa), each_isa, *operands(each_isa, shape, x, codes, scales))
    assert_close(y, reference.qlinear_int4(x, codes, scales))


@pytest.mark.parametrize("m", [1, 8])
def test_smallest_float16_scales_count(run_kernel, arm_isa, m):
    """Their bits become float32 subnormals on the way and must not be lost."""
    shape = QMatmulShape(m, 16, 64)
    (codes, _), x = weights(shape), activations(shape)
    scales = np.full((shape.n, 2), 2.0**-24, np.float32)
    (y,) = run_kernel(make(shape, arm_isa), arm_isa, *operands(arm_isa, shape, x, codes, scales))
    assert_close(y, reference.qlinear_int4(x, codes, scales))


@pytest.mark.parametrize("shape", [SHAPES[0], SHAPES[10]], ids=str)
def test_packed_scales_are_those_of_the_reference(shape):
    """The float16 or bfloat16 that is packed reads back as what the reference rounds to."""
    _, scales = weights(shape)
    stored = packing.to_scale_dtype(scales, shape.scale_dtype)
    values = from_bfloat16(stored) if stored.dtype == np.uint16 else stored.astype(np.float32)
    np.testing.assert_array_equal(values, round_to(scales, shape.scale_dtype))
