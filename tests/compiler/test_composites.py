"""The body of each composite, run by the Relax VM, is the reference arithmetic."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any

import numpy as np
import pytest
import tvm
from tvm import relax

from llamac.compiler import reference
from llamac.compiler.composites import BODIES, CompositeBuilder
from llamac.compiler.config import LLAMA_3_2_1B, rope_table
from llamac.compiler.floats import from_bfloat16, to_bfloat16

RNG = np.random.default_rng(0)
ATTENTION = {"heads": 4, "kv_heads": 2, "head_dim": 16}
CAPACITY, TOKENS, POSITION = 24, 3, 13


@dataclass(frozen=True)
class Case:
    """A composite with its attributes and arguments; uint16 arguments are bfloat16 bits."""

    kind: str
    args: tuple[Any, ...]
    attrs: dict[str, Any] = field(default_factory=dict)


def normal(*shape, scale=1.0):
    return (RNG.normal(size=shape) * scale).astype(np.float32)


def codes(low, high, *shape):
    return RNG.integers(low, high + 1, shape).astype(np.int8)


def uniform(*shape):
    return RNG.uniform(0.001, 0.1, shape).astype(np.float32)


# Row by row: scale 1 and zero point 0 with all ties; zeros; positive only; negative only; large.
TIES = np.zeros((5, 64), np.float32)
TIES[0, :60] = np.arange(60) - 30 + 0.5
TIES[0, 60:62] = -128, 127
TIES[2], TIES[3] = np.linspace(0.1, 3.0, 64), -np.linspace(0.1, 3.0, 64)
TIES[4] = normal(64, scale=1e6)

META = np.array([POSITION, 1], np.int32)
TABLE = rope_table(LLAMA_3_2_1B, CAPACITY)[:, ::4]
INT4 = {"weight": "int4", "group": 32, "rule": "torchao"}
FLOAT16_CACHES = tuple(normal(2, CAPACITY, 16).astype(np.float16) for _ in "kv")
INT8_CACHES = (
    *(codes(-128, 127, 2, CAPACITY, 16) for _ in "kv"),
    *(np.stack([uniform(2, CAPACITY), codes(-128, 127, 2, CAPACITY)], 2) for _ in "kv"),
)
QKV = normal(TOKENS, 64), normal(TOKENS, 32), normal(TOKENS, 32)

CASES = {
    "embedding int8": Case(
        "embedding", (np.array([0, 6, 3], np.int32), codes(-128, 127, 7, 64), uniform(7))
    ),
    "embedding": Case("embedding", (np.array([6, 0], np.int32), to_bfloat16(normal(7, 64)))),
    "rms_norm": Case("rms_norm", (normal(3, 96), normal(96)), {"eps": 1e-5}),
    "rms_norm of tiny": Case(
        "rms_norm", (normal(2, 32, scale=1e-3), np.ones(32, np.float32)), {"eps": 1e-2}
    ),
    "qlinear int4": Case("qlinear", (normal(3, 64), codes(-8, 7, 48, 64), uniform(48, 2)), INT4),
    "qlinear group 16": Case(
        "qlinear", (normal(3, 64), codes(-8, 7, 48, 64), uniform(48, 4)), {**INT4, "group": 16}
    ),
    "qlinear lora": Case(
        "qlinear",
        (
            normal(3, 64),
            codes(-8, 7, 48, 64),
            uniform(48, 2),
            to_bfloat16(normal(4, 64)),
            to_bfloat16(normal(48, 4)),
        ),
        {**INT4, "lora_scale": 2.0},
    ),
    "qlinear int8": Case(
        "qlinear",
        (normal(2, 64), codes(-128, 127, 32, 64), uniform(32)),
        {"weight": "int8", "rule": "torchao"},
    ),
    "qlinear ties": Case(
        "qlinear",
        (TIES, np.eye(64, dtype=np.int8), np.ones(64, np.float32)),
        {"weight": "int8", "rule": "torchao"},
    ),
    "linear": Case("linear", (normal(3, 64), to_bfloat16(normal(48, 64)))),
    "hadamard 64": Case("hadamard", (normal(3, 64),)),
    "hadamard 128": Case("hadamard", (normal(2, 128),)),
    "rope": Case("rope", (normal(TOKENS, 64), TABLE, META), {"head_dim": 16}),
    "attention": Case(
        "attention", (*QKV, META, *FLOAT16_CACHES), {**ATTENTION, "kv_dtype": "float16"}
    ),
    "attention int8": Case(
        "attention", (*QKV, META, *INT8_CACHES), {**ATTENTION, "kv_dtype": "int8"}
    ),
    "swiglu": Case("swiglu", (normal(3, 32, scale=30.0), normal(3, 32))),
    "add": Case("add", (normal(3, 32), normal(3, 32))),
    "take_row": Case("take_row", (normal(4, 32), np.array([99, 2], np.int32))),
    "argmax": Case("argmax", (np.array([[1, 7, 7, -2]], np.float32),)),
}


def as_tensor(array):
    """A TVM tensor; bfloat16 bits become bfloat16."""
    if array.dtype != np.uint16:
        return tvm.runtime.tensor(array)
    empty = tvm.runtime.empty(array.shape, "bfloat16")
    return empty.copyfrom(array)


@pytest.fixture(scope="module")
def machine():
    """All cases in one module, compiled once."""
    builder = relax.BlockBuilder()
    composites = CompositeBuilder(builder)
    for index, case in enumerate(CASES.values()):
        dtypes = ["bfloat16" if a.dtype == np.uint16 else str(a.dtype) for a in case.args]
        params = [
            relax.Var(f"p{i}", relax.TensorType(list(a.shape), dtype))
            for i, (a, dtype) in enumerate(zip(case.args, dtypes, strict=True))
        ]
        with builder.function(f"case_{index}", params):
            with builder.dataflow():
                value = composites.call(case.kind, params, **case.attrs)
                result = builder.emit_output(value)
            builder.emit_func_output(result)
    executable = tvm.compile(builder.finalize(), target="llvm")
    return relax.VirtualMachine(executable, tvm.cpu())


@pytest.fixture
def run(machine):
    """`run(name)`: the results of a case as numpy arrays."""

    def call(name):
        index = list(CASES).index(name)
        result = machine[f"case_{index}"](*(as_tensor(a) for a in CASES[name].args))
        is_tensor = isinstance(result, tvm.runtime.Tensor)
        return [t.numpy() for t in ([result] if is_tensor else result)]

    return call


def assert_close(values, expected, limit=2e-6):
    scale = np.abs(expected).max(-1, keepdims=True)
    assert values.shape == expected.shape
    assert (np.abs(values - expected) <= limit * scale).all()


def test_every_composite_has_a_case():
    assert {case.kind for case in CASES.values()} == set(BODIES)


def test_embedding(run):
    tokens, table, scales = CASES["embedding int8"].args
    expected = reference.embedding(tokens, table, scales).astype(np.float32)
    np.testing.assert_array_equal(run("embedding int8")[0], expected)
    tokens, table = CASES["embedding"].args
    np.testing.assert_array_equal(run("embedding")[0], from_bfloat16(table)[tokens])


@pytest.mark.parametrize("name", ["rms_norm", "rms_norm of tiny"])
def test_rms_norm(run, name):
    """In the second case eps decides: without it, values would be ten times as large."""
    case = CASES[name]
    assert_close(run(name)[0], reference.rms_norm(*case.args, case.attrs["eps"]))


@pytest.mark.parametrize("name", ["qlinear int4", "qlinear group 16"])
def test_int4_linear(run, name):
    assert_close(run(name)[0], reference.qlinear_int4(*CASES[name].args))


def test_int4_linear_with_lora(run):
    *args, a, b = CASES["qlinear lora"].args
    expected = reference.qlinear_int4(*args, reference.Lora(a, b, 2.0))
    assert_close(run("qlinear lora")[0], expected)
    branch = expected - reference.qlinear_int4(*args)
    assert np.abs(branch).max() > 0.1 * np.abs(expected).max()


def test_int8_linear(run):
    assert_close(run("qlinear int8")[0], reference.qlinear_int8(*CASES["qlinear int8"].args))


def test_activation_codes_are_exact(run):
    """A weight that is the identity shows the codes: ties go to even, as in the reference."""
    codes = reference.quantize_per_token(TIES)
    assert (codes.scale[0], codes.zero_point[0]) == (1.0, 0)
    assert set(np.rint(TIES[0, :60]) % 2) == {0.0}
    expected = codes.centred().astype(np.float32) * codes.scale[:, None]
    np.testing.assert_array_equal(run("qlinear ties")[0], expected)


def test_linear(run):
    assert_close(run("linear")[0], reference.linear(*CASES["linear"].args))


@pytest.mark.parametrize("name", ["hadamard 64", "hadamard 128"])
def test_hadamard(run, name):
    assert_close(run(name)[0], reference.hadamard(CASES[name].args[0]))


def test_rope(run):
    x, table, _ = CASES["rope"].args
    rows = table[POSITION : POSITION + TOKENS]
    expected = reference.rope(x.reshape(TOKENS, 4, 16), rows).reshape(TOKENS, 64)
    assert_close(run("rope")[0], expected)


def attended(keys, values):
    """Attention of the case's queries over caches [Hkv, C, D]."""
    sides = (np.asarray(cache).transpose(1, 0, 2) for cache in (keys, values))
    out = reference.attention(QKV[0].reshape(TOKENS, 4, 16), *sides, POSITION)
    return out.reshape(TOKENS, 64)


