"""Kernel selection: which kernels a model becomes, and how it refuses what no rule covers."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from typing import Any

import numpy as np
import pytest
from tvm import relax
from tvm.ir import IRModule

from llamac.compiler.composites import CompositeBuilder
from llamac.compiler.config import LlamaConfig
from llamac.runtime.errors import CoverageError
from llamac.schedules.intrin.hexagon import HexagonHvx
from llamac.schedules.intrin.isa import Isa
from llamac.schedules.intrin.x86 import X86_LEVELS, X86Portable
from llamac.schedules.kernel import work_items
from llamac.targets.cpu.kernels import FAMILIES
from llamac.targets.cpu.packing import Packer
from llamac.targets.cpu.selection import select_kernels
from llamac.targets.program import tensor_bytes

BEGIN, END = ["embedding"], ["select", "norm", "qmatmul_int8", "sampling"]
LAYER = ["norm", "qmatmul", "rope", "attention", "quantize", "qmatmul", "norm", "qmatmul"]
LORA_LAYER = [
    *["norm", "lora", "qmatmul", "rope", "attention", "quantize", "lora", "qmatmul"],
    *["norm", "lora", "qmatmul", "quantize", "lora", "qmatmul"],
]
FLOAT_LAYER = ["norm", "matmul", "rope", "attention", "matmul", "norm", "matmul", "matmul"]
STEPS = {
    "spinquant": BEGIN + 2 * [*LAYER, "hadamard", "qmatmul"] + END,
    "ptq": BEGIN + 2 * [*LAYER, "quantize", "qmatmul"] + END,
    "qlora": BEGIN + 2 * LORA_LAYER + END,
    "float": BEGIN + 2 * FLOAT_LAYER + ["select", "norm", "matmul", "sampling"],
}


@pytest.mark.parametrize("form", STEPS)
def test_kernels_of_a_form(lowered: Callable[..., Any], form: str) -> None:
    """What can be fused is: q, k, v; gate, up and SwiGLU; residuals; quantization."""
    program = lowered(form).program
    for function in program.functions:
        families = [program.kernels[step.kernel].family for step in function.steps]
        assert families == STEPS[form]


@pytest.mark.parametrize("form", ["spinquant", "qlora"])
def test_shapes_of_matrix_kernels(lowered: Callable[..., Any], form: str) -> None:
    """One layer of decode: rows, epilogue and LoRA of its four products."""
    program = lowered(form, scale_dtype="bfloat16").program
    steps = program.function("decode").steps
    kernels = [program.kernels[step.kernel] for step in steps]
    shapes = [k.shape for k in kernels if k.family == "qmatmul"][:4]
    assert [(s["n"], s["k"], s["epilogue"]) for s in shapes] == [
        (64 + 32 + 32, 64, "none"),
        (64, 64, "residual"),
        (256, 64, "swiglu"),
        (64, 128, "residual"),
    ]
    assert {s["scale_dtype"] for s in shapes} == {"bfloat16"}
    splits = [tuple(s["lora_splits"]) for s in shapes]
    is_lora = form == "qlora"
    assert splits == ([(64, 32, 32), (64,), (128, 128), (64,)] if is_lora else [()] * 4)
    assert {(s["lora_rank"], s["lora_scale"]) for s in shapes} == {(4, 2.0) if is_lora else (0, 1)}


HVX = HexagonHvx(75, simulate=True)


@pytest.fixture
def wide_kv(tiny: LlamaConfig) -> LlamaConfig:
    """Sizes with which each of q, k, v makes whole blocks of 64 rows, as LoRA on HVX needs."""
    return replace(tiny, num_kv_heads=4)


@pytest.mark.parametrize("form", STEPS)
def test_kernels_of_a_dsp(lowered: Callable[..., Any], wide_kv: LlamaConfig, form: str) -> None:
    """The same steps; products with integer weights are of HVX's families."""
    on_hvx = {"qmatmul": "qmatmul_hvx", "qmatmul_int8": "qmatmul_int8_hvx"}
    program = lowered(form, isa=HVX, config=wide_kv).program
    for function in program.functions:
        families = [program.kernels[step.kernel].family for step in function.steps]
        assert families == [on_hvx.get(family, family) for family in STEPS[form]]


