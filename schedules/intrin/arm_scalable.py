"""SVE and SME: levels with vectors whose length only the CPU knows.

One binary serves every length that the level allows: a type such as int32xvscalex4 has 4 * vscale
lanes, and vscale, the number of 128-bit segments of a vector, is read at run time. The level is
taken by CPUs whose vectors are longer than NEON's; with 128 bits NEON does the same.

    sve   vectors of 256 or 512 bits: products by lane and matrix products within each segment
    sme   outer products of two streaming vectors of 512 bits, added to a tile of 16 x 16 int32

Both are for the int4 products. Every other kernel of these levels is NEON's.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

from tvm.ir import StringImm
from tvm.tirx.script.builder import ir as T

from llamac.schedules.intrin.arm import ArmI8mm, target_of
from llamac.schedules.intrin.isa import intrinsic
from llamac.schedules.kernel import local

BYTES = "int8xvscalex16"
WORDS = "int32xvscalex4"
FLOATS = "float32xvscalex4"
_PAIRS = "int64xvscalex2"
_ALL = 31  # the pattern of `ptrue` that takes every lane


def num_words() -> Any:
    """32-bit lanes of a vector, as int64."""
    return T.Cast("int64", T.vscale()) * T.int64(4)


def splat(value: Any, per_segment: int) -> Any:
    """Repeat a scalar in all lanes, of which a segment has `per_segment`."""
    return T.broadcast(value, per_segment * T.vscale())


def accumulator() -> Any:
    """A local FLOATS of zeros. Each has a buffer of its own: LLVM splits no array of them."""
    place = local(FLOATS)
    T.buffer_store(place, splat(T.float32(0), 4), [0])
    return place


class Scalable:
    """Operations on scalable vectors that SVE has, and SME in streaming mode."""

    def load_bytes(self, buffer: Any, *index: Any) -> Any:
        """A whole vector of bytes from `index`."""
        *outer, last = index
        value = buffer[(*outer, T.ramp(last, 1, 16 * T.vscale()))]
        return T.Bind(T.reinterpret(BYTES, value))

    def load_segment(self, buffer: Any, *index: Any) -> Any:
        """The 16 bytes from `index` in every segment (ld1rqb)."""
        lanes = _all_lanes(16)
        address = T.address_of(buffer[index])
        return T.Bind(intrinsic(BYTES, "llvm.aarch64.sve.ld1rq.nxv16i8", lanes, address))

    def load_wide_scales(
        self, buffer: Any, shift: int, *index: Any, keep: int | None = None
    ) -> Any:
        """16-bit scales as FLOATS with these bits, shifted left by `shift`.

        With `keep` copies of the sign come in from the left, and only its bits are left.
        """
        *outer, last = index
        value = buffer[(*outer, T.ramp(last, 1, 4 * T.vscale()))]
        kind = "uint" if keep is None else "int"
        bits = T.Cast(f"{kind}32xvscalex4", T.reinterpret(f"{kind}16xvscalex4", value))
        bits = T.shift_left(bits, splat((T.uint32 if keep is None else T.int32)(shift), 4))
        if keep is not None:
            bits = T.bitwise_and(bits, splat(T.int32(keep), 4))
        return T.Bind(T.reinterpret(FLOATS, bits))

    def store_floats(self, buffer: Any, value: Any, index: Any) -> None:
        """Store FLOATS from `index` of a buffer of one axis."""
        T.buffer_store(buffer, value, [T.ramp(index, 1, 4 * T.vscale())])

    def unpack_wide(self, packed: Any) -> tuple[Any, Any]:
        """The low and high nibbles of BYTES, 16 times too large, as `ArmDotprod.unpack`."""
        low = T.shift_left(packed, splat(T.int8(4), 16))
        return T.Bind(low), T.Bind(T.bitwise_and(packed, splat(T.int8(-16), 16)))

    def fma_floats(self, value: Any, scale: Any, acc: Any) -> Any:
        """Acc + scale * value, all FLOATS."""
        return intrinsic(FLOATS, "llvm.fma.nxv4f32", value, scale, acc)

    def fma_words(self, total: Any, scale: Any, acc: Any) -> Any:
        """Acc + scale * total, of WORDS `total`."""
        return self.fma_floats(T.Cast(FLOATS, total), scale, acc)


def _all_lanes(per_segment: int) -> Any:
    """The predicate of all lanes."""
    dtype = f"int1xvscalex{per_segment}"
    return intrinsic(dtype, f"llvm.aarch64.sve.ptrue.nxv{per_segment}i1", T.int32(_ALL))


class ArmSve(ArmI8mm, Scalable):
    """SVE with vectors of 256 or 512 bits and its int8 matrix products (Neoverse V1)."""

    name = "sve"
    features: tuple[str, ...] = ("dotprod", "i8mm", "sve256")
    target = target_of("dotprod", "i8mm", "sve")

    def dot_segment_lane(self, acc: Any, rows: Any, codes: Any, lane: int) -> Any:
        """acc[i] += sum of 4 products of bytes 4i .. 4i+3 with word `lane` of i's segment."""
        name = "llvm.aarch64.sve.sdot.lane.nxv4i32"
        return T.Bind(intrinsic(WORDS, name, acc, rows, codes, T.int32(lane)))

    def matmul_segments(self, acc: Any, lhs: Any, rhs: Any) -> Any:
        """In every segment what `ArmI8mm.matmul_2x2` does."""
        return T.Bind(intrinsic(WORDS, "llvm.aarch64.sve.smmla.nxv4i32", acc, lhs, rhs))

    def zip_words(self, first: Any, second: Any) -> list[Any]:
        """Words of two BYTES in turn: of their lower, then of their upper halves."""
        return _both("zip", BYTES, WORDS, first, second)

    def zip_pairs(self, first: Any, second: Any) -> list[Any]:
        """64-bit pairs of two FLOATS in turn: of their lower, then of their upper halves."""
        return _both("zip", FLOATS, _PAIRS, first, second)

    def unzip_pairs(self, first: Any, second: Any) -> list[Any]:
        """The even, then the odd 64-bit pairs of two FLOATS, those of the first before."""
        return _both("uzp", FLOATS, _PAIRS, first, second)


