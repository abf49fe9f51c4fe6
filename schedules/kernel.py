"""What a kernel is, and the scaffold in which generators build one.

A kernel is a TIR PrimFunc `kernel(inputs..., outputs..., begin, end)` over static shapes. Its work
is cut into `work` independent items, and a call does the items `begin <= i < end`: threads, DSP
jobs and tests all use the same function with other bounds, and no kernel ever waits for another
one.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from contextlib import AbstractContextManager, contextmanager, nullcontext
from typing import Any

import tvm
from tvm.script.ir_builder import IRBuilder
from tvm.tirx import Buffer, PrimFunc
from tvm.tirx.script.builder import ir as T

from llamac.schedules.intrin.isa import Isa

Knobs = Mapping[str, int | str]

WORK_ATTR = "llamac.work"
OUTPUTS_ATTR = "llamac.outputs"
MCPU_ATTR = "llamac.mcpu"


class KernelBuilder:
    """Builds one kernel: declare tensors, open `items()`, write the body, take `func`.

    Args:
        name: symbol of the kernel, in the grammar `<op>_<dst>_<lhs>_<rhs>_<isa>`.
        work: number of independent work items.
        mcpu: core for which LLVM schedules the kernel; "" leaves that to the instruction set.
        alignment: bytes to which all tensors are aligned, see `Isa.alignment`. Nothing checks it
            in the kernel.

    Attributes:
        begin: first item of the call, once `items` is open.
        end: behind its last.
    """

    begin: Any
    end: Any

    def __init__(
        self, name: str, work: int, mcpu: str = "", alignment: int = Isa.alignment
    ) -> None:
        self._mcpu = mcpu
        self._alignment = alignment
        self._name = name
        self._work = work
        self._outputs = 0
        self._builder = IRBuilder()
        self._function = T.prim_func()

    def __enter__(self) -> KernelBuilder:
        self._builder.__enter__()
        self._function.__enter__()
        T.func_name(self._name)
        return self

    def __exit__(self, *exc: Any) -> None:
        self._function.__exit__(*exc)
        self._builder.__exit__(*exc)

    def input(self, name: str, shape: tuple[int, ...], dtype: str) -> Buffer:
        """Declare an input tensor (bfloat16 is declared as its uint16 bits)."""
        return T.arg(name, T.buffer(shape, dtype, align=self._alignment))

    def output(self, name: str, shape: tuple[int, ...], dtype: str) -> Buffer:
        """Declare an output tensor; outputs follow all inputs."""
        self._outputs += 1
        return T.arg(name, T.buffer(shape, dtype, align=self._alignment))

    @contextmanager
    def items(self, around: AbstractContextManager[None] | None = None) -> Iterator[Any]:
        """Loop over the work items of this call; yields the item's index.

        Args:
            around: opens and closes a state of the CPU in which the whole loop runs.
        """
        self.begin = begin = T.arg("begin", T.int64())
        self.end = end = T.arg("end", T.int64())
        T.func_attr(
            {
                "global_symbol": self._name,
                "tirx.noalias": True,
                WORK_ATTR: self._work,
                OUTPUTS_ATTR: self._outputs,
                **({MCPU_ATTR: self._mcpu} if self._mcpu else {}),
            }
        )
        with around or nullcontext(), T.serial(begin, end) as item:
            yield item

    @property
    def func(self) -> PrimFunc:
        """The finished kernel."""
        return self._builder.get()


def for_token_tiles(tokens: int, mr: int, emit: Callable[[Any, int], None]) -> None:
    """Call `emit(first token, tokens)` for tiles of `mr` tokens, and once more for the rest."""
    full = tokens // mr * mr
    if full:
        with T.serial(0, T.int64(full // mr)) as i:
            emit(i * mr, mr)
    if full < tokens:
        emit(T.int64(full), tokens - full)


def local(dtype: str, count: int = 1) -> Buffer:
    """Allocate `count` local values of a (vector) dtype; constant indices become registers."""
    return T.alloc_buffer(
        (count,), dtype, scope="local", annotations={"disable_lower_builtin": True}
    )


def store(buffer: Buffer, value: Any, *index: Any) -> None:
    """Write `value` at `index` of `buffer`."""
    T.buffer_store(buffer, value, list(index))


def sum_chains(chains: Buffer, first: int, count: int) -> Any:
    """Sum of `count` independent accumulators, from index `first` of a local buffer."""
    total = chains[first]
    for i in range(first + 1, first + count):
        total = total + chains[i]
    return total


def opaque(value: Any, dtype: str = "int64") -> Any:
    """Name a value without telling TVM's analyzer what it is.

    The analyzer looks through `T.Bind` at every use while code is generated; a value that many
    vector comparisons depend on then takes minutes. LLVM turns this local into a register.
    """
    place = local(dtype)
    store(place, value, 0)
    return place[0]


def span(start: Any, lanes: int) -> Any:
    """Index of `lanes` consecutive elements from `start`."""
    return T.ramp(start, 1, lanes) if lanes > 1 else start


def over_all_items(func: PrimFunc) -> PrimFunc:
    """The kernel without `begin` and `end`: it always does all items, as Relax calls it."""
    *_, begin, end = func.params
    return func.specialize({begin: T.int64(0), end: T.int64(work_items(func))})


def work_items(func: PrimFunc) -> int:
    """Number of work items of a kernel."""
    return int(func.attrs[WORK_ATTR])


def num_outputs(func: PrimFunc) -> int:
    """Number of output tensors of a kernel."""
    return int(func.attrs[OUTPUTS_ATTR])


def compile_kernels(functions: Mapping[str, PrimFunc], isa: Isa) -> Any:
    """Compile kernels for one instruction set, all scheduled alike, into one runtime module.

    TVM's default pipeline would turn `local` buffers into heap allocations (StorageRewrite loses
    their annotation, and nothing of it is needed for straight kernels), so the plain "tirx" one is
    used.
    """
    models = {str(func.attrs.get(MCPU_ATTR, "")) for func in functions.values()}
    if len(models) > 1:
        raise ValueError(f"kernels of one module are scheduled for different cores: {models}")
    for mcpu in models - {""}:
        isa = isa.scheduled_for(mcpu)
    module = tvm.IRModule(dict(functions))
    return tvm.tirx.build(module, target=tvm.target.Target(isa.target), pipeline="tirx")