@pytest.mark.parametrize("isa", [X86_LEVELS[0], HVX], ids=lambda isa: isa.name)
@pytest.mark.parametrize("form", ["spinquant", "float"])
def test_a_shared_table_is_stored_once(lowered: Callable[..., Any], form: str, isa: Isa) -> None:
    """In the blocks of the output layer, which the embedding reads too."""
    tensors = lowered(form, shared=True, isa=isa).program.tensors
    tables = [t for t in tensors if t.pack is not None and t.pack.sources == ("tok_embeddings",)]
    big = [t.pack.layout for t in tables if len(t.shape) > 1]
    int8 = "hvx.int8" if isa is HVX else "int8.blocks"
    assert big == [int8 if form == "spinquant" else "bf16.blocks"]


@pytest.mark.parametrize(("form", "vocab", "rows"), [("qlora", 96, 64), ("spinquant", 80, 32)])
def test_rows_that_make_no_block_of_hvx_are_refused(
    lowered: Callable[..., Any], tiny: LlamaConfig, form: str, vocab: int, rows: int
) -> None:
    with pytest.raises(CoverageError, match=f"no multiple of {rows} rows"):
        lowered(form, isa=HVX, config=replace(tiny, vocab_size=vocab))


def test_layers_share_kernels(lowered: Callable[..., Any]) -> None:
    """Kernels are made for shapes: each stands once in the module, with its work."""
    model = lowered("spinquant")
    assert len(model.selection.kernels) < len(model.program.functions[0].steps) * 3 / 2
    for name, spec in model.selection.kernels.items():
        assert spec.family in FAMILIES
        assert model.selection.work[name] == work_items(spec.make(X86_LEVELS[0])) >= 1
        assert name in {var.name_hint for var in model.selection.module.functions}


def test_the_choice_of_kernels_is_the_same_for_all_levels(lowered: Callable[..., Any]) -> None:
    """One program serves all levels of a library: names, shapes, work, places."""
    assert lowered("ptq").program == lowered("ptq", isa=X86Portable()).program


def test_packed_parameters_have_the_bytes_that_packing_makes(
    lowered: Callable[..., Any], wide_kv: LlamaConfig, rng: np.random.Generator
) -> None:
    """Shape and dtype of each weight agree with what its recipe yields."""
    plain = X86_LEVELS[0]
    for form, scale_dtype, isa in (
        ("qlora", "bfloat16", plain),
        ("float", "float16", plain),
        ("qlora", "float16", HVX),
    ):
        model = lowered(form, scale_dtype=scale_dtype, isa=isa, config=wide_kv)
        weights = _RandomWeights(model.checkpoint.weights, rng)
        packer = Packer(weights, scale_dtype)
        for tensor in model.program.tensors:
            if tensor.space != "weights":
                continue
            pieces = list(packer.pack(tensor.pack))
            assert sum(p.nbytes for p in pieces) == tensor_bytes(tensor.dtype, tensor.shape)
            assert {str(p.dtype) for p in pieces} == {tensor.dtype}


class _RandomWeights:
    """Values for shapes."""

    def __init__(self, shapes: Any, rng: np.random.Generator) -> None:
        self._shapes, self._rng = shapes, rng

    def read(self, name: str) -> Any:
        """Small integers of the dtype."""
        if name == "rope.table":
            return np.zeros((64, 8, 2), np.float32)
        info = self._shapes.info(name)
        dtype = "uint16" if info.dtype == "bfloat16" else info.dtype
        return self._rng.integers(0, 8, info.shape).astype(dtype)


# -- what no rule covers ---------------------------------------------------------------------------

Body = Callable[[Callable[..., Any], dict[str, Any]], Any]
PARAMS = {
    "tokens": ((4,), "int32"),
    "meta": ((2,), "int32"),
    "table.weight": ((32, 64), "bfloat16"),
    "norm.weight": ((64,), "float32"),
    "wq.weight": ((64, 64), "bfloat16"),
    "rope.table": ((64, 8, 2), "float32"),
    "layers.0.k_cache": ((4, 64, 16), "float16"),
    "layers.0.v_cache": ((4, 64, 16), "float16"),
}


