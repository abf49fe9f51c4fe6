"""The model as Relax functions of composites: its shape, and what it computes in the Relax VM."""

from __future__ import annotations

from collections import Counter
from dataclasses import replace

import numpy as np
import pytest
import tvm
from tvm import relax

from llamac.compiler.checkpoint import TensorInfo
from llamac.compiler.config import rope_table
from llamac.compiler.frontends.meta import from_meta
from llamac.compiler.llama import ROPE_TABLE, ModelOptions, build_llama, cache_names
from llamac.compiler.reference_model import ReferenceModel
from llamac.targets.cpu.composite_calls import entry_functions, read_calls

CAPACITY, CHUNK = 24, 8
PROMPT = [3, 17, 95, 5, 64, 2, 1, 7, 12, 13]


def share_tables(tensors, params):
    """Make the output layer equal to the embedding."""
    for part in ("weight", "scales"):
        if f"tok_embeddings.{part}" in tensors:
            tensors[f"output.{part}"] = tensors[f"tok_embeddings.{part}"].clone()


@pytest.fixture
def checkpoint(write_meta):
    """checkpoint(form, change=None): a tiny random checkpoint through the front end."""
    return lambda form, change=None: from_meta(write_meta(form, change))


def build(checkpoint, kv_dtype="float16", chunks=(CHUNK,)):
    return build_llama(checkpoint, ModelOptions(CAPACITY, chunks, kv_dtype))


def param_info(var):
    return TensorInfo(tuple(int(n) for n in var.ty.shape), str(var.ty.dtype.dtype))


def test_one_function_for_each_chunk_and_decode(checkpoint):
    module = build(checkpoint("spinquant"), chunks=(16, 8))
    functions = entry_functions(module)
    assert set(functions) == {"prefill_16", "prefill_8", "decode"}
    for name, tokens in (("prefill_16", 16), ("prefill_8", 8), ("decode", 1)):
        first, second, *_ = functions[name].params
        assert (first.name, param_info(first)) == ("tokens", TensorInfo((tokens,), "int32"))
        assert (second.name, param_info(second)) == ("meta", TensorInfo((2,), "int32"))
    relax.analysis.well_formed(module)  # raises if it is not


