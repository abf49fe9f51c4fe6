"""Compute ONNX nodes in float64: by ONNX's reference implementation, onnxruntime's by our own.

Graphs of onnxruntime's own tools have operators of the domain com.microsoft, which onnx does not
know. They are written down here for what recognizing a model needs: no past, no padding.

Source: docs/ContribOperators.md of microsoft/onnxruntime.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import numpy as np
from numpy.typing import NDArray
from onnx import AttributeProto, NodeProto, TensorProto, helper
from onnx.reference import ReferenceEvaluator

from llamac.compiler.floats import from_bfloat16

Array = NDArray[Any]
Attributes = Mapping[str, Any]

_FLOATS = (TensorProto.FLOAT, TensorProto.FLOAT16, TensorProto.BFLOAT16)
_FORBIDDEN = ("If", "Loop", "Scan", "SequenceMap")
_MAKERS = ("ConstantOfShape", "Expand", "Tile", "Range", "EyeLike")
_MOST_ELEMENTS = 1 << 28


class Evaluator:
    """Computes nodes.

    Args:
        opsets: versions by domain.
    """

    def __init__(self, opsets: Mapping[str, int]) -> None:
        self._opsets = dict(opsets)
        self._ready: dict[int, ReferenceEvaluator] = {}

    def knows(self, node: NodeProto) -> bool:
        """Whether a node can be computed, as far as its name tells."""
        if _own(node) is not None:
            return True
        if node.domain not in ("", "ai.onnx") or node.op_type in _FORBIDDEN:
            return False
        try:
            self._reference(node)
        except Exception:  # whatever the package raises for an operator that it does not have
            return False
        return True

    def compute(self, node: NodeProto, args: Sequence[Any]) -> Any:
        """Compute a node; its results in float64, a tuple if there are several."""
        own = _own(node)
        if own is not None:
            results = own(args, attributes(node))
        else:
            _check_size(node.op_type, args)
            given = {n: a for n, a in zip(node.input, args, strict=True) if n}
            results = [_wide(result) for result in self._reference(node).run(None, given)]
        wanted = tuple(results[: len(node.output)])
        return wanted[0] if len(wanted) == 1 else wanted

    def _reference(self, node: NodeProto) -> ReferenceEvaluator:
        key = id(node)
        if key not in self._ready:
            self._ready[key] = ReferenceEvaluator(_in_float64(node), opsets=self._opsets)
        return self._ready[key]


def attributes(node: NodeProto) -> dict[str, Any]:
    """Attributes by name."""
    return {a.name: helper.get_attribute_value(a) for a in node.attribute}


def _in_float64(node: NodeProto) -> NodeProto:
    """A node that casts to floats of any size, casting to float64."""
    if node.op_type != "Cast" or attributes(node).get("to") not in _FLOATS:
        return node
    changed = NodeProto()
    changed.CopyFrom(node)
    for attribute in changed.attribute:
        if attribute.name == "to" and attribute.type == AttributeProto.INT:
            attribute.i = TensorProto.DOUBLE
    return changed


def _wide(value: Any) -> Any:
    """Floats of all sizes as float64."""
    if not isinstance(value, np.ndarray):
        return value
    if value.dtype.kind == "f":
        return value.astype(np.float64)
    if value.dtype.name == "bfloat16":
        return from_bfloat16(value.view(np.uint16)).astype(np.float64)
    return value


def _check_size(operator: str, args: Sequence[Any]) -> None:
    """Keep a damaged file from asking for absurd allocations."""
    if operator not in _MAKERS:
        return
    sizes = [int(n) for n in np.concatenate([np.ravel(a) for a in args[-1:]])]
    if operator == "Range":
        sizes = [int(abs(float(args[1]) - float(args[0])) / max(abs(float(args[2])), 1e-9))]
    if operator == "EyeLike":
        sizes = []
    if operator == "Tile":
        sizes = [*sizes, args[0].size]
    if abs(math.prod(sizes)) > _MOST_ELEMENTS:
        raise ValueError(f"it asks for {math.prod(sizes)} elements")


# -- Operators of onnxruntime ---------------------------------------------------------------------


def _rms_norm(x: Array, gamma: Array, attributes: Attributes) -> tuple[Array, Array]:
    inverse = 1 / np.sqrt(np.mean(x * x, -1, keepdims=True) + attributes.get("epsilon", 1e-5))
    return x * inverse * gamma, inverse


def _simplified_norm(args: Sequence[Any], attributes: Attributes) -> Any:
    if attributes.get("axis", -1) not in (-1, args[0].ndim - 1):
        raise ValueError("it normalizes over several axes")
    return _rms_norm(args[0], args[1], attributes)


def _skip_simplified_norm(args: Sequence[Any], attributes: Attributes) -> Any:
    x, skip, gamma, *bias = args
    total = x + skip + (bias[0] if bias and bias[0] is not None else 0)
    normed, inverse = _rms_norm(total, gamma, attributes)
    return normed, np.mean(total, -1, keepdims=True), inverse, total


def _turn(x: Array, cos: Array, sin: Array, is_interleaved: bool) -> Array:
    """RoPE of x [B, T, H, D] by cosines and sines [B, T, D/2]."""
    cos, sin = cos[:, :, None], sin[:, :, None]
    if is_interleaved:
        first, last = x[..., 0::2], x[..., 1::2]
    else:
        first, last = np.split(x, 2, -1)
    turned = (first * cos - last * sin, first * sin + last * cos)
    if is_interleaved:
        return np.stack(turned, -1).reshape(x.shape)
    return np.concatenate(turned, -1)


def _rotary(args: Sequence[Any], attributes: Attributes) -> Any:
    x, positions, cos, sin = args
    is_interleaved = bool(attributes.get("interleaved", 0))
    half = cos.shape[-1]
    is_heads_first = x.ndim == 4
    heads = x.transpose(0, 2, 1, 3) if is_heads_first else x.reshape(*x.shape[:2], -1, 2 * half)
    if heads.shape[-1] != 2 * half:
        raise ValueError("it turns a part of each head")
    if positions.size == 1:
        positions = int(positions.reshape(-1)[0]) + np.arange(heads.shape[1])[None]
    turned = _turn(heads, cos[positions], sin[positions], is_interleaved)
    return [turned.transpose(0, 2, 1, 3) if is_heads_first else turned.reshape(x.shape)]


def _grouped_attention(args: Sequence[Any], attributes: Attributes) -> Any:
    q, k, v, past = (args[i] if i < len(args) else None for i in range(4))
    num_heads, kv_heads = attributes["num_heads"], attributes["kv_num_heads"]
    for name in ("softcap", "smooth_softmax"):
        if attributes.get(name):
            raise ValueError(f"it has {name}")
    if attributes.get("local_window_size", -1) != -1:
        raise ValueError(f"it attends over a window of {attributes['local_window_size']}")
    if past is not None and past.size:
        raise ValueError("it has a past")
    if any(args[i] is not None for i in range(10, len(args))):
        raise ValueError("it has a bias or a sink")
    assert q is not None  # graphs have it
    if k is None or v is None:
        size = q.shape[-1] // (num_heads + 2 * kv_heads)
        q, k, v = np.split(q, [num_heads * size, (num_heads + kv_heads) * size], -1)
    q, k, v = (_heads(q, num_heads), _heads(k, kv_heads), _heads(v, kv_heads))
    if attributes.get("do_rotary", 0):
        positions = np.broadcast_to(np.arange(q.shape[1]), q.shape[:2])
        cos, sin = args[7][positions], args[8][positions]
        is_interleaved = bool(attributes.get("rotary_interleaved", 0))
        q, k = (_turn(x, cos, sin, is_interleaved) for x in (q, k))
    scale = attributes.get("scale") or 1 / math.sqrt(q.shape[-1])
    out = _causal(q, k, v, scale)
    return out, k.transpose(0, 2, 1, 3), v.transpose(0, 2, 1, 3)


def _causal(q: Array, k: Array, v: Array, scale: float) -> Array:
    """Causal attention of q [B, T, H, D] over k and v [B, T, Hkv, D]: [B, T, H D]."""
    repeats = q.shape[2] // k.shape[2]
    k, v = (np.repeat(x, repeats, axis=2) for x in (k, v))
    scores = np.einsum("bthd,bshd->bhts", q, k) * scale
    count = q.shape[1]
    scores = np.where(np.tril(np.ones((count, count), bool)), scores, -np.inf)
    with np.errstate(invalid="ignore"):  # of infinite scores the answer is no number, as it should
        weights = np.exp(scores - scores.max(-1, keepdims=True))
    weights /= weights.sum(-1, keepdims=True)
    mixed: Array = np.einsum("bhts,bshd->bthd", weights, v)
    return mixed.reshape(*q.shape[:2], -1)


def _heads(x: Array, count: int) -> Array:
    """Rows [B, T, H D] as heads [B, T, H, D]."""
    return x.reshape(*x.shape[:2], count, -1)


_OWN: Mapping[str, Callable[[Sequence[Any], Attributes], Sequence[Any]]] = {
    "SimplifiedLayerNormalization": _simplified_norm,
    "SkipSimplifiedLayerNormalization": _skip_simplified_norm,
    "GroupQueryAttention": _grouped_attention,
    "RotaryEmbedding": _rotary,
}
"""Operators of onnxruntime by name; each returns all its results."""


def _own(node: NodeProto) -> Callable[[Sequence[Any], Attributes], Sequence[Any]] | None:
    """What computes a node, if it is onnxruntime's.

    SimplifiedLayerNormalization is said to be ONNX's; RotaryEmbedding is the name of one of each.
    """
    is_theirs = node.domain == "com.microsoft" or node.op_type == "SimplifiedLayerNormalization"
    return _OWN.get(node.op_type) if is_theirs else None
