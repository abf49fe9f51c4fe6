"""All kernels over 32 lanes of HVX: what they compute, and what the real forms compile to.

The simulated form is executed: the same vectors and integer instructions, with floats one by one.
No emulator at hand executes the floats of the real form, whose assembly is looked at.
"""

from __future__ import annotations

import re

import numpy as np
import pytest

from llamac.compiler import reference
from llamac.compiler.floats import to_bfloat16
from llamac.schedules.attention import AttentionShape
from llamac.schedules.embedding import EmbeddingShape
from llamac.schedules.hadamard import HadamardShape
from llamac.schedules.intrin.hexagon import HEXAGON_VERSIONS, HexagonHvx
from llamac.schedules.kernel import KernelBuilder, compile_kernels
from llamac.schedules.lora import LoraShape
from llamac.schedules.matmul import MatmulShape
from llamac.schedules.norm import RmsNormShape
from llamac.schedules.qmatmul import QMatmulShape
from llamac.schedules.qmatmul_int8 import QMatmulInt8Shape
from llamac.schedules.quantize import QuantizeShape
from llamac.schedules.rope import CacheShape, RopeShape
from llamac.schedules.sampling import ArgmaxShape
from llamac.schedules.select import TakeRowShape
from llamac.targets.cpu import packing
from llamac.targets.cpu.kernels import FAMILIES, KernelSpec

HVX = HexagonHvx(75, simulate=True)
needs_qemu = pytest.mark.needs("qemu-hexagon")


def make(family, shape, isa=HVX):
    generator = FAMILIES[family]
    knobs = generator.default(shape, isa)
    assert generator.valid(shape, isa, knobs)
    return generator.make(shape, isa, **knobs)


def normal(*shape, seed=0):
    return np.random.default_rng(seed).standard_t(3, shape).astype(np.float32)


def assert_close(y, expected):
    scale = np.abs(expected).max(-1, keepdims=True)
    assert (np.abs(y - expected) <= 1e-5 * scale).all()


def apply(run_kernel, operation, values, dst):
    """Run an operation of vectors over a flat array."""
    rows = values.reshape(-1, 32)
    with KernelBuilder("operation", len(rows), alignment=HVX.alignment) as b:
        x = b.input("x", rows.shape, str(values.dtype))
        y = b.output("y", rows.shape, dst)
        with b.items() as row:
            HVX.store(y, operation(HVX.load(x, row, 0)), row, 0)
    return run_kernel(b.func, HVX, rows)[0].reshape(values.shape)


# -- operations ----------------------------------------------------------------------------------


@needs_qemu
def test_float16_is_widened_exactly(run_kernel):
    half = np.arange(65536, dtype=np.uint16).view(np.float16)
    half = np.where(np.isfinite(half), half, np.float16(0))
    got = apply(run_kernel, HVX.to_float32, half, "float32")
    np.testing.assert_array_equal(got, half.astype(np.float32))


