"""Every kernel compiles for every level, also for those that this CPU cannot run."""

from __future__ import annotations

import pytest

from llamac.schedules import (
    attention,
    embedding,
    hadamard,
    lora,
    norm,
    quantize,
    rope,
    sampling,
    select,
)
from llamac.schedules.kernel import compile_kernels
from llamac.schedules.rope import CacheShape

FLOAT16, INT8 = CacheShape(2, 16, 64), CacheShape(2, 64, 64, "int8")
KERNELS = {
    "attention float16": (attention, attention.AttentionShape(1, 8, FLOAT16)),
    "attention int8": (attention, attention.AttentionShape(8, 8, INT8)),
    "embedding": (embedding, embedding.EmbeddingShape(2, 32, 64)),
    "embedding of blocks": (embedding, embedding.EmbeddingShape(2, 32, 64, "bfloat16", True)),
    "hadamard": (hadamard, hadamard.HadamardShape(1, 64, quantize=False)),
    "lora": (lora, lora.LoraShape(2, 4, 64)),
    "rms norm": (norm, norm.RmsNormShape(2, 64, 1e-5, with_float=True)),
    "quantize": (quantize, quantize.QuantizeShape(2, 64)),
    "rope float16": (rope, rope.RopeShape(2, 8, 64, FLOAT16)),
    "rope int8": (rope, rope.RopeShape(2, 8, 64, INT8)),
    "argmax": (sampling, sampling.ArgmaxShape(77)),
    "take row": (select, select.TakeRowShape(8, 64)),
}


@pytest.mark.parametrize("kernel", KERNELS)
def test_kernel_compiles_without_foreign_calls(any_isa, external_symbols, kernel):
    """No heap, no libm: a kernel calls only the function that records a wrong argument."""
    family, shape = KERNELS[kernel]
    knobs = family.default(shape, any_isa)
    assert family.valid(shape, any_isa, knobs)
    library = compile_kernels({"kernel": family.make(shape, any_isa, **knobs)}, any_isa)
    assert external_symbols(library) == {"TVMFFIErrorSetRaisedFromCStrParts"}
