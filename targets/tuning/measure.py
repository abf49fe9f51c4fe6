"""What the ways to measure kernels have in common: a problem, candidates, measurements.

    HostTimer        wall time on this machine                      targets/tuning/host.py
    AarchCounter     instructions under QEMU, cycles of a model     targets/tuning/emulated.py
    PacketCounter    packets under qemu-hexagon                     targets/tuning/emulated.py

All judge the results of a candidate before its cost: what is wrong has no cost.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Callable, Sequence
from contextlib import AbstractContextManager
from dataclasses import dataclass, field
from types import TracebackType
from typing import Any

import numpy as np
from numpy.typing import NDArray
from tvm.tirx import PrimFunc

from llamac.schedules.intrin.isa import Isa
from llamac.schedules.kernel import num_outputs, work_items
from llamac.targets.cpu.kernels import KernelSpec
from llamac.targets.tuning.records import KnobValues

Array = NDArray[Any]
Judge = Callable[[Sequence[Array]], str]

SYMBOL = "kernel"
MOST_COPIES = 256  # smaller weights are those of a model that fits the cache anyway


@dataclass(frozen=True)
class Problem:
    """A kernel to tune, with operands and the judge of its results.

    Attributes:
        spec: the kernel.
        isa: instruction set that computes it.
        inputs: its input tensors.
        streamed: which of them are weights, read once per call: a call of a model finds them in no
            cache.
        items: work items whose results the judge looks at, from the first one; None: all.
        products: multiply-accumulates of a call with all items, 0 if it is no product.
        judge: says what is wrong with the outputs of a call, "" if nothing is.
    """

    spec: KernelSpec
    isa: Isa
    inputs: Sequence[Array]
    streamed: Sequence[int]
    items: int | None
    products: int
    judge: Judge

    def build(self, knobs: KnobValues) -> PrimFunc:
        """The kernel with the given knobs."""
        return self.spec.make_with(knobs, self.isa, SYMBOL)

    def judged_items(self, func: PrimFunc) -> int:
        """How many work items must be done for the judge."""
        return work_items(func) if self.items is None else min(self.items, work_items(func))


@dataclass(frozen=True)
class Candidate:
    """A point of the space that compiled.

    Attributes:
        knobs: the point.
        code: hash of its machine code.
        features: numbers per product that a cost model learns from, see `features.py`.
    """

    knobs: KnobValues
    code: str
    features: dict[str, float] = field(default_factory=dict)


@dataclass(frozen=True)
class Measurement:
    """What measuring a candidate gave; see `Record` for the words.

    Attributes:
        status: "ok", "wrong" or "failed".
        kind: of the cost.
        cost: of a call with all work items.
        noise: how far the median of repeated measurements is above the cost, relative to it.
        note: why it is not "ok".
    """

    status: str
    kind: str
    cost: float = 0.0
    noise: float = 0.0
    note: str = ""


@dataclass(frozen=True)
class DeviceState:
    """A device, as it is shown while it measures.

    Attributes:
        name: of the device.
        trials: that it has measured.
        is_busy: whether it measures now.
    """

    name: str
    trials: int
    is_busy: bool


class Measurer(AbstractContextManager["Measurer"], ABC):
    """A way to measure; a context manager that holds what it needs.

    Attributes:
        device: what is measured on, for records.
        is_exact: measuring again gives the same.
        parallel: candidates that it measures at a time.
    """

    device: str = ""
    parallel: int = 1
    is_exact: bool = False

    @abstractmethod
    def kind(self, problem: Problem) -> str:
        """The kind of cost that it measures for a problem, a key of `records.KINDS`."""

    @abstractmethod
    def measure(self, problem: Problem, candidates: Sequence[Candidate]) -> list[Measurement]:
        """Measure candidates; whatever goes wrong with one is in its measurement."""

    def roof(self, problem: Problem) -> float:
        """The least that a call can cost on the device, in the unit of `kind`; 0: not known."""
        return 0.0

    def devices(self) -> list[DeviceState]:
        """Devices that it measures on, where it has several."""
        return []

    def close(self) -> None:
        """Give back what it holds."""
        return

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        self.close()


def weight_copies(
    spec: KernelSpec, inputs: Sequence[Array], streamed: Sequence[int], cache_bytes: int
) -> int:
    """How many copies of its weights make a kernel for one token read them from memory.

    Args:
        spec: the kernel.
        inputs: its tensors.
        streamed: which of them are weights.
        cache_bytes: size of the last cache; the copies are twice as large.
    """
    size = sum(inputs[i].nbytes for i in streamed)
    return min(-(-2 * cache_bytes // size), MOST_COPIES) if size and is_for_token(spec) else 1


def is_for_token(spec: KernelSpec) -> bool:
    """Whether a kernel computes one token: a model reads its weights from memory."""
    return 1 in (getattr(spec.shape, name, 0) for name in ("m", "tokens"))


def empty_outputs(func: PrimFunc) -> list[Array]:
    """Tensors for the results of a kernel, full of a byte that is no result."""
    *tensors, _begin, _end = func.params
    outputs = []
    for buffer in tensors[len(tensors) - num_outputs(func) :]:
        array = np.empty([int(n) for n in buffer.shape], str(buffer.dtype))
        array.view(np.uint8)[...] = 0x5A
        outputs.append(array)
    return outputs


def last_line(error: BaseException) -> str:
    """What an error says, short enough for a record."""
    lines = str(error).strip().splitlines() or [type(error).__name__]
    return lines[-1][:200]
