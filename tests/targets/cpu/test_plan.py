"""The memory plan, replayed from the program alone: nobody's tensor is overwritten too early."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from itertools import combinations, pairwise
from typing import Any

import pytest

from llamac.compiler.config import LLAMA_3_2_1B
from llamac.schedules.intrin.x86 import X86_LEVELS
from llamac.targets.cpu import plan
from llamac.targets.program import Function, Program, ProgramTensor

PAGE = 4096
VARIANTS = [
    ("spinquant", {}),
    ("spinquant", {"shared": True, "kv_dtype": "int8"}),
    ("qlora", {"scale_dtype": "bfloat16"}),
    ("ptq", {"chunks": (32, 16, 8)}),
    ("float", {"shared": True}),
]
IDS = ["spinquant", "shared-int8", "qlora", "ptq", "float-shared"]


@pytest.fixture(params=VARIANTS, ids=IDS)
def model(request: pytest.FixtureRequest, lowered: Callable[..., Any]) -> Any:
    """Each form with its options."""
    form, options = request.param
    return lowered(form, **options)


def lifetimes(program: Program, function: Function) -> dict[int, tuple[int, int]]:
    """First and last step that touches each arena tensor; inputs and results live on."""
    lives: dict[int, tuple[int, int]] = {i: (-1, -1) for i in (function.tokens, function.meta)}
    for index, step in enumerate(function.steps):
        for operand in step.operands:
            if program.tensors[operand].space == "arena":
                lives[operand] = (lives.get(operand, (index, index))[0], index)
    for operand in (function.tokens, function.meta, function.logits, function.argmax):
        lives[operand] = (lives[operand][0], len(function.steps))
    return lives


def overlapping(program: Program, lives: dict[int, tuple[int, int]]) -> Iterator[tuple[str, str]]:
    """Names of tensors that live at the same time in the same bytes."""
    for a, b in combinations(lives, 2):
        first, second = program.tensors[a], program.tensors[b]
        together = lives[a][0] <= lives[b][1] and lives[b][0] <= lives[a][1]
        if together and share_bytes(first, second):
            yield first.name, second.name


def share_bytes(a: ProgramTensor, b: ProgramTensor) -> bool:
    """Whether two tensors of a space overlap."""
    return a.offset < b.offset + b.num_bytes and b.offset < a.offset + a.num_bytes


def test_live_tensors_do_not_overlap(model: Any) -> None:
    for function in model.program.functions:
        assert list(overlapping(model.program, lifetimes(model.program, function))) == []


def test_the_replay_finds_an_overlap(model: Any) -> None:
    """If everything lived all the time, tensors would share bytes: places are reused."""
    function = model.program.functions[0]
    always = dict.fromkeys(lifetimes(model.program, function), (0, len(function.steps)))
    assert list(overlapping(model.program, always))


def test_the_arena_is_no_larger_than_needed(model: Any) -> None:
    """At least what lives at the busiest step; at most a third more than that."""
    program = model.program
    busiest = 0
    for function in program.functions:
        lives = lifetimes(program, function)
        for step in range(len(function.steps)):
            live = [i for i, (first, last) in lives.items() if first <= step <= last]
            size = sum(plan.align_up(program.tensors[i].num_bytes, 64) for i in live)
            busiest = max(busiest, size)
    assert busiest <= program.arena_bytes <= busiest * 4 / 3 + PAGE


def test_every_tensor_is_inside_its_space_and_aligned(model: Any) -> None:
    """64 bytes in the arena; pages for weights and caches that are a page or more."""
    program = model.program
    sizes = {
        "weights": program.weights_bytes,
        "arena": program.arena_bytes,
        "kv": program.kv_bytes,
    }
    assert all(size % PAGE == 0 for size in sizes.values())
    for tensor in program.tensors:
        is_large = tensor.space != "arena" and tensor.num_bytes >= PAGE
        assert tensor.offset % (PAGE if is_large else 64) == 0
        assert tensor.offset + tensor.num_bytes <= sizes[tensor.space]


@pytest.mark.parametrize("space", ["weights", "kv"])
def test_weights_and_caches_never_overlap(model: Any, space: str) -> None:
    tensors = [t for t in model.program.tensors if t.space == space]
    tensors.sort(key=lambda t: t.offset)
    assert len({t.name for t in tensors}) == len(tensors) > 1
    for before, after in pairwise(tensors):
        assert before.offset + before.num_bytes <= after.offset


def test_weights_stand_in_the_order_of_decode(model: Any) -> None:
    """One token reads the file from front to back, after the header."""
    program = model.program
    decode = program.functions[-1]
    order = dict.fromkeys(i for step in decode.steps for i in step.operands)
    tensors = [program.tensors[i] for i in order]
    offsets = [t.offset for t in tensors if t.space == "weights"]
    assert offsets == sorted(offsets)
    assert offsets[0] == PAGE
    # And decode reads all that there is.
    assert len(offsets) == sum(t.space == "weights" for t in program.tensors)


def test_every_weight_of_the_checkpoint_is_packed(model: Any) -> None:
    """Each tensor is a source of a packed one, and nothing else is."""
    packs = [t.pack for t in model.program.tensors if t.space == "weights"]
    sources = {source for pack in packs for source in pack.sources}
    names = model.checkpoint.weights.names()
    wanted = {n.removesuffix(".weight") for n in names if n.endswith(".weight")}
    wanted = {n for n in wanted if ".adaptor" not in n} | {"rope"}
    assert sources == wanted - ({"output"} if model.checkpoint.shared_embedding else set())
    assert all(t.pack is None for t in model.program.tensors if t.space != "weights")


def test_caches_are_in_their_own_space(model: Any) -> None:
    """As many as layers have, and of the size that the configuration says."""
    config, program = model.checkpoint.config, model.program
    caches = [t for t in program.tensors if t.space == "kv"]
    is_int8 = any(t.dtype == "int8" for t in caches)
    assert len(caches) == config.num_layers * (4 if is_int8 else 2)
    parts = {t.name.rpartition(".")[2] for t in caches}
    assert parts == {"k_cache", "v_cache"} | ({"k_params", "v_params"} if is_int8 else set())
    width = config.head_dim * (1 if is_int8 else 2) + (8 if is_int8 else 0)
    assert sum(t.num_bytes for t in caches) == (
        2 * config.num_layers * config.num_kv_heads * 64 * width
    )


def test_functions_share_weights_and_caches(model: Any) -> None:
    """Prefill works on the very tensors that decode works on."""
    program = model.program

    def shared(function: Function) -> set[int]:
        used = {i for step in function.steps for i in step.operands}
        return {i for i in used if program.tensors[i].space != "arena"}

    first, *others = (shared(function) for function in program.functions)
    assert all(other == first for other in others)


def test_functions_come_largest_first(model: Any) -> None:
    functions = model.program.functions
    tokens = [f.num_tokens for f in functions]
    assert tokens == sorted(tokens, reverse=True)
    assert (functions[-1].name, functions[-1].num_tokens) == ("decode", 1)
    assert [f.name for f in functions[:-1]] == [f"prefill_{n}" for n in tokens[:-1]]
    for function in functions:
        shapes = [
            (model.program.tensors[i].dtype, model.program.tensors[i].shape)
            for i in (function.tokens, function.meta, function.logits, function.argmax)
        ]
        vocab = model.checkpoint.config.vocab_size
        assert shapes == [
            ("int32", (function.num_tokens,)),
            ("int32", (2,)),
            ("float32", (1, vocab)),
            ("int32", (1,)),
        ]


def test_logits_steps_are_those_after_the_last_layer(model: Any) -> None:
    """What is skipped for a chunk that more tokens follow touches no cache."""
    program = model.program
    for function in program.functions:
        steps = function.steps[len(function.steps) - function.num_logits_steps :]
        families = [program.kernels[step.kernel].family for step in steps]
        assert (families[0], families[-1]) == ("select", "sampling")
        operands = {program.tensors[i].space for step in steps for i in step.operands}
        assert "kv" not in operands
        earlier = function.steps[: -function.num_logits_steps]
        assert not {"select", "sampling"} & {program.kernels[s.kernel].family for s in earlier}


def test_operands_have_the_types_of_their_kernels(model: Any) -> None:
    """Each step passes what its kernel declares, in order."""
    program, isa = model.program, X86_LEVELS[0]
    for kernel in program.kernels:
        func = model.selection.kernels[kernel.name].make(isa)
        *tensors, _begin, _end = func.params
        declared = [(str(b.dtype), tuple(int(n) for n in b.shape)) for b in tensors]
        steps = [s for f in program.functions for s in f.steps]
        calls = [s for s in steps if program.kernels[s.kernel] is kernel]
        assert calls
        for step in calls:
            operands = [program.tensors[i] for i in step.operands]
            assert [(t.dtype, t.shape) for t in operands] == declared


def test_weight_bytes_per_token_of_the_1b_model(lowered: Callable[..., Any]) -> None:
    """int4 codes and scales, the int8 output layer, and little more: 0.81 GB."""
    config = LLAMA_3_2_1B
    program = lowered("spinquant", config=config, chunks=(), capacity=64).program
    rows = sum(n for n, _ in config.linear_shapes().values()) * config.num_layers
    linear = config.num_linear_weights() * (0.5 + 2 / 32) + 4 * rows
    output = config.vocab_size * (config.dim + 4 + 4)
    norms = 4 * config.dim * (2 * config.num_layers + 1)
    rows_of_tables = (config.dim + 4) + 4 * 2 * config.head_dim
    total = program.weight_bytes_per_token()
    assert total == linear + output + norms + rows_of_tables
    assert 810.0e6 < total < 813.5e6
