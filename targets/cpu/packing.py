"""Layouts of weights.bin: checkpoint tensors to what the kernels read, in pieces of bounded size.

Rows of linear layers are packed in blocks of 16 (see `schedules/qmatmul.py`), of 64 for HVX (see
`schedules/qmatmul_hvx.py`). A layout function takes rows [n, ...] of whole blocks and returns the
packed array; `Packer.pack` feeds it row blocks, so that the memory in use is that of a few thousand
rows whatever the tensor's size.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from typing import Any

import numpy as np
from numpy.typing import NDArray

from llamac.schedules.intrin.arm_levels import ARM_LEVELS
from llamac.schedules.intrin.arm_on_x86 import ArmOnX86
from llamac.schedules.intrin.isa import Isa
from llamac.schedules.qmatmul import GROUP
from llamac.schedules.qmatmul_epilogue import ROWS
from llamac.schedules.quantize import CHUNK_PAIRS, PANEL
from llamac.targets.base import WeightReader
from llamac.targets.program import Pack

Array = NDArray[Any]
PIECE_BYTES = 16 << 20
HVX_ROWS = 64  # of a block of HVX's int4 weights; gate and up alternate in halves of it
SCALES = ("int4.scales", "hvx.scales")


def int4_codes(codes: Array) -> Array:
    """int8 [n, k] in -8..7 -> uint8 [n/16, k/32, 256], value + 8; see schedules/qmatmul.py."""
    return int4_signed(codes) ^ 0x88  # a two's complement nibble with its top bit flipped


def int4_signed(codes: Array) -> Array:
    """int8 [n, k] in -8..7 -> uint8 [n/16, k/32, 256]: the same order, nibbles in two's complement.

    Byte j*64 + row*4 + b of a block holds k = 8j + b in its low and k = 8j + 4 + b in its high
    nibble.
    """
    n, k = codes.shape
    words = np.ascontiguousarray(codes).view(np.uint32).reshape(n // ROWS, ROWS, k // GROUP, 4, 2)
    nibbles = words & 0x0F0F0F0F
    packed = (nibbles[..., 0] | (nibbles[..., 1] << 4)).transpose(0, 2, 3, 1)
    return np.ascontiguousarray(packed).view(np.uint8).reshape(n // ROWS, k // GROUP, 256)


def int4_hvx(codes: Array) -> Array:
    """int8 [n, k] in -8..7 -> uint8 [n/64, k/32, 1024], value + 8; see schedules/qmatmul_hvx.py.

    Byte j*128 + row*4 + b of a block holds column 4j + b of row `row` in its low and of row
    32 + `row` in its high nibble.
    """
    n, k = codes.shape
    unsigned = (codes + 8).astype(np.uint8).reshape(n // 64, 2, 32, k // GROUP, 8, 4)
    packed = (unsigned[:, 0] | (unsigned[:, 1] << 4)).transpose(0, 2, 3, 1, 4)
    return np.ascontiguousarray(packed).reshape(n // 64, k // GROUP, 1024)


def hvx_scales(stored: Array) -> Array:
    """[n, c] -> [n/64, c, 64]: one column of a block, in which rows r and r + 32 are neighbours."""
    n, columns = stored.shape
    pairs = stored.reshape(n // 64, 2, 32, columns).transpose(0, 3, 2, 1)
    return np.ascontiguousarray(pairs).reshape(n // 64, columns, 64)


def int8_hvx(codes: Array) -> Array:
    """int8 [n, k] -> uint8 [n/32, k/4, 128], value + 128: four columns of each of 32 rows."""
    n, k = codes.shape
    words = np.ascontiguousarray(codes ^ np.int8(-128)).view(np.uint32).reshape(n // 32, 32, k // 4)
    return np.ascontiguousarray(words.transpose(0, 2, 1)).view(np.uint8).reshape(n // 32, -1, 128)


def arrange_codes(codes: Array, arrangement: str) -> Array:
    """Activation codes int8 [m, k] as an instruction set's kernels want them.

    Args:
        codes: one row for each token.
        arrangement: `Isa.codes`; "pairs" and "panels" are described in `schedules/quantize.py`.
    """
    m, k = codes.shape
    if m == 1 or arrangement not in _PANEL_AXES:
        return codes
    rows = np.zeros((-(-m // PANEL) * PANEL, k), np.int8)
    rows[:m] = codes
    chunks = _chunks(rows, arrangement)
    panels = chunks.transpose(_PANEL_AXES[arrangement])
    return np.ascontiguousarray(panels).reshape(-1, k // GROUP, PANEL * GROUP)


def restore_codes(stored: Array, m: int, arrangement: str) -> Array:
    """The inverse of `arrange_codes` for m tokens."""
    if stored.ndim == 2:
        return stored
    panels, groups, _ = stored.shape
    rows = np.empty((panels * PANEL, groups * GROUP), np.int8)
    axes = _PANEL_AXES[arrangement]
    shape = np.array(_chunks(rows, arrangement).shape)[list(axes)]
    chunks = stored.reshape(shape).transpose(np.argsort(axes))
    if arrangement == "pairs":
        order = np.argsort(np.ravel(CHUNK_PAIRS))
        chunks = chunks.reshape(*chunks.shape[:4], 8, 4)[..., order, :]
    return np.ascontiguousarray(chunks).reshape(rows.shape)[:m]


# Axes of `_chunks` in the order in which a panel is stored.
_PANEL_AXES = {
    "pairs": (0, 3, 1, 4, 2, 5, 6),  # group, pair, vector, token, chunk of two, code
    "panels": (0, 2, 3, 1, 4),  # group, chunk, token, code
}


def _chunks(rows: Array, arrangement: str) -> Array:
    """Rows of whole panels by panel, (pair,) token, group, chunk (of a vector) and code."""
    if arrangement == "panels":
        return rows.reshape(-1, PANEL, rows.shape[1] // GROUP, GROUP // 4, 4)
    return rows.reshape(-1, PANEL // 2, 2, rows.shape[1] // GROUP, GROUP // 4, 4)[
        ..., CHUNK_PAIRS, :
    ]


def codes_arrangement(level: str) -> str:
    """`Isa.codes` of a level by its name; levels of other packages arrange nothing."""
    return next((isa.codes for isa in (*ARM_LEVELS, ArmOnX86()) if isa.name == level), Isa.codes)


def block_columns(rows: Array, block: int = ROWS) -> Array:
    """[n, c] -> [n/block, c, block]: one column of a block is contiguous."""
    n, columns = rows.shape
    return np.ascontiguousarray(rows.reshape(n // block, block, columns).transpose(0, 2, 1))


def int8_codes(codes: Array) -> Array:
    """int8 [n, k] -> int8 [n/16, k/4, 64]: four columns of each of 16 rows."""
    n, k = codes.shape
    words = np.ascontiguousarray(codes).view(np.uint32)
    return block_columns(words).view(np.int8).reshape(n // ROWS, k // 4, 4 * ROWS)


def to_scale_dtype(scales: Array, dtype: str) -> Array:
    """float32 -> float16, or the bits of bfloat16 (round half to even)."""
    return scales.astype(np.float16) if dtype == "float16" else to_bfloat16(scales)


def to_bfloat16(values: Array) -> Array:
    """Float -> bits of bfloat16 in uint16, rounded half to even; bits pass through."""
    if values.dtype == np.uint16:
        return values
    bits = np.ascontiguousarray(values, dtype=np.float32).view(np.uint32)
    return ((bits + 0x7FFF + ((bits >> 16) & 1)) >> 16).astype(np.uint16)


def scale_values(stored: Array) -> Array:
    """What a kernel reads from stored scales, as float64."""
    if stored.dtype == np.uint16:
        return (stored.astype(np.uint32) << 16).view(np.float32).astype(np.float64)
    return stored.astype(np.float64)


def int4_ksum(codes: Array, scales: Array) -> Array:
    """float32 [n]: sum over groups of the (rounded) scale times the sum of the group's codes."""
    n, k = codes.shape
    sums = codes.reshape(n, k // GROUP, GROUP).sum(axis=2, dtype=np.int32)
    ksum: Array = (sums * scale_values(scales)).sum(axis=1)
    return ksum.astype(np.float32)


def rope_rows(table: Array) -> Array:
    """float32 [p, d/2, 2] -> [p, 2, d]: cosines twice each, and sines with alternating sign."""
    cos, sin = np.repeat(table[:, :, 0], 2, axis=1), np.repeat(table[:, :, 1], 2, axis=1)
    sin = sin * np.tile(np.array([-1, 1], np.float32), table.shape[1])
    return np.stack([cos, sin], axis=1).astype(np.float32)


class Packer:
    """Makes packed tensors from a checkpoint.

    Args:
        weights: the checkpoint's tensors.
        scale_dtype: "float16" or "bfloat16".
        check_scales: called with (name, scales) before they are rounded; raises when they do not
            fit.
    """

    def __init__(
        self,
        weights: WeightReader,
        scale_dtype: str,
        check_scales: Callable[[str, Array], None] | None = None,
    ) -> None:
        self._weights, self._scale_dtype, self._check = weights, scale_dtype, check_scales
        self._layouts: dict[str, Callable[[dict[str, Array]], Array]] = {
            "int4.codes": lambda w: int4_codes(w["weight"]),
            "int4.signed": lambda w: int4_signed(w["weight"]),
            "int4.scales": lambda w: block_columns(to_scale_dtype(w["scales"], scale_dtype)),
            "int4.ksum": lambda w: int4_ksum(w["weight"], to_scale_dtype(w["scales"], scale_dtype)),
            "hvx.int4": lambda w: int4_hvx(w["weight"]),
            "hvx.scales": lambda w: hvx_scales(to_scale_dtype(w["scales"], scale_dtype)),
            "hvx.ksum": lambda w: int4_ksum(w["weight"], to_scale_dtype(w["scales"], scale_dtype)),
            "hvx.lora.b": lambda w: block_columns(to_bfloat16(w["adaptor.B.weight"]), HVX_ROWS),
            "hvx.int8": lambda w: int8_hvx(w["weight"]),
            "int8.blocks": lambda w: int8_codes(w["weight"]),
            "int8.wsum": lambda w: w["weight"].sum(axis=1, dtype=np.int32),
            "int8.scales": lambda w: w["scales"].astype(np.float32),
            "int8.rows": lambda w: w["weight"],
            "bf16.blocks": lambda w: block_columns(to_bfloat16(w["weight"])),
            "bf16.rows": lambda w: to_bfloat16(w["weight"]),
            "lora.a": lambda w: to_bfloat16(w["adaptor.A.weight"]),
            "lora.b": lambda w: block_columns(to_bfloat16(w["adaptor.B.weight"])),
            "float32": lambda w: w["weight"].astype(np.float32),
            "rope": lambda w: rope_rows(w["table"]),
        }

    def pack(self, pack: Pack) -> Iterator[Array]:
        """Yield the tensor in consecutive pieces whose bytes together are the tensor's."""
        convert = self._layouts[pack.layout]
        for rows in self._row_blocks(pack):
            yield convert(rows)

    def _row_blocks(self, pack: Pack) -> Iterator[dict[str, Array]]:
        """Matching row blocks of all parts (codes, scales, ...) of the sources, in packed order."""
        sources = [self._parts(name, pack.layout) for name in pack.sources]
        if not pack.interleave:
            for parts in sources:
                yield from _slices(parts)
            return
        for blocks in zip(*(_slices(parts) for parts in sources), strict=True):
            rows = HVX_ROWS // 2 if pack.layout.startswith("hvx.") else ROWS
            yield {part: _interleave([b[part] for b in blocks], rows) for part in blocks[0]}

    def _parts(self, name: str, layout: str) -> dict[str, Array]:
        """The tensors of one linear layer that a layout needs."""
        needed = {
            **dict.fromkeys(SCALES, ("scales",)),
            **dict.fromkeys(("int4.ksum", "hvx.ksum"), ("weight", "scales")),
            "hvx.lora.b": ("adaptor.B.weight",),
            "int8.scales": ("scales",),
            "lora.a": ("adaptor.A.weight",),
            "rope": ("table",),
            "lora.b": ("adaptor.B.weight",),
        }.get(layout, ("weight",))
        parts = {part: self._weights.read(f"{name}.{part}") for part in needed}
        if layout in SCALES and self._scale_dtype == "float16" and self._check:
            self._check(f"{name}.scales", parts["scales"])
        return parts


def _slices(parts: dict[str, Array]) -> Iterator[dict[str, Array]]:
    """Cut all parts into the same row blocks of at most about PIECE_BYTES."""
    n = len(next(iter(parts.values())))
    row_bytes = sum(array.nbytes // n for array in parts.values())
    step = max(HVX_ROWS, PIECE_BYTES // max(1, row_bytes) // HVX_ROWS * HVX_ROWS)
    for start in range(0, n, step):
        yield {name: array[start : start + step] for name, array in parts.items()}


def _interleave(arrays: Sequence[Array], rows: int) -> Array:
    """Alternate blocks of `rows` rows of arrays of equal shape."""
    shape = arrays[0].shape
    blocks = [a.reshape(shape[0] // rows, 1, rows, *shape[1:]) for a in arrays]
    return np.concatenate(blocks, axis=1).reshape(len(arrays) * shape[0], *shape[1:])
