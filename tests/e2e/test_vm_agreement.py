"""The shared library and the Relax VM run the same module and agree to the last bit.

The library goes its own way from the lowered module: a memory plan, tables in C, threads. The VM
allocates every tensor anew and calls whole kernels, so equal logits mean that nothing was lost.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from types import ModuleType
from typing import Any

import numpy as np
import pytest
import tvm
from numpy.typing import NDArray
from tvm import relax

from llamac import runtime
from llamac.compiler.checkpoint import Checkpoint
from llamac.compiler.compile_config import CompileConfig
from llamac.compiler.llama import ModelOptions, build_llama
from llamac.compiler.pipeline import PipelineWeights, compile_bundle, kv_capacity, read_checkpoint
from llamac.compiler.progress import SilentProgress
from llamac.schedules.intrin.isa import Isa
from llamac.schedules.intrin.x86 import X86_LEVELS
from llamac.targets.cpu.packing import Packer
from llamac.targets.cpu.selection import select_kernels
from llamac.targets.soc import Level

CONTEXT, CHUNKS = 100, (16, 8)
# Chunks of 16 and 8, a padded one, and single tokens; then a padded chunk over a longer cache.
CALLS = [16, 8, 1, 1, 5, 1, 16, 3, 1]

# TVM's own list without the passes that look for operators or for tensor blocks in kernels: the
# module only calls kernels, which are loops. They are compiled as those of a bundle are ("tirx").
VM_PASSES = tvm.transform.Sequential(
    [
        relax.transform.ToNonDataflow(),
        relax.transform.RemovePurityChecking(),
        relax.transform.CallTIRRewrite(),
        relax.transform.StaticPlanBlockMemory(),
        relax.transform.LowerAllocTensor(),
        relax.transform.KillAfterLastUse(),
        relax.transform.LowerRuntimeBuiltin(),
        relax.transform.ComputePrimValue(),
        relax.transform.VMShapeLower(),
        relax.transform.AttachGlobalSymbol(),
    ]
)


@dataclass(frozen=True)
class Variant:
    """One way to compile."""

    form: str
    kv_dtype: str = "float16"
    scale_dtype: str = "float16"
    shared: bool = False

    def __str__(self) -> str:
        parts = (self.form, self.kv_dtype, self.scale_dtype, "shared" if self.shared else "")
        return "-".join(filter(None, parts))


VARIANTS = [
    Variant("spinquant"),
    Variant("qlora", scale_dtype="bfloat16"),
    Variant("ptq", kv_dtype="int8", shared=True),
    Variant("float"),
    Variant("float", kv_dtype="int8", shared=True),
]
SLOW = [pytest.param(v, id=str(v), marks=pytest.mark.slow) for v in VARIANTS[1:]]


def share_tables(tensors: dict[str, Any], params: dict[str, Any]) -> None:
    """Make the output layer equal to the embedding."""
    for part in ("weight", "scales"):
        if f"tok_embeddings.{part}" in tensors:
            tensors[f"output.{part}"] = tensors[f"tok_embeddings.{part}"].clone()


class Machine:
    """The lowered module in the Relax VM; caches are inputs that the kernels update in place."""

    def __init__(self, checkpoint: Checkpoint, variant: Variant, isa: Isa) -> None:
        capacity = kv_capacity(CONTEXT, CHUNKS)
        module = build_llama(checkpoint, ModelOptions(capacity, CHUNKS, variant.kv_dtype))
        selection = select_kernels(module, variant.scale_dtype, isa)
        self._module = selection.module
        target = tvm.target.Target(isa.target)
        built = tvm.compile(self._module, target, relax_pipeline=VM_PASSES, tir_pipeline="tirx")
        self._vm = relax.VirtualMachine(built, tvm.cpu())
        packer = Packer(PipelineWeights(checkpoint, capacity), variant.scale_dtype)
        self._tensors = {
            name: np.concatenate([p.reshape(-1).view(np.uint8) for p in packer.pack(pack)])
            for name, pack in selection.packs.items()
        }
        self._held: dict[str, Any] = {}

    def __call__(
        self, function: str, tokens: list[int], position: int, last: int
    ) -> tuple[NDArray[np.float32], int]:
        """Logits [V] of row `last`, and the best token."""
        inputs = {"tokens": tokens, "meta": [position, last]}
        args = []
        for param in self._module[function].params:
            if param.name in inputs:
                args.append(tvm.runtime.tensor(np.array(inputs[param.name], np.int32)))
            else:
                args.append(self._hold(param))
        logits, best, *_caches = self._vm[function](*args)
        return logits.numpy()[0], int(best.numpy()[0])

    def _hold(self, param: Any) -> Any:
        """The tensor of a weight or cache, the same in every call; caches start with zeros."""
        if param.name not in self._held:
            shape, dtype = [int(n) for n in param.ty.shape], str(param.ty.dtype.dtype)
            data = self._tensors.get(param.name)
            array = np.zeros(shape, dtype) if data is None else data.view(dtype).reshape(shape)
            self._held[param.name] = tvm.runtime.tensor(array)
        return self._held[param.name]


@pytest.fixture(scope="module")
def meta_layout(helper: Callable[[str], ModuleType]) -> ModuleType:
    """The module that writes random checkpoints for the compiler's tests."""
    return helper("compiler/meta_layout")