@needs_qemu
def test_float16_is_rounded_half_to_even(run_kernel):
    """All values, the midpoints between them with their neighbours, too large and too small."""
    finite = np.arange(0x7C00, dtype=np.uint16).view(np.float16).astype(np.float32)
    middle = (finite[:-1] + finite[1:]) / 2
    some = [finite, middle, np.nextafter(middle, 0), np.nextafter(middle, 1e9)]
    special = np.float32([65519.9, 65520, 65536, 1e38, 1e-38, 1e-45, 2.0**-25])
    values = np.concatenate([*some, special]).astype(np.float32)
    values = np.concatenate([values, -values])
    values = np.resize(values, -(-len(values) // 32) * 32)
    got = apply(run_kernel, HVX.to_float16, values, "float16")
    with np.errstate(over="ignore"):
        np.testing.assert_array_equal(got, values.astype(np.float16))


@needs_qemu
def test_rint_rounds_half_to_even(run_kernel):
    values = np.concatenate([np.arange(-4096, 4096) / 4, [2.0**21 + 0.5, -(2.0**21) - 1.5] * 16])
    values = np.concatenate([values, np.nextafter(values, 0), [1e-30, -0.0] * 16])
    values = values.astype(np.float32)
    got = apply(run_kernel, HVX.rint, values, "float32")
    np.testing.assert_array_equal(got, np.rint(values))


@needs_qemu
def test_silu_without_division(run_kernel):
    values = np.linspace(-200, 200, 4096).astype(np.float32)
    wide = values.astype(np.float64)
    got = apply(run_kernel, HVX.silu, values, "float32")
    np.testing.assert_allclose(got, wide / (1 + np.exp(-wide)), rtol=1e-6, atol=1e-30)


# -- kernels ---------------------------------------------------------------------------------------


@needs_qemu
def test_quantize(run_kernel, assert_quantized):
    x = normal(3, 96)
    assert_quantized(HVX, run_kernel(make("quantize", QuantizeShape(3, 96)), HVX, x), x)


@needs_qemu
def test_norm(run_kernel, assert_quantized):
    x, gamma = normal(2, 96), normal(96, seed=1)
    func = make("norm", RmsNormShape(2, 96, 1e-5, with_float=True))
    *quantized, y = run_kernel(func, HVX, x, gamma)
    assert_close(y, reference.rms_norm(x, gamma, 1e-5))
    assert_quantized(HVX, quantized, y)


@needs_qemu
@pytest.mark.parametrize("k", [64, 1024])
def test_hadamard(run_kernel, assert_quantized, k):
    x = normal(2, k)
    *quantized, y = run_kernel(make("hadamard", HadamardShape(2, k)), HVX, x)
    assert_close(y, reference.hadamard(x))
    assert_quantized(HVX, quantized, y)


@needs_qemu
def test_lora(run_kernel):
    x, a = normal(3, 96), to_bfloat16(normal(8, 96, seed=1))
    (t,) = run_kernel(make("lora", LoraShape(3, 8, 96)), HVX, x, a)
    assert_close(t, reference.linear(x, a))


@needs_qemu
@pytest.mark.parametrize("hvx", [False, True])
def test_embedding(run_kernel, hvx):
    rng = np.random.default_rng(0)
    table, scales = rng.integers(-128, 128, (64, 96)).astype(np.int8), np.abs(normal(64))
    tokens = np.array([0, 63, 31, 32], np.int32)
    func = make("embedding", EmbeddingShape(4, 64, 96, blocks=hvx, hvx=hvx))
    stored = packing.int8_hvx(table) if hvx else table
    (x,) = run_kernel(func, HVX, tokens, stored, scales)
    np.testing.assert_array_equal(x, reference.embedding(tokens, table, scales).astype(np.float32))


@needs_qemu
@pytest.mark.parametrize("places", [(0,), (299,), (17, 200), (31, 32)])
def test_argmax(run_kernel, places):
    logits = np.full((1, 300), -7.5, np.float32)
    logits[0, list(places)] = -1
    logits[0, 5] = np.nan
    (index,) = run_kernel(make("sampling", ArgmaxShape(300)), HVX, logits)
    assert index[0] == min(places)


@needs_qemu
def test_select(run_kernel):
    x = normal(4, 96)
    (y,) = run_kernel(make("select", TakeRowShape(4, 96)), HVX, x, np.array([0, 2], np.int32))
    np.testing.assert_array_equal(y[0], x[2])


def pair_keys(keys):
    """[Hkv, C, D] -> [Hkv, C/64, D, 64], positions p and p + 32 of a block side by side."""
    kv_heads, capacity, head_dim = keys.shape
    blocks = keys.reshape(kv_heads, capacity // 64, 2, 32, head_dim).transpose(0, 1, 4, 3, 2)
    return np.ascontiguousarray(blocks).reshape(kv_heads, capacity // 64, head_dim, 64)


@needs_qemu
@pytest.mark.parametrize("tokens", [1, 2])
@pytest.mark.parametrize("position", [0, 31, 32, 95, 120])
def test_rope_and_attention(run_kernel, tokens, position):
    """RoPE writes a position where attention looks for it."""
    heads, kv_heads, size, capacity = 4, 2, 64, 128
    cache = CacheShape(kv_heads, size, capacity, hvx=True)
    rng = np.random.default_rng(position)
    angles = rng.uniform(0, 6.3, (capacity, size // 2))
    table = np.stack([np.cos(angles), np.sin(angles)], -1)
    qkv = normal(tokens, (heads + 2 * kv_heads) * size, seed=1)
    keys, values = rng.normal(size=(2, kv_heads, capacity, size)).astype(np.float16)
    keys[:, position:], values[:, position:] = 99, 99
    stored = [pair_keys(keys), values]
    meta = np.array([position, tokens - 1], np.int32)
    rope = make("rope", RopeShape(tokens, heads, capacity, cache))
    rows = packing.rope_rows(table.astype(np.float32))
    (q,) = run_kernel(rope, HVX, qkv, rows, meta, *stored)
    split = qkv.reshape(tokens, -1, size)
    here = table[position : position + tokens]
    turned = reference.rope(split[:, : heads + kv_heads], here)
    assert_close(q, turned[:, :heads].reshape(q.shape))
    new = slice(position, position + tokens)
    keys[:, new] = turned[:, heads:].astype(np.float32).astype(np.float16).swapaxes(0, 1)
    values[:, new] = split[:, heads + kv_heads :].astype(np.float16).swapaxes(0, 1)
    np.testing.assert_allclose(stored[0], pair_keys(keys), rtol=1e-3)
    np.testing.assert_array_equal(stored[1], values)
    func = make("attention", AttentionShape(tokens, heads, cache))
    (out,) = run_kernel(func, HVX, q, *stored, meta)
    blocks = stored[0].reshape(kv_heads, -1, size, 32, 2).transpose(0, 1, 4, 3, 2)
    kept = blocks.reshape(kv_heads, capacity, size)[:, : position + tokens].swapaxes(0, 1)
    seen = stored[1][:, : position + tokens].swapaxes(0, 1)
    expected = reference.attention(q.reshape(tokens, heads, size), kept, seen, position)
    assert_close(out, expected.reshape(out.shape))


# -- real forms ------------------------------------------------------------------------------------

CACHE = CacheShape(8, 64, 512, hvx=True)
SPECS = {
    "attention": KernelSpec("kernel", "attention", AttentionShape(1, 32, CACHE)),
    "attention of a chunk": KernelSpec("kernel", "attention", AttentionShape(8, 32, CACHE)),
    "embedding": KernelSpec("kernel", "embedding", EmbeddingShape(1, 2048, 2048)),
    "hadamard": KernelSpec("kernel", "hadamard", HadamardShape(1, 8192)),
    "lora": KernelSpec("kernel", "lora", LoraShape(1, 16, 2048)),
    "norm": KernelSpec("kernel", "norm", RmsNormShape(1, 2048, 1e-5)),
    "qmatmul, residual": KernelSpec("kernel", "qmatmul_hvx", QMatmulShape(1, 2048, 8192)),
    "qmatmul, swiglu": KernelSpec(
        "kernel", "qmatmul_hvx", QMatmulShape(1, 16384, 2048, epilogue="swiglu")
    ),
    "qmatmul_int8": KernelSpec("kernel", "qmatmul_int8_hvx", QMatmulInt8Shape(1, 2048, 2048)),
    "quantize": KernelSpec("kernel", "quantize", QuantizeShape(1, 2048)),
    "rope": KernelSpec("kernel", "rope", RopeShape(1, 32, 512, CACHE)),
    "sampling": KernelSpec("kernel", "sampling", ArgmaxShape(128256)),
    "select": KernelSpec("kernel", "select", TakeRowShape(8, 2048)),
}
# What any of them may call: the error of a wrong argument, and functions of the C library and of
# the compiler's, a static program of zig has them all.
KNOWN_CALLS = {
    "TVMFFIErrorSetRaisedFromCStrParts",
    "__hexagon_memcpy_likely_aligned_min32bytes_mult8bytes",
    "__hexagon_sqrtf",
    "memset",
}
MOVE_ONLY = {"select"}
# Scratch on the stack is at multiples of 16 bytes.
HAS_SCRATCH = {"attention", "attention of a chunk"}
REAL = [isa for isa in HEXAGON_VERSIONS if isa.version >= 68]


def calls(assembly):
    names = set(re.findall(r"\bcall (?:##)?([A-Za-z_]\w*)", assembly))
    return {n for n in names if not n.startswith(("kernel_compute_", "__tvm_set_raised"))}


def assembly_of(spec, isa):
    isa = isa.for_family(spec.family)
    return compile_kernels({"kernel": spec.make(isa, "kernel")}, isa).inspect_source("asm")


@pytest.mark.parametrize("name", SPECS)
@pytest.mark.parametrize(
    "isa",
    [isa if isa.version in (68, 75) else pytest.param(isa, marks=pytest.mark.slow) for isa in REAL],
    ids=lambda isa: isa.name,
)
def test_real_forms_have_vectors_of_floats(isa, name):
    """Sums and products of floats are HVX's, none is a scalar's for each lane."""
    spec = SPECS[name]
    assert isa.for_family(spec.family) is isa
    assembly = assembly_of(spec, isa)
    assert calls(assembly) <= KNOWN_CALLS
    arithmetic = r"v\d+\.qf32 = v(mpy|add|sub)\(|vcmp\.gt\(v\d+\.sf"
    assert name in MOVE_ONLY or re.search(arithmetic, assembly)
    # A division or a root of a row and the exponential of a running maximum, not of 32 lanes.
    assert len(re.findall(r"\bsf(?:add|sub|mpy)\(", assembly)) < 100
    assert name in HAS_SCRATCH or "vmemu" not in assembly


@pytest.mark.parametrize("name", ["norm", "rope", "attention", "sampling"])
def test_without_floats_in_vectors_kernels_are_scalar(name):
    """V66, and every simulated level."""
    for isa in (HexagonHvx(66), HVX):
        chosen = isa.for_family(SPECS[name].family)
        assert (chosen.name, chosen.lanes) == (f"v{isa.version}-scalar", 4)
        assert isa.for_family("qmatmul_hvx") is isa
    shape = CacheShape(8, 64, 512)
    spec = KernelSpec("kernel", "attention", AttentionShape(1, 32, shape))
    assembly = assembly_of(spec, HexagonHvx(66))
    assert "qf32" not in assembly and "sfmpy" in assembly


def test_what_has_no_real_form():
    """bfloat16 products stay scalar; int8 keys and blocks of 16 positions make no vectors."""
    isa = HexagonHvx(75)
    assert isa.for_family("matmul").lanes == 4
    assert KernelSpec("kernel", "matmul", MatmulShape(1, 32, 64)).make(isa) is not None
    for cache in (CacheShape(8, 64, 512, "int8"), CacheShape(8, 64, 512)):
        shape = AttentionShape(1, 32, cache)
        generator = FAMILIES["attention"]
        assert not generator.valid(shape, isa, generator.default(shape, isa))
    assert not CacheShape(8, 64, 512, "int8", hvx=True).is_valid
    assert not CacheShape(8, 64, 544, hvx=True).is_valid
    assert not FAMILIES["hadamard"].valid(HadamardShape(1, 32), isa, {"radix": 8})
