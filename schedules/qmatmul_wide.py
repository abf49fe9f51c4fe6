"""Blocks of 16 rows by vectors longer than NEON's: sums through memory, results as elsewhere.

A multiplication by SVE or SME leaves its sums of a block, for up to 16 tokens, in a buffer of
float32 [token][row]. From there NEON's vectors of four rows take them, so that zero points, LoRA,
SwiGLU and residuals stand once, in `qmatmul_quads.py` and `qmatmul_epilogue.py`.
"""

from __future__ import annotations

from typing import Any

from tvm.tirx.script.builder import ir as T

from llamac.schedules.kernel import local
from llamac.schedules.loop import loop
from llamac.schedules.qmatmul_epilogue import ROWS
from llamac.schedules.qmatmul_tensors import QUAD, QUADS, Tensors
from llamac.schedules.quantize import PANEL

NIBBLE_SHIFT = 4  # the sums are of nibbles in the upper half of their bytes


class WideBlocks:
    """The work items of a kernel; a subclass multiplies."""

    def __init__(self, tensors: Tensors) -> None:
        self.tensors = tensors
        blocks = 2 if tensors.epilogue.is_swiglu else 1
        self.sums = local("float32", blocks * PANEL * ROWS)

    def emit(self, item: Any) -> None:
        """Compute and store a work item."""
        m = self.tensors.shape.m
        if m >= PANEL:
            with loop(m // PANEL) as panel:
                self._panel(item, panel, PANEL)
        if m % PANEL:
            self._panel(item, T.int64(m // PANEL), m % PANEL)

    def multiply(self, block: Any, panel: Any, tokens: int, place: int) -> None:
        """Fill `sums` from `place`, with 16 rows of a block for each token of a panel.

        An odd number of tokens may be rounded up.
        """
        raise NotImplementedError

    def _blocks(self, item: Any) -> list[Any]:
        return [item * 2, item * 2 + 1] if self.tensors.epilogue.is_swiglu else [item]

    def _panel(self, item: Any, panel: Any, tokens: int) -> None:
        t = self.tensors
        for slot, block in enumerate(self._blocks(item)):
            self.multiply(block, panel, tokens, slot * PANEL * ROWS)
        with loop(QUADS) as quad:
            values = self._results(self._blocks(item), quad, panel, tokens)
            for i, value in enumerate(values):
                t.epilogue.store(value, panel * PANEL + i, item * ROWS + quad * QUAD)

    def _results(self, blocks: list[Any], quad: Any, panel: Any, tokens: int) -> list[Any]:
        """Results of a quad, a vector for each token."""
        t, isa = self.tensors, self.tensors.isa
        results = []
        for slot, block in enumerate(blocks):
            place = slot * PANEL * ROWS + quad * QUAD
            sums = [T.Bind(isa.load(self.sums, place + i * ROWS)) for i in range(tokens)]
            split = slot if t.epilogue.is_swiglu else None
            results.append(t.finish(sums, block, quad, panel * PANEL, split, NIBBLE_SHIFT))
        if not t.epilogue.is_swiglu:
            return results[0]
        return [isa.silu(gate) * up for gate, up in zip(*results, strict=True)]