def module_of(body: Body) -> IRModule:
    """A function `decode` over the parameters above; `body(call, params)` gives its result."""
    builder = relax.BlockBuilder()
    composites = CompositeBuilder(builder)
    params = {
        name: relax.Var(name, relax.TensorType(list(shape), dtype))
        for name, (shape, dtype) in PARAMS.items()
    }
    with builder.function("decode", list(params.values())):
        with builder.dataflow():
            value = body(composites.call, params)
            outputs = [builder.emit_output(value) for _ in range(2)]
        builder.emit_func_output(relax.Tuple(outputs))
    return builder.finalize()


def hadamard_then_add(call: Callable[..., Any], p: dict[str, Any]) -> Any:
    x = call("embedding", [p["tokens"], p["table.weight"]])
    return call("add", [x, call("hadamard", [x])])


def lone_add(call: Callable[..., Any], p: dict[str, Any]) -> Any:
    x = call("embedding", [p["tokens"], p["table.weight"]])
    return call("add", [x, x])


def lone_swiglu(call: Callable[..., Any], p: dict[str, Any]) -> Any:
    x = call("embedding", [p["tokens"], p["table.weight"]])
    return call("swiglu", [x, x])


def rope_of_the_embedding(call: Callable[..., Any], p: dict[str, Any]) -> Any:
    x = call("embedding", [p["tokens"], p["table.weight"]])
    return call("rope", [x, p["rope.table"], p["meta"]], head_dim=16)


def attention(call: Callable[..., Any], p: dict[str, Any], turned: str) -> Any:
    """Attention of three fused projections; `turned` says which of q, k, v went through RoPE."""
    x = call("embedding", [p["tokens"], p["table.weight"]])
    qkv = [call("linear", [x, p["wq.weight"]]) for _ in range(3)]
    qkv = [
        call("rope", [value, p["rope.table"], p["meta"]], head_dim=16) if name in turned else value
        for name, value in zip("qkv", qkv, strict=True)
    ]
    attrs = {"heads": 4, "kv_heads": 4, "head_dim": 16, "kv_dtype": "float16"}
    caches = [p["layers.0.k_cache"], p["layers.0.v_cache"]]
    return call("attention", [*qkv, p["meta"], *caches], **attrs)


UNCOVERED: dict[str, tuple[str, Body]] = {
    "hadamard, then add": ("hadamard", hadamard_then_add),
    "add without a product": ("add", lone_add),
    "swiglu without products": ("swiglu", lone_swiglu),
    "rope of no projection": ("rope", rope_of_the_embedding),
    "attention without rope": ("attention", lambda c, p: attention(c, p, "")),
    "attention with rope on v": ("attention", lambda c, p: attention(c, p, "qkv")),
    "attention with rope on q": ("attention", lambda c, p: attention(c, p, "q")),
}


@pytest.mark.parametrize("name", UNCOVERED)
def test_what_no_rule_covers_is_refused(name: str) -> None:
    """The error names the composite with its operands, and says why and what to do."""
    kind, body = UNCOVERED[name]
    with pytest.raises(CoverageError) as caught:
        select_kernels(module_of(body), "float16", X86_LEVELS[0])
    error = caught.value
    assert error.code == "coverage"
    assert error.message.startswith(f"llamac.{kind}(")
    assert "[4, 64]" in error.message
    assert error.cause and "--dump" in error.fix


def test_an_unknown_composite_is_refused() -> None:
    """A kind that has no rule at all."""
    module = module_of(lone_add)
    renamed = {
        var: function.with_attr("Composite", "llamac.softcap")
        if function.attrs and str(function.attrs.get("Composite", "")) == "llamac.add"
        else function
        for var, function in module.functions.items()
    }
    with pytest.raises(CoverageError, match=r"llamac\.softcap\(.*no kernel covers it"):
        select_kernels(IRModule(renamed), "float16", X86_LEVELS[0])