@pytest.mark.parametrize("form", ["spinquant", "qlora", "ptq", "float"])
def test_parameters_are_the_checkpoint(checkpoint, form):
    """Every tensor of the checkpoint is a parameter of its shape; table and caches follow."""
    source = checkpoint(form)
    params = {p.name: param_info(p) for p in build(source)["decode"].params[2:]}
    weights = {n: source.weights.info(n) for n in source.weights.names()}
    assert {name: params[name] for name in weights} == weights
    extra = {name: info for name, info in params.items() if name not in weights}
    config = source.config
    assert extra.pop(ROPE_TABLE) == TensorInfo((CAPACITY, config.head_dim // 2, 2), "float32")
    names = [n for layer in range(config.num_layers) for n in cache_names("float16", layer)]
    cache = TensorInfo((config.num_kv_heads, CAPACITY, config.head_dim), "float16")
    assert extra == dict.fromkeys(names, cache)


def test_int8_caches_have_parameters(checkpoint):
    params = {p.name: param_info(p) for p in build(checkpoint("ptq"), "int8")["decode"].params}
    assert params["layers.1.k_cache"] == TensorInfo((2, CAPACITY, 16), "int8")
    assert params["layers.1.v_params"] == TensorInfo((2, CAPACITY, 2), "float32")


@pytest.mark.parametrize("form", ["spinquant", "float"])
def test_a_shared_table_is_one_parameter(checkpoint, form):
    """The output layer then reads the embedding's parameters."""
    module = build(checkpoint(form, share_tables))
    names = {p.name for p in module["decode"].params}
    assert not [name for name in names if name.startswith("output.")]
    calls, _, _ = read_calls(module, module["decode"])
    assert calls[-2].args[1].name == calls[0].args[1].name == "tok_embeddings.weight"


@pytest.mark.parametrize(
    ("form", "extra"),
    [("spinquant", {"hadamard": 2}), ("qlora", {}), ("ptq", {}), ("float", {})],
)
def test_composites_of_a_form(checkpoint, form, extra):
    """Two layers of the same composites; SpinQuant alone transforms online."""
    module = build(checkpoint(form))
    calls, results, _ = read_calls(module, module["decode"])
    linear = {"linear": 15} if form == "float" else {"qlinear": 15}
    counts = {"embedding": 1, "rms_norm": 5, "rope": 4, "attention": 2, "swiglu": 2, "add": 4}
    expected = counts | linear | extra | {"take_row": 1, "argmax": 1}
    assert Counter(call.kind for call in calls) == expected
    assert [call.kind for call in calls[-4:-2]] == ["take_row", "rms_norm"]
    assert len(results) == 2 + 2 * 2
    lora = {len(call.args) for call in calls if call.attrs.get("weight") == "int4"}
    assert lora == {"float": set(), "qlora": {5}}.get(form, {3})


def test_layers_share_their_composites(checkpoint):
    """Functions are made for shapes, not for layers."""

    def composites(source):
        module = build(source)
        return len(module.functions) - len(entry_functions(module))

    source = checkpoint("ptq")
    fewer = replace(source, config=replace(source.config, num_layers=1))
    assert composites(fewer) == composites(source)


class Machine:
    """A model in the Relax VM that keeps its caches between calls."""

    def __init__(self, checkpoint, kv_dtype):
        self.checkpoint = checkpoint
        self.module = build(checkpoint, kv_dtype)
        self.vm = relax.VirtualMachine(tvm.compile(self.module, target="llvm"), tvm.cpu())
        self.values = {
            name: self._tensor(checkpoint.weights.read(name), checkpoint.weights.info(name).dtype)
            for name in checkpoint.weights.names()
        }
        table = rope_table(checkpoint.config, CAPACITY)
        self.values[ROPE_TABLE] = tvm.runtime.tensor(table)
        self.caches = [
            n for layer in range(checkpoint.config.num_layers) for n in cache_names(kv_dtype, layer)
        ]

    def _tensor(self, array, dtype):
        return tvm.runtime.empty(array.shape, dtype).copyfrom(np.ascontiguousarray(array))

    def __call__(self, function, tokens, position, last):
        """Logits [V] of row `last` and their argmax."""
        inputs = {"tokens": np.array(tokens, np.int32), "meta": np.array([position, last])}
        args = []
        for param in self.module[function].params:
            info = param_info(param)
            if param.name in inputs:
                args.append(self._tensor(inputs[param.name].astype(np.int32), "int32"))
                continue
            if param.name not in self.values:
                self.values[param.name] = self._tensor(np.zeros(info.shape, info.dtype), info.dtype)
            args.append(self.values[param.name])
        logits, best, *caches = self.vm[function](*args)
        self.values.update(zip(self.caches, caches, strict=True))
        return logits.numpy()[0], int(best.numpy()[0])


VARIANTS = [
    pytest.param("spinquant", "float16", False),
    pytest.param("qlora", "float16", False, marks=pytest.mark.slow),
    pytest.param("ptq", "int8", False, marks=pytest.mark.slow),
    pytest.param("ptq", "float16", True, marks=pytest.mark.slow),
    pytest.param("float", "float16", False, marks=pytest.mark.slow),
    pytest.param("float", "float16", True, marks=pytest.mark.slow),
]


@pytest.mark.parametrize(("form", "kv_dtype", "shared"), VARIANTS)
def test_logits_are_those_of_the_reference(checkpoint, form, kv_dtype, shared):
    """A full chunk, a padded one that is overwritten, and single tokens."""
    source = checkpoint(form, share_tables if shared else None)
    assert source.shared_embedding is shared
    machine = Machine(source, kv_dtype)
    model = ReferenceModel(source, scale_dtype="float32", kv_dtype=kv_dtype)
    expected = model.logits(PROMPT)
    calls = [
        ("prefill_8", PROMPT[:3] + [0] * 5, 0, 2),
        ("prefill_8", [*PROMPT[3:8], 0, 0, 0], 3, 4),
        ("decode", PROMPT[8:9], 8, 0),
        ("decode", PROMPT[9:], 9, 0),
    ]
    for function, tokens, position, last in calls:
        logits, best = machine(function, tokens, position, last)
        wanted = expected[position + last]
        assert np.abs(logits - wanted).max() <= 2e-6 * np.abs(wanted).max()
        assert best == wanted.argmax()
