"""Kernel families by name, and a kernel as family and shape: what selection chooses."""

from __future__ import annotations

import dataclasses
from dataclasses import dataclass
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
    """One kernel: `shape` is an instance of the family's shape class."""

    name: str
    family: str
    shape: Any

    def make(self, isa: Isa, name: str | None = None) -> PrimFunc:
        """Build the kernel for a level, with the family's default knobs."""
        isa, family = self.isa_of(isa), FAMILIES[self.family]
        knobs = family.default(self.shape, isa)
        return family.make(self.shape, isa, **knobs, name=name or self.name)

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
