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

The result is a Relax module whose functions only call kernels, so the Relax VM runs it, and
`targets/cpu/plan.py` reads the program of a bundle off it. Weights become parameters in packed
layouts, named `<sources>:<layout>`; how each is made is in `Selection.packs`.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import Any

from tvm import relax
from tvm.ir import IRModule
from tvm.relax import BlockBuilder, Var

from llamac.runtime.errors import CoverageError
from llamac.schedules.attention import AttentionShape
from llamac.schedules.embedding import EmbeddingShape
from llamac.schedules.hadamard import HadamardShape
from llamac.schedules.intrin.isa import Isa
from llamac.schedules.kernel import over_all_items, work_items
from llamac.schedules.lora import LoraShape
from llamac.schedules.matmul import MatmulShape
from llamac.schedules.norm import RmsNormShape
from llamac.schedules.qmatmul import GROUP, GROUP_BYTES, ROWS, QMatmulShape
from llamac.schedules.qmatmul_int8 import QMatmulInt8Shape
from llamac.schedules.quantize import QuantizeShape
from llamac.schedules.rope import CacheShape, RopeShape
from llamac.schedules.sampling import ArgmaxShape
from llamac.schedules.select import TakeRowShape
from llamac.targets.cpu.kernels import KernelSpec
from llamac.targets.program import Pack

STATE_PARTS = ("k_cache", "v_cache", "k_params", "v_params")


@dataclass(frozen=True)
class Call:
    """A call of a composite in a Relax function."""

    kind: str
    attrs: dict[str, Any]
    args: tuple[Var, ...]
    var: Var


@dataclass(frozen=True)
class Columns:
    """Columns of a fused result that stand for the value of a composite."""

    source: Var
    first: int
    count: int
    turned: bool = False  # RoPE has been asked for


@dataclass(frozen=True)
class Quantized:
    """Activation codes and what goes with them; `values` are the floats, if they are stored."""

    codes: Var
    qparams: Var
    offsets: Var
    values: Var | None


@dataclass
class Selection:
    """What selection makes of a module."""

    module: IRModule
    kernels: dict[str, KernelSpec]
    packs: dict[str, Pack]
    work: dict[str, int] = field(default_factory=dict)


def select_kernels(
    module: IRModule, scale_dtype: str, isa: Isa, on_kernel: Callable[[str], None] | None = None
) -> Selection:
    """Cover all functions of composites with kernels, built for `isa` in the returned module.

    Raises:
        CoverageError: a composite that no rule covers.
    """
    builder = BlockBuilder()
    selection = Selection(IRModule({}), {}, {})
    library = _Library(builder, selection, isa, on_kernel or (lambda name: None))
    for name, function in sorted(entry_functions(module).items()):
        _FunctionSelector(builder, library, module, function, scale_dtype).emit(name)
    selection.module = builder.finalize()
    return selection


def entry_functions(module: IRModule) -> dict[str, relax.Function]:
    """The functions of a model (not its composites)."""
    return {
        var.name_hint: function
        for var, function in module.functions.items()
        if isinstance(function, relax.Function)
        and not (function.attrs and "Composite" in function.attrs)
    }


class _Library:
    """Kernels of a module, each added once."""

    def __init__(
        self,
        builder: BlockBuilder,
        selection: Selection,
        isa: Isa,
        on_kernel: Callable[[str], None],
    ) -> None:
        self._builder, self.selection, self._isa, self._on_kernel = (
            builder,
            selection,
            isa,
            on_kernel,
        )
        self._vars: dict[str, Any] = {}

    def add(self, family: str, shape: Any, name: str) -> Any:
        """Global variable of a kernel, which is added at its first use."""
        if name not in self._vars:
            spec = KernelSpec(name, family, shape)
            function = spec.make(self._isa)
            self.selection.kernels[name] = spec
            self.selection.work[name] = work_items(function)
            self._vars[name] = self._builder.add_func(over_all_items(function), name)
            self._on_kernel(name)
        return self._vars[name]

    def packed(self, pack: Pack) -> str:
        """Name of a packed tensor."""
        name = "+".join(pack.sources) + ":" + pack.layout
        self.selection.packs[name] = pack
        return name


