"""Put graphs into the IR: each run of layers that was compiled becomes one composite.

    llamac.graph   x [T, K], table [P, D/2, 2], meta [2], caches   -> [T, K], caches

Its attributes say which binary and graph it is. The CPU owns what is left, and calls the graphs.
"""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from dataclasses import asdict
from typing import Any

from tvm import relax
from tvm.ir import IRModule
from tvm.relax import BlockBuilder, Var

from llamac.schedules.graph import GraphShape
from llamac.targets.chunk import Chunk, read_function

KIND = "llamac.graph"


def outline(mod: IRModule, graphs: Sequence[tuple[Chunk, GraphShape]]) -> IRModule:
    """Return the module with every chunk replaced by a call of its graph."""
    untyped: Any = mod
    functions = dict(untyped.functions_items())
    by_function: dict[str, list[tuple[Chunk, GraphShape]]] = {}
    for chunk, shape in graphs:
        by_function.setdefault(chunk.function, []).append((chunk, shape))
    for var, function in list(functions.items()):
        if var.name_hint in by_function:
            rewriter = _Rewriter(mod, var.name_hint, by_function[var.name_hint])
            functions |= rewriter.run(function)
            del functions[var]
    result: IRModule = type(untyped)(functions, attrs=untyped.attrs)
    return result


class _Rewriter:
    """Rebuilds one function; the call of a graph stands where its last step stood."""

    def __init__(
        self, mod: IRModule, name: str, graphs: Sequence[tuple[Chunk, GraphShape]]
    ) -> None:
        _, _, self._names = read_function(mod, name)
        self._name, self._graphs = name, graphs
        self._chunk_of = {step.results: i for i, (c, _) in enumerate(graphs) for step in c.steps}
        self._builder = BlockBuilder()
        self._new: dict[str, Any] = {}  # name of a value -> its expression in the new function

    def run(self, old: relax.Function) -> Mapping[Any, relax.Function]:
        """Return the new function, and the composites that it calls beside the old ones."""
        params = list(old.params)
        self._new = {str(param.name): param for param in params}
        with self._builder.function(self._name, params):
            with self._builder.dataflow():
                for binding in (b for block in old.body.blocks for b in block.bindings):
                    self._binding(binding)
                outputs = [self._builder.emit_output(self._value(v)) for v in _results(old)]
            self._builder.emit_func_output(relax.Tuple(outputs))
        return dict(self._builder.finalize().functions_items())

    def _value(self, var: Var) -> Any:
        [name] = self._names[var]
        return self._new[name]

    def _binding(self, binding: Any) -> None:
        value = binding.value
        if isinstance(value, relax.Call):
            results = self._names[binding.var]
            chunk = self._chunk_of.get(results)
            if chunk is None:
                call = relax.Call(value.op, [self._value(arg) for arg in value.args])
                self._bind(results, self._builder.emit(call))
            elif self._graphs[chunk][0].steps[-1].results == results:
                self._graph(*self._graphs[chunk])
        elif isinstance(value, relax.Var):
            self._names.setdefault(binding.var, self._names[value])

    def _bind(self, results: tuple[str, ...], value: Any) -> None:
        """Give the parts of a value their names."""
        if len(results) == 1:
            self._new[results[0]] = value
            return
        for i, name in enumerate(results):
            self._new[name] = self._builder.emit(relax.TupleGetItem(value, i))

    def _graph(self, chunk: Chunk, shape: GraphShape) -> None:
        """Call a graph and name what it returns as the steps in it did."""
        attentions = [step for step in chunk.steps if step.kind == "llamac.attention"]
        rope = next(step for step in chunk.steps if step.kind == "llamac.rope")
        table, meta = rope.args[1:3]
        caches = [name for step in attentions for name in step.args[4:]]
        args = [self._new[name] for name in (chunk.source, table, meta, *caches)]
        call = self._builder.emit(relax.Call(self._composite(chunk, shape, args), args))
        updated = [name for step in attentions for name in step.results[1:]]
        self._bind((chunk.sink, *updated), call)

    def _composite(self, chunk: Chunk, shape: GraphShape, args: Sequence[Any]) -> Any:
        """Declare the composite function of a graph."""
        inner = BlockBuilder()
        params = [relax.Var(f"arg{i}", arg.ty) for i, arg in enumerate(args)]
        types = [args[0].ty, *(arg.ty for arg in args[3:])]
        with inner.function("main", params, private=True):
            with inner.dataflow():
                called = relax.op.call_dps_packed(KIND, relax.Tuple(params), types)
                result = inner.emit_output(called)
            inner.emit_func_output(result)
        attrs = {"Composite": KIND, "llamac.attrs": json.dumps(asdict(shape), sort_keys=True)}
        function = inner.finalize()["main"].with_attrs(attrs)
        return self._builder.add_func(function, f"llamac_graph_{chunk.name}")


def _results(function: relax.Function) -> Sequence[Var]:
    """The variables that a function returns."""
    body = function.body.body
    if isinstance(body, relax.Var):
        bindings = {b.var: b.value for block in function.body.blocks for b in block.bindings}
        body = bindings[body]
    fields: Sequence[Var] = body.fields
    return fields
