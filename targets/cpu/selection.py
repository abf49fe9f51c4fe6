"""Kernel selection: composites become calls of kernels, as large a tile as one kernel covers.

Selection walks the composites of a function in order. Each rule below covers one composite and what
follows from it, and emits `call_tir` of a kernel; a composite that a larger tile has covered is
passed over:

    rms_norm -> qlinear...            rms_norm_quantize        (the codes feed every consumer)
    [hadamard ->] qlinear...          [hadamard_]quantize
    qlinear q, k, v of one input      one qmatmul over all rows
    qlinear gate, up -> swiglu        one qmatmul with the swiglu epilogue
    qlinear -> add                    one qmatmul with the residual epilogue
    rope q, rope k -> attention       rope (turns q and k, appends k and v to the cache), attention
    graph                             convert and positions before it, append and convert after it

The result is a Relax module whose functions only call kernels, so the Relax VM runs it, and
`targets/cpu/plan.py` reads the program of a bundle off it. Weights become parameters in packed
layouts, named `<sources>:<layout>`; how each is made is in `Selection.packs`.
"""

from __future__ import annotations

from collections.abc import Callable

from tvm import relax
from tvm.ir import IRModule
from tvm.relax import BlockBuilder

from llamac.schedules.attention import AttentionShape
from llamac.schedules.embedding import EmbeddingShape
from llamac.schedules.hadamard import HadamardShape
from llamac.schedules.intrin.isa import Isa
from llamac.schedules.norm import RmsNormShape
from llamac.schedules.rope import CacheShape, RopeShape
from llamac.schedules.sampling import ArgmaxShape
from llamac.schedules.select import TakeRowShape
from llamac.targets.cpu.composite_calls import Call, dims, entry_functions, prefix
from llamac.targets.cpu.emitter import Columns, KernelLibrary, Quantized, Selection
from llamac.targets.cpu.graph_rules import GraphRules
from llamac.targets.cpu.knobs import KnobChooser
from llamac.targets.cpu.linear_rules import LinearRules


def select_kernels(
    module: IRModule, scale_dtype: str, isa: Isa, chooser: KnobChooser | None = None
) -> Selection:
    """Cover all functions of composites with kernels, built for `isa` in the returned module.

    Args:
        module: the composites.
        scale_dtype: of int4 group scales.
        isa: of the best level.
        chooser: looks up tuned knobs; None: the generators' defaults.

    Raises:
        CoverageError: a composite that no rule covers.
    """
    builder = BlockBuilder()
    selection = Selection(IRModule({}), {}, {})
    library = KernelLibrary(builder, selection, isa, chooser)
    for name, function in sorted(entry_functions(module).items()):
        _FunctionSelector(builder, library, module, function, scale_dtype).emit(name)
    selection.module = builder.finalize()
    return selection


