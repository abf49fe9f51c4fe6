"""Selection rules for linear layers: which of them one kernel covers, and with which epilogue."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from tvm.relax import Var

from llamac.schedules.lora import LoraShape
from llamac.schedules.matmul import MatmulShape
from llamac.schedules.qmatmul import GROUP, QMatmulShape
from llamac.schedules.qmatmul_epilogue import ROWS
from llamac.schedules.qmatmul_int8_lanes import QMatmulInt8Shape
from llamac.schedules.quantize import QuantizeShape, codes_shape, has_offsets
from llamac.targets.cpu.composite_calls import Call, dims, prefix
from llamac.targets.cpu.emitter import Columns, FunctionState, Quantized
from llamac.targets.cpu.weight_form import WeightForm, weight_form


class LinearRules(FunctionState):
    """Rules for `llamac.qlinear` and `llamac.linear`."""

    def _codes_of(self, x: Var) -> Quantized:
        """Codes of a linear layer's input; a kernel makes them unless one has already."""
        if x not in self._quantized:
            tokens, k = dims(x)
            name = f"quantize_{tokens}x{k}"
            shape = QuantizeShape(tokens, k)
            value = self._values[x]
            outputs = self._code_outputs(tokens, k)
            codes = self._kernel("quantize", shape, name, [value], outputs)
            self._quantized[x] = Quantized(tuple(codes), value)
        return self._quantized[x]

    def _select_qlinear(self, call: Call) -> None:
        if call.attrs["weight"] == "int8":
            self._select_int8(call)
            return
        calls, epilogue, extra = self._tile(call)
        n, k = sum(dims(c.args[1])[0] for c in calls), dims(call.args[1])[1]
        self._check_int4_blocks(call, calls, epilogue == "swiglu")
        sources = [prefix(c.args[1]) for c in calls]
        codes = self._codes_of(call.args[0])
        inputs: list[Var] = list(codes.operands)
        inputs += self._int4_weights(sources, n, k, epilogue == "swiglu")
        rank, scale, splits = 0, 1.0, tuple[int, ...]()
        if len(call.args) > 3:
            rank, scale = dims(call.args[3])[0], call.attrs["lora_scale"]
            splits = tuple(dims(c.args[1])[0] for c in calls)
            inputs += self._lora_branch(call, codes, sources, n, rank, epilogue == "swiglu")
        lora, signed = (rank, scale, splits), call.attrs.get("signed_scales", False)
        shape = QMatmulShape(self._rows(call), n, k, self._scale_dtype, epilogue, *lora, signed)
        self._linear_kernel(self._form.int4_family, "qai8dx_qsi4c32", shape, calls, inputs + extra)

    @property
    def _form(self) -> WeightForm:
        return weight_form(self._library.isa)

    def _check_int4_blocks(self, call: Call, calls: Sequence[Call], swiglu: bool) -> None:
        """Refuse rows that make no whole blocks, together or each for itself."""
        rows = self._form.gate_rows if swiglu else self._form.int4_rows
        each = [dims(c.args[1])[0] for c in calls]
        is_split = swiglu or len(call.args) > 3
        self._check_blocks(call, each if is_split else [sum(each)], rows)

    def _check_blocks(self, call: Call, counts: Sequence[int], rows: int) -> None:
        if any(count % rows for count in counts):
            raise self._uncovered(call, f"its weights have no multiple of {rows} rows")

    def _code_outputs(self, tokens: int, k: int) -> list[tuple[tuple[int, ...], str]]:
        """Shapes of codes, (scale, zero point), and group offsets if the levels have them."""
        codes = codes_shape(self._library.isa, tokens, k)
        outputs: list[tuple[tuple[int, ...], str]] = [(codes, "int8"), ((tokens, 2), "float32")]
        if has_offsets(self._library.isa):
            outputs.append(((tokens, k // GROUP), "int32"))
        return outputs

    def _int4_weights(self, sources: Sequence[str], n: int, k: int, swiglu: bool) -> list[Var]:
        groups, bits = k // GROUP, "float16" if self._scale_dtype == "float16" else "uint16"
        form, rows = self._form, self._form.int4_rows
        codes, scales = (n // rows, groups, rows * GROUP // 2), (n // rows, groups, rows)
        return [
            self._packed(form.int4, sources, codes, "uint8", swiglu),
            self._packed(form.scales, sources, scales, bits, swiglu),
            self._packed(form.ksum, sources, (n,), "float32", swiglu),
        ]

    def _lora_branch(
        self, call: Call, codes: Quantized, sources: Sequence[str], n: int, rank: int, swiglu: bool
    ) -> list[Var]:
        """Emit t = A x for all fused projections; return t and the packed B."""
        tokens, k = dims(call.args[0])
        if codes.values is None:
            raise self._uncovered(call, "its LoRA branch needs activations that are not stored")
        total = rank * len(sources)
        a = self._packed("lora.a", sources, (total, k), "uint16")
        name = f"lora_a_{tokens}x{total}x{k}"
        shape = LoraShape(tokens, total, k)
        outputs = [((tokens, total), "float32")]
        [t] = self._kernel("lora", shape, name, [codes.values, a], outputs)
        rows = self._form.int4_rows
        b = (n // rows, rank, rows)
        return [t, self._packed(self._form.lora_b, sources, b, "uint16", swiglu)]

    def _select_int8(self, call: Call) -> None:
        x, weight, _ = call.args
        n, k = dims(weight)
        codes, source, form = self._codes_of(x), [prefix(weight)], self._form
        rows = form.int8_rows
        self._check_blocks(call, [n], rows)
        blocks = (n // rows, k // 4, 4 * rows)
        inputs = [
            *codes.operands[: 3 if form.int8_offsets else 2],
            self._packed(form.int8, source, blocks, form.int8_dtype),
            self._packed("int8.scales", source, (n,), "float32"),
            self._packed("int8.wsum", source, (n,), "int32"),
        ]
        tokens = self._rows(call)
        shape = QMatmulInt8Shape(tokens, n, k)
        name = f"qmatmul_f32_qai8dx_qsi8cx_{tokens}x{n}x{k}"
        outputs = [((tokens, n), "float32")]
        [result] = self._kernel(form.int8_family, shape, name, inputs, outputs)
        self._values[call.var] = result

    def _select_linear(self, call: Call) -> None:
        calls, epilogue, extra = self._tile(call)
        n, k = sum(dims(c.args[1])[0] for c in calls), dims(call.args[1])[1]
        sources = [prefix(c.args[1]) for c in calls]
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
        if getattr(shape, "signed_scales", False):
            suffix += "_signed"
        name = f"{family}_f32_{operands}{suffix}_{shape.m}x{shape.n}x{shape.k}"
        outputs = [((shape.m, shape.columns), "float32")]
        [result] = self._kernel(family, shape, name, inputs, outputs)
        if shape.epilogue == "none":
            first = 0
            for call in calls:
                count = dims(call.args[1])[0]
                whole = len(calls) == 1
                self._values[call.var] = result if whole else Columns(result, first, count)
                first += count
            self._covered.update(call.var for call in calls)
            return
        [user] = self._uses[calls[0].var]
        self._values[user.var] = result
        self._covered.update([user.var, *(call.var for call in calls)])

    def _rows(self, call: Call) -> int:
        return dims(call.args[0])[0]
