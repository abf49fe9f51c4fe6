"""Models as shapes without data, and what the CPU target makes of them."""

from __future__ import annotations

import functools
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from numpy.typing import NDArray
from tvm.ir import IRModule

from llamac.compiler.checkpoint import Checkpoint, TensorInfo
from llamac.compiler.config import LlamaConfig, LoraConfig, QuantConfig, RopeScaling
from llamac.compiler.llama import ModelOptions, build_llama
from llamac.compiler.meta_writer import layout
from llamac.schedules.intrin.isa import Isa
from llamac.schedules.intrin.x86 import X86_LEVELS
from llamac.targets.cpu.emitter import Selection
from llamac.targets.cpu.plan import plan_program
from llamac.targets.cpu.selection import select_kernels
from llamac.targets.program import Program

TINY = LlamaConfig(
    dim=64,
    num_layers=2,
    num_heads=4,
    num_kv_heads=2,
    head_dim=16,
    ffn_dim=128,
    vocab_size=96,
    norm_eps=1e-5,
    rope_theta=500000.0,
    rope_scaling=RopeScaling(32.0),
)
QUANT = {
    "spinquant": QuantConfig("spinquant", hadamard_r4=True),
    "qlora": QuantConfig("qlora", lora=LoraConfig(4, 2.0)),
    "ptq": QuantConfig("ptq"),
    "float": QuantConfig("float"),
}


@dataclass(frozen=True)
class Shapes:
    """Weights of a form that have names, shapes and dtypes only."""

    infos: dict[str, TensorInfo]

    def names(self) -> list[str]:
        """All tensors."""
        return list(self.infos)

    def info(self, name: str) -> TensorInfo:
        """Shape and dtype as the front end gives them: flat scales of tables, float32 norms."""
        info = self.infos[name]
        if name.endswith("norm.weight"):
            return TensorInfo(info.shape, "float32")
        is_column = info.shape[1:] == (1,)
        return TensorInfo(info.shape[:1], info.dtype) if is_column else info

    def read(self, name: str) -> NDArray[Any]:
        """There is nothing to read."""
        raise AssertionError(f"{name} must not be read")


@dataclass(frozen=True)
class Model:
    """A model on its way through the CPU target."""

    checkpoint: Checkpoint
    module: IRModule
    selection: Selection
    program: Program


@functools.cache
def lower(
    form: str = "spinquant",
    *,
    config: LlamaConfig = TINY,
    kv_dtype: str = "float16",
    scale_dtype: str = "float16",
    shared: bool = False,
    chunks: tuple[int, ...] = (16, 8),
    capacity: int = 64,
    isa: Isa = X86_LEVELS[0],
) -> Model:
    """Build the IR of a form, choose kernels and plan memory; the result is shared by tests."""
    quant = QUANT[form]
    weights = Shapes(layout(config, quant))
    checkpoint = Checkpoint("shapes", config, quant, weights, Path("none"), shared_embedding=shared)
    module = build_llama(checkpoint, ModelOptions(capacity, chunks, kv_dtype))
    selection = select_kernels(module, scale_dtype, isa)
    return Model(checkpoint, module, selection, plan_program(selection))


@pytest.fixture(scope="session")
def lowered() -> Callable[..., Model]:
    """`lowered(form, kv_dtype=..., scale_dtype=..., shared=..., chunks=..., config=...)`."""
    return lower


@pytest.fixture
def tiny() -> LlamaConfig:
    """Sizes of the model that `lowered` makes by default."""
    return TINY


@pytest.fixture
def rng() -> np.random.Generator:
    """Random numbers that are the same in every run."""
    return np.random.default_rng(0)