def appended(cache, rows):
    """The cache [Hkv, C, ...] with rows [T, Hkv, ...] at the case's positions."""
    result = cache.copy()
    result[:, POSITION : POSITION + TOKENS] = np.moveaxis(rows, 0, 1)
    return result


def test_attention_over_float16(run):
    """Only the new rows change; queries see float16 and nothing behind their own position."""
    out, *caches = run("attention")
    new = [rows.reshape(TOKENS, 2, 16).astype(np.float16) for rows in QKV[1:]]
    expected = [appended(c, rows) for c, rows in zip(FLOAT16_CACHES, new, strict=True)]
    for cache, wanted in zip(caches, expected, strict=True):
        np.testing.assert_array_equal(cache, wanted)
    assert_close(out, attended(*expected))


def test_attention_over_int8(run):
    """Codes and parameters of the new rows are the reference's; old rows are used as they are."""
    out, *caches = run("attention int8")
    new = [reference.quantize_kv(rows.reshape(TOKENS, 2, 16)) for rows in QKV[1:]]
    params = [np.stack([q.scale, q.zero_point.astype(np.float32)], axis=-1) for q in new]
    rows = [*(q.codes for q in new), *params]
    expected = [appended(c, r) for c, r in zip(INT8_CACHES, rows, strict=True)]
    for cache, wanted in zip(caches, expected, strict=True):
        np.testing.assert_array_equal(cache, wanted)
    floats = [
        (codes.astype(float) - params[..., 1:]) * params[..., :1]
        for codes, params in zip(expected[:2], expected[2:], strict=True)
    ]
    assert_close(out, attended(*floats))


