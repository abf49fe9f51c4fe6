"""int4 group-32 weights x int8 per-token activations on Arm: GEMV (decode) and GEMM (prefill).

The same product as in `qmatmul.py`, in the form that Arm's instructions want:

    y[m, n] = sx * ( f * sum_g s'[n, g] * dot(x[m, g], w[n, g])  -  zp * ksum[n] )

Nibbles are signed. A shift left and a mask turn a byte of two of them into 16 * w each, and the
conversion of the sum to float takes the 16 out again: `scvtf` has fraction bits. (Plain NEON sums
products in 16 bits, which has no room for the 16: one more shift.) A float16 scale is
not converted: its bits, shifted left by 13, are the float32 s' = s * 2^-112, and f = 2^112. One
widening shift does it, on a pipe that the dot products leave free; `fcvtl` would cost two slots of
a busy one. Where scales may be negative the shift fills up with copies of the sign, and a mask
leaves the first. A bfloat16 scale is shifted by 16 and is exact.

Packed layout, one for all levels of the architecture (four rows are a quad, four quads a block):

    weights [N/16][K/32][4 j][4 quads][4 rows x 4 bytes]: byte b of a row holds k = 8j + b in its
            low and k = 8j + 4 + b in its high nibble, so that 16 bytes feed two `sdot` by lane, and
            longer vectors (SVE, SME) read more rows of the same j;
    scales  [N/16][K/32][16] float16 or bfloat16.

One token is multiplied here, many by tiles of NEON's vectors (`qmatmul_tiles.py`: `sdot` by lane;
`qmatmul_smmla.py`), SVE (`qmatmul_sve.py`, one token too) or SME (`qmatmul_sme.py`). The activation
codes of many tokens lie as these want them, see `quantize.py`. Epilogues and LoRA are those of
`qmatmul_epilogue.py`.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any

from tvm.tirx import PrimFunc
from tvm.tirx.script.builder import ir as T

from llamac.schedules.intrin.arm import SCHEDULING_MODELS, ArmDotprod, ArmI8mm, ArmNeon
from llamac.schedules.intrin.arm_scalable import ArmSme, ArmSve, Scalable
from llamac.schedules.kernel import KernelBuilder, Knobs, local
from llamac.schedules.loop import loop
from llamac.schedules.qmatmul import QMatmulShape
from llamac.schedules.qmatmul_epilogue import ROWS
from llamac.schedules.qmatmul_sme import SmeBlocks
from llamac.schedules.qmatmul_smmla import SmmlaTile
from llamac.schedules.qmatmul_sve import SveBlocks
from llamac.schedules.qmatmul_tensors import CHUNKS, GROUP_BYTES, QUAD, QUADS, HiddenZeros, Tensors
from llamac.schedules.qmatmul_tiles import LaneTile, emit_panels
from llamac.schedules.quantize import GROUP, PANEL

VERSION = 1
# Our threads have 1 MiB of stack, but one of them is the caller's, which may be musl's 128 KiB.
MOST_KEPT_BYTES = 64 << 10

KNOBS: Mapping[str, tuple[int | str, ...]] = {
    "mr": (1, 4, 8, 12, 16),  # tokens per tile of four rows; 1 is a GEMV's
    "unroll": (1, 2, 4),  # groups per iteration of the hot loop
    "prefetch": (0, 4, 8, 16, 32),  # groups ahead, of a GEMV
    "unpack_once": (0, 1),  # of a GEMM: a quad for all panels, through memory
    "mcpu": SCHEDULING_MODELS,  # of LLVM; "" or none: that of the instruction set
}


def valid(shape: QMatmulShape, isa: ArmNeon, knobs: Knobs) -> bool:
    """Whether tiles fit a panel, kept quads the stack, and the unrolled loop the columns."""
    if shape.m == 1:
        tile = knobs["mr"] == 1 and not knobs.get("unpack_once", 0)
    elif knobs["mr"] == 1 or knobs.get("prefetch", 0):
        return False
    elif isinstance(isa, Scalable):
        tile = knobs["mr"] == PANEL and not knobs.get("unpack_once", 0)
    else:
        fits = not knobs.get("unpack_once", 0) or kept_bytes(shape, isa) <= MOST_KEPT_BYTES
        tile = knobs["mr"] in KNOBS["mr"] and fits
    return tile and (shape.k // GROUP) % int(knobs["unroll"]) == 0


def default(shape: QMatmulShape, isa: ArmNeon) -> dict[str, int]:
    """Accumulators in half of the registers, fewer where products are summed in two halves."""
    pairs = 2 if shape.k // GROUP % 2 == 0 else 1
    if shape.m == 1:
        return {"mr": 1, "unroll": pairs, "prefetch": 0}
    if isinstance(isa, Scalable):
        return {"mr": PANEL, "unroll": pairs if isinstance(isa, ArmSme) else 1, "prefetch": 0}
    mr = PANEL if isinstance(isa, ArmDotprod) else PANEL // 2
    keep = shape.m > 2 * PANEL and kept_bytes(shape, isa) <= MOST_KEPT_BYTES
    return {"mr": mr, "unroll": 1, "prefetch": 0, "unpack_once": int(keep)}


def kept_bytes(shape: QMatmulShape, isa: ArmNeon) -> int:
    """Bytes on the stack of a quad that is unpacked once, or of two."""
    vectors = CHUNKS + (2 if isinstance(isa, ArmI8mm) else 1)
    return shape.k // GROUP * vectors * 16 * (2 if shape.epilogue == "swiglu" else 1)


def make(
    shape: QMatmulShape,
    isa: ArmNeon,
    *,
    mr: int,
    unroll: int,
    prefetch: int = 0,
    unpack_once: int = 0,
    mcpu: str = "",
    name: str | None = None,
) -> PrimFunc:
    """Build the kernel.

    Arguments of the kernel: codes int8 [1, k] or paired [m/16, k/32, 512], qparams float32 [m, 2]
    (scale, zero point), weights uint8 [n/16, k/32, 256], scales [n/16, k/32, 16], ksum float32 [n],
    then t and B with a LoRA branch, residual float32 [m, n], and the output float32 [m, n] or
    [m, n/2].
    """
    symbol = name or f"qmatmul_f32_qai8dx_qsi4c32_{shape.m}x{shape.n}x{shape.k}_{isa.suffix}"
    with KernelBuilder(symbol, shape.work, mcpu) as b:
        tensors = Tensors(b, shape, isa)
        around = isa.streaming() if isinstance(isa, ArmSme) and shape.m > 1 else None
        with b.items(around) as item:
            _emitter(tensors, mr, unroll, prefetch, unpack_once)(item)
    return b.func


def _emitter(
    tensors: Tensors, mr: int, unroll: int, prefetch: int, unpack_once: int
) -> Callable[[Any], None]:
    """What emits the code of a work item, by the level's instructions and the number of tokens."""
    isa, is_gemv = tensors.isa, tensors.shape.m == 1
    if isinstance(isa, ArmSve):
        return SveBlocks(tensors, isa, unroll).emit
    if is_gemv:
        return _Gemv(tensors, unroll, prefetch).emit
    if isinstance(isa, ArmSme):
        return SmeBlocks(tensors, isa, unroll).emit
    tile_class = SmmlaTile if isinstance(isa, ArmI8mm) else LaneTile
    tile = tile_class(tensors, unroll, bool(unpack_once))
    return lambda item: emit_panels(tile, item, mr)


