"""A part of the model that another processor's compiler has compiled: layers as one step.

It is no kernel that TVM compiles. In the IR it is a call of the packed function "llamac.graph"; in
a bundle's library it is a call of that processor's runtime (`runtime/c/qnn`). The tensors at its
edges are those of `targets/qnn_htp/emitter.py`.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from math import prod
from typing import Any

import numpy as np
from tvm.tirx import PrimFunc
from tvm.tirx.script.builder import ir as T

from llamac.schedules.intrin.isa import Isa
from llamac.schedules.kernel import KernelBuilder
from llamac.schedules.quantized import Quantization

VERSION = 1
KNOBS: Mapping[str, tuple[int, ...]] = {}

FAMILY = "graph"


@dataclass(frozen=True)
class GraphTensor:
    """A tensor at the edge of a graph; `codes` None: float16."""

    name: str
    shape: tuple[int, ...]
    codes: Quantization | None = None

    @classmethod
    def from_fields(cls, fields: Mapping[str, Any]) -> GraphTensor:
        """Make it from its fields as JSON has them."""
        codes = fields["codes"]
        return cls(fields["name"], tuple(fields["shape"]), codes and Quantization(**codes))

    @property
    def dtype(self) -> str:
        """Of its elements."""
        return "float16" if self.codes is None else self.codes.dtype

    @property
    def nbytes(self) -> int:
        """Its size."""
        return prod(self.shape) * np.dtype(self.dtype).itemsize


@dataclass(frozen=True)
class GraphShape:
    """A compiled graph: what is in its binary, and for which processor.

    Attributes:
        name: of the step.
        graph: name of the graph in the binary.
        file: the binary's path in the bundle.
        sha256: of the file.
        file_bytes: its size.
        soc_model: Qualcomm's number of the SoC.
        build_id: of the vendor's libraries that made it.
        inputs, outputs: its tensors, in the order of the step's operands.
        layers: layers of the checkpoint whose weights are in it, "layers.0.attention.wq".
    """

    name: str
    graph: str
    file: str
    sha256: str
    file_bytes: int
    soc_model: int
    build_id: str
    inputs: tuple[GraphTensor, ...]
    outputs: tuple[GraphTensor, ...]
    layers: tuple[str, ...]

    @classmethod
    def from_fields(cls, fields: Mapping[str, Any]) -> GraphShape:
        """Make it from its fields as JSON has them."""
        sides = {
            side: tuple(GraphTensor.from_fields(tensor) for tensor in fields[side])
            for side in ("inputs", "outputs")
        }
        return cls(**{**fields, **sides, "layers": tuple(fields["layers"])})


def valid(shape: GraphShape, isa: Isa, knobs: Mapping[str, int]) -> bool:
    """Its own compiler has decided that."""
    return not knobs


def default(shape: GraphShape, isa: Isa) -> dict[str, int]:
    """No knobs."""
    return {}


def make(shape: GraphShape, isa: Isa, *, name: str | None = None) -> PrimFunc:
    """Build the call; work = 1. Arguments are the inputs, then the outputs."""
    with KernelBuilder(name or shape.name, 1) as b:
        tensors = [b.input(t.name.replace(".", "_"), t.shape, t.dtype) for t in shape.inputs]
        tensors += [b.output(t.name.replace(".", "_"), t.shape, t.dtype) for t in shape.outputs]
        with b.items():
            T.evaluate(T.call_packed("llamac.graph", shape.file, shape.graph, *tensors))
    return b.func
