"""Hexagon without HVX: every DSP executes it, and so does QEMU 7.2, whose only CPU is a v67."""

from __future__ import annotations

from typing import Any

from tvm.tirx.script.builder import ir as T

from llamac.schedules.intrin.isa import Isa, intrinsic, join, lanes_of, pick


class HexagonPlain(Isa):
    """Plain TIR, compiled to scalar instructions, two of which fit into a packet that also loads.

    Four lanes: a vector is a run of 32-bit registers, of which a DSP has 28 to use. Tensors are
    aligned as HVX needs them, so that its kernels can read the same weights and caches.

    Args:
        version: of the DSP, "v75".
    """

    lanes = 4
    alignment = 128

    def __init__(self, version: str) -> None:
        self.name = f"{version}-scalar"
        # No data near the global pointer, which nobody sets; no packet that loads what its other
        # slot stores, which QEMU 7.2 gets wrong behind a cancelled store.
        self.target = {
            "kind": "llvm",
            "mtriple": "hexagon",
            "mcpu": f"hexagon{version}",
            "cl-opt": [
                "-hexagon-small-data-threshold:uint=0",
                "-slot1-store-slot0-load:bool=false",
            ],
        }

    def rint(self, value: Any) -> Any:
        """Round by the conversions to int32 and back, for |value| < 2^31, half to even.

        The addition of the base class may be fused with the product before it, because TVM lets
        LLVM fuse everywhere: a product that was not rounded comes out as the other neighbour of a
        tie. It was one code in a prompt of 32 tokens of the tiny model.
        """
        return join([round_scalar(lane) for lane in lanes_as_scalars(value)])


def lanes_as_scalars(value: Any) -> list[Any]:
    """The lanes of a vector, one by one."""
    count = lanes_of(value)
    if count == 1:
        return [value]
    value = T.Bind(value)
    return [pick(value, [lane]) for lane in range(count)]


def round_scalar(value: Any) -> Any:
    """Round a float32 below 2^31 by the conversions of a scalar, half to even."""
    whole = intrinsic("int32", "llvm.hexagon.F2.conv.sf2w", value)
    return intrinsic("float32", "llvm.hexagon.F2.conv.w2sf", whole)
