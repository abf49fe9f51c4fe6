"""Composite calls of a Relax function, as kernel selection reads them."""

from __future__ import annotations

import json
from dataclasses import dataclass
from typing import Any

from tvm import relax
from tvm.ir import IRModule
from tvm.relax import Var


@dataclass(frozen=True)
class Call:
    """A call of a composite in a Relax function."""

    kind: str
    attrs: dict[str, Any]
    args: tuple[Var, ...]
    var: Var


def entry_functions(module: IRModule) -> dict[str, relax.Function]:
    """The functions of a model (not its composites)."""
    return {
        var.name_hint: function
        for var, function in module.functions.items()
        if isinstance(function, relax.Function)
        and not (function.attrs and "Composite" in function.attrs)
    }


def read_calls(
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


def dims(var: Any) -> tuple[int, ...]:
    """Shape of a tensor variable."""
    return tuple(int(n) for n in var.ty.shape)


def prefix(weight: Var) -> str:
    """Name of the layer whose `.weight` a parameter is."""
    return str(weight.name).removesuffix(".weight")
