"""Products on HVX equal the reference under QEMU, and every version's real form compiles.

What runs is the simulated form, with scalar floats: QEMU 7.2 knows no floats of HVX.
"""

from __future__ import annotations

import itertools
import json
import os
import re
from pathlib import Path

import numpy as np
import pytest

from llamac.compiler import reference
from llamac.compiler.floats import round_to, to_bfloat16
from llamac.runtime.errors import DeviceError
from llamac.schedules import qmatmul_hvx, qmatmul_int8_hvx
from llamac.schedules.intrin.hexagon import HEXAGON_VERSIONS, HexagonHvx
from llamac.schedules.kernel import compile_kernels, work_items
from llamac.schedules.qmatmul import GROUP, QMatmulShape
from llamac.schedules.qmatmul_int8 import QMatmulInt8Shape
from llamac.targets.cpu import packing
from llamac.targets.kernel_runner import KernelCall, build_kernel_program, count_kernel_program

GOLDEN = Path(__file__).parents[1] / "golden" / "hexagon_packets.json"
UPDATE = "LLAMAC_UPDATE_GOLDEN"
TOLERANCE = 0.02
QEMU = ["qemu-hexagon", "-cpu", "v67"]
HVX = HexagonHvx(73, simulate=True)
needs_qemu = pytest.mark.needs("qemu-hexagon")

SHAPES = [
    QMatmulShape(1, 192, 96),
    QMatmulShape(1, 64, 64, "bfloat16", "residual"),
    QMatmulShape(1, 128, 96, "float16", "swiglu"),
    QMatmulShape(3, 64, 64, "float16", "residual"),
    pytest.param(QMatmulShape(7, 128, 32, "bfloat16", "swiglu"), marks=pytest.mark.slow),
    QMatmulShape(37, 64, 96, "bfloat16"),
    QMatmulShape(128, 64, 64),
    QMatmulShape(1, 256, 64, "float16", "none", 4, 2.0, (128, 64, 64)),
    QMatmulShape(3, 128, 64, "bfloat16", "swiglu", 5, 0.5, (64, 64)),
    QMatmulShape(5, 64, 64, "float16", "residual", 16, -1.5, (64,)),
]
INT8_SHAPES = [
    QMatmulInt8Shape(1, 96, 96),
    QMatmulInt8Shape(3, 64, 64),
    QMatmulInt8Shape(9, 32, 128),
]


def make(shape, isa=HVX, *, sums_only=False, **knobs):
    knobs = knobs or qmatmul_hvx.default(shape, isa)
    return qmatmul_hvx.make(shape, isa, sums_only=sums_only, **knobs)


def make_int8(shape, isa=HVX, **knobs):
    return qmatmul_int8_hvx.make(shape, isa, **(knobs or qmatmul_int8_hvx.default(shape, isa)))


