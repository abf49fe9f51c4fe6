"""The generated C file compiles without a warning and says what the program says."""

from __future__ import annotations

import ast
import re
import subprocess
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from llamac.schedules.intrin.x86 import X86_LEVELS
from llamac.targets.base import Identity
from llamac.targets.cpu.entry import DTYPES, Level, entry_source
from llamac.targets.cpu.target import RUNTIME_SOURCES
from llamac.targets.program import SPACES, Program
from llamac.targets.toolchain import find_toolchain

IDENTITY = Identity("tiny", "0123456789abcdef" * 4, 96, 60, 16)
LEVELS = [Level(isa.name, isa.features) for isa in X86_LEVELS]
EMPTY = Program((), (), (), 4096, 0, 0)


def source_of(program: Program, name: str = "tiny") -> str:
    identity = Identity(name, *list(vars(IDENTITY).values())[1:])
    return entry_source(program, identity, LEVELS, "LLAMAC_X86_")


def table(source: str, name: str) -> list[str]:
    """Rows of a table."""
    found = re.search(rf"{name}\[\] = {{\n(.*?)}};", source, re.DOTALL)
    assert found is not None
    return [row.strip().removesuffix(",") for row in found[1].splitlines()]


def numbers(row: str) -> list[int]:
    """All numbers of a row outside of its comment and its text."""
    plain = re.sub(r"/\*.*?\*/|\".*?\"|UINT64_C", "", row)
    return [int(n) for n in re.findall(r"-?\b\d+\b", plain)]


@pytest.mark.parametrize("form", ["spinquant", "qlora", "float"])
def test_it_compiles_without_a_warning(
    lowered: Callable[..., Any], tmp_path: Path, form: str
) -> None:
    """All levels, and a name that has to be escaped."""
    entry = tmp_path / "entry.c"
    entry.write_text(source_of(lowered(form).program, 'a "b" \\ ??/ *␤\n7'), encoding="ascii")
    flags = ["-std=c11", "-Wall", "-Wextra", "-Wpedantic", "-Wtrigraphs", "-Werror"]
    command = [*find_toolchain().command, *flags, f"-I{RUNTIME_SOURCES}", "-c", str(entry)]
    done = subprocess.run(
        [*command, "-o", str(tmp_path / "entry.o")], capture_output=True, text=True, check=False
    )
    assert (done.returncode, done.stderr) == (0, "")


def test_tables_are_the_program(lowered: Callable[..., Any]) -> None:
    """Tensors, operands, steps and functions, number by number."""
    program = lowered("spinquant", kv_dtype="int8").program
    source = source_of(program)
    tensors = [
        [SPACES.index(t.space), *DTYPES[t.dtype], len(t.shape), t.offset, *t.shape]
        for t in program.tensors
    ]
    assert [numbers(row) for row in table(source, "tensors")] == tensors
    steps, operands, functions = [], [], []
    for f in program.functions:
        results = (f.num_logits_steps, f.tokens, f.meta, f.logits, f.argmax)
        functions.append([f.num_tokens, len(steps), len(f.steps), *results])
        for step in f.steps:
            work = program.kernels[step.kernel].work
            steps.append([step.kernel, len(step.operands), len(operands), work])
            operands += step.operands
    assert [numbers(row) for row in table(source, "steps")] == steps
    assert [int(row) for row in table(source, "operands")] == operands
    assert [numbers(row) for row in table(source, "functions")] == functions
    names = [row.split('"')[1] for row in table(source, "functions")]
    assert names == ["prefill_16", "prefill_8", "decode"]
    assert [row.strip('"') for row in table(source, "kernel_names")] == [
        kernel.name for kernel in program.kernels
    ]


def test_every_level_has_every_kernel_in_order(lowered: Callable[..., Any]) -> None:
    """A level is a table of the same kernels under its own suffix, with its feature bits."""
    program = lowered("ptq").program
    source = source_of(program)
    for level in LEVELS:
        symbols = [f"__tvm_ffi_{kernel.name}{level.suffix}" for kernel in program.kernels]
        assert table(source, f"kernels{level.suffix}") == symbols
        assert all(source.count(f"extern int32_t {symbol}(") == 1 for symbol in symbols)
    rows = table(source, "levels")
    assert [row.split('"')[1] for row in rows] == [isa.name for isa in X86_LEVELS]
    assert "LLAMAC_X86_AVX2 | LLAMAC_X86_FMA | LLAMAC_X86_F16C," in rows[2]
    assert rows[3] == '{"x86-64", 0, kernels__x86_64}'


def test_sizes_and_identity(lowered: Callable[..., Any]) -> None:
    program = lowered("ptq").program
    source = source_of(program)
    fields = dict(re.findall(r"\.(\w+) = (.*),\n", source))
    assert fields["weights_bytes"] == f"UINT64_C({program.weights_bytes})"
    assert fields["arena_bytes"] == f"UINT64_C({program.arena_bytes})"
    assert fields["kv_bytes"] == f"UINT64_C({program.kv_bytes})"
    assert [fields[n] for n in ("vocab_size", "context_length", "max_chunk")] == ["96", "60", "16"]
    assert int(fields["num_kernels"]) == len(program.kernels)
    assert int(fields["num_steps"]) == sum(len(f.steps) for f in program.functions)
    build_id = bytes(ast.literal_eval(fields["build_id"].replace("{", "[").replace("}", "]")))
    assert build_id.hex() == IDENTITY.build_id


@given(st.text(max_size=20))
def test_any_name_is_a_c_string(name: str) -> None:
    """Octal escapes mean the same in C and in Python, so Python reads the literal back."""
    found = re.search(r"\.model_name = (\".*\"),\n", source_of(EMPTY, name))
    assert found is not None
    assert ast.literal_eval(f"b{found[1]}") == name.encode()
    assert "??" not in found[1]
