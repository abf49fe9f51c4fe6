"""What the int4 kernels of `qmatmul_quads.py` read, and how a sum becomes a result."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

from tvm.tirx.script.builder import ir as T

from llamac.schedules.intrin.arm import ArmNeon
from llamac.schedules.intrin.isa import pick
from llamac.schedules.kernel import KernelBuilder, local, opaque
from llamac.schedules.qmatmul import QMatmulShape
from llamac.schedules.qmatmul_epilogue import ROWS, Epilogue
from llamac.schedules.quantize import GROUP, codes_shape

QUAD = 4  # rows of a quad, lanes of a vector
QUADS = ROWS // QUAD
GROUP_BYTES = ROWS * GROUP // 2
# A float32's sign, and a float16's exponent and mantissa at their place in it. Between them a shift
# that fills up with copies of the sign leaves three.
SIGN_AND_HALF = ~0x70000000
CHUNKS = GROUP // 4  # of four codes, what a lane of a dot product takes


class Tensors:
    """The arguments of a kernel and how its levels read them."""

    def __init__(self, b: KernelBuilder, shape: QMatmulShape, isa: ArmNeon) -> None:
        groups = shape.k // GROUP
        self.is_bfloat16 = shape.scale_dtype == "bfloat16"
        self.shape, self.isa, self.groups = shape, isa, groups
        self.codes = b.input("codes", codes_shape(isa, shape.m, shape.k), "int8")
        self.qparams = b.input("qparams", (shape.m, 2), "float32")
        self.weights = b.input("weights", (shape.blocks, groups, GROUP_BYTES), "uint8")
        bits = "uint16" if self.is_bfloat16 else "float16"
        self.scales = b.input("scales", (shape.blocks, groups, ROWS), bits)
        self.ksum = b.input("ksum", (shape.n,), "float32")
        self.epilogue = Epilogue(b, shape, isa)

    @property
    def scale_shift(self) -> int:
        """By how many bits a stored scale is shifted to the left to be read as float32."""
        return 16 if self.is_bfloat16 else 13

    @property
    def kept_bits(self) -> int | None:
        """What is left of float16 scales with a sign after that shift; None: all bits."""
        return SIGN_AND_HALF if self.shape.signed_scales and not self.is_bfloat16 else None

    @property
    def factor(self) -> float:
        """What the scales in the accumulators lack."""
        return 1.0 if self.is_bfloat16 else 2.0**112

    def scaled(self, total: Any, scale: Any, acc: Any) -> Any:
        """Acc + scale * total, of a total that `dot_group` made."""
        return self.isa.fma(self.isa.fixed_to_float32(total, self.isa.nibble_shift), scale, acc)

    def packed(self, block: Any, group: Any, quad: Any, j: int) -> Any:
        """Vector j of a quad: 16 bytes."""
        place = quad * (4 * QUAD) + j * (4 * ROWS)
        value = self.isa.load(self.weights, block, group, place, lanes=16)
        return T.Bind(T.reinterpret("int8x16", value))

    def scale(self, block: Any, group: Any, quad: Any) -> Any:
        """Scales of a quad as float32x4, times 2^-112 if they are float16."""
        stored = self.isa.load(self.scales, block, group, quad * QUAD)
        return T.Bind(T.reinterpret("float32x4", self._widened(stored)))

    def _widened(self, stored: Any) -> Any:
        """The bits of 16-bit scales where float32 has them; a sign is three places further up."""
        if self.kept_bits is None:
            bits = T.Cast("uint32x4", T.reinterpret("uint16x4", stored))
            return T.shift_left(bits, T.broadcast(T.uint32(self.scale_shift), QUAD))
        bits = T.Cast("int32x4", T.reinterpret("int16x4", stored))
        copies = T.shift_left(bits, T.broadcast(T.int32(self.scale_shift), QUAD))
        return T.bitwise_and(copies, T.broadcast(T.int32(self.kept_bits), QUAD))

    def finish(
        self, accs: Sequence[Any], block: Any, quad: Any, row0: Any, split: Any, shift: int = 0
    ) -> list[Any]:
        """The results of a quad for some tokens, from an accumulator of each, 2^shift too large."""
        isa = self.isa
        factor = isa.splat(self.factor / 2**shift)
        ksum = T.Bind(isa.load(self.ksum, block * ROWS + quad * QUAD))
        values = []
        for i, acc in enumerate(accs):
            if i % 2 == 0:  # one load for two tokens; the products take a lane of it
                count = min(2, len(accs) - i)
                params = T.Bind(isa.load(self.qparams, row0 + i, 0, lanes=2 * count))
            scale, zero = (isa.splat(pick(params, [i % 2 * 2 + j])) for j in (0, 1))
            value = T.Bind(scale * isa.fma(T.Bind(isa.splat(0.0) - zero), ksum, acc * factor))
            values.append(self.epilogue.add_lora(value, block, row0 + i, quad, split))
        return values


class HiddenZeros:
    """Vectors of zeros in memory, of which LLVM does not know that they are zeros.

    Every group's integer sums start with zeros. Setting a register takes a vector operation, of
    which products need all that there are; a load of two vectors takes none.

    Args:
        isa: instruction set.
        item: the work item, not negative.
        count: vectors.
    """

    def __init__(self, isa: ArmNeon, item: Any, count: int) -> None:
        self._memory = local("int32", 4 * count)
        for i in range(count):
            T.buffer_store(self._memory, isa.splat(T.int32(0)), [T.ramp(4 * i, 1, 4)])
        # Always 0, but only we know that: what depends on it is not moved out of the loop.
        self._step = opaque(T.shift_right(item, T.int64(62)))

    def of(self, group: Any) -> Callable[[int], Any]:
        """The vectors of a group: i -> int32x4."""
        base = T.Bind(group * self._step)
        return lambda i: T.Bind(self._memory[T.ramp(base + 4 * i, 1, 4)])
