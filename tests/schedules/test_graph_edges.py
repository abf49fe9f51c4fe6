"""What surrounds a graph: conversion, positions and the append to the cache, exact to the bit."""

from __future__ import annotations

import json
from dataclasses import asdict, replace

import numpy as np
import pytest

from llamac.schedules import append, convert, graph, positions
from llamac.schedules.append import AppendShape
from llamac.schedules.convert import ConvertShape
from llamac.schedules.graph import GraphShape, GraphTensor, NeuronGraph, QnnGraph
from llamac.schedules.kernel import num_outputs, work_items
from llamac.schedules.positions import MASKED, PositionsShape
from llamac.schedules.quantized import Quantization
from llamac.schedules.rope import CacheShape
from llamac.targets.cpu.entry_graphs import graph_index, graph_source

RNG = np.random.default_rng


def test_floats_become_halves_and_back(isa, run_kernel):
    """Half to even, subnormals, and beyond the range infinity."""
    x = RNG(0).normal(size=(3, 64)).astype(np.float32)
    x[0, :6] = [0.0, -0.0, 2.0**-24, 3 * 2.0**-25, 65504.0, 1e6]
    with np.errstate(over="ignore"):
        expected = x.astype(np.float16)
    [half] = run_kernel(convert.make(ConvertShape(3, 64, to_graph=True), isa), isa, x)
    assert half.shape == (1, 3, 64) and half.tobytes() == expected.tobytes()
    [wide] = run_kernel(convert.make(ConvertShape(3, 64, to_graph=False), isa), isa, half)
    assert wide.tobytes() == expected.astype(np.float32).tobytes()


@pytest.mark.parametrize(
    "codes", [Quantization("uint16", 0.0003, 30000), Quantization("int16", 0.007)], ids=str
)
def test_floats_become_codes_and_back(isa, run_kernel, codes):
    """Ties to even, clamped at both ends, and the same float32 steps back."""
    x = RNG(3).uniform(-30, 30, (3, 64)).astype(np.float32)
    x[0, :5] = [0.0, -0.0, 1e9, -1e9, 2.5 * codes.scale]
    inverse = np.float32(1) / np.float32(codes.scale)
    expected = np.clip(np.rint(x * inverse) + np.float32(codes.zero_point), *codes.limits)
    [got] = run_kernel(convert.make(ConvertShape(3, 64, True, codes), isa), isa, x)
    assert got.dtype == codes.dtype and np.array_equal(got[0], expected.astype(codes.dtype))
    [back] = run_kernel(convert.make(ConvertShape(3, 64, False, codes), isa), isa, got)
    centred = (got[0].astype(np.int32) - codes.zero_point).astype(np.float32)
    assert back.tobytes() == (centred * np.float32(codes.scale)).tobytes()


@pytest.mark.parametrize(("tokens", "first"), [(1, 0), (1, 37), (8, 13), (5, 59)])
def test_positions(isa, run_kernel, tokens, first):
    """The rows of the table from the first position, and who sees whom."""
    shape = PositionsShape(tokens, 80, 16, 64)
    angles = RNG(1).uniform(0, 6.3, (80, 8))
    cos, sin = (np.repeat(f(angles), 2, -1).astype(np.float32) for f in (np.cos, np.sin))
    sin[:, 0::2] *= -1
    table = np.stack([cos, sin], 1)
    meta = np.array([first, tokens - 1], np.int32)
    got = run_kernel(positions.make(shape, isa), isa, table, meta)
    here = slice(first, first + tokens)
    assert got[0][:, 0, :, 0].tobytes() == cos[here, 1::2].astype(np.float16).tobytes()
    assert got[1][:, 0, :, 0].tobytes() == sin[here, 1::2].astype(np.float16).tobytes()
    for token, row in enumerate(got[2]):
        seen = {*range(first), *range(64, 64 + token + 1)}
        assert set(np.flatnonzero(row == 0)) == seen
        assert set(row[row != 0]) <= {np.float16(MASKED)}