@pytest.fixture(scope="module", params=[pytest.param(VARIANTS[0], id=str(VARIANTS[0])), *SLOW])
def variant(request: pytest.FixtureRequest) -> Variant:
    """How to compile."""
    chosen: Variant = request.param
    return chosen


@pytest.fixture(scope="module")
def config(
    variant: Variant,
    one_level: str,
    meta_layout: ModuleType,
    tmp_path_factory: pytest.TempPathFactory,
) -> CompileConfig:
    """A checkpoint, and how to compile it."""
    folder = tmp_path_factory.mktemp("agreement")
    change = share_tables if variant.shared else None
    meta_layout.write_checkpoint(folder / "model", variant.form, change=change)
    return CompileConfig(
        model=folder / "model",
        target=one_level,
        out=folder / "bundle",
        context_length=CONTEXT,
        chunks=CHUNKS,
        scale_dtype=variant.scale_dtype,
        kv_dtype=variant.kv_dtype,
        verify=False,
    )


@pytest.fixture(scope="module")
def bundle(config: CompileConfig) -> Path:
    """The compiled bundle."""
    compile_bundle(config, SilentProgress())
    return config.out


@pytest.fixture(scope="module")
def machine(config: CompileConfig, variant: Variant, levels: list[Level]) -> Machine:
    """The same checkpoint in the VM, with the kernels of the same level."""
    [isa] = [isa for isa in X86_LEVELS if isa.name == levels[0].name]
    return Machine(read_checkpoint(config), variant, isa)


def cuts(lengths: list[int]) -> Iterator[tuple[str, int, int]]:
    """(function, position, valid tokens) of each call, as the library cuts them."""
    position = 0
    for length in lengths:
        size = 1 if length == 1 else next(c for c in reversed(CHUNKS) if c >= length)
        yield "decode" if size == 1 else f"prefill_{size}", position, length
        position += length


@pytest.mark.parametrize("threads", [1, 2])
def test_logits_are_equal_bit_for_bit(bundle: Path, machine: Machine, threads: int) -> None:
    """After every call: prefill in chunks, padded chunks, decode."""
    rng = np.random.default_rng(7)
    with runtime.load(bundle, threads=threads) as model, model.session() as session:
        vocab = model.info.vocab_size
        for function, position, length in cuts(CALLS):
            tokens = rng.integers(0, vocab, length).tolist()
            session.append(tokens)
            size = 1 if function == "decode" else int(function.rpartition("_")[2])
            padded = tokens + [0] * (size - length)
            logits, best = machine(function, padded, position, length - 1)
            np.testing.assert_array_equal(session.logits, logits)
            assert session.argmax() == best
        assert np.ptp(logits) > 0


def test_a_shared_table_is_stored_once(bundle: Path, variant: Variant) -> None:
    """Both layers read the same packed tensor."""
    manifest = runtime.load(bundle, threads=1).manifest
    assert manifest.quantization.shared_embedding is variant.shared
    program = (bundle / "program.json").read_text("utf-8")
    assert ('"output:' not in program) is variant.shared
