"""What the kernels of a compiled function cost, by kernel and per product.

The unit is the instruction, or the packet on Hexagon. A region of `targets/count.py` or of
`targets/packets.py` is one step, because the runner marks each call of a kernel and one
thread does all of it. Products (multiply-accumulates) follow from the shapes in program.json.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from functools import reduce
from operator import add
from typing import Any, TypeVar

from llamac.targets.count import Counts
from llamac.targets.packets import Packets
from llamac.targets.program import Function, Program, ProgramKernel

AnyCounts = TypeVar("AnyCounts", Counts, Packets)


@dataclass(frozen=True)
class KernelCost:
    """All calls of one kernel in a function.

    Attributes:
        name: of the kernel.
        family: that generated it.
        calls: steps that call it.
        counts: of all calls.
        macs: products of all calls; 0 where they say nothing (only matrix products and attention
            have some).
    """

    name: str
    family: str
    calls: int
    counts: Counts | Packets
    macs: int

    @property
    def per_mac(self) -> float | None:
        """Instructions or packets per product."""
        return self.counts.total / self.macs if self.macs else None


@dataclass(frozen=True)
class FunctionCost:
    """One run of a function.

    Attributes:
        function: its name.
        position: of its first token in the context.
        tokens: that it evaluated; padding is not among them, but its instructions are.
        kernels: the most expensive first.
        unit: of their counts, "instructions" or "packets".
    """

    function: str
    position: int
    tokens: int
    kernels: tuple[KernelCost, ...]
    unit: str = Counts.unit

    @property
    def total(self) -> int:
        """Instructions or packets of all kernels."""
        return sum(kernel.counts.total for kernel in self.kernels)

    def to_json(self) -> dict[str, Any]:
        """Return the costs as JSON values."""
        return {
            "function": self.function,
            "position": self.position,
            "tokens": self.tokens,
            self.unit: self.total,
            f"{self.unit}_per_token": self.total / self.tokens,
            "kernels": [self._kernel_json(kernel) for kernel in self.kernels],
        }

    def _kernel_json(self, kernel: KernelCost) -> dict[str, Any]:
        total = kernel.counts.total
        return {
            "name": kernel.name,
            "family": kernel.family,
            "calls": kernel.calls,
            self.unit: total,
            f"{self.unit}_per_token": total / self.tokens,
            "share": total / self.total,
            "macs_per_token": kernel.macs / self.tokens if kernel.macs else None,
            f"{self.unit}_per_mac": kernel.per_mac,
            **kernel.counts.details(),
        }


def function_cost(
    program: Program, function: Function, position: int, tokens: int, regions: Sequence[AnyCounts]
) -> FunctionCost:
    """Add up the regions of a run by kernel.

    Args:
        program: compiled model.
        function: that ran, with all its steps.
        position: of its first token.
        tokens: valid ones.
        regions: one for each step, in order.
    """
    steps: dict[int, list[AnyCounts]] = {}
    for step, counts in zip(function.steps, regions, strict=True):
        steps.setdefault(step.kernel, []).append(counts)
    costs = [
        _kernel_cost(program.kernels[index], position, calls) for index, calls in steps.items()
    ]
    costs.sort(key=lambda cost: -cost.counts.total)
    return FunctionCost(function.name, position, tokens, tuple(costs), regions[0].unit)


def _kernel_cost(kernel: ProgramKernel, position: int, calls: Sequence[AnyCounts]) -> KernelCost:
    macs = len(calls) * macs_of(kernel, position)
    return KernelCost(kernel.name, kernel.family, len(calls), reduce(add, calls), macs)


def macs_of(kernel: ProgramKernel, position: int) -> int:
    """Products of one call of a kernel whose first token is at `position`; 0 if it is no product.

    Attention counts the positions that a token sees, with two products for each element of a head.
    """
    shape = kernel.shape
    if kernel.family == "attention":
        tokens = shape["tokens"]
        seen = sum(position + i + 1 for i in range(tokens))
        return int(2 * shape["heads"] * shape["cache"]["head_dim"] * seen)
    if kernel.family == "lora":
        return int(shape["tokens"] * shape["rank"] * shape["k"])
    if not {"m", "n", "k"} <= shape.keys():
        return 0
    return int(shape["m"] * shape["n"] * (shape["k"] + shape.get("lora_rank", 0)))