def test_positions_as_codes(isa, run_kernel):
    """The same as codes; what is masked has the smallest code."""
    turns, mask = Quantization("uint16", 1 / 32767, 32768), Quantization("uint16", 0.001, 60000)
    shape = PositionsShape(3, 80, 16, 64, turns, mask)
    table = RNG(1).uniform(-1, 1, (80, 2, 16)).astype(np.float32)
    got = run_kernel(positions.make(shape, isa), isa, table, np.array([20, 2], np.int32))
    inverse = np.float32(1) / np.float32(turns.scale)
    for part, side in zip(got[:2], (0, 1), strict=True):
        wanted = np.rint(table[20:23, side, 1::2] * inverse) + np.float32(32768)
        assert part.dtype == np.uint16
        assert np.array_equal(part[:, 0, :, 0], wanted.astype(np.uint16))
    for token, row in enumerate(got[2]):
        assert set(np.flatnonzero(row == 60000)) == {*range(20), *range(64, 64 + token + 1)}
        assert set(row[row != 60000]) == {0}


@pytest.mark.parametrize(("tokens", "first"), [(1, 31), (7, 12), (16, 48)])
def test_append_codes(isa, run_kernel, tokens, first):
    """Codes as they are, and beside each row the one scale, for the kernels of a CPU."""
    cache = CacheShape(2, 32, 64, "int8")
    sides = Quantization("int8", 0.03), Quantization("int8", 0.5, 3)
    k_new, v_new = RNG(2).integers(-128, 128, (2, 2, tokens, 32)).astype(np.int8)
    k, v = np.full(cache.k_shape, 7, np.int8), np.full(cache.v_shape, 7, np.int8)
    params = [np.full(cache.params_shape, -1, np.float32) for _ in "kv"]
    meta = np.array([first, tokens - 1], np.int32)
    func = append.make(AppendShape(tokens, cache, *sides), isa)
    run_kernel(func, isa, k_new, v_new, meta, k, v, *params)
    here = slice(first, first + tokens)
    keys = k.transpose(0, 1, 3, 2).reshape(2, 64, 32)
    for side, new, rows, codes in zip((keys, v), (k_new, v_new), params, sides, strict=True):
        assert np.array_equal(side[:, here], new)
        assert np.all(np.delete(side, here, axis=1) == 7)
        assert np.all(rows[:, here] == np.array([codes.scale, codes.zero_point], np.float32))
        assert np.all(np.delete(rows, here, axis=1) == -1)


@pytest.mark.parametrize(("tokens", "first"), [(1, 31), (7, 12), (16, 48)])
def test_append_int16(isa, run_kernel, tokens, first):
    """Codes as they are; rows have no scales, and no kernel of a CPU takes the cache."""
    cache = CacheShape(2, 32, 64, "int16")
    sides = Quantization("int16", 0.03), Quantization("int16", 0.5)
    k_new, v_new = RNG(2).integers(-(2**15), 2**15, (2, 2, tokens, 32)).astype(np.int16)
    k, v = np.full(cache.k_shape, 7, np.int16), np.full(cache.v_shape, 7, np.int16)
    meta = np.array([first, tokens - 1], np.int32)
    shape = AppendShape(tokens, cache, *sides)
    assert append.valid(shape, isa, {}) and not cache.is_valid
    run_kernel(append.make(shape, isa), isa, k_new, v_new, meta, k, v)
    here = slice(first, first + tokens)
    keys = k.transpose(0, 1, 3, 2).reshape(2, 64, 32)
    for side, new in ((keys, k_new), (v, v_new)):
        assert np.array_equal(side[:, here], new)
        assert np.all(np.delete(side, here, axis=1) == 7)


CODES = {dtype: Quantization(dtype, 0.1) for dtype in ("int8", "int16")}


