"""runtime/c/neuron: network files with right hashes and wrong numbers, one for each check."""

from __future__ import annotations

import hashlib
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from llamac.targets.neuropilot.network_file import Kind, NetworkWriter, OperandType

INT16, INT32 = OperandType.TENSOR_QUANT16_SYMM, OperandType.TENSOR_INT32
INT8, INT4 = (
    OperandType.TENSOR_QUANT8_SYMM_PER_CHANNEL,
    OperandType.TENSOR_QUANT4_SYMM_PER_CHANNEL,
)
HEADER_BYTES, OPERAND_BYTES, OPERATION_BYTES = 104, 56, 24
ADD, RESHAPE = 0, 22


@dataclass(frozen=True)
class Tensor:
    """As the harness wants it."""

    name: str
    bytes: int = 16
    dtype: str = "0 16"


@dataclass(frozen=True)
class Graph:
    """A network that has x and y, whatever else is in it."""

    path: Path
    sha256: str

    def lines(self) -> list[str]:
        head = f"layers {self.path.name} {self.path.stat().st_size} {self.sha256} mt6991 - 0 1 1"
        return [head, "x 16 0 16", "y 16 0 16"]

    def feeds(self) -> list[bytes]:
        return [bytes(16)]


Refuse = Callable[..., None]


@pytest.fixture
def check(run: Callable[..., Any], refused: Refuse, tmp_path: Path) -> Refuse:
    """Describe a network, change bytes of it, see it refused: check(describe, what, patch=...).

    describe(writer, x, y) adds to a network that has an operation already; None: to nothing.
    """

    def refuse(
        describe: Callable[..., None] | None,
        what: str,
        patch: Callable[[bytearray], None] | None = None,
    ) -> None:
        writer = NetworkWriter(8)
        x = writer.operand(INT16, (1, 8), kind=Kind.INPUT, name="x", scale=1e-3)
        y = writer.operand(INT16, (1, 8), kind=Kind.OUTPUT, name="y", scale=1e-3)
        none = writer.operand(OperandType.INT32, (), data=np.zeros(1, "<i4"))
        writer.operation(ADD, [x, x, none], [y], "ADD 'y'")
        if describe is not None:
            describe(writer, x, y)
        path = writer.write(tmp_path / "hostile.neuron", [x], [y]).path
        data = bytearray(path.read_bytes())
        if patch is not None:
            patch(data)
        data[24:56] = hashlib.sha256(data[HEADER_BYTES:]).digest()
        path.write_bytes(data)
        outcome = run([Graph(path, bytes(data[24:56]).hex())])
        if what:
            refused(outcome, "network-invalid", what)
            assert outcome.functions() == ["Neuron_getVersion"]
        else:
            assert outcome.text == "compiled, not kept: no cache folder\nok\n"

    return refuse


def put(place: int, value: int, size: int = 4) -> Callable[[bytearray], None]:
    """Change a number of the file."""

    def patch(data: bytearray) -> None:
        data[place : place + size] = value.to_bytes(size, "little", signed=value < 0)

    return patch


def test_the_network_is_good_otherwise(check: Refuse) -> None:
    """Or all of the others would be refused for another reason."""
    check(None, "")


@pytest.mark.parametrize(
    "dims",
    [
        (1 << 16,) * 4,  # 2^64 elements, which is 0
        (1 << 16, 1 << 16, 1 << 16, 1 << 15, 2),
        (0,),
        (4, 0),
        (1,) * 9,
    ],
)
def test_dimensions(dims: tuple[int, ...], check: Refuse) -> None:
    def constant(writer: NetworkWriter, x: int, y: int) -> None:
        writer.operand(INT32, dims, data=np.zeros(0, "<i4"))

    def temporary(writer: NetworkWriter, x: int, y: int) -> None:
        writer.operand(INT16, dims)

    check(constant, "dimensions of operand 3")
    check(temporary, "dimensions of operand 3")