class _Gemv:
    """One token times a block of 16 rows: four accumulators of four rows."""

    def __init__(self, tensors: Tensors, unroll: int, prefetch: int) -> None:
        self._t, self._unroll, self._prefetch = tensors, unroll, prefetch

    def emit(self, item: Any) -> None:
        """Compute and store the results of a work item."""
        t, isa = self._t, self._t.isa
        self._zeros = HiddenZeros(isa, item, QUADS)
        if t.epilogue.is_swiglu:
            gate, up = self._block(item * 2, split=0), self._block(item * 2 + 1, split=1)
            values = [isa.silu(g) * u for g, u in zip(gate, up, strict=True)]
        else:
            values = self._block(item, split=None)
        for quad, value in enumerate(values):
            t.epilogue.store(value, 0, item * ROWS + quad * QUAD)

    def _block(self, block: Any, split: int | None) -> list[Any]:
        t = self._t
        acc = local("float32x4", QUADS)
        for quad in range(QUADS):
            T.buffer_store(acc, t.isa.splat(0.0), [quad])
        with loop(t.groups // self._unroll) as step:
            for u in range(self._unroll):
                self._group(acc, block, step * self._unroll + u)
        return [t.finish([acc[quad]], block, quad, 0, split)[0] for quad in range(QUADS)]

    def _group(self, acc: Any, block: Any, group: Any) -> None:
        """Add one group of 32 columns."""
        t, isa = self._t, self._t.isa
        if self._prefetch:
            for line in range(0, GROUP_BYTES, 64):
                isa.prefetch(t.weights, block, group + self._prefetch, line)
            isa.prefetch(t.scales, block, group + self._prefetch, 0)
        x = [
            T.Bind(T.reinterpret("int32x4", isa.load(t.codes, 0, group * GROUP + i, lanes=16)))
            for i in (0, 16)
        ]
        zeros = self._zeros.of(group)
        for quad in range(QUADS):
            chunks = [
                rows for j in range(4) for rows in isa.unpack(t.packed(block, group, quad, j))
            ]
            words = [(x[c // 4], c % 4) for c in range(CHUNKS)]
            total = isa.dot_group(zeros(quad), chunks, words)
            T.buffer_store(acc, t.scaled(total, t.scale(block, group, quad), acc[quad]), [quad])