@pytest.mark.parametrize(
    ("dtype", "sides"),
    [
        ("float16", [CODES["int8"]] * 2),
        ("int8", []),
        ("int8", [CODES["int16"]] * 2),
        ("int16", [CODES["int16"]]),
        ("int16", [CODES["int16"], CODES["int8"]]),
        ("float32", []),
    ],
)
def test_append_wants_the_codes_of_its_cache(isa, dtype, sides):
    assert not append.valid(AppendShape(1, CacheShape(2, 32, 64, dtype), *sides), isa, {})


@pytest.mark.parametrize(("tokens", "first"), [(1, 31), (7, 12), (16, 48)])
def test_append(isa, run_kernel, tokens, first):
    """New rows, in blocks of keys and in rows of values; nothing else changes."""
    cache = CacheShape(2, 32, 64)
    bits = RNG(2).integers(0, 2**16, (2, 2, tokens, 32)).astype(np.uint16)
    k_new, v_new = bits.view(np.float16)
    k = np.full(cache.k_shape, 7, np.float16)
    v = np.full(cache.v_shape, 7, np.float16)
    meta = np.array([first, tokens - 1], np.int32)
    func = append.make(AppendShape(tokens, cache), isa)
    assert (num_outputs(func), work_items(func)) == (0, 2)
    run_kernel(func, isa, k_new, v_new, meta, k, v)
    keys = k.transpose(0, 1, 3, 2).reshape(2, 64, 32)
    for side, new in ((keys, k_new), (v, v_new)):
        assert side[:, first : first + tokens].tobytes() == new.tobytes()
        kept = np.delete(side, slice(first, first + tokens), axis=1)
        assert np.all(kept == 7)


QNN, NEURON = QnnGraph(57, "v2.51.0.1"), NeuronGraph("mt6991", "a" * 64, "apu/g.tflite")


def example(vendor: QnnGraph | NeuronGraph = QNN) -> GraphShape:
    """A graph of one tensor in and one out."""
    tensors = (GraphTensor("hidden", (1, 2, 8)),), (GraphTensor("layers.0.k_new", (1, 2, 4)),)
    where = ("step", "QNN_1", "htp/step.bin", "0" * 64, 4096)
    return GraphShape(*where, *tensors, ("layers.0.attention.wq",), vendor)


def test_a_graph_is_a_call_in_the_ir(isa):
    func = graph.make(example(), isa)
    assert (num_outputs(func), work_items(func)) == (1, 1)
    text = func.script()
    assert 'call_packed("llamac.graph", "htp/step.bin", "QNN_1"' in text


def test_a_graph_is_a_table_and_a_function_in_c():
    """Sizes in bytes, inputs before outputs; without graphs there is nothing."""
    assert graph_source([]) == []
    text = "\n".join(graph_source([example()]))
    assert '{"hidden", 32}' in text and '{"layers.0.k_new", 16}' in text
    assert "UINT64_C(4096), 57" in text and "graph_0_tensors, 1, 1}" in text
    assert "llamac_graph_call(self, 0, args, num_args)" in text
    assert graph_index([example()]) == {"step": "graph_0"}


def test_a_graph_for_mediatek_has_its_own_table_and_functions():
    """The runner compares hash and SoC; nothing of Qualcomm's is there."""
    text = "\n".join(graph_source([example(NEURON)]))
    assert f'UINT64_C(4096), "{"a" * 64}", "mt6991", NULL, graph_0_tensors, 1, 1}}' in text
    assert "llamac_neuron_open_beside(graphs, 1, folder, &opened, error)" in text
    assert "llamac_neuron_call(self, 0, args, num_args)" in text
    assert "qnn/qnn.h" not in text and "llamac_graphs_open" not in text
    compiled = replace(NEURON, dla="apu/g.dla", dla_bytes=99)
    text = "\n".join(graph_source([example(compiled)]))
    assert '&(const llamac_neuron_dla){"apu\\057g.dla", UINT64_C(99)}, graph_0' in text


@pytest.mark.parametrize("vendor", [QNN, NEURON])
def test_json_keeps_the_vendor(vendor):
    shape = example(vendor)
    assert GraphShape.from_fields(json.loads(json.dumps(asdict(shape)))) == shape
