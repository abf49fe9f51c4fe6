"""Operators of PyTorch that quantize: `quantized_decomposed` and `torchao`.

Codes become the values that they stand for. Activations that are quantized at run time are handed
on as they are: kernels of llamac quantize them, too, by the rule that the notes tell.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import torch

from llamac.compiler.frontends.graph import Graph, Node, Ref

_GROUP_ARGUMENT = 6


def compute_quantized(name: str, args: Sequence[Any], kwargs: Mapping[str, Any]) -> Any:
    """Compute one of these operators.

    Args:
        name: without its namespace, "dequantize_affine.default".
        args: of the operator.
        kwargs: of the operator.

    Raises:
        NotImplementedError: it is another one.
    """
    kind = name.partition(".")[0]
    if kind.startswith("choose_qparams"):
        # Nobody looks at them: see below.
        return torch.ones(()), torch.zeros((), dtype=torch.int64)
    x = args[0] if args else kwargs["input"]
    if kind.startswith("quantize") or (kind.startswith("dequantize") and x.is_floating_point()):
        return x
    if kind == "dequantize_affine":
        return _by_blocks(x, *args[1:4])
    if kind == "dequantize_per_channel_group":
        group = args[_GROUP_ARGUMENT] if len(args) > _GROUP_ARGUMENT else kwargs["group_size"]
        return _by_blocks(x, [1, group], *args[1:3])
    if kind == "dequantize_per_channel":
        sizes = [1 if d == args[3] else n for d, n in enumerate(x.shape)]
        return _by_blocks(x, sizes, *args[1:3])
    raise NotImplementedError(f"{kind} is not known")


def _by_blocks(
    codes: torch.Tensor, block: Sequence[int], scale: torch.Tensor, zero: torch.Tensor | None
) -> torch.Tensor:
    """(codes - zero points) * scales; each block of that size shares one of them."""
    counts = [n // b for n, b in zip(codes.shape, block, strict=True)]
    values = codes.to(torch.float64)
    split = values.reshape([part for pair in zip(counts, block, strict=True) for part in pair])
    shape = [part for count in counts for part in (count, 1)]
    if zero is not None:
        split = split - zero.to(torch.float64).reshape(shape)
    return (split * scale.to(torch.float64).reshape(shape)).reshape(codes.shape)


def check_quantizers(graph: Graph, nodes: Sequence[Node]) -> None:
    """Refuse graphs that quantize weights themselves, as fake quantization in training does.

    Raises:
        ModelUnsupported: there is such an operation.
    """
    constants = graph.constants()
    for node in nodes:
        kind = node.op.partition(".")[2]
        first = node.args[0] if node.args else None
        if kind.startswith("quantize") and isinstance(first, Ref) and first.name in constants:
            raise graph.refuse(
                f"{node.op} ({node.name}) quantizes the weight {first.name!r} when the model runs",
                "Convert the model before it is exported, so that it holds codes.",
            )
