"""Selection rules around graphs: what is converted before them, and what is kept of them.

A graph reads the residual stream in float16 or codes, where its tokens stand, and the caches; it
returns the stream and the new keys and values. Two graphs that follow each other hand on the stream
as it is.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from tvm.relax import Var

from llamac.schedules.append import AppendShape
from llamac.schedules.convert import ConvertShape
from llamac.schedules.graph import FAMILY, GraphShape, GraphTensor
from llamac.schedules.positions import PositionsShape
from llamac.schedules.quantized import Quantization
from llamac.schedules.rope import CacheShape
from llamac.targets.cpu.composite_calls import Call, dims
from llamac.targets.cpu.emitter import FunctionState


class GraphRules(FunctionState):
    """Rules for `llamac.graph`."""

    def __init__(self, *args: Any) -> None:
        super().__init__(*args)
        # Value of the composites and codes at a graph's edge -> the stream in that form.
        self._edges: dict[tuple[Var, Quantization | None], Var] = {}
        self._positions: list[Var] = []  # cos, sin, mask; the same for all graphs of a function

    def _select_graph(self, call: Call) -> None:
        x, table, meta, *old_state = call.args
        shape = GraphShape.from_fields(call.attrs)
        heads, capacity, head_dim = dims(old_state[0])
        cache = CacheShape(heads, head_dim, capacity, str(old_state[0].ty.dtype))
        state = [self._state(var, cache) for var in old_state]
        hidden_in, *positions = shape.inputs[:4]
        # Graphs read keys and values; scales of single rows are for the kernels of the CPU.
        caches = [v for v, old in zip(state, old_state, strict=True) if old.name.endswith("_cache")]
        inputs = [
            self._edge(x, hidden_in.codes, shape.name),
            *self._positions_of(table, meta, cache, positions),
            *caches,
        ]
        outputs = [(tensor.shape, tensor.dtype) for tensor in shape.outputs]
        hidden, *new = self._kernel(FAMILY, shape, shape.name, inputs, outputs)
        updated: list[Var] = []
        parts, codes = len(cache.parts), [tensor.codes for tensor in shape.outputs[1:]]
        for i in range(len(new) // 2):
            ours = slice(2 * i, 2 * i + 2)
            kept = AppendShape(self._tokens, cache, *codes[ours])
            of_layer = state[parts * i : parts * (i + 1)]
            updated += self._append(kept, new[ours], of_layer, meta, f"{shape.name}_{i}")
        result, *aliases = self._aliases[call.var]
        edge = shape.outputs[0].codes
        self._edges[result, edge] = hidden
        users = self._uses.get(result, [])
        if any(use.kind != FAMILY or _edge_of(use) != edge for use in users):
            spec = ConvertShape(*_rows(x), to_graph=False, codes=edge)
            self._values[result] = self._convert(spec, hidden, shape.name)
        self._values.update(zip(aliases, updated, strict=True))

    def _edge(self, x: Var, codes: Quantization | None, graph: str) -> Var:
        """The residual stream as a graph has it, [1, T, K]."""
        if (x, codes) not in self._edges:
            spec = ConvertShape(*_rows(x), to_graph=True, codes=codes)
            self._edges[x, codes] = self._convert(spec, self._values[x], graph)
        return self._edges[x, codes]

    def _convert(self, spec: ConvertShape, value: Var, graph: str) -> Var:
        shape = (spec.tokens, spec.k)
        out = ((1, *shape), spec.dtype) if spec.to_graph else (shape, "float32")
        name = f"convert_{'to' if spec.to_graph else 'from'}_{spec.dtype}_{spec.tokens}x{spec.k}"
        name += _of(graph, spec.codes)
        [result] = self._kernel("convert", spec, name, [value], [out])
        return result

    def _positions_of(
        self, table: Var, meta: Var, cache: CacheShape, tensors: Sequence[GraphTensor]
    ) -> list[Var]:
        """Rows of the RoPE table and the mask, made once per function."""
        if not self._positions:
            tokens, rows, width = self._tokens, dims(table)[0], cache.head_dim
            packed = self._packed("rope", ["rope"], (rows, 2, width), "float32")
            cos, _, mask = tensors
            self._positions = self._kernel(
                "positions",
                PositionsShape(tokens, rows, width, cache.capacity, cos.codes, mask.codes),
                f"positions_{tokens}x{width}x{cache.capacity}",
                [packed, self._values[meta]],
                [(tensor.shape, tensor.dtype) for tensor in tensors],
            )
        return self._positions

    def _append(
        self, spec: AppendShape, new: Sequence[Var], state: Sequence[Var], meta: Var, layer: str
    ) -> list[Var]:
        """Write the new keys and values of a layer into its cache."""
        cache = spec.cache
        name = f"append_{self._tokens}x{cache.kv_heads}x{cache.head_dim}x{cache.capacity}"
        name += _of(layer, spec.k_codes)
        inputs = [*new, self._values[meta], *state]
        return self._kernel("append", spec, name, inputs, [], [*range(3, len(inputs))])

    def _state(self, var: Var, cache: CacheShape) -> Var:
        """A cache tensor in the kernels' layout."""
        part = var.name.rpartition(".")[2]
        if part == "k_cache":
            return self._param(var.name, cache.k_shape, cache.dtype)
        if part == "v_cache":
            return self._param(var.name, cache.v_shape, cache.dtype)
        return self._param(var.name, cache.params_shape, "float32")


def _edge_of(call: Call) -> Quantization | None:
    """The codes in which a graph reads the stream."""
    return GraphShape.from_fields(call.attrs).inputs[0].codes


def _of(place: str, codes: Quantization | None) -> str:
    """Tells kernels apart that hold the scales of one place."""
    return "" if codes is None else f"_{place}"


def _rows(x: Var) -> tuple[int, int]:
    """Tokens and width of the stream."""
    tokens, width = dims(x)
    return tokens, width
