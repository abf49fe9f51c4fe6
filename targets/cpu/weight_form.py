"""How linear layers lie in weights.bin: the layouts of an architecture, and who reads them."""

from __future__ import annotations

from dataclasses import dataclass

from llamac.schedules import qmatmul_hvx, qmatmul_int8_hvx
from llamac.schedules.intrin.hexagon import HexagonHvx
from llamac.schedules.intrin.isa import Isa
from llamac.schedules.qmatmul_epilogue import ROWS
from llamac.schedules.quantize import has_offsets


@dataclass(frozen=True)
class WeightForm:
    """Layouts of `targets/cpu/packing.py` and families of `targets/cpu/kernels.py`.

    Attributes:
        int4: layout of int4 codes.
        int4_family: of the kernels that read it.
        int4_rows: of its blocks.
        gate_rows: in which gate and up alternate.
        scales: layout of their scales.
        ksum: of their sums.
        lora_b: of the wide half of a LoRA branch.
        int8: layout of int8 codes in blocks.
        int8_family: of the kernels that read it.
        int8_rows: of its blocks.
        int8_dtype: of its codes.
        int8_offsets: whether that product, too, reads the offsets of activation codes.
    """

    int4: str
    int4_family: str
    int4_rows: int = ROWS
    gate_rows: int = ROWS
    scales: str = "int4.scales"
    ksum: str = "int4.ksum"
    lora_b: str = "lora.b"
    int8: str = "int8.blocks"
    int8_family: str = "qmatmul_int8"
    int8_rows: int = ROWS
    int8_dtype: str = "int8"
    int8_offsets: bool = False


UNSIGNED = WeightForm("int4.codes", "qmatmul")
# Signed nibbles need no offsets.
SIGNED = WeightForm("int4.signed", "qmatmul_quads")
HVX = WeightForm(
    "hvx.int4",
    "qmatmul_hvx",
    int4_rows=qmatmul_hvx.BLOCK,
    gate_rows=qmatmul_hvx.HALF,
    scales="hvx.scales",
    ksum="hvx.ksum",
    lora_b="hvx.lora.b",
    int8="hvx.int8",
    int8_family="qmatmul_int8_hvx",
    int8_rows=qmatmul_int8_hvx.ROWS,
    int8_dtype="uint8",
    int8_offsets=True,
)


def weight_form(isa: Isa) -> WeightForm:
    """What all levels beside `isa` read, too."""
    if isinstance(isa, HexagonHvx):
        return HVX
    return UNSIGNED if has_offsets(isa) else SIGNED
