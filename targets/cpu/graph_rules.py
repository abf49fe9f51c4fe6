"""Selection rules around graphs: what is converted before them, and what is kept of them.

A graph reads the residual stream in float16, where its tokens stand, and the caches; it returns the
stream and the new keys and values. Two graphs that follow each other hand on the stream as it is.
"""

from __future__ import annotations

from typing import Any

from tvm.relax import Var

from llamac.schedules.append import AppendShape
from llamac.schedules.convert import ConvertShape
from llamac.schedules.graph import FAMILY, GraphShape
from llamac.schedules.positions import PositionsShape
from llamac.schedules.rope import CacheShape
from llamac.targets.cpu.composite_calls import Call, dims
from llamac.targets.cpu.emitter import FunctionState


class GraphRules(FunctionState):
    """Rules for `llamac.graph`."""

    def __init__(self, *args: Any) -> None:
        super().__init__(*args)
        self._halves: dict[Var, Var] = {}  # value of the composites -> the stream in float16
        self._positions: list[Var] = []  # cos, sin, mask; the same for all graphs of a function

    def _select_graph(self, call: Call) -> None:
        x, table, meta, *old_state = call.args
        shape = GraphShape.from_fields(call.attrs)
        heads, capacity, head_dim = dims(old_state[0])
        cache = CacheShape(heads, head_dim, capacity)
        state = [self._state(var, cache) for var in old_state]
        inputs = [self._half(x), *self._positions_of(table, meta, cache), *state]
        outputs = [(tensor.shape, "float16") for tensor in shape.outputs]
        hidden, *new = self._kernel(FAMILY, shape, shape.name, inputs, outputs)
        updated: list[Var] = []
        for i in range(0, len(state), 2):
            updated += self._append(new[i : i + 2], state[i : i + 2], meta, cache)
        result, *aliases = self._aliases[call.var]
        self._halves[result] = hidden
        if any(use.kind != FAMILY for use in self._uses.get(result, [])):
            self._values[result] = self._convert(hidden, dims(x), "float32")
        self._values.update(zip(aliases, updated, strict=True))

    def _half(self, x: Var) -> Var:
        """The residual stream in float16, [1, T, K]."""
        if x not in self._halves:
            self._halves[x] = self._convert(self._values[x], dims(x), "float16")
        return self._halves[x]

    def _convert(self, value: Var, shape: tuple[int, ...], to: str) -> Var:
        tokens, k = shape
        out = (1, tokens, k) if to == "float16" else (tokens, k)
        spec, name = ConvertShape(tokens, k, to), f"convert_{to}_{tokens}x{k}"
        [result] = self._kernel("convert", spec, name, [value], [(out, to)])
        return result

    def _positions_of(self, table: Var, meta: Var, cache: CacheShape) -> list[Var]:
        """Rows of the RoPE table and the mask, made once per function."""
        if not self._positions:
            tokens, rows, width = self._tokens, dims(table)[0], cache.head_dim
            packed = self._packed("rope", ["rope"], (rows, 2, width), "float32")
            turns = ((tokens, 1, width // 2, 1), "float16")
            mask = ((tokens, cache.capacity + tokens), "float16")
            self._positions = self._kernel(
                "positions",
                PositionsShape(tokens, rows, width, cache.capacity),
                f"positions_{tokens}x{width}x{cache.capacity}",
                [packed, self._values[meta]],
                [turns, turns, mask],
            )
        return self._positions

    def _append(self, new: list[Var], state: list[Var], meta: Var, cache: CacheShape) -> list[Var]:
        """Write the new keys and values of a layer into its cache."""
        name = f"append_{self._tokens}x{cache.kv_heads}x{cache.head_dim}x{cache.capacity}"
        inputs = [*new, self._values[meta], *state]
        return self._kernel("append", AppendShape(self._tokens, cache), name, inputs, [], [3, 4])

    def _state(self, var: Var, cache: CacheShape) -> Var:
        """A cache tensor in the kernels' layout."""
        part = var.name.rpartition(".")[2]
        if part == "k_cache":
            return self._param(var.name, cache.k_shape, cache.dtype)
        if part == "v_cache":
            return self._param(var.name, cache.v_shape, cache.dtype)
        return self._param(var.name, cache.params_shape, "float32")