class _FunctionSelector(LinearRules, GraphRules):
    """Selects kernels for one function."""

    def emit(self, name: str) -> None:
        """Emit the function; packed parameters are found on the way, so the body comes first."""
        old = {param.name: param for param in self._function.params}
        self._tokens = dims(old["tokens"])[0]
        self._values[old["tokens"]] = self._param("tokens", (self._tokens,), "int32")
        self._values[old["meta"]] = self._param("meta", (2,), "int32")
        inner = self._emitter
        with inner.function(name, []):
            with inner.dataflow():
                for call in self._calls:
                    if call.var not in self._covered:
                        self._rule(call)(call)
                outputs = [inner.emit_output(self._values[var]) for var in self._results[:2]]
                outputs += [self._values[var] for var in self._results[2:]]
            inner.emit_func_output(relax.Tuple(outputs))
        body = inner.finalize()[name]
        params = list(self._params.values())
        function = relax.Function(params, body.body, body.ret_ty, body.is_pure)
        self._builder.add_func(function.with_attr("global_symbol", name), name)

    def _rule(self, call: Call) -> Callable[[Call], None]:
        rule: Callable[[Call], None] | None = getattr(self, f"_select_{call.kind}", None)
        if rule is None:
            raise self._uncovered(call, "no kernel covers it")
        return rule

    def _select_embedding(self, call: Call) -> None:
        tokens, table, *scales = call.args
        vocab, dim = dims(table)
        source = prefix(table)
        shared = any(use.kind in ("qlinear", "linear") for use in self._uses[table])
        dtype = "int8" if scales else "bfloat16"
        hvx = bool(scales) and shared and self._form.int8 == "hvx.int8"
        shape = EmbeddingShape(self._tokens, vocab, dim, dtype, shared, hvx)
        layout = ("int8" if scales else "bf16") + (".blocks" if shared else ".rows")
        layout = "hvx.int8" if hvx else layout
        inputs = [self._packed(layout, [source], shape.table_shape, shape.table_dtype)]
        if scales:
            inputs.append(self._packed("int8.scales", [source], (vocab,), "float32"))
        name = f"embedding_f32_{dtype}{'_blocks' if shared else ''}_{self._tokens}x{dim}"
        out = [((self._tokens, dim), "float32")]
        [result] = self._kernel("embedding", shape, name, [self._values[tokens], *inputs], out)
        self._values[call.var] = result

    def _select_rms_norm(self, call: Call) -> None:
        x, gamma = call.args
        tokens, k = dims(x)
        users = self._uses[call.var]
        quantize = all(use.kind == "qlinear" for use in users)
        lora = quantize and any(len(use.args) > 3 for use in users)
        shape = RmsNormShape(tokens, k, call.attrs["eps"], quantize, lora)
        inputs = [self._values[x], self._packed("float32", [prefix(gamma)], (k,), "float32")]
        suffix = f"{'_quantize' if quantize else ''}{'_lora' if lora else ''}_{tokens}x{k}"
        values = [((tokens, k), "float32")] if lora or not quantize else []
        outputs = (self._code_outputs(tokens, k) if quantize else []) + values
        results = self._kernel("norm", shape, f"rms_norm{suffix}", inputs, outputs)
        if quantize:
            operands = results[:-1] if lora else results
            self._quantized[call.var] = Quantized(tuple(operands), results[-1] if lora else None)
        else:
            self._values[call.var] = results[0]

    def _select_hadamard(self, call: Call) -> None:
        if not all(use.kind == "qlinear" and len(use.args) == 3 for use in self._uses[call.var]):
            raise self._uncovered(call, "its result is not the input of quantized linear layers")
        tokens, k = dims(call.var)
        outputs = [*self._code_outputs(tokens, k), ((tokens, k), "float32")]
        shape = HadamardShape(tokens, k, quantize=True)
        name = f"hadamard_quantize_{tokens}x{k}"
        results = self._kernel("hadamard", shape, name, [self._values[call.args[0]]], outputs)
        self._quantized[call.var] = Quantized(tuple(results[:-1]), None)

    def _select_rope(self, call: Call) -> None:
        """RoPE waits for its attention: one kernel turns q and k, and stores k and v."""
        columns = self._values[call.args[0]]
        if not isinstance(columns, Columns):
            raise self._uncovered(call, "its input is not one of fused q, k, v projections")
        self._values[call.var] = Columns(columns.source, columns.first, columns.count, turned=True)
        self._table = call.args[1]

    def _select_attention(self, call: Call) -> None:
        q, k, v = (self._values[arg] for arg in call.args[:3])
        meta, old_state = self._values[call.args[3]], call.args[4:]
        fused = all(isinstance(c, Columns) and c.source == q.source for c in (q, k, v))
        if not fused or [c.turned for c in (q, k, v)] != [True, True, False]:
            raise self._uncovered(call, "q, k and v are not fused projections with RoPE on q and k")
        heads, kv_heads, head_dim = (call.attrs[n] for n in ("heads", "kv_heads", "head_dim"))
        kv_dtype = call.attrs["kv_dtype"]
        cache = CacheShape(kv_heads, head_dim, dims(old_state[0])[1], kv_dtype)
        state = [self._state(var, cache) for var in old_state]
        positions = dims(self._table)[0]
        table = self._packed("rope", ["rope"], (positions, 2, head_dim), "float32")
        name = f"{kv_dtype}_{self._tokens}x{heads}x{kv_heads}x{head_dim}x{cache.capacity}"
        places = list(range(3, 3 + len(state)))
        out = [((self._tokens, heads * head_dim), "float32")]
        rope = RopeShape(self._tokens, heads, positions, cache)
        inputs = [q.source, table, meta, *state]
        *state, turned = self._kernel("rope", rope, f"rope_{name}", inputs, out, places)
        attention = AttentionShape(self._tokens, heads, cache)
        inputs = [turned, *state, meta]
        [result] = self._kernel("attention", attention, f"attention_{name}", inputs, out)
        for alias, value in zip(self._aliases[call.var], [result, *state], strict=True):
            self._values[alias] = value

    def _select_take_row(self, call: Call) -> None:
        x, meta = call.args
        tokens, k = dims(x)
        name = f"take_row_{tokens}x{k}"
        inputs = [self._values[x], self._values[meta]]
        out = [((1, k), "float32")]
        [result] = self._kernel("select", TakeRowShape(tokens, k), name, inputs, out)
        self._values[call.var] = result

    def _select_argmax(self, call: Call) -> None:
        vocab = dims(call.args[0])[1]
        inputs, out = [self._values[call.args[0]]], [((1,), "int32")]
        [result] = self._kernel("sampling", ArgmaxShape(vocab), f"argmax_{vocab}", inputs, out)
        self._values[call.var] = result
