"""Graphs of ONNX files as `graph.py` has them."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from functools import partial
from typing import Any

import numpy as np
from onnx import NodeProto, TensorProto, helper

from llamac.compiler.frontends.graph import Graph, Input, Linear, Node, Ref
from llamac.compiler.frontends.hf_packed import PackedWeights
from llamac.compiler.frontends.hf_tensors import RowOrder
from llamac.compiler.frontends.onnx_file import OnnxFile, OnnxTensor
from llamac.compiler.frontends.onnx_ops import Evaluator, attributes
from llamac.compiler.frontends.onnx_packed import BlockWeights
from llamac.compiler.frontends.safetensors_file import SafeTensor

_MATRIX = 2
_PACKED = ("MatMulNBits", "GatherBlockQuantized")
_SHAPE_ONLY = {"Shape": 0, "Size": 0, "CastLike": 1, "EyeLike": 0}
_COMPARISONS = ("Sub", "Less", "LessOrEqual", "Greater", "GreaterOrEqual")
_WINDOW = 4
_FIX = "Export a float model with opset 17 or newer, or build it with onnxruntime-genai."


class OnnxGraph:
    """Makes the graph of a file.

    Args:
        file: the model.
    """

    def __init__(self, file: OnnxFile) -> None:
        self._file, self._proto = file, file.model.graph
        opsets = {entry.domain: entry.version for entry in file.model.opset_import}
        self._evaluator = Evaluator(opsets)
        self._protos: dict[str, NodeProto] = {}
        self._weights: dict[str, OnnxTensor] = {}
        self._packed_nodes: dict[str, NodeProto] = {}

    def graph(self) -> Graph:
        """The graph.

        Raises:
            ModelUnsupported: it has operators that are not known.
            CheckpointError: another of its classes, for tensors.
        """
        try:
            return self._make()
        except (KeyError, IndexError, TypeError, ValueError, AttributeError) as error:
            what = f"its nodes are not as expected ({error!r:.120})"
            raise self._file.damaged(what) from error

    def _make(self) -> Graph:
        """The same, believing that nodes have what their operators need."""
        proto = self._proto
        for tensor in proto.initializer:
            self._weights[tensor.name] = self._file.tensor(tensor)
        nodes = [node for entry in proto.node for node in self._nodes(entry)]
        inputs = {
            value.name: Input(_shape(value), _kind(value))
            for value in proto.input
            if value.name not in self._weights
        }
        shapes = {
            value.name: _shape(value)
            for value in (*proto.value_info, *proto.output)
            if value.type.tensor_type.HasField("shape")
        }
        graph = Graph(
            self._file.path.name,
            tuple(nodes),
            inputs,
            self._with_products(shapes, nodes),
            self._weights,
            tuple(value.name for value in proto.output),
            self._compute,
            np.asarray,
            np.asarray,
            as_linear,
            as_embedding,
            {name: partial(self._unpack, name) for name in self._packed_nodes},
        )
        self._graph = graph
        self._check(graph)
        return graph

    def _check(self, graph: Graph) -> None:
        """Refuse operators that are not known, and sliding windows."""
        if self._proto.sparse_initializer:
            raise graph.refuse("it has sparse tensors", _FIX)
        needed = graph.reached(graph.outputs[:1])
        used = [n for n in graph.nodes if needed.intersection(n.outputs)]
        unknown = sorted(
            {n.op for n in used if n.name in self._protos and not self._knows(self._protos[n.name])}
        )
        if unknown:
            raise graph.refuse(
                f"it has operators that llamac does not know: {', '.join(unknown)}", _FIX
            )
        for node in used:
            if node.op in _COMPARISONS and (window := self._window(node)):
                raise graph.refuse(
                    f"{node.op} ({node.name}) compares positions with {window}: attention over a "
                    "sliding window"
                )

    def _knows(self, proto: NodeProto) -> bool:
        return proto.op_type in _PACKED or self._evaluator.knows(proto)

    def _window(self, node: Node) -> int:
        """An integer constant that a comparison has, if it is large; else 0."""
        for name in node.inputs():
            tensor = self._weights.get(name)
            if tensor is not None and tensor.kind.startswith("I") and tensor.shape in ((), (1,)):
                value = abs(int(tensor.array().reshape(-1)[0]))
                return value if value >= _WINDOW else 0
        return 0

    # -- Nodes ------------------------------------------------------------------------------------

    def _nodes(self, proto: NodeProto) -> list[Node]:
        """A node; a packed matrix is a value of its own, from which the node reads."""
        outputs = tuple(name or f"{proto.output[0]}#{i}" for i, name in enumerate(proto.output))
        if proto.op_type == "Constant":
            self._weights[outputs[0]] = self._constant(proto, outputs[0])
            return []
        args = tuple(Ref(name) if name else None for name in proto.input)
        if proto.op_type in _PACKED:
            return self._packed(proto, args, outputs)
        place = _SHAPE_ONLY.get(proto.op_type)
        shape_only = frozenset() if place is None else frozenset([proto.input[place]])
        self._protos[outputs[0]] = proto
        kwargs = attributes(proto) if proto.op_type == "Gemm" else {}
        return [Node(proto.op_type, args, kwargs, outputs, shape_only)]

    def _packed(
        self, proto: NodeProto, args: tuple[Ref | None, ...], outputs: tuple[str, ...]
    ) -> list[Node]:
        """A product with packed codes, or a look-up of them."""
        matrix = f"{outputs[0]}.matrix"
        self._packed_nodes[matrix] = proto
        is_product = proto.op_type == "MatMulNBits"
        x, codes = (args[0], args[1]) if is_product else (args[1], args[0])
        rest = tuple(
            a for i, a in enumerate(args[2:]) if a is not None and not (is_product and i > 1)
        )
        unpack = Node("Unpack", (codes, *rest), {}, (matrix,))
        extra = args[4:] if is_product else ()
        kwargs = {"bias": extra[-1] if any(a is not None for a in extra) else None}
        return [unpack, Node(proto.op_type, (x, Ref(matrix)), kwargs, outputs)]

    def _constant(self, proto: NodeProto, name: str) -> OnnxTensor:
        """The tensor of a Constant node."""
        kind, value = next(iter(attributes(proto).items()), ("none", None))
        if isinstance(value, TensorProto):
            tensor = TensorProto()
            tensor.CopyFrom(value)
            tensor.name = name
            return self._file.tensor(tensor)
        if value is None or kind not in ("value_float", "value_floats", "value_int", "value_ints"):
            raise self._file.damaged(f"the constant {name!r:.80} is of the kind {kind}")
        array = np.array(value, np.float32 if "float" in kind else np.int64)
        return OnnxTensor(name, "F32" if "float" in kind else "I64", array.shape, lambda: array)

    def _with_products(
        self, shapes: dict[str, tuple[int | None, ...]], nodes: Sequence[Node]
    ) -> Mapping[str, tuple[int | None, ...]]:
        """Add shapes of packed matrices and of what comes of them, which files may leave out."""
        for node in nodes:
            if node.op == "Unpack":
                proto = self._packed_nodes[node.name]
                shapes[node.name] = self._matrix_shape(proto)
            elif node.op in _PACKED:
                rows, columns = shapes[node.args[1].name]
                width = rows if node.op == "MatMulNBits" else columns
                shapes.setdefault(node.name, (None, None, width))
            elif node.op in ("DequantizeLinear", "MatMul") and node.name not in shapes:
                source = node.args[0 if node.op == "DequantizeLinear" else 1]
                weight = self._weights.get(source.name)
                shape = weight.shape if weight else shapes.get(source.name)
                if shape is not None:
                    is_product = node.op == "MatMul"
                    shapes[node.name] = (None, None, shape[-1]) if is_product else shape
        return shapes

    def _matrix_shape(self, proto: NodeProto) -> tuple[int, int]:
        """[N, K] of a packed matrix."""
        given = self._integers(proto)
        if proto.op_type == "MatMulNBits":
            return given["N"], given["K"]
        scales = self._weights.get(proto.input[2])
        block = given.get("block_size", 128)
        is_plain = given.get("gather_axis", 0) == 0 and given.get("quantize_axis", 1) in (1, -1)
        if scales is None or len(scales.shape) != _MATRIX or not is_plain:
            raise self._file.damaged(f"the table of {proto.output[0]!r:.80} has no scales by rows")
        return scales.shape[0], scales.shape[1] * block

    def _integers(self, proto: NodeProto) -> dict[str, int]:
        """Attributes of a node with packed weights; all that such nodes have are integers."""
        given = attributes(proto)
        needed = {"N", "K"} if proto.op_type == "MatMulNBits" else set()
        wrong = [name for name, value in given.items() if not isinstance(value, int)]
        if wrong or needed - given.keys():
            names = ", ".join(sorted({*wrong, *(needed - given.keys())}))
            raise self._file.damaged(f"{proto.output[0]!r:.80} has no integer {names:.80}")
        return given

    # -- Values -----------------------------------------------------------------------------------

    def _compute(self, node: Node, args: Sequence[Any], kwargs: Mapping[str, Any]) -> Any:
        if node.op == "Unpack":
            rows = slice(0, self._matrix_shape(self._packed_nodes[node.name])[0])
            whole = self._unpack(node.name, rows, RowOrder(rows.stop))
            return whole.values(slice(None)).astype(np.float64)
        if node.op in _PACKED:
            x, matrix = args
            return x @ matrix.T if node.op == "MatMulNBits" else matrix[x]
        return self._evaluator.compute(self._protos[node.name], args)

    def _unpack(self, name: str, rows: slice, order: RowOrder) -> PackedWeights:
        """Some rows of a packed matrix as weights."""
        proto = self._packed_nodes[name]
        given, is_product = self._integers(proto), proto.op_type == "MatMulNBits"
        places = (1, 2, 3) if is_product else (0, 2, 3)
        tensors = [self._tensor(proto.input[i]) if i < len(proto.input) else None for i in places]
        codes, scales, zeros = tensors
        if codes is None or scales is None:
            raise self._file.damaged(f"{proto.output[0]!r:.80} has no codes or scales")
        return BlockWeights(
            proto.input[places[0]].removesuffix("_Q4"),
            codes,
            scales,
            zeros,
            shape=self._matrix_shape(proto),
            bits=given.get("bits", 4),
            block=given.get("block_size", 128),
            rows=rows,
            order=order,
        )

    def _tensor(self, name: str) -> SafeTensor | None:
        """A constant; None for an input that is left out."""
        if not name:
            return None
        if name in self._weights:
            return self._weights[name].stored()
        [found] = self._graph.evaluate([name], {})
        kind = {"uint8": "U8", "float64": "F64"}.get(str(found.dtype), str(found.dtype))
        return SafeTensor(name, kind, found)


def as_linear(node: Node, constants: frozenset[str]) -> Linear | None:
    """A product with a matrix of weights."""
    if node.op not in ("MatMul", "Gemm", "MatMulNBits"):
        return None
    x, weight = node.args[:2]
    if weight.name not in constants or x.name in constants:
        return None
    is_transposed, has_bias = node.op == "MatMul", node.kwargs.get("bias") is not None
    if node.op == "Gemm":
        is_transposed, has_bias = not node.kwargs.get("transB"), len(node.args) > _MATRIX
    return Linear(node, x.name, weight.name, is_transposed, has_bias)


def as_embedding(node: Node, constants: frozenset[str]) -> tuple[str, str] | None:
    """A look-up of rows: names of the table and of what is looked up."""
    if node.op not in ("Gather", "GatherBlockQuantized"):
        return None
    first, last = node.args[:2]
    table, rows = (last, first) if node.op == "GatherBlockQuantized" else (first, last)
    if table.name not in constants or rows.name in constants or "pos" in rows.name:
        return None
    return table.name, rows.name


def _shape(value: Any) -> tuple[int | None, ...]:
    """Sizes of a value; None for one that has a name, or none."""
    dims = value.type.tensor_type.shape.dim
    return tuple(d.dim_value if d.HasField("dim_value") else None for d in dims)


def _kind(value: Any) -> str:
    """NumPy's letter of an input's dtype."""
    kind = helper.tensor_dtype_to_np_dtype(value.type.tensor_type.elem_type).kind
    return {"V": "f", "u": "i"}.get(kind, kind)
