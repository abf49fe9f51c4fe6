"""Emitting kernel calls: what selection knows of a function while it rewrites it."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any

from tvm import relax
from tvm.ir import IRModule
from tvm.relax import BlockBuilder, Var

from llamac.runtime.errors import CoverageError
from llamac.schedules.intrin.isa import Isa
from llamac.schedules.kernel import over_all_items, work_items
from llamac.targets.cpu.composite_calls import Call, dims, read_calls
from llamac.targets.cpu.kernels import KernelSpec
from llamac.targets.cpu.knobs import KnobChooser
from llamac.targets.program import Pack

# Last parts of the names of the tensors that kernels update in place.
STATE_PARTS = ("k_cache", "v_cache", "k_params", "v_params")


@dataclass(frozen=True)
class Columns:
    """Columns of a fused result that stand for the value of a composite."""

    source: Var
    first: int
    count: int
    turned: bool = False  # RoPE has been asked for


@dataclass(frozen=True)
class Quantized:
    """What a quantization stored, and the floats it was made from, if they are stored too."""

    operands: tuple[Var, ...]  # codes, (scale, zero point), and offsets if the levels have them
    values: Var | None


@dataclass
class Selection:
    """What selection makes of a module."""

    module: IRModule
    kernels: dict[str, KernelSpec]
    packs: dict[str, Pack]
    work: dict[str, int] = field(default_factory=dict)


class KernelLibrary:
    """Kernels of a module, each added once."""

    def __init__(
        self,
        builder: BlockBuilder,
        selection: Selection,
        isa: Isa,
        chooser: KnobChooser | None = None,
    ) -> None:
        self._builder, self.selection, self.isa = builder, selection, isa
        self._chooser = chooser
        self._vars: dict[str, Any] = {}

    def add(self, family: str, shape: Any, name: str) -> Any:
        """Global variable of a kernel, which is added at its first use."""
        if name not in self._vars:
            spec = KernelSpec(name, family, shape, self._chooser)
            function = spec.make(self.isa)
            self.selection.kernels[name] = spec
            self.selection.work[name] = work_items(function)
            self._vars[name] = self._builder.add_func(over_all_items(function), name)
        if self.selection.kernels[name].shape != shape:
            raise RuntimeError(f"two kernels have the name {name}: {shape}")
        return self._vars[name]

    def packed(self, pack: Pack) -> str:
        """Name of a packed tensor."""
        name = "+".join(pack.sources) + ":" + pack.layout
        self.selection.packs[name] = pack
        return name


class FunctionState:
    """A function under selection: values so far, and how to emit what comes next."""

    def __init__(
        self,
        builder: BlockBuilder,
        library: KernelLibrary,
        module: IRModule,
        function: relax.Function,
        scale_dtype: str,
    ) -> None:
        self._builder, self._library, self._scale_dtype = builder, library, scale_dtype
        self._function = function
        self._calls, self._results, self._aliases = read_calls(module, function)
        self._uses: dict[Var, list[Call]] = {}
        for call in self._calls:
            for arg in call.args:
                self._uses.setdefault(arg, []).append(call)
        self._values: dict[Var, Any] = {}  # old variable -> new variable, or Columns
        self._quantized: dict[Var, Quantized] = {}
        self._params: dict[str, Var] = {}
        self._covered: set[Var] = set()
        self._emitter = BlockBuilder()
        self._tokens = 0

    def _uncovered(self, call: Call, why: str) -> CoverageError:
        shapes = ", ".join(f"{arg.name} {list(dims(arg))}" for arg in call.args)
        return CoverageError(
            f"llamac.{call.kind}({shapes}) cannot be compiled for this CPU: {why}",
            cause="kernel selection has a rule for every form of Llama, and this is none of them",
            fix="report the model's form; `--dump DIR` writes the module that selection saw",
        )

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
