"""Hexagon with HVX: 32 vector registers of 128 bytes, versions v66 to v81.

Two forms exist of every version. The *real* form is for a DSP: from v68 on its floats are HVX's own
format (qf32). The *simulated* form keeps the integer instructions and computes floats as scalars;
it is what QEMU 7.2 executes, whose only CPU is a v67 without HVX floats. v66 has no vector floats,
so there the two are one.

HVX loads and stores ignore the low seven bits of an address. Buffers are declared with
`HexagonHvx.alignment`, and who calls a kernel checks them (`runtime/c/alignment.h`).
"""

from __future__ import annotations

from typing import Any

from llamac.schedules.intrin.isa import Isa

TRIPLE = "hexagon"
VERSIONS = (66, 68, 69, 73, 75, 79, 81)
FIRST_WITH_FLOATS = 68


def target_of(version: int, *, simulate: bool) -> dict[str, Any]:
    """TVM's target. Kind `llvm`: kind `hexagon` needs a host, a linker and its own options.

    Options of LLVM: vectors as we write them and no others, no data near the global pointer (nobody
    sets it), and no packet that loads what its own other slot stores, which QEMU 7.2 gets wrong.
    """
    attributes = [f"+hvxv{version}", "+hvx-length128b"]
    if version >= FIRST_WITH_FLOATS:
        attributes += ["-hvx-qfloat" if simulate else "+hvx-qfloat", "-hvx-ieee-fp"]
    return {
        "kind": "llvm",
        "mtriple": TRIPLE,
        "mcpu": f"hexagonv{version}",
        "mattr": attributes,
        "cl-opt": [
            "-hexagon-autohvx:bool=true",
            "-hexagon-small-data-threshold:uint=0",
            "-force-target-max-vector-interleave:uint=1",
            "-slot1-store-slot0-load:bool=false",
        ],
    }


class HexagonHvx(Isa):
    """One version of HVX.

    Args:
        version: of the DSP, one of VERSIONS.
        simulate: whether floats are scalars, so that QEMU 7.2 can run the kernels.
    """

    lanes = 32
    registers = 32
    alignment = 128

    def __init__(self, version: int, *, simulate: bool = False) -> None:
        if version not in VERSIONS:
            raise ValueError(f"HVX v{version} is not one of {VERSIONS}")
        self.version = version
        self.simulate = simulate or version < FIRST_WITH_FLOATS
        self.name = f"hvx-v{version}{'-simulate' if simulate else ''}"
        self.features = (f"hvxv{version}",)
        self.target = target_of(version, simulate=simulate)


HEXAGON_VERSIONS = tuple(HexagonHvx(version) for version in VERSIONS)
