"""From the matrices of a graph to weights as files have them: floats, or codes with scales.

A matrix may be a tensor as it is, its transpose, or computed from codes: a chain that a quantizer
left. Which of them is found out like everything else, by computing it: from numbers that count the
elements, or by comparing with codes times scales. Codes are taken over as they are.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np

from llamac.compiler.frontends.forms import Stored
from llamac.compiler.frontends.graph import Array, Graph
from llamac.compiler.frontends.hf_packed import TorchaoWeights
from llamac.compiler.frontends.hf_tensors import FLOATS, FloatWeights, RowOrder
from llamac.compiler.frontends.safetensors_file import SafeTensor

_INT4 = (-8, 7)
_RANK = 2
_PROBED_ROWS = 256


@dataclass(frozen=True)
class Matrix:
    """A matrix of a model.

    Attributes:
        value: its name in the graph.
        is_transposed: the value is [K, N].
        shape: [N, K] of the part that is wanted.
        rows: of the matrix that are this part.
        order: of the rows of the part.
    """

    value: str
    is_transposed: bool
    shape: tuple[int, int]
    rows: slice
    order: RowOrder


def stored_vector(graph: Graph, name: str | None, size: int) -> Stored:
    """The weights of a norm; ones if it has none."""
    if name is None:
        tensor = SafeTensor("(no weights)", "F32", np.ones(size, np.float32))
    else:
        tensor = graph.weights[name].stored()
    return FloatWeights(tensor, RowOrder(size))


def stored_matrix(graph: Graph, matrix: Matrix) -> Stored:
    """The weights of a layer as the graph has them.

    Raises:
        ModelUnsupported: they are computed in a way that is not known.
    """
    if matrix.value in graph.packed:
        return graph.packed[matrix.value](matrix.rows, matrix.order)
    leaves = sorted(graph.reached([matrix.value]) & graph.weights.keys())
    tensors = {name: graph.weights[name].stored() for name in leaves}
    floats = [name for name in leaves if tensors[name].dtype in FLOATS]
    if len(leaves) == 1 and floats:
        return _float_matrix(graph, matrix, leaves[0], tensors[leaves[0]])
    columns = matrix.shape[1]
    codes = [
        n
        for n in leaves
        if tensors[n].dtype in ("I8", "U8")
        and len(tensors[n].shape) == _RANK
        and tensors[n].shape[0 if matrix.is_transposed else 1] == columns
    ]
    if len(codes) == 1:
        return _coded_matrix(graph, matrix, codes[0], tensors)
    raise graph.refuse(
        f"the matrix {matrix.value!r} is computed from {len(leaves)} tensors, of which "
        f"{len(codes)} are int8 codes"
    )


def _float_matrix(graph: Graph, matrix: Matrix, name: str, tensor: SafeTensor) -> Stored:
    """A tensor, or its transpose."""
    is_turned = matrix.is_transposed
    if matrix.value != name:
        is_turned ^= _is_transpose(graph, matrix.value, name, tensor.shape)
    data = (tensor.data.T if is_turned else tensor.data)[matrix.rows]
    _check_shape(graph, matrix, data)
    return FloatWeights(SafeTensor(tensor.name, tensor.dtype, data), matrix.order)


def _is_transpose(graph: Graph, value: str, name: str, shape: tuple[int, ...]) -> bool:
    """Whether a matrix is the transpose of a tensor, or the tensor itself.

    Two matrices go through the graph, the row and the column of every element, which take next to
    no memory.
    """
    numbers = [np.arange(n, dtype=np.int32) for n in shape]
    rows, columns = (np.broadcast_to(n, shape) for n in (numbers[0][:, None], numbers[1]))
    found = [graph.evaluate([value], {name: given})[0] for given in (rows, columns)]
    if all(np.array_equal(f, given) for f, given in zip(found, (rows, columns), strict=True)):
        return False
    if all(np.array_equal(f, given.T) for f, given in zip(found, (rows, columns), strict=True)):
        return True
    raise graph.refuse(f"the matrix {value!r} is no transpose of {name!r}")


def _coded_matrix(
    graph: Graph, matrix: Matrix, name: str, tensors: dict[str, SafeTensor]
) -> Stored:
    """Codes [N, K] of 8 bits with scales [N, G], and zero points if they are not 0."""
    codes = tensors[name].data.T if matrix.is_transposed else tensors[name].data
    middle = _middle(codes)
    codes = (codes.astype(np.int16) - middle).astype(np.int8) if middle else codes
    [values] = graph.evaluate([matrix.value], {})
    values = values.T if matrix.is_transposed else values
    others = [tensor for other, tensor in tensors.items() if other != name]
    zero_points: Sequence[SafeTensor | None] = [*others, None]
    for scales in others:
        for zeros in zero_points:
            made = _packed(matrix, SafeTensor(name, "I8", codes), scales, zeros, middle)
            if made is not None and _is_same(made, matrix, values):
                return made
    raise graph.refuse(
        f"the matrix {matrix.value!r} is not (codes - zero points) * scales of the tensors that it "
        "is computed from"
    )


def _packed(
    matrix: Matrix,
    codes: SafeTensor,
    scales: SafeTensor,
    zeros: SafeTensor | None,
    middle: int,
) -> TorchaoWeights | None:
    """A layer of these tensors; None: their shapes do not go together."""
    total, columns = codes.shape
    grouped = _by_rows(scales, total, matrix.is_transposed)
    if scales.dtype not in FLOATS or grouped is None or columns % grouped.shape[1]:
        return None
    points = np.zeros(grouped.shape, np.float32)
    if zeros is not None:
        found = _by_rows(zeros, total, matrix.is_transposed)
        if found is None or found.shape != grouped.shape or zeros.dtype == "BF16":
            return None
        points = found.astype(np.float32)
    wanted = SafeTensor(codes.name, "I8", codes.data[matrix.rows])
    low, high = int(wanted.data.min()), int(wanted.data.max())
    bits = 4 if _INT4[0] <= low and high <= _INT4[1] else 8
    parts = (
        wanted,
        SafeTensor(scales.name, scales.dtype, grouped[matrix.rows]),
        SafeTensor("zero points", "F32", points[matrix.rows] - np.float32(middle)),
    )
    name = codes.name.removesuffix(".qdata").removesuffix(".weight")
    return TorchaoWeights(parts, bits, name, "graph", matrix.shape, grouped.shape[1], matrix.order)


def _middle(codes: Array) -> int:
    """What codes without a sign are less, so that they fit into int8; 0 with a sign."""
    if codes.dtype != np.uint8:
        return 0
    return 8 if codes.max() < 16 else 128


def _by_rows(tensor: SafeTensor, rows: int, is_transposed: bool) -> Array | None:
    """Scales or zero points as [N, G]; None: they are not of that many rows."""
    if not tensor.data.size or tensor.data.size % rows:
        return None
    data = tensor.data
    if is_transposed and data.ndim == _RANK and data.shape[1] == rows:
        data = data.T
    return data.reshape(rows, -1)


def _is_same(made: TorchaoWeights, matrix: Matrix, values: Array) -> bool:
    """Whether a layer has the values of the graph, on some rows, up to float32's rounding."""
    rows = np.unique(np.linspace(0, matrix.shape[0] - 1, _PROBED_ROWS).astype(np.intp))
    expected = values[matrix.rows][matrix.order.indices(rows)]
    return np.allclose(made.values(rows), expected, rtol=1e-6, atol=0)


def _check_shape(graph: Graph, matrix: Matrix, data: Array) -> None:
    if data.shape != matrix.shape:
        raise graph.refuse(
            f"the matrix {matrix.value!r} is {list(data.shape)}, expected {list(matrix.shape)}"
        )
