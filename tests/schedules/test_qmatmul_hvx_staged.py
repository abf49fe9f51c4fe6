"""Weights through a scratch: the same results, and a DMA whose copies are one block ahead.

The copy by a loop is executed under QEMU, which has no DMA; the form with DMA is inspected.
"""

from __future__ import annotations

import re

import numpy as np
import pytest

from llamac.schedules import qmatmul_hvx, qmatmul_hvx_staged
from llamac.schedules.intrin.hexagon import HEXAGON_VERSIONS, HexagonHvx
from llamac.schedules.kernel import compile_kernels
from llamac.schedules.qmatmul import QMatmulShape

HVX = HexagonHvx(75, simulate=True)
SHAPES = [
    QMatmulShape(1, 256, 64),
    QMatmulShape(5, 192, 96, epilogue="residual"),
    QMatmulShape(2, 256, 64, epilogue="swiglu"),
]


def tensors(shape):
    """Random inputs of `qmatmul_hvx`."""
    rng = np.random.default_rng(0)
    blocks, groups = shape.n // 64, shape.k // 32
    inputs = [
        rng.integers(-128, 128, (shape.m, shape.k)).astype(np.int8),
        rng.uniform(0.1, 1, (shape.m, 2)).astype(np.float32),
        rng.integers(-999, 999, (shape.m, groups)).astype(np.int32),
        rng.integers(0, 256, (blocks, groups, 1024)).astype(np.uint8),
        rng.uniform(0.1, 1, (blocks, groups, 64)).astype(np.float16),
        rng.normal(size=shape.n).astype(np.float32),
    ]
    if shape.epilogue == "residual":
        inputs.append(rng.normal(size=(shape.m, shape.n)).astype(np.float32))
    return inputs


def make(shape, isa, dma):
    knobs = qmatmul_hvx_staged.default(shape, isa)
    assert qmatmul_hvx_staged.valid(shape, isa, knobs, dma=dma)
    return qmatmul_hvx_staged.make(shape, isa, dma=dma, **knobs)


@pytest.mark.needs("qemu-hexagon")
@pytest.mark.parametrize("shape", SHAPES, ids=str)
def test_the_scratch_changes_no_result(run_kernel, shape):
    """Nor does where a call begins; a call fills the scratch and nothing more."""
    inputs, work = tensors(shape), qmatmul_hvx.work(shape)
    plain = qmatmul_hvx.make(shape, HVX, **qmatmul_hvx.default(shape, HVX))
    staged = make(shape, HVX, dma=False)
    for begin, end in ((0, work), (0, 0), (1, work), (1, 2)):
        scratch = np.full((2, shape.k // 32, 1024), 0x77, np.uint8)
        descriptors = np.full((2, 4), 7, np.uint32)
        (expected,) = run_kernel(plain, HVX, *inputs, begin=begin, end=end)
        own = (scratch, descriptors)
        (got,) = run_kernel(staged, HVX, *own, *inputs, begin=begin, end=end)
        np.testing.assert_array_equal(got, expected)
        assert (descriptors == 7).all()
        for block in range(begin, end)[-2:]:
            np.testing.assert_array_equal(scratch[block % 2], inputs[3][block])
        for half in {0, 1} - {block % 2 for block in range(begin, end)}:
            assert (scratch[half] == 0x77).all()


@pytest.mark.parametrize(
    "isa", [isa for isa in HEXAGON_VERSIONS if isa.version >= 68], ids=lambda isa: isa.name
)
def test_the_dma_is_one_block_ahead(isa):
    """A copy starts before the loop, then the loop waits, starts the next one and multiplies."""
    shape = QMatmulShape(8, 2048, 2048)
    assembly = compile_kernels({"kernel": make(shape, isa, dma=True)}, isa).inspect_source("asm")
    found = re.findall(r"dmstart|dmwait|vrmpy", assembly)
    assert found[:4] == ["dmstart", "dmwait", "dmstart", "vrmpy"]
    assert set(found[4:]) == {"vrmpy"}
    assert "vmemu" not in assembly
    copies = compile_kernels({"kernel": make(shape, isa, dma=False)}, isa).inspect_source("asm")
    assert not re.search(r"dmstart|dmwait", copies)


def test_a_block_is_loaded_behind_the_wait():
    """LLVM must know neither that the scratch is unchanged nor where the loads are."""
    isa, shape = HexagonHvx(75), QMatmulShape(1, 4096, 32)  # one group: nothing but the outer loop
    code = compile_kernels({"kernel": make(shape, isa, dma=True)}, isa).inspect_source("ll")
    status = re.search(r"(%\S+) = tail call i32 @llvm\.hexagon\.Y6\.dmwait", code)
    assert status is not None
    loop = code[status.end() :]
    assert re.search(rf"\b(?:add|and)\b[^\n]*{re.escape(status[1])}\b", loop)
    assert re.search(r"store ptr %\S+, ptr %\S+, align", code[: status.start()])
    assert loop.count("load <32 x i32>") >= 8


def test_what_has_no_dma():
    shape, knobs = QMatmulShape(1, 64, 64), {"mr": 1}
    assert qmatmul_hvx_staged.valid(shape, HexagonHvx(66), knobs)
    assert not qmatmul_hvx_staged.valid(shape, HexagonHvx(66), knobs, dma=True)
    long = QMatmulShape(1, 64, 1 << 19)
    assert qmatmul_hvx_staged.valid(long, HVX, knobs)
    assert not qmatmul_hvx_staged.valid(long, HVX, knobs, dma=True)
