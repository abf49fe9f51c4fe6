"""Kernel families by name, and a kernel as family and shape: what selection chooses."""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping
from dataclasses import dataclass, field
from types import ModuleType
from typing import Any

from tvm.tirx import PrimFunc

from llamac.schedules import (
    append,
    attention,
    convert,
    embedding,
    graph,
    hadamard,
    lora,
    matmul,
    norm,
    positions,
    qmatmul,
    qmatmul_hvx,
    qmatmul_int8,
    qmatmul_int8_hvx,
    qmatmul_quads,
    quantize,
    rope,
    sampling,
    select,
)
from llamac.schedules.intrin.isa import Isa
from llamac.schedules.kernel import Knobs
from llamac.targets.cpu.knobs import Choice, KnobChooser, TunableKernel, knob_points
from llamac.targets.tuning.book import DEFAULT

FAMILIES: dict[str, ModuleType] = {
    "append": append,
    "attention": attention,
    "convert": convert,
    "embedding": embedding,
    "graph": graph,
    "hadamard": hadamard,
    "lora": lora,
    "matmul": matmul,
    "norm": norm,
    "positions": positions,
    "qmatmul": qmatmul,
    "qmatmul_hvx": qmatmul_hvx,
    "qmatmul_int8": qmatmul_int8,
    "qmatmul_int8_hvx": qmatmul_int8_hvx,
    "qmatmul_quads": qmatmul_quads,
    "quantize": quantize,
    "rope": rope,
    "sampling": sampling,
    "select": select,
}


@dataclass(frozen=True)
class KernelSpec:
    """One kernel.

    Attributes:
        name: of the kernel.
        family: a key of FAMILIES.
        shape: an instance of the family's shape class.
        chooser: looks up tuned knobs; None: the family's defaults.
    """

    name: str
    family: str
    shape: Any
    chooser: KnobChooser | None = field(default=None, compare=False, repr=False)

    def make(self, isa: Isa, name: str | None = None) -> PrimFunc:
        """Build the kernel for a level."""
        isa, knobs = self.isa_of(isa), self.choice(isa).knobs
        return FAMILIES[self.family].make(self.shape, isa, **knobs, name=name or self.name)

    def make_with(self, knobs: Knobs, isa: Isa, name: str) -> PrimFunc:
        """Build the kernel for a level with the given knobs, under another name."""
        return FAMILIES[self.family].make(self.shape, self.isa_of(isa), **knobs, name=name)

    def choice(self, level: Isa) -> Choice:
        """The knobs that it gets for a level, and where they came from."""
        isa, family = self.isa_of(level), FAMILIES[self.family]
        if self.chooser is None:
            return Choice(family.default(self.shape, isa), DEFAULT)
        return self.chooser.choose(self.family, family, self.shape, isa)

    def points(self, level: Isa) -> list[dict[str, int | str]]:
        """Valid points of its knob space for a level, the default first."""
        return knob_points(FAMILIES[self.family], self.shape, self.isa_of(level))

    @property
    def version(self) -> int:
        """VERSION of its generator."""
        return int(FAMILIES[self.family].VERSION)

    def isa_of(self, level: Isa) -> Isa:
        """The instruction set that a level computes it with: scalar where its vectors do not fit.

        A tensor has one layout for all levels of a library, and it may not be that of a vector.
        """
        isa, family = level.for_family(self.family), FAMILIES[self.family]
        if isa.scalar is not None:
            if not family.valid(self.shape, isa, family.default(self.shape, isa)):
                return isa.scalar
        return isa

    def shape_fields(self) -> dict[str, Any]:
        """The shape as plain data."""
        return dataclasses.asdict(self.shape)


def tunable_kernels(kernels: Mapping[str, KernelSpec], level: Isa) -> list[TunableKernel]:
    """The kernels that have a choice of knobs at a level, and where each choice came from."""
    return [
        TunableKernel(name, spec.choice(level).origin)
        for name, spec in kernels.items()
        if len(spec.points(level)) > 1
    ]
