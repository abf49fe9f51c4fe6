"""A program is plain data: it goes through JSON unchanged, and knows what a token reads."""

from __future__ import annotations

import json
from collections.abc import Callable
from typing import Any

import numpy as np
import pytest

from llamac.targets.program import (
    DTYPE_BYTES,
    Function,
    Pack,
    Program,
    ProgramKernel,
    ProgramTensor,
    Step,
    tensor_bytes,
)


@pytest.fixture
def program() -> Program:
    """decode: look up a row, rotate with a row of the table, multiply with everything."""
    table = ("weights", 12288, "float32", (10, 2, 16))
    weight = ("weights", 4096, "int8", (96, 64))
    tensors = (
        ProgramTensor("tokens", "arena", 0, "int32", (1,)),
        ProgramTensor("embedding", *weight, Pack("int8.rows", ("tok_embeddings",))),
        ProgramTensor("rope:rope", *table, Pack("rope", ("rope",))),
        ProgramTensor("linear", *weight, Pack("int8.blocks", ("a", "b"), interleave=True)),
        ProgramTensor("x", "arena", 64, "float32", (1, 64)),
        ProgramTensor("unused", *weight, Pack("int8.rows", ("c",))),
    )
    kernels = (
        ProgramKernel("embedding_1x64", "embedding", {"vocab": 96, "tokens": 1}, 1),
        ProgramKernel("rope", "rope", {}, 4),
        ProgramKernel("matmul", "qmatmul_int8", {"splits": [1, 2]}, 6),
    )
    steps = (Step(0, (0, 1, 4)), Step(1, (4, 2)), Step(2, (4, 3, 4)), Step(2, (4, 3, 4)))
    prefill = Function("prefill_8", 8, (Step(0, (0, 5)),), 0, 0, 0, 4, 4)
    decode = Function("decode", 1, steps, 1, 0, 0, 4, 4)
    return Program(tensors, kernels, (prefill, decode), 20480, 4096, 0)


def test_a_step_counts_once_and_a_table_one_row(program: Program) -> None:
    """The arena, and what only prefill reads, do not count."""
    assert program.weight_bytes_per_token() == 64 + 2 * 16 * 4 + 96 * 64


def test_functions_by_name(program: Program) -> None:
    assert program.function("decode") is program.functions[1]
    with pytest.raises(StopIteration):
        program.function("prefill_9")


def test_json_round_trip(program: Program) -> None:
    """Tuples, packs and missing packs come back as they were; the text is reproducible."""
    text = program.to_json()
    again = Program.from_json(text)
    assert again == program
    assert again.to_json() == text
    assert json.loads(text)["tensors"][3]["pack"]["interleave"] is True


@pytest.mark.parametrize("form", ["spinquant", "qlora", "float"])
def test_json_round_trip_of_a_model(lowered: Callable[..., Any], form: str) -> None:
    """All that a real program has; shapes of kernels become lists, which is the same JSON."""
    program = lowered(form).program
    again = Program.from_json(program.to_json())
    assert again.to_json() == program.to_json()
    assert (again.tensors, again.functions) == (program.tensors, program.functions)


def test_sizes_of_dtypes() -> None:
    for dtype, size in DTYPE_BYTES.items():
        numpy = np.dtype("uint16" if dtype == "bfloat16" else dtype)
        assert tensor_bytes(dtype, (3, 5)) == 15 * size == 15 * numpy.itemsize