def random_problem(shape):
    """Activations, weight codes and their scales."""
    rng = np.random.default_rng(0)
    x = reference.Quantized(
        rng.integers(-128, 128, (shape.m, shape.k)).astype(np.int8),
        rng.uniform(0.001, 0.1, shape.m).astype(np.float32),
        rng.integers(-128, 128, shape.m).astype(np.int32),
    )
    codes = rng.integers(-8, 8, (shape.n, shape.k)).astype(np.int8)
    return x, codes, rng.uniform(0.001, 0.1, (shape.n, shape.k // GROUP)).astype(np.float32)


def activations(x):
    """Codes, (scale, zero point) and offsets as the quantization stores them."""
    qparams = np.stack([x.scale, x.zero_point.astype(np.float32)], axis=1)
    return [x.codes, qparams, -8 * reference.group_sums(x.codes, GROUP)]


def operands(shape, x, codes, scales):
    """What the kernel reads of activations and weights."""
    stored = packing.to_scale_dtype(scales, shape.scale_dtype)
    tables = [packing.hvx_scales(stored), packing.int4_ksum(codes, stored)]
    return [*activations(x), packing.int4_hvx(codes), *tables]


def lora_branch(shape, t, b):
    """scale * t @ B.T for each fused projection, with that projection's part of t."""
    ends = np.cumsum(shape.lora_splits)
    parts = zip(np.split(t, len(ends), axis=1), np.split(b, ends[:-1]), strict=True)
    return shape.lora_scale * np.concatenate([reference.linear(*part) for part in parts], axis=1)


def problem(shape):
    """Inputs of the kernel, and its result in float64.

    For swiglu, blocks of 32 rows of gate and up alternate in what the kernel reads.
    """
    rng = np.random.default_rng(2)
    x, codes, scales = random_problem(shape)
    expected = reference.qlinear_int4(x, codes, round_to(scales, shape.scale_dtype))
    order = np.arange(shape.n)
    if shape.epilogue == "swiglu":
        order = order.reshape(2, -1, 32).transpose(1, 0, 2).reshape(-1)
    inputs = operands(shape, x, codes[order], scales[order])
    if shape.lora_rank:
        t = rng.normal(size=(shape.m, shape.lora_rank * len(shape.lora_splits)))
        b = to_bfloat16(rng.normal(size=(shape.n, shape.lora_rank)).astype(np.float32))
        inputs += [t.astype(np.float32), packing.block_columns(b[order], 64)]
        expected = expected + lora_branch(shape, inputs[-2], b)
    if shape.epilogue == "residual":
        inputs.append(rng.normal(size=(shape.m, shape.n)).astype(np.float32))
        expected = expected + inputs[-1]
    if shape.epilogue == "swiglu":
        expected = reference.swiglu(*np.split(expected, 2, axis=1))
    return inputs, expected


def assert_close(y, expected):
    scale = np.abs(expected).max(-1, keepdims=True)
    assert (np.abs(y - expected) <= 1e-5 * scale).all()


@needs_qemu
@pytest.mark.parametrize("shape", SHAPES, ids=str)
def test_product(run_kernel, shape):
    inputs, expected = problem(shape)
    (y,) = run_kernel(make(shape), HVX, *inputs)
    assert y.shape == (shape.m, shape.columns)
    assert_close(y, expected)


@needs_qemu
@pytest.mark.parametrize("mr", [1, 2, 3, 6])
def test_tiles_that_leave_tokens_over(run_kernel, mr):
    shape = QMatmulShape(8, 64, 64)
    inputs, expected = problem(shape)
    assert_close(run_kernel(make(shape, mr=mr), HVX, *inputs)[0], expected)


@needs_qemu
@pytest.mark.parametrize("version", [66, 68, 79])
def test_versions_agree(run_kernel, version):
    """Their simulated forms; v66 has no other."""
    isa, shape = HexagonHvx(version, simulate=True), SHAPES[0]
    inputs, _ = problem(shape)
    (y,), (z,) = run_kernel(make(shape, isa), isa, *inputs), run_kernel(make(shape), HVX, *inputs)
    np.testing.assert_array_equal(y, z)


@needs_qemu
@pytest.mark.parametrize("m", [1, 5])
def test_sums_of_groups_are_exact(run_kernel, m):
    """Random, and with every operand at its ends."""
    shape = QMatmulShape(m, 128, 96)
    func = make(shape, sums_only=True)
    x, codes, _ = random_problem(shape)
    ends = itertools.product((-128, 127), (-8, 7))
    cases = [
        (x.codes, codes),
        *((np.full_like(x.codes, a), np.full_like(codes, w)) for a, w in ends),
    ]
    for acts, weights in cases:
        inputs = [*activations(x._replace(codes=acts)), packing.int4_hvx(weights)]
        (sums,) = run_kernel(func, HVX, *inputs)
        groups = (
            array.reshape(len(array), -1, GROUP).astype(np.int64) for array in (acts, weights)
        )
        expected = np.einsum("mgk,ngk->ngm", *groups).reshape(2, 64, 3, m)
        np.testing.assert_array_equal(sums, expected.transpose(0, 2, 3, 1))


@needs_qemu
def test_each_weight_meets_its_activation(run_kernel):
    """One weight other than 0 in each row, all columns in turn: a misplaced nibble is seen."""
    shape = QMatmulShape(1, 64, 64)
    codes = np.zeros((shape.n, shape.k), np.int8)
    column = np.arange(shape.n) * 27 % shape.k
    codes[np.arange(shape.n), column] = 1
    row = np.arange(shape.k, dtype=np.int8)[None]
    x = reference.Quantized(row, np.ones(1, np.float32), np.zeros(1, np.int32))
    scales = np.ones((shape.n, 2), np.float32)
    (y,) = run_kernel(make(shape), HVX, *operands(shape, x, codes, scales))
    np.testing.assert_array_equal(y[0], column)


@needs_qemu
@pytest.mark.parametrize("sign", [1, -1])
def test_smallest_and_largest_float16_scales(run_kernel, sign):
    """Subnormal and negative ones too: they are widened as integers."""
    shape = QMatmulShape(1, 64, 64)
    x, codes, scales = random_problem(shape)
    scales[...] = np.array([2.0**-24, 2.0**-15, 2.0**-14, 65504], np.float32).repeat(16)[:, None]
    scales *= sign
    (y,) = run_kernel(make(shape), HVX, *operands(shape, x, codes, scales))
    expected = reference.qlinear_int4(x, codes, scales)
    for rows in range(0, 64, 16):
        assert_close(y[:, rows : rows + 16], expected[:, rows : rows + 16])


@needs_qemu
@pytest.mark.parametrize("epilogue", ["none", pytest.param("swiglu", marks=pytest.mark.slow)])
def test_a_call_writes_only_its_columns(run_kernel, epilogue):
    """Work items are blocks of 64 columns of the result, or of 32 for swiglu."""
    shape = QMatmulShape(3, 256, 32, epilogue=epilogue)
    inputs, _ = problem(shape)
    func, width = make(shape), 64 if epilogue == "none" else 32
    (whole,) = run_kernel(func, HVX, *inputs)
    for begin, end in ((0, 0), (0, 1), (1, 3), (3, 4)):
        (part,) = run_kernel(func, HVX, *inputs, begin=begin, end=end)
        columns = np.s_[begin * width : end * width]
        np.testing.assert_array_equal(part[:, columns], whole[:, columns])
        others = np.ascontiguousarray(np.delete(part, columns, axis=1))
        assert (others.view(np.uint8) == 0x5A).all()


@needs_qemu
def test_a_misaligned_tensor_is_refused(tmp_path):
    """HVX would read other data and say nothing."""
    shape = QMatmulShape(1, 64, 32)
    inputs, _ = problem(shape)
    program = build_kernel_program(make(shape), HVX, tmp_path / "kernel")
    tensors = [*inputs, np.zeros((1, 64), np.float32)]
    call = KernelCall(tensors, 0, 1, alignment=64)
    with pytest.raises(DeviceError) as raised:
        count_kernel_program([*QEMU, str(program)], call)
    assert "not aligned" in raised.value.cause


@needs_qemu
@pytest.mark.parametrize("fill", [None, (-128, -128, 127), (127, -128, -128), (-128, 127, 0)])
@pytest.mark.parametrize("shape", INT8_SHAPES, ids=str)
def test_int8_product(run_kernel, shape, fill):
    """Exact up to the last two factors; `fill` = (activation, weight, zero point) everywhere."""
    rng = np.random.default_rng(3)
    x, _, _ = random_problem(shape)
    codes = rng.integers(-128, 128, (shape.n, shape.k)).astype(np.int8)
    if fill is not None:
        x.codes[...], codes[...], x.zero_point[...] = fill
    scales = rng.uniform(0.001, 0.1, shape.n).astype(np.float32)
    inputs = [*activations(x), packing.int8_hvx(codes), scales, codes.sum(axis=1, dtype=np.int32)]
    (y,) = run_kernel(make_int8(shape), HVX, *inputs)
    exact = x.centred().astype(np.int64) @ codes.T.astype(np.int64)
    expected = (x.scale[:, None] * scales) * exact.astype(np.float32)
    np.testing.assert_allclose(y, expected, rtol=3e-7, atol=0)


@pytest.mark.parametrize("isa", HEXAGON_VERSIONS, ids=lambda isa: isa.name)
def test_real_forms_compile_to_instructions_of_hvx(isa):
    """Products are `vrmpy`, from v68 on floats are HVX's own; unused elsewhere: libraries."""
    shape = QMatmulShape(1, 128, 64, "float16", "residual")
    for func in (make(shape, isa), make(QMatmulShape(8, 128, 64), isa)):
        assembly = compile_kernels({"kernel": func}, isa).inspect_source("asm")
        assert re.search(r"v\d+\.w \+= vrmpy\(v\d+\.ub,r\d+\.b\)", assembly)
        assert ("qf32" in assembly) == (isa.version >= 68)
        assert "vmemu" not in assembly
        # Before v68 floats are scalar, and lanes are turned (valign) to be put in one by one.
        assert isa.version < 68 or "valign" not in assembly


@pytest.mark.parametrize("m", [1, 2, 8, 32, 128])
@pytest.mark.parametrize("nk", [(2048, 2048), (3072, 2048), (16384, 2048), (5120, 3072)], ids=str)
def test_defaults_are_valid(m, nk):
    shape = QMatmulShape(m, *nk)
    assert qmatmul_hvx.valid(shape, HVX, qmatmul_hvx.default(shape, HVX))


def test_rows_that_make_no_block_are_not_valid():
    assert not qmatmul_hvx.valid(QMatmulShape(1, 96, 64), HVX, {"mr": 1})
    assert not qmatmul_hvx.valid(QMatmulShape(8, 64, 64), HVX, {"mr": 8})
    assert not qmatmul_int8_hvx.valid(QMatmulInt8Shape(1, 48, 64), HVX, {"mr": 1, "unroll": 1})
    with pytest.raises(ValueError, match="v67"):
        HexagonHvx(67)


# At least so many products in a packet, of the form that leaves the sums of groups or of all of it.
COUNTED = {
    "int4 GEMV 2048 x 8192, sums": (QMatmulShape(1, 2048, 8192), True, 150),
    "int4 GEMV 8192 x 2048, sums": (QMatmulShape(1, 8192, 2048), True, 150),
    "int4 GEMM M=32 2048 x 2048, sums": (QMatmulShape(32, 2048, 2048), True, 200),
    "int4 GEMM M=128 512 x 2048, sums": (QMatmulShape(128, 512, 2048), True, 200),
    "int4 GEMV 2048 x 2048, simulated": (QMatmulShape(1, 2048, 2048), False, 1),
    "int8 GEMV 2048 x 2048": (QMatmulInt8Shape(1, 2048, 2048), False, 60),
    "int8 GEMM M=8 2048 x 2048": (QMatmulInt8Shape(8, 2048, 2048), False, 100),
}


@needs_qemu
@pytest.mark.parametrize("name", COUNTED)
def test_packets_are_those_of_the_golden_file(name, tmp_path):
    """Exact, so a change of 2 % is one of the code; written anew as in test_counts.py."""
    shape, sums_only, least = COUNTED[name]
    is_int8 = isinstance(shape, QMatmulInt8Shape)
    func = make_int8(shape) if is_int8 else make(shape, sums_only=sums_only)
    *buffers, _begin, _end = func.params
    tensors = [np.zeros([int(n) for n in b.shape], str(b.dtype)) for b in buffers]
    program = build_kernel_program(func, HVX, tmp_path / "kernel")
    call = KernelCall(tensors, 0, work_items(func), alignment=HVX.alignment)
    _, costs = count_kernel_program([*QEMU, str(program)], call)
    golden = json.loads(GOLDEN.read_text("utf-8")) if GOLDEN.exists() else {}
    if os.environ.get(UPDATE) == "1":
        golden[name] = vars(costs)
        GOLDEN.write_text(json.dumps(golden, indent=2, sort_keys=True) + "\n", "utf-8")
    assert abs(costs.packets / golden[name]["packets"] - 1) <= TOLERANCE
    assert shape.m * shape.n * shape.k / costs.packets >= least
