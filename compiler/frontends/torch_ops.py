"""Compute operations of PyTorch's graphs in float64, and no others than those of a list.

A graph names its operations, and a name must not become a call of whatever it names: `aten` alone
can read files. What is here computes values from values. Operators that quantize activations give
back what they get, because their kernels do the same in ways of their own: what is left of them is
that a matrix has codes.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from typing import Any

import torch

from llamac.compiler.frontends.graph import Linear, Node, Ref
from llamac.compiler.frontends.torch_quant import compute_quantized

_ATEN = frozenset(
    """
    __and__ __or__ _assert_async _assert_scalar _assert_tensor_metadata _softmax _to_copy
    _scaled_dot_product_flash_attention_for_cpu _unsafe_view _unsafe_index abs add addmm alias
    all amax amin any arange argmax baddbmm bitwise_and bitwise_not bitwise_or bmm bool cat
    chunk clamp clamp_min clone complex contiguous copy copy_ cos cumsum detach diff div div_
    dropout einsum embedding empty eq exp expand expand_as eye fill fill_ flatten full full_like
    gather ge gt index index_copy index_copy_ index_put index_put_ index_select is_nonzero isinf
    isnan item le lift_fresh lift_fresh_copy linear linspace log log2 logical_and logical_not
    logical_or lt masked_fill masked_fill_ matmul max maximum mean min minimum mm mul mul_
    narrow ne neg new_full new_ones new_zeros numel numpy_T ones ones_like outer permute polar
    pow prod reciprocal repeat repeat_interleave reshape rms_norm rsqrt rsub scalar_tensor
    scaled_dot_product_attention scatter select select_scatter sigmoid silu silu_ sin slice
    slice_scatter softmax split split_with_sizes sqrt squeeze stack sub sub_ sum
    sym_constrain_range sym_constrain_range_for_size sym_numel sym_size t tan tanh to transpose
    tril tril_ triu triu_ type_as unbind unflatten unsqueeze unsqueeze_ view view_as
    view_as_complex view_as_real where zeros zeros_like
    """.split()
)
_PYTHON = frozenset("add sub mul floordiv mod neg getitem eq ne lt le gt ge and_ or_ pow".split())
_SYMBOLIC = frozenset("sym_max sym_min sym_not sym_sum sym_float sym_int".split())
_ASSERTIONS = ("_assert", "sym_constrain_range")
_QUANTIZED = ("quantized_decomposed.", "torchao.")
_FLOATS = (torch.float16, torch.bfloat16, torch.float32)


# Which arguments give a shape or dtype, and no elements.
_SHAPE_ONLY = {
    **dict.fromkeys(("type_as", "view_as", "expand_as"), 1),
    **dict.fromkeys(("ones_like", "zeros_like", "empty_like", "full_like"), 0),
    **dict.fromkeys(("new_ones", "new_zeros", "new_full", "sym_size", "sym_numel", "numel"), 0),
}


# Operations whose arguments alone tell how much memory they take.
_MAKERS = frozenset(
    "arange empty eye full linspace new_full new_ones new_zeros ones repeat zeros".split()
)
_MOST_ELEMENTS = 1 << 28
_WINDOW = 4  # fewer positions than are computed show


class UnknownOperation(Exception):
    """An operation that is not on the list; the text is its name."""


def find_operation(name: str) -> Any:
    """The function of a name: "aten.add.Tensor", "operator.mul", "torch.sym_max".

    Raises:
        UnknownOperation: it is not on the list.
    """
    namespace, _, rest = name.partition(".")
    operation, _, overload = rest.partition(".")
    if namespace == "operator" and rest in _PYTHON:
        import operator  # noqa: PLC0415

        return getattr(operator, rest)
    if namespace == "torch" and rest in _SYMBOLIC:
        return getattr(torch, rest)
    known = namespace == "aten" and operation in _ATEN
    if not known or not hasattr(torch.ops.aten, operation):
        raise UnknownOperation(name)
    return getattr(getattr(torch.ops.aten, operation), overload or "default")


def shape_only(op: str, args: Sequence[Any]) -> frozenset[str]:
    """Names of values of which an operation reads shape or dtype only."""
    place = _SHAPE_ONLY.get(op.split(".")[1] if op.startswith("aten.") else "")
    given = args[place] if place is not None and place < len(args) else None
    return frozenset([given.name]) if isinstance(given, Ref) else frozenset()


def is_known(name: str) -> bool:
    """Whether an operation is on the list."""
    if name.startswith(_QUANTIZED) or name.removeprefix("aten.").startswith(_ASSERTIONS):
        return True
    try:
        find_operation(name)
    except UnknownOperation:
        return False
    return True


def compute(node: Node, args: Sequence[Any], kwargs: Mapping[str, Any]) -> Any:
    """Compute a node; floats of all sizes become float64.

    Raises:
        UnknownOperation: it is not on the list.
    """
    rest = node.op.partition(".")[2]
    if node.op.startswith(_QUANTIZED):
        return compute_quantized(rest, args, kwargs)
    if rest.startswith(_ASSERTIONS):
        return None
    function = find_operation(node.op)
    _check_size(rest.partition(".")[0], (*args, *kwargs.values()))
    default = torch.get_default_dtype()
    torch.set_default_dtype(torch.float64)
    try:
        with torch.no_grad():
            result = function(*map(_wide, args), **{k: _wide(v) for k, v in kwargs.items()})
    finally:
        torch.set_default_dtype(default)
    return result


def _check_size(operation: str, args: Sequence[Any]) -> None:
    """Keep a damaged file from asking for absurd allocations.

    Raises:
        ValueError: it does.
    """
    if operation not in _MAKERS:
        return
    for given in args:
        sizes = given if isinstance(given, list | tuple) else [given]
        count = math.prod(n for n in sizes if isinstance(n, int))
        if abs(count) > _MOST_ELEMENTS:
            raise ValueError(f"it asks for {count} elements")


def _wide(value: Any) -> Any:
    """A dtype of floats that is asked for, made float64."""
    if isinstance(value, torch.dtype):
        if value in _FLOATS:
            return torch.float64
        return torch.complex128 if value.is_complex else value
    return value


def window_of(node: Node) -> int | None:
    """How far a comparison of positions looks back, if it has a number for that.

    A mask of a sliding window compares positions less a constant. Few positions are computed when
    a model is recognized, so that a longer window would not show.
    """
    kind = node.op.split(".")[1] if node.op.startswith("aten.") else ""
    numbers = [arg for arg in node.args if isinstance(arg, int) and not isinstance(arg, bool)]
    if kind not in ("sub", "lt", "le", "gt", "ge") or not numbers or abs(numbers[0]) < _WINDOW:
        return None
    return abs(numbers[0])


def as_linear(node: Node, constants: frozenset[str]) -> Linear | None:
    """A product with a matrix of weights."""
    kind = node.op.split(".")[1] if node.op.startswith("aten.") else ""
    place = {"linear": (0, 1), "mm": (0, 1), "matmul": (0, 1), "addmm": (1, 2)}.get(kind)
    if place is None:
        return None
    x, weight = (node.args[i] if i < len(node.args) else None for i in place)
    if not isinstance(x, Ref) or not isinstance(weight, Ref):
        return None
    if weight.name not in constants or x.name in constants:
        return None
    bias = node.args[0] if kind == "addmm" else (*node.args[2:3], node.kwargs.get("bias"))[0]
    is_transposed = kind != "linear"
    return Linear(node, x.name, weight.name, is_transposed, has_bias=bias is not None)


def as_embedding(node: Node, constants: frozenset[str]) -> tuple[str, str] | None:
    """A look-up of rows: names of the table and of what is looked up."""
    if node.op != "aten.embedding.default":
        return None
    table, tokens = node.args[:2]
    if table.name not in constants or tokens.name in constants:
        return None
    return table.name, tokens.name