def test_swiglu(run):
    assert_close(run("swiglu")[0], reference.swiglu(*CASES["swiglu"].args))


def test_add_take_row_argmax(run):
    np.testing.assert_array_equal(run("add")[0], np.add(*CASES["add"].args))
    np.testing.assert_array_equal(run("take_row")[0], CASES["take_row"].args[0][2:3])
    np.testing.assert_array_equal(run("argmax")[0], [1])


def test_equal_composites_are_one_function():
    """Kind, attributes and types make a function; a call with other attributes makes another."""
    builder = relax.BlockBuilder()
    composites = CompositeBuilder(builder)
    types = [relax.TensorType([2, 32], "float32"), relax.TensorType([32], "float32")]
    params = [relax.Var(name, ty) for name, ty in zip("xg", types, strict=True)]
    with builder.function("main", params):
        with builder.dataflow():
            x, gamma = params
            x = composites.call("rms_norm", [x, gamma], eps=1e-5)
            x = composites.call("rms_norm", [x, gamma], eps=1e-5)
            x = composites.call("rms_norm", [x, gamma], eps=1e-6)
            result = builder.emit_output(composites.call("hadamard", [x]))
        builder.emit_func_output(result)
    functions = [f for f in builder.finalize().functions.values() if "Composite" in (f.attrs or {})]
    kinds = sorted(str(f.attrs["Composite"]) for f in functions)
    assert kinds == ["llamac.hadamard", "llamac.rms_norm", "llamac.rms_norm"]
