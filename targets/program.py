"""A compiled model as data: tensors at fixed places, kernels, and straight lists of kernel calls.

A CPU target derives it from the lowered Relax module. The entry file of a bundle is this as C
tables, and `program.json` in the bundle is this as JSON, so that `llamac verify` can check any step
later.
"""

from __future__ import annotations

import dataclasses
import json
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from llamac.schedules.graph import GraphShape

SPACES = ("weights", "arena", "kv")
DTYPE_BYTES = {
    "float32": 4,
    "int32": 4,
    "float16": 2,
    "bfloat16": 2,
    "int16": 2,
    "uint16": 2,
    "int8": 1,
    "uint8": 1,
}


@dataclass(frozen=True)
class Pack:
    """How a tensor of weights.bin is made: a layout of `targets/cpu/packing.py` and its sources.

    Attributes:
        layout: name of the layout, e.g. "int4.codes".
        sources: checkpoint tensors, in the order of their rows.
        interleave: sources alternate in blocks of 16 rows, of 32 in layouts for HVX (gate and up),
            instead of following each other.
    """

    layout: str
    sources: tuple[str, ...]
    interleave: bool = False


@dataclass(frozen=True)
class ProgramTensor:
    """A tensor at a fixed place; `offset` in bytes from the start of its space."""

    name: str
    space: str
    offset: int
    dtype: str
    shape: tuple[int, ...]
    pack: Pack | None = None

    @property
    def num_bytes(self) -> int:
        """Size in bytes."""
        return tensor_bytes(self.dtype, self.shape)


@dataclass(frozen=True)
class ProgramKernel:
    """A kernel: the family that generated it and the fields of its shape."""

    name: str
    family: str
    shape: dict[str, Any]
    work: int


@dataclass(frozen=True)
class Step:
    """One kernel call; `operands` are indices of tensors: inputs, state, outputs."""

    kernel: int
    operands: tuple[int, ...]


@dataclass(frozen=True)
class Function:
    """The steps for a fixed number of tokens, and its tensors that the session reads and writes.

    The last `num_logits_steps` only serve the logits: they are skipped when more tokens follow.
    """

    name: str
    num_tokens: int
    steps: tuple[Step, ...]
    num_logits_steps: int
    tokens: int
    meta: int
    logits: int
    argmax: int


@dataclass(frozen=True)
class Program:
    """A compiled model; sizes of the spaces in bytes."""

    tensors: tuple[ProgramTensor, ...]
    kernels: tuple[ProgramKernel, ...]
    functions: tuple[Function, ...]
    weights_bytes: int
    arena_bytes: int
    kv_bytes: int

    def function(self, name: str) -> Function:
        """The function of that name."""
        return next(f for f in self.functions if f.name == name)

    def graphs(self) -> tuple[GraphShape, ...]:
        """What other processors compute, in the order of kernels."""
        from llamac.schedules.graph import FAMILY, GraphShape  # noqa: PLC0415 (imports TVM)

        shapes = (kernel.shape for kernel in self.kernels if kernel.family == FAMILY)
        return tuple(GraphShape.from_fields(shape) for shape in shapes)

    def weight_bytes_per_token(self) -> int:
        """Bytes of weights that one decode step reads: all its operands, of a table one row.

        Of a graph it is the size of its binary.
        """
        decode = self.function("decode")
        tensors = {i: step for step in decode.steps for i in step.operands}
        names = {self.kernels[step.kernel].name for step in decode.steps}
        total = sum(graph.file_bytes for graph in self.graphs() if graph.name in names)
        for index, step in tensors.items():
            tensor = self.tensors[index]
            if tensor.space == "weights":
                rows = self._rows_read(step, tensor)
                total += tensor.num_bytes if rows is None else tensor.num_bytes // rows
        return total

    def _rows_read(self, step: Step, tensor: ProgramTensor) -> int | None:
        """Number of rows of which one is read, for tables that are indexed; else None."""
        family = self.kernels[step.kernel].family
        if family == "embedding":
            return int(self.kernels[step.kernel].shape["vocab"])
        if family == "rope" and tensor.pack is not None and tensor.pack.layout == "rope":
            return tensor.shape[0]
        return None

    def to_json(self) -> str:
        """The program as compact, reproducible JSON."""
        return json.dumps(dataclasses.asdict(self), sort_keys=True, separators=(",", ":"))

    @classmethod
    def from_json(cls, text: str) -> Program:
        """Read what `to_json` wrote."""
        data = json.loads(text)
        return cls(
            tensors=tuple(_tensor(t) for t in data["tensors"]),
            kernels=tuple(ProgramKernel(**k) for k in data["kernels"]),
            functions=tuple(_function(f) for f in data["functions"]),
            weights_bytes=data["weights_bytes"],
            arena_bytes=data["arena_bytes"],
            kv_bytes=data["kv_bytes"],
        )


def tensor_bytes(dtype: str, shape: tuple[int, ...]) -> int:
    """Bytes of a compact tensor."""
    size = DTYPE_BYTES[dtype]
    for n in shape:
        size *= n
    return size


def _tensor(data: dict[str, Any]) -> ProgramTensor:
    pack = data.pop("pack")
    if pack is not None:
        pack = Pack(pack["layout"], tuple(pack["sources"]), pack["interleave"])
    return ProgramTensor(**(data | {"shape": tuple(data["shape"]), "pack": pack}))


def _function(data: dict[str, Any]) -> Function:
    steps = tuple(Step(s["kernel"], tuple(s["operands"])) for s in data.pop("steps"))
    return Function(**data, steps=steps)