@pytest.mark.parametrize(
    ("type_", "options", "what"),
    [
        (INT8, {}, "scales"),
        (INT8, {"scales": [1.0] * 3}, "scales"),
        (INT8, {"scales": [1.0] * 5}, "scales"),
        (INT8, {"scales": [1.0] * 4, "channel_dim": 1}, "scales"),
        (INT8, {"scales": [1.0] * 4, "channel_dim": 2}, "scales"),
        (INT4, {}, "scales"),
        (OperandType.TENSOR_QUANT8_SYMM, {"scales": [1.0] * 4}, "scales"),
        (OperandType.TENSOR_QUANT8_SYMM, {"data": np.zeros(31, "u1")}, "values"),
        (OperandType.TENSOR_QUANT8_SYMM, {"data": np.zeros(33, "u1")}, "values"),
        (INT4, {"scales": [1.0] * 4, "data": np.zeros(32, "u1")}, "values"),
        (12, {}, "unknown type"),
        (9005, {}, "unknown type"),
        (-1, {}, "unknown type"),
    ],
)
def test_types_and_values(type_: Any, options: dict[str, Any], what: str, check: Refuse) -> None:
    def describe(writer: NetworkWriter, x: int, y: int) -> None:
        writer.operand(type_, (4, 8), **({"data": np.zeros(32, "u1")} | options))

    check(describe, what)
    check(describe, "operand 3")


@pytest.mark.parametrize(
    ("inputs", "outputs"), [([0, 0, 9], [1]), ([0, 0, 2], [9]), ([0, 0, 2], []), ([1 << 31], [1])]
)
def test_operands_of_operations(inputs: list[int], outputs: list[int], check: Refuse) -> None:
    check(lambda writer, x, y: writer.operation(ADD, inputs, outputs, "two"), "operation 1")


FIRST_OPERAND = HEADER_BYTES
FIRST_OPERATION = HEADER_BYTES + 3 * OPERAND_BYTES
CONSTANT = HEADER_BYTES + 2 * OPERAND_BYTES


@pytest.mark.parametrize(
    ("place", "value", "size", "what"),
    [
        (8, 2, 4, "unknown version 2"),
        (12, 96, 4, "unknown version 1"),
        (56, 1 << 23, 4, "operands: 8388608"),
        (56, 0xFFFFFFFF, 4, "operands: 4294967295"),
        (60, 1 << 23, 4, "operations: 8388608"),
        (64, 2, 4, "inputs or outputs"),
        (64, 0xFFFFFFFF, 4, "inputs or outputs"),
        (68, 0xFFFFFFFF, 4, "inputs or outputs"),
        (72, 0xFFFFFFFF, 4, "inputs or outputs"),
        (72, 0, 4, "inputs or outputs"),
        (76, 1 << 23, 4, "words: 8388608"),
        (80, 1 << 23, 4, "scales: 8388608"),
        (84, 1 << 20, 4, "bytes of names: 1048576"),
        (84, 0, 4, "bytes of names: 0"),
        (84, 2, 4, "bytes of names: 2"),  # the last one is not zero
        (100, 1 << 20, 4, "options at 1048576"),
        (FIRST_OPERAND + 4, 4, 4, "kind or name of operand 0"),
        (FIRST_OPERAND + 4, 0, 4, "inputs or outputs"),
        (FIRST_OPERAND + 8, 9, 4, "dimensions of operand 0"),
        (FIRST_OPERAND + 12, 0xFFFFFFFF, 4, "dimensions of operand 0"),
        (FIRST_OPERAND + 36, 1 << 20, 4, "kind or name of operand 0"),
        (CONSTANT + 40, 4, 8, "values of operand 2"),
        (CONSTANT + 40, 64, 8, "values of operand 2"),
        (CONSTANT + 40, (1 << 64) - 8, 8, "values of operand 2"),
        (CONSTANT + 48, (1 << 64) - 4, 8, "values of operand 2"),
        (FIRST_OPERATION + 4, 0xFFFFFFFF, 4, "operation 0"),
        (FIRST_OPERATION + 8, 0xFFFFFFFF, 4, "operation 0"),
        (FIRST_OPERATION + 12, 0xFFFFFFFF, 4, "operation 0"),
        (FIRST_OPERATION + 16, 1 << 20, 4, "operation 0"),
    ],
)
def test_numbers_of_the_file(place: int, value: int, size: int, what: str, check: Refuse) -> None:
    check(None, what, put(place, value, size))