class _FunctionSelector:
    """Selects kernels for one function."""

    def __init__(
        self,
        builder: BlockBuilder,
        library: _Library,
        module: IRModule,
        function: relax.Function,
        scale_dtype: str,
    ) -> None:
        self._builder, self._library, self._scale_dtype = builder, library, scale_dtype
        self._function = function
        self._calls, self._results, self._aliases = _read_calls(module, function)
        self._uses: dict[Var, list[Call]] = {}
        for call in self._calls:
            for arg in call.args:
                self._uses.setdefault(arg, []).append(call)
        self._values: dict[Var, Any] = {}  # old variable -> new variable, or Columns
        self._quantized: dict[Var, Quantized] = {}
        self._params: dict[str, Var] = {}
        self._covered: set[Var] = set()
        self._tokens = 0

    def emit(self, name: str) -> None:
        """Emit the function; packed parameters are found on the way, so the body comes first."""
        old = {param.name: param for param in self._function.params}
        self._tokens = _dims(old["tokens"])[0]
        self._values[old["tokens"]] = self._param("tokens", (self._tokens,), "int32")
        self._values[old["meta"]] = self._param("meta", (2,), "int32")
        inner = BlockBuilder()
        self._emitter = inner
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

    def _uncovered(self, call: Call, why: str) -> CoverageError:
        shapes = ", ".join(f"{arg.name} {list(_dims(arg))}" for arg in call.args)
        return CoverageError(
            f"llamac.{call.kind}({shapes}) cannot be compiled for this CPU: {why}",
            cause="kernel selection has a rule for every form of Llama, and this is none of them",
            fix="report the model's form; `--dump DIR` writes the module that selection saw",
        )

    # -- emitting --------------------------------------------------------------------------------

    def _param(self, name: str, shape: Sequence[int], dtype: str) -> Var:
        if name not in self._params:
            self._params[name] = relax.Var(name, relax.TensorType(list(shape), dtype))
        return self._params[name]

    def _packed(
        self,
        layout: str,
        sources: Sequence[str],
        shape: Sequence[int],
        dtype: str,
        interleave: bool = False,
    ) -> Var:
        name = self._library.packed(Pack(layout, tuple(sources), interleave))
        return self._param(name, shape, dtype)

    def _kernel(
        self,
        family: str,
        shape: Any,
        name: str,
        inputs: Sequence[Var],
        outputs: Sequence[tuple[tuple[int, ...], str]],
        state: Sequence[int] = (),
    ) -> list[Var]:
        """Emit a kernel call; `state` are indices of inputs that it updates in place.

        Returns the updated state tensors, then the outputs.
        """
        kernel = self._library.add(family, shape, name)
        types = [inputs[i].ty for i in state] + [relax.TensorType(list(s), d) for s, d in outputs]
        if state:
            places = [*state, *([-1] * len(outputs))]
            call = relax.op.call_tir_inplace(kernel, list(inputs), places, types)
        else:
            call = relax.op.call_tir(kernel, list(inputs), types)
        result = self._emitter.emit(call)
        if len(types) == 1 and not state:
            return [result]
        return [self._emitter.emit(relax.TupleGetItem(result, i)) for i in range(len(types))]

    # -- rules -----------------------------------------------------------------------------------

    def _select_embedding(self, call: Call) -> None:
        tokens, table, *scales = call.args
        vocab, dim = _dims(table)
        source = _prefix(table)
        shared = any(use.kind in ("qlinear", "linear") for use in self._uses[table])
        form = "int8" if scales else "bf16"
        shape = EmbeddingShape(self._tokens, vocab, dim, form=form, blocks=shared)
        if form == "int8":
            packed = (vocab // ROWS, dim // 4, 4 * ROWS) if shared else (vocab, dim)
            layout = "int8.codes" if shared else "int8.rows"
            inputs = [self._packed(layout, [source], packed, "int8")]
            inputs.append(self._packed("int8.scales", [source], (vocab,), "float32"))
        else:
            packed = (vocab // ROWS, dim, ROWS) if shared else (vocab, dim)
            layout = "bf16.blocks" if shared else "bf16.rows"
            inputs = [self._packed(layout, [source], packed, "uint16")]
        name = f"embedding_f32_{form}{'_blocks' if shared else ''}_{self._tokens}x{dim}"
        out = [((self._tokens, dim), "float32")]
        [result] = self._kernel("embedding", shape, name, [self._values[tokens], *inputs], out)
        self._values[call.var] = result

    def _select_rms_norm(self, call: Call) -> None:
        x, gamma = call.args
        tokens, k = _dims(x)
        users = self._uses[call.var]
        quantize = all(use.kind == "qlinear" for use in users)
        lora = quantize and any(len(use.args) > 3 for use in users)
        shape = RmsNormShape(tokens, k, call.attrs["eps"], quantize, lora)
        inputs = [self._values[x], self._packed("float32", [_prefix(gamma)], (k,), "float32")]
        suffix = f"{'_quantize' if quantize else ''}{'_lora' if lora else ''}_{tokens}x{k}"
        values = [((tokens, k), "float32")] if lora or not quantize else []
        outputs = (_code_outputs(tokens, k) if quantize else []) + values
        results = self._kernel("norm", shape, f"rms_norm{suffix}", inputs, outputs)
        if quantize:
            self._quantized[call.var] = Quantized(*results[:3], results[3] if lora else None)
        else:
            self._values[call.var] = results[0]

    def _select_hadamard(self, call: Call) -> None:
        if not all(use.kind == "qlinear" and len(use.args) == 3 for use in self._uses[call.var]):
            raise self._uncovered(call, "its result is not the input of quantized linear layers")
        tokens, k = _dims(call.var)
        outputs = [*_code_outputs(tokens, k), ((tokens, k), "float32")]
        shape = HadamardShape(tokens, k, quantize=True)
        name = f"hadamard_quantize_{tokens}x{k}"
        results = self._kernel("hadamard", shape, name, [self._values[call.args[0]]], outputs)
        self._quantized[call.var] = Quantized(*results[:3], None)

    def _codes_of(self, x: Var) -> Quantized:
        """Codes of a linear layer's input; a kernel makes them unless one has already."""
        if x not in self._quantized:
            tokens, k = _dims(x)
            name = f"quantize_{tokens}x{k}"
            shape = QuantizeShape(tokens, k)
            value = self._values[x]
            codes = self._kernel("quantize", shape, name, [value], _code_outputs(tokens, k))
            self._quantized[x] = Quantized(*codes, value)
        return self._quantized[x]

    def _select_qlinear(self, call: Call) -> None:
        if call.attrs["weight"] == "int8":
            self._select_int8(call)
            return
        calls, epilogue, extra = self._tile(call)
        n, k = sum(_dims(c.args[1])[0] for c in calls), _dims(call.args[1])[1]
        sources = [_prefix(c.args[1]) for c in calls]
        codes = self._codes_of(call.args[0])
        inputs: list[Var] = [codes.codes, codes.qparams, codes.offsets]
        inputs += self._int4_weights(sources, n, k, epilogue == "swiglu")
        rank, scale, splits = 0, 1.0, ()
        if len(call.args) > 3:
            rank, scale = _dims(call.args[3])[0], call.attrs["lora_scale"]
            splits = tuple(_dims(c.args[1])[0] for c in calls)
            inputs += self._lora_branch(call, codes, sources, n, rank, epilogue == "swiglu")
        shape = QMatmulShape(
            self._rows(call), n, k, self._scale_dtype, epilogue, rank, scale, splits
        )
        self._linear_kernel("qmatmul", "qai8dx_qsi4c32", shape, calls, inputs + extra)

    def _int4_weights(self, sources: Sequence[str], n: int, k: int, swiglu: bool) -> list[Var]:
        groups, bits = k // GROUP, "float16" if self._scale_dtype == "float16" else "uint16"
        blocks = n // ROWS
        return [
            self._packed("int4.codes", sources, (blocks, groups, GROUP_BYTES), "uint8", swiglu),
            self._packed("int4.scales", sources, (blocks, groups, ROWS), bits, swiglu),
            self._packed("int4.ksum", sources, (n,), "float32", swiglu),
        ]

    def _lora_branch(
        self, call: Call, codes: Quantized, sources: Sequence[str], n: int, rank: int, swiglu: bool
    ) -> list[Var]:
        """Emit t = A x for all fused projections; return t and the packed B."""
        tokens, k = _dims(call.args[0])
        if codes.values is None:
            raise self._uncovered(call, "its LoRA branch needs activations that are not stored")
        total = rank * len(sources)
        a = self._packed("lora.a", sources, (total, k), "uint16")
        name = f"lora_a_{tokens}x{total}x{k}"
        shape = LoraShape(tokens, total, k)
        outputs = [((tokens, total), "float32")]
        [t] = self._kernel("lora", shape, name, [codes.values, a], outputs)
        return [t, self._packed("lora.b", sources, (n // ROWS, rank, ROWS), "uint16", swiglu)]

    def _select_int8(self, call: Call) -> None:
        x, weight, _ = call.args
        n, k = _dims(weight)
        codes, source = self._codes_of(x), [_prefix(weight)]
        inputs = [
            codes.codes,
            codes.qparams,
            self._packed("int8.codes", source, (n // ROWS, k // 4, 4 * ROWS), "int8"),
            self._packed("int8.scales", source, (n,), "float32"),
            self._packed("int8.wsum", source, (n,), "int32"),
        ]
        rows = self._rows(call)
        shape = QMatmulInt8Shape(rows, n, k)
        name = f"qmatmul_f32_qai8dx_qsi8cx_{rows}x{n}x{k}"
        outputs = [((rows, n), "float32")]
        [result] = self._kernel("qmatmul_int8", shape, name, inputs, outputs)
        self._values[call.var] = result

    def _select_linear(self, call: Call) -> None:
        calls, epilogue, extra = self._tile(call)
        n, k = sum(_dims(c.args[1])[0] for c in calls), _dims(call.args[1])[1]
        sources = [_prefix(c.args[1]) for c in calls]
        packed = (n // ROWS, k, ROWS)
        weights = self._packed("bf16.blocks", sources, packed, "uint16", epilogue == "swiglu")
        shape = MatmulShape(self._rows(call), n, k, epilogue)
        inputs = [self._values[call.args[0]], weights, *extra]
        self._linear_kernel("matmul", "f32_bf16", shape, calls, inputs)

    def _tile(self, call: Call) -> tuple[list[Call], str, list[Var]]:
        """The linear layers that one kernel covers, its epilogue, and the epilogue's inputs."""
        siblings = [
            use
            for use in self._uses[call.args[0]]
            if use.kind == call.kind and use.attrs == call.attrs and len(use.args) == len(call.args)
        ]
        users = [self._uses.get(c.var, []) for c in siblings]
        if len(siblings) == 2 and all(u == users[0] and len(u) == 1 for u in users):
            [user] = users[0]
            if user.kind == "swiglu" and [c.var for c in siblings] == list(user.args):
                return siblings, "swiglu", []
        if len(siblings) == 1 and len(users[0]) == 1 and users[0][0].kind == "add":
            other = [arg for arg in users[0][0].args if arg != call.var]
            if len(other) == 1 and isinstance(self._values.get(other[0]), Var):
                return siblings, "residual", [self._values[other[0]]]
        return siblings, "none", []

    def _linear_kernel(
        self, family: str, operands: str, shape: Any, calls: Sequence[Call], inputs: Sequence[Var]
    ) -> None:
        """Emit a matrix kernel and bind its result to the composites that it covers."""
        suffix = "" if shape.epilogue == "none" else f"_{shape.epilogue}"
        if getattr(shape, "lora_rank", 0):
            suffix += f"_lora{shape.lora_rank}x{len(shape.lora_splits)}"
        name = f"{family}_f32_{operands}{suffix}_{shape.m}x{shape.n}x{shape.k}"
        outputs = [((shape.m, shape.columns), "float32")]
        [result] = self._kernel(family, shape, name, inputs, outputs)
        if shape.epilogue == "none":
            first = 0
            for call in calls:
                count = _dims(call.args[1])[0]
                whole = len(calls) == 1
                self._values[call.var] = result if whole else Columns(result, first, count)
                first += count
            self._covered.update(call.var for call in calls)
            return
        [user] = self._uses[calls[0].var]
        self._values[user.var] = result
        self._covered.update([user.var, *(call.var for call in calls)])

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
        cache = CacheShape(kv_heads, head_dim, _dims(old_state[0])[1], kv_dtype)
        state = [self._state(var, cache) for var in old_state]
        positions = _dims(self._table)[0]
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

    def _state(self, var: Var, cache: CacheShape) -> Var:
        """A cache tensor in the kernels' layout."""
        part = var.name.rpartition(".")[2]
        if part == "k_cache":
            return self._param(var.name, cache.k_shape, cache.dtype)
        if part == "v_cache":
            return self._param(var.name, cache.v_shape, cache.dtype)
        return self._param(var.name, cache.params_shape, "float32")

    def _select_take_row(self, call: Call) -> None:
        x, meta = call.args
        tokens, k = _dims(x)
        name = f"take_row_{tokens}x{k}"
        inputs = [self._values[x], self._values[meta]]
        out = [((1, k), "float32")]
        [result] = self._kernel("select", TakeRowShape(tokens, k), name, inputs, out)
        self._values[call.var] = result

    def _select_argmax(self, call: Call) -> None:
        vocab = _dims(call.args[0])[1]
        inputs, out = [self._values[call.args[0]]], [((1,), "int32")]
        [result] = self._kernel("sampling", ArgmaxShape(vocab), f"argmax_{vocab}", inputs, out)
        self._values[call.var] = result

    def _rows(self, call: Call) -> int:
        return _dims(call.args[0])[0]


def _code_outputs(tokens: int, k: int) -> list[tuple[tuple[int, ...], str]]:
    return [((tokens, k), "int8"), ((tokens, 2), "float32"), ((tokens, k // GROUP), "int32")]


def _dims(var: Any) -> tuple[int, ...]:
    return tuple(int(n) for n in var.ty.shape)


def _prefix(weight: Var) -> str:
    """Name of the layer whose `.weight` a parameter is."""
    return str(weight.name).removesuffix(".weight")


def _read_calls(
    module: IRModule, function: relax.Function
) -> tuple[list[Call], list[Var], dict[Var, list[Var]]]:
    """Composite calls in order, the results of the function, and the parts of tuple results."""
    calls: list[Call] = []
    aliases: dict[Var, list[Var]] = {}
    same: dict[Var, Var] = {}
    for block in function.body.blocks:
        for binding in block.bindings:
            value = binding.value
            if isinstance(value, relax.Call):
                composite = module[value.op]
                kind = str(composite.attrs["Composite"]).removeprefix("llamac.")
                attrs = json.loads(str(composite.attrs["llamac.attrs"]))
                args = tuple(same.get(arg, arg) for arg in value.args)
                calls.append(Call(kind, attrs, args, binding.var))
            elif isinstance(value, relax.TupleGetItem):
                aliases.setdefault(value.tuple_value, []).append(binding.var)
            elif isinstance(value, relax.Var):
                same[binding.var] = same.get(value, value)
    results = function.body.body
    if isinstance(results, relax.Var):
        bindings = {b.var: b.value for block in function.body.blocks for b in block.bindings}
        results = bindings[results]
    return calls, [same.get(var, var) for var in results.fields], aliases