def _both(operation: str, dtype: str, lanes: str, first: Any, second: Any) -> list[Any]:
    """Both results of a permutation of two vectors of `dtype`, on lanes of another type."""
    suffix = {WORDS: "nxv4i32", _PAIRS: "nxv2i64"}[lanes]
    operands = [T.reinterpret(lanes, value) for value in (first, second)]
    results = [
        intrinsic(lanes, f"llvm.aarch64.sve.{operation}{i}.{suffix}", *operands) for i in (1, 2)
    ]
    return [T.Bind(T.reinterpret(dtype, value)) for value in results]


class ArmSme(ArmI8mm, Scalable):
    """SME with streaming vectors of 512 bits (Apple M4, Arm C1, Oryon of 2025).

    SVE outside of streaming mode is not asked for: Apple's cores do not have it.
    """

    name = "sme"
    features: tuple[str, ...] = ("dotprod", "i8mm", "bf16", "sme512")
    target = target_of("dotprod", "i8mm", "bf16", "sme")
    codes = "panels"

    @contextmanager
    def streaming(self) -> Iterator[None]:
        """Code of a kernel that runs in streaming mode, with the tiles of ZA on."""
        # The attribute is one of the whole function: LLVM enters the mode at its beginning.
        with T.attr(0, "pragma_aarch64_pstate_sm", StringImm("body")):
            _effect("llvm.aarch64.sme.za.enable")
            yield
            _effect("llvm.aarch64.sme.za.disable")

    def clear_tiles(self, tiles: int) -> None:
        """Set the first `tiles` int32 tiles to zero (the mask is of the eight 64-bit tiles)."""
        mask = sum(0x11 << tile for tile in range(tiles))
        _effect("llvm.aarch64.sme.zero", T.int32(mask))

    def outer_product(self, tile: int, lhs: Any, rhs: Any) -> None:
        """tile[i][j] += sum of 4 products of bytes 4i .. 4i+3 of `lhs` and 4j .. 4j+3 of `rhs`."""
        lanes = _all_lanes(16)
        name = "llvm.aarch64.sme.smopa.wide.nxv16i8"
        _effect(name, T.int32(tile), lanes, lanes, lhs, rhs)

    def read_row(self, tile: int, row: int, spare: Any) -> Any:
        """A row of a tile as WORDS; `spare` is any vector that the result may overwrite."""
        name = "llvm.aarch64.sme.read.horiz.nxv4i32"
        # Not pure: it must stay between the products before it and those behind it.
        return T.Bind(
            T.call_llvm_intrin(WORDS, name, spare, _all_lanes(4), T.int32(tile), T.int32(row))
        )


def _effect(name: str, *arguments: Any) -> None:
    """Call an intrinsic for what it does."""
    T.evaluate(T.call_llvm_intrin("void", name, *arguments))
