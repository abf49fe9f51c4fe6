"""Runs of layers become graphs in the IR, and graphs become steps of a program."""

from __future__ import annotations

from pathlib import Path

import pytest

from llamac.compiler.frontends.meta import from_meta
from llamac.compiler.llama import ModelOptions, build_llama
from llamac.schedules.graph import GraphShape, GraphTensor, QnnGraph
from llamac.schedules.intrin.arm import ArmDotprod
from llamac.targets.chunk import Chunk, cut_chunks
from llamac.targets.cpu.plan import plan_program
from llamac.targets.cpu.selection import select_kernels
from llamac.targets.outline import outline
from llamac.targets.program import Program
from llamac.targets.qnn_htp.emitter import interface

TINY = Path(__file__).resolve().parents[2] / "examples" / "tiny-llama"
CAPACITY = 64
EDGES = ["embedding", "convert", "positions"]
HEAD = ["convert", "select", "norm", "qmatmul_int8", "sampling"]


def shape_of(chunk: Chunk) -> GraphShape:
    """A graph as if a chunk had been compiled; the tiny model has 2 heads of 32."""
    kinds = {
        "hidden": (1, chunk.tokens, 128),
        "hidden_out": (1, chunk.tokens, 128),
        "rope_cos": (chunk.tokens, 1, 16, 1),
        "rope_sin": (chunk.tokens, 1, 16, 1),
        "mask": (chunk.tokens, CAPACITY + chunk.tokens),
        "k_cache": (2, CAPACITY // 16, 32, 16),
        "v_cache": (2, CAPACITY, 32),
        "k_new": (2, chunk.tokens, 32),
        "v_new": (2, chunk.tokens, 32),
    }
    sides = (
        tuple(GraphTensor(name, kinds[name.rpartition(".")[2]]) for name in names)
        for names in interface(chunk)
    )
    where = (chunk.name, "graph", f"htp/{chunk.name}.bin", "0" * 64, 4096)
    vendor = QnnGraph(57, "v2.51.0.1")
    return GraphShape(*where, *sides, chunk.linear_layers(), vendor)


def program_of(form: str, functions: tuple[str, ...], layers: int) -> Program:
    """The program of the tiny model with these functions' layers in graphs."""
    module = build_llama(from_meta(TINY / form), ModelOptions(CAPACITY, (8,)))
    chunks = [chunk for name in functions for chunk in cut_chunks(module, name, layers)]
    module = outline(module, [(chunk, shape_of(chunk)) for chunk in chunks])
    return plan_program(select_kernels(module, "float16", ArmDotprod()))


def families(program: Program, function: str) -> list[str]:
    return [program.kernels[step.kernel].family for step in program.function(function).steps]


@pytest.mark.parametrize("form", ["spinquant", "qlora"])
def test_all_layers_in_one_graph(form: str) -> None:
    """One conversion before it and one behind; each layer's keys are appended."""
    program = program_of(form, ("decode", "prefill_8"), 4)
    for function in ("decode", "prefill_8"):
        assert families(program, function) == [*EDGES, "graph", *["append"] * 4, *HEAD]
    assert [graph.name for graph in program.graphs()] == [
        "decode_layers_0_3",
        "prefill_8_layers_0_3",
    ]
    assert Program.from_json(program.to_json()).graphs() == program.graphs()


def test_graphs_hand_on_the_stream_as_it_is() -> None:
    """Two graphs share mask and table rows; what one returns the next one reads."""
    program = program_of("spinquant", ("decode",), 2)
    steps = program.function("decode").steps
    middle = ["graph", "append", "append"] * 2
    assert families(program, "decode") == [*EDGES, *middle, *HEAD]
    first, second = (s for s in steps if program.kernels[s.kernel].family == "graph")
    num_inputs = len(program.graphs()[0].inputs)
    assert second.operands[0] == first.operands[num_inputs]
    assert second.operands[1:4] == first.operands[1:4]
    names = [program.tensors[i].name for i in second.operands[4:num_inputs]]
    assert names == [f"layers.{i}.{side}_cache" for i in (2, 3) for side in "kv"]


def test_both_processors_have_one_cache() -> None:
    """Prefill in a graph, decode in kernels: the same tensors of the same space."""
    program = program_of("spinquant", ("prefill_8",), 4)
    assert "graph" not in families(program, "decode")
    assert families(program, "decode").count("attention") == 4
    caches = [t for t in program.tensors if t.space == "kv"]
    assert len(caches) == len({t.name for t in caches}) == 8
    used = {
        i
        for step in program.function("decode").steps
        for i in step.operands
        if program.tensors[i].space == "kv"
    }
    [graph] = [
        s
        for s in program.function("prefill_8").steps
        if program.kernels[s.kernel].family == "graph"
    ]
    assert used <= set(graph.operands)


def test_weights_of_graphs_are_in_no_file_of_ours() -> None:
    """Only what the CPU computes is packed; the bytes of a token count the binary."""
    whole = program_of("spinquant", (), 4)
    part = program_of("spinquant", ("decode", "prefill_8"), 4)
    packed = [t.pack.sources for t in part.tensors if t.pack is not None]
    assert not any(name.startswith("layers.") for names in packed for name in names)
    assert part.weights_bytes < whole.weights_bytes
    assert part.graphs()[0].layers[0] == "layers.0.attention_norm"
    assert len(part.graphs()[0].layers) == 4 * 9
    assert part.weight_bytes_per_token() > 4096
