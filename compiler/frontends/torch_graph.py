"""Graphs of PyTorch: an exported program as `graph.py` has them."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch

from llamac.compiler.frontends.graph import Array, Graph, Input, Node, Ref
from llamac.compiler.frontends.safetensors_file import SafeTensor
from llamac.compiler.frontends.torch_ops import (
    as_embedding,
    as_linear,
    compute,
    is_known,
    shape_only,
    window_of,
)
from llamac.compiler.frontends.torch_quant import check_quantizers

_NAMES = {
    torch.bfloat16: "BF16",
    torch.float16: "F16",
    torch.float32: "F32",
    torch.float64: "F64",
    torch.int8: "I8",
    torch.int32: "I32",
    torch.int64: "I64",
    torch.uint8: "U8",
}
_FLOATS = (torch.float16, torch.bfloat16, torch.float32)
# A part of a weight of a class of its own, as torchao's are: codes, scales or zero points.
_INNER_TENSOR = "export.access_subclass_inner_tensor.default"
ADVICE = "Run `program.run_decompositions()` before it is saved, which leaves operators of ATen."


@dataclass(frozen=True)
class TorchWeight:
    """A parameter, buffer or constant."""

    name: str
    tensor: torch.Tensor

    @property
    def shape(self) -> tuple[int, ...]:
        """Rows first."""
        return tuple(self.tensor.shape)

    def stored(self) -> SafeTensor:
        """The elements as NumPy has them; bfloat16 as its bits."""
        kind = _NAMES.get(self.tensor.dtype, str(self.tensor.dtype))
        tensor = self.tensor.detach()
        if tensor.dtype == torch.bfloat16:
            tensor = tensor.view(torch.int16)
            return SafeTensor(self.name, kind, tensor.numpy().view("uint16"))
        return SafeTensor(self.name, kind, tensor.numpy())

    def array(self) -> torch.Tensor:
        """A copy, so that operations in place do no harm; floats in float64."""
        wide = self.tensor.dtype in _FLOATS
        return self.tensor.detach().to(torch.float64 if wide else self.tensor.dtype, copy=True)


def to_array(value: Any) -> Array:
    """A tensor or number of PyTorch as NumPy's."""
    array: Array = torch.as_tensor(value).detach().numpy()
    return array


def from_array(array: Array) -> Any:
    """The opposite."""
    return torch.from_numpy(array.copy())


def make_graph(
    source: str,
    nodes: Sequence[Node],
    inputs: Mapping[str, Input],
    shapes: Mapping[str, tuple[int | None, ...]],
    weights: Mapping[str, torch.Tensor],
    outputs: Sequence[str],
) -> Graph:
    """Put a graph of PyTorch together.

    Raises:
        ModelUnsupported: it has operations that are not on the list, which are named.
    """
    graph = Graph(
        source,
        tuple(nodes),
        inputs,
        shapes,
        {name: TorchWeight(name, tensor) for name, tensor in weights.items()},
        tuple(outputs),
        compute,
        to_array,
        from_array,
        as_linear,
        as_embedding,
    )
    needed = graph.reached(graph.outputs[:1])
    unknown = sorted({n.op for n in nodes if needed.intersection(n.outputs) and not is_known(n.op)})
    if unknown:
        raise graph.refuse(
            f"it has operations that llamac does not know: {', '.join(unknown)}", ADVICE
        )
    check_quantizers(graph, nodes)
    for node in nodes:
        if needed.intersection(node.outputs) and (window := window_of(node)) is not None:
            raise graph.refuse(
                f"{node.op} ({node.name}) compares positions with {window}: attention over a "
                "sliding window"
            )
    return graph


def graph_of_program(program: torch.export.ExportedProgram, source: str) -> Graph:
    """The graph of an exported program; weights stay where they are.

    Raises:
        ModelUnsupported: it has operations that are not on the list.
    """
    signature = program.graph_signature
    weights = _weights(program)
    inputs, shapes, nodes = dict[str, Input](), dict[str, tuple[int | None, ...]](), list[Node]()
    for node in program.graph.nodes:
        value = node.meta.get("val")
        if isinstance(value, torch.Tensor):
            shapes[node.name] = tuple(n if isinstance(n, int) else None for n in value.shape)
            if node.op == "placeholder" and node.name not in weights:
                inputs[node.name] = Input(shapes[node.name], kind_of(value.dtype))
        if node.op == "call_function":
            args, kwargs = _refs(node.args), _refs(dict(node.kwargs))
            op = _name_of(node.target)
            if op == _INNER_TENSOR:
                weights[node.name] = getattr(weights[args[0].name], args[1])
                continue
            nodes.append(Node(op, args, kwargs, (node.name,), shape_only(op, args)))
    return make_graph(source, nodes, inputs, shapes, weights, signature.user_outputs)


def _weights(program: torch.export.ExportedProgram) -> dict[str, torch.Tensor]:
    """Parameters, buffers and constants by the graph's names."""
    signature = program.graph_signature
    names = {
        **signature.inputs_to_parameters,
        **signature.inputs_to_buffers,
        **signature.inputs_to_lifted_tensor_constants,
    }
    stored = {**program.state_dict, **program.constants}
    return {name: stored[fqn] for name, fqn in names.items()}


def _name_of(target: Any) -> str:
    """Names as `torch_ops.py` has them: aten.add.Tensor, operator.mul."""
    if isinstance(target, torch._ops.OpOverload):
        return str(target)
    module = str(getattr(target, "__module__", "")).removeprefix("_")
    name = str(getattr(target, "__name__", target))
    return f"{module}.{name}" if module in ("operator", "torch") else name


def _refs(value: Any) -> Any:
    """Arguments with `Ref` in the place of nodes."""
    if isinstance(value, torch.fx.Node):
        return Ref(value.name)
    if isinstance(value, tuple | list):
        return (
            type(value)(_refs(part) for part in value)
            if type(value) in (tuple, list)
            else [_refs(part) for part in value]
        )
    if isinstance(value, dict):
        return {key: _refs(part) for key, part in value.items()}
    return value


def kind_of(dtype: torch.dtype) -> str:
    """NumPy's letter: "f", "i" or "b"."""
    if dtype == torch.bool:
        return "b"
    return "f" if dtype.is_floating_point or dtype.is_complex else "i"
