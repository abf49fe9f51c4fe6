"""A part of the model that another processor's compiler has compiled: layers as one step.

It is no kernel that TVM compiles. In the IR it is a call of the packed function "llamac.graph"; in
a bundle's library it is a call of that processor's runtime (`runtime/c/qnn`, `runtime/c/neuron`).
The tensors at its edges are those of `targets/qnn_htp/emitter.py`; `targets/neuropilot/emitter.py`
has the same.
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
class QnnGraph:
    """What Qualcomm's runtime compares a context binary with.

    Attributes:
        soc_model: Qualcomm's number of the SoC.
        build_id: of the QNN libraries that made it.
    """

    soc_model: int
    build_id: str


@dataclass(frozen=True)
class NeuronGraph:
    """What our runner for MediaTek's adapter compares a network file with.

    Attributes:
        soc: "mt6991", for the names of compiled networks.
        network_sha256: of what follows the header of the file, as the header has it.
        tflite: path in the bundle of the same graph as .tflite, which is executed in emulation.
        dla: path in the bundle of what MediaTek's SDK compiled of it; "": nothing.
        dla_bytes: size of that file.
    """

    soc: str
    network_sha256: str
    tflite: str
    dla: str = ""
    dla_bytes: int = 0


@dataclass(frozen=True)
class GraphShape:
    """A graph: what is in its file, and for which processor.

    Attributes:
        name: of the step.
        graph: its name in the file.
        file: path in the bundle.
        sha256: of the file.
        file_bytes: its size.
        inputs, outputs: its tensors, in the order of the step's operands.
        layers: layers of the checkpoint whose weights are in it, "layers.0.attention.wq".
        vendor: whose graph it is, and what that vendor's runtime needs of it.
    """

    name: str
    graph: str
    file: str
    sha256: str
    file_bytes: int
    inputs: tuple[GraphTensor, ...]
    outputs: tuple[GraphTensor, ...]
    layers: tuple[str, ...]
    vendor: QnnGraph | NeuronGraph

    @classmethod
    def from_fields(cls, fields: Mapping[str, Any]) -> GraphShape:
        """Make it from its fields as JSON has them."""
        sides = {
            side: tuple(GraphTensor.from_fields(tensor) for tensor in fields[side])
            for side in ("inputs", "outputs")
        }
        vendor = fields["vendor"]
        kind = QnnGraph if "soc_model" in vendor else NeuronGraph
        parts = {"layers": tuple(fields["layers"]), "vendor": kind(**vendor)}
        return cls(**{**fields, **sides, **parts})


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
