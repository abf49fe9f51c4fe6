"""Memory plan: a module of kernel calls becomes a program with every tensor at a fixed place.

weights   packed parameters, shared by all functions, in the order of decode's steps so that one
token
          reads the file front to back
kv        the caches, shared by all functions
arena     everything else: inputs and results of a function, and intermediates, whose places are
          reused as soon as their last reader has run
"""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass
from typing import Any

from tvm import relax
from tvm.relax import Var

from llamac.runtime.checks import WeightsHeader
from llamac.runtime.errors import CoverageError
from llamac.schedules.kernel import num_outputs
from llamac.targets.cpu.composite_calls import entry_functions
from llamac.targets.cpu.emitter import STATE_PARTS, Selection
from llamac.targets.program import (
    Function,
    Program,
    ProgramKernel,
    ProgramTensor,
    Step,
    tensor_bytes,
)

PAGE = 4096


def align_up(offset: int, to: int) -> int:
    """The next multiple of `to`."""
    return -(-offset // to) * to


@dataclass(frozen=True)
class KernelCall:
    """One call in a lowered function: kernel name, inputs, and the variables it defines."""

    kernel: str
    inputs: tuple[Var, ...]
    outputs: tuple[Var, ...]


def plan_program(selection: Selection, alignment: int = 64) -> Program:
    """Give every tensor of a selection its place.

    Args:
        selection: kernels and their calls.
        alignment: of every tensor, in bytes; a power of two, at most a page.
    """
    return _Planner(selection, alignment).plan()


class _Planner:
    def __init__(self, selection: Selection, alignment: int) -> None:
        self._selection = selection
        self._alignment = alignment
        self._tensors: list[ProgramTensor] = []
        self._shared: dict[str, int] = {}  # weights and caches by name
        self._kernels: dict[str, int] = {}
        self._sizes = {"weights": WeightsHeader.BYTES, "arena": 0, "kv": 0}

    def plan(self) -> Program:
        """Plan all functions, decode first because it decides the order of the weights."""
        functions = entry_functions(self._selection.module)
        planned = {name: self._function(name, functions[name]) for name in _plan_order(functions)}
        ordered = sorted(planned.values(), key=lambda f: -f.num_tokens)
        kernels = tuple(self._kernel(name) for name in self._kernels)
        self._sizes["weights"] = align_up(self._sizes["weights"], PAGE)
        return Program(
            tensors=tuple(self._tensors),
            kernels=kernels,
            functions=tuple(ordered),
            weights_bytes=self._sizes["weights"],
            arena_bytes=align_up(self._sizes["arena"], PAGE),
            kv_bytes=align_up(self._sizes["kv"], PAGE),
        )

    def _kernel(self, name: str) -> ProgramKernel:
        spec = self._selection.kernels[name]
        return ProgramKernel(name, spec.family, spec.shape_fields(), self._selection.work[name])

    def _function(self, name: str, function: relax.Function) -> Function:
        calls, results = _read_kernel_calls(self._selection, function)
        same = self._resolve(calls)
        arena = _Arena(self._tensors, self._alignment)
        places: dict[Var, int] = {}
        for param in function.params:
            if param.name in ("tokens", "meta"):
                places[param] = arena.add(param.name, param, keep=True)
        logits, argmax = (same.get(var, var) for var in results[:2])
        arena.keep(logits, argmax)
        last_use = _last_uses(calls, same)
        steps = []
        for index, call in enumerate(calls):
            for output in call.outputs:
                if output not in same:
                    places[output] = arena.add(f"{name}.{index}.{output.name}", output)
            operands = []
            for var in (*call.inputs, *(o for o in call.outputs if o not in same)):
                origin = same.get(var, var)
                operands.append(places[origin] if origin in places else self._param(origin))
            steps.append(
                Step(self._kernels.setdefault(call.kernel, len(self._kernels)), tuple(operands))
            )
            arena.free(var for var in last_use.get(index, ()) if var in places)
        self._sizes["arena"] = max(self._sizes["arena"], arena.size)
        params = {param.name: param for param in function.params}
        return Function(
            name=name,
            num_tokens=int(params["tokens"].ty.shape[0]),
            steps=tuple(steps),
            num_logits_steps=_logits_steps(self._selection, calls),
            tokens=places[params["tokens"]],
            meta=places[params["meta"]],
            logits=places[logits],
            argmax=places[argmax],
        )

    def _resolve(self, calls: Iterable[KernelCall]) -> dict[Var, Var]:
        """Variables that name an updated state tensor -> the parameter it is."""
        same: dict[Var, Var] = {}
        for call in calls:
            states = [same.get(v, v) for v in call.inputs if _is_state(same.get(v, v))]
            updated = call.outputs[: len(call.outputs) - self._num_outputs(call.kernel)]
            same.update(zip(updated, states, strict=False))
        return same

    def _num_outputs(self, kernel: str) -> int:
        return num_outputs(self._selection.module[kernel])

    def _param(self, var: Var) -> int:
        """Index of a weight or cache, given a place at its first use."""
        if var.name not in self._shared:
            space = "kv" if _is_state(var) else "weights"
            shape, dtype = _type(var)
            size = tensor_bytes(dtype, shape)
            offset = align_up(self._sizes[space], PAGE if size >= PAGE else self._alignment)
            self._sizes[space] = offset + size
            pack = self._selection.packs.get(var.name)
            self._shared[var.name] = len(self._tensors)
            self._tensors.append(ProgramTensor(var.name, space, offset, dtype, shape, pack))
        return self._shared[var.name]


class _Arena:
    """Places of one function's own tensors: first fit among the gaps of the live ones."""

    def __init__(self, tensors: list[ProgramTensor], alignment: int) -> None:
        self._tensors = tensors
        self._alignment = alignment
        self._live: dict[Var, tuple[int, int]] = {}
        self._kept: set[Var] = set()
        self.size = 0

    def keep(self, *variables: Var) -> None:
        """Never reuse the places of these."""
        self._kept.update(variables)

    def add(self, name: str, var: Var, keep: bool = False) -> int:
        """Place a tensor; returns its index."""
        shape, dtype = _type(var)
        size = align_up(tensor_bytes(dtype, shape), self._alignment)
        offset = 0
        for begin, end in sorted(self._live.values()):
            if offset + size <= begin:
                break
            offset = max(offset, end)
        self._live[var] = (offset, offset + size)
        self.size = max(self.size, offset + size)
        if keep:
            self._kept.add(var)
        self._tensors.append(ProgramTensor(name, "arena", offset, dtype, shape))
        return len(self._tensors) - 1

    def free(self, variables: Iterable[Var]) -> None:
        """Let later tensors reuse these places."""
        for var in variables:
            if var not in self._kept:
                self._live.pop(var, None)


def _plan_order(functions: Iterable[str]) -> list[str]:
    return sorted(functions, key=lambda name: (name != "decode", name))


def _type(var: Var) -> tuple[tuple[int, ...], str]:
    return tuple(int(n) for n in var.ty.shape), str(var.ty.dtype.dtype)


def _is_state(var: Var) -> bool:
    return str(var.name).rpartition(".")[2] in STATE_PARTS


def _last_uses(calls: list[KernelCall], same: dict[Var, Var]) -> dict[int, list[Var]]:
    """Call index -> variables nobody reads after it (never read: freed where they are made)."""
    last: dict[Var, int] = {}
    for index, call in enumerate(calls):
        for var in (*call.inputs, *call.outputs):
            last[same.get(var, var)] = index
    uses: dict[int, list[Var]] = {}
    for var, index in last.items():
        uses.setdefault(index, []).append(var)
    return uses


def _logits_steps(selection: Selection, calls: list[KernelCall]) -> int:
    """Number of last steps that start with the selection of the last valid row."""
    for index, call in enumerate(calls):
        if selection.kernels[call.kernel].family == "select":
            return len(calls) - index
    return 0


def _read_kernel_calls(
    selection: Selection, function: relax.Function
) -> tuple[list[KernelCall], list[Var]]:
    """Kernel calls of a lowered function in order, and its results."""
    calls: list[KernelCall] = []
    producers: dict[Var, tuple[str, tuple[Var, ...]]] = {}
    parts: dict[Var, dict[int, Var]] = {}
    order: list[Var] = []
    same: dict[Var, Var] = {}
    for binding in (b for block in function.body.blocks for b in block.bindings):
        value: Any = binding.value
        if isinstance(value, relax.Call):
            if str(value.op.name) not in ("relax.call_tir", "relax.call_tir_inplace"):
                raise CoverageError(
                    f"{value.op.name} is left after lowering",
                    cause="every call must be a kernel call by now",
                    fix="report it with the module that `--dump DIR` writes",
                )
            inputs = tuple(same.get(v, v) for v in value.args[1].fields)
            producers[binding.var] = (value.args[0].name_hint, inputs)
            order.append(binding.var)
        elif isinstance(value, relax.TupleGetItem):
            parts.setdefault(value.tuple_value, {})[int(value.index)] = binding.var
        elif isinstance(value, relax.Var):
            same[binding.var] = same.get(value, value)
    for var in order:
        kernel, inputs = producers[var]
        fields = parts.get(var)
        outputs = tuple(fields[i] for i in sorted(fields)) if fields else (var,)
        calls.append(KernelCall(kernel, inputs, outputs))
    results = function.body.body
    return calls, [same.get(v, v) for v in results.fields]
