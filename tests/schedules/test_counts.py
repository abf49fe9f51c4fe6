"""Instructions of the main kernels on Arm stay what they are, and pass the marks that we set.

The counts are exact, so a change of 2 % is a change of the code. If it is intended:

    LLAMAC_UPDATE_GOLDEN=1 python -m pytest tests/schedules/test_counts.py
"""

from __future__ import annotations

import functools
import json
import os
from collections.abc import Callable, Mapping
from pathlib import Path

import numpy as np
import pytest

from llamac.schedules.attention import AttentionShape
from llamac.schedules.hadamard import HadamardShape
from llamac.schedules.intrin.arm import scheduling_model
from llamac.schedules.intrin.arm_levels import ARM_LEVELS
from llamac.schedules.kernel import compile_kernels, work_items
from llamac.schedules.norm import RmsNormShape
from llamac.schedules.qmatmul import QMatmulShape
from llamac.schedules.qmatmul_int8 import QMatmulInt8Shape
from llamac.schedules.quantize import QuantizeShape
from llamac.schedules.rope import CacheShape, RopeShape
from llamac.schedules.sampling import ArgmaxShape
from llamac.targets.count import Counts, count_instructions
from llamac.targets.cpu.kernels import KernelSpec
from llamac.targets.emulator import find_emulator
from llamac.targets.kernel_runner import KernelCall, build_kernel_program
from llamac.targets.machine_code import parse_assembly
from llamac.targets.mca import MODELS, hot_loop, macs_per_cycle

GOLDEN = Path(__file__).parents[1] / "golden" / "arm_counts.json"
UPDATE = "LLAMAC_UPDATE_GOLDEN"
TOLERANCE = 0.02
BIG, LITTLE = "cortex-x4", "cortex-a510"
K = N = 2048
POSITION = 300  # of the token that attends, in a cache of 512 positions
CACHE = CacheShape(kv_heads=8, head_dim=64, capacity=512)

# Shapes are those of Llama 3.2 1B, but for the rows of the int8 product.
KERNELS: Mapping[str, tuple[str, object]] = {
    "int4 GEMV": ("qmatmul_quads", QMatmulShape(1, N, K)),
    "int4 GEMM M=128": ("qmatmul_quads", QMatmulShape(128, N, K)),
    "int8 GEMV": ("qmatmul_int8", QMatmulInt8Shape(1, N, K)),
    "quantize 1": ("quantize", QuantizeShape(1, K)),
    "quantize 128": ("quantize", QuantizeShape(128, K)),
    "hadamard_quantize": ("hadamard", HadamardShape(1, 8192)),
    "rms_norm_quantize": ("norm", RmsNormShape(1, K, 1e-5)),
    "rope": ("rope", RopeShape(1, 32, CACHE.capacity, CACHE)),
    "attention": ("attention", AttentionShape(1, 32, CACHE)),
    "argmax": ("sampling", ArgmaxShape(128256)),
}
CASES = [
    ("int4 GEMV", "dotprod"),
    ("int4 GEMV", "neon"),
    ("int4 GEMM M=128", "dotprod"),
    ("int4 GEMM M=128", "i8mm"),
    ("int4 GEMV", "sve"),
    ("int4 GEMM M=128", "sve"),
    ("int4 GEMM M=128", "sme"),
    *((name, "dotprod") for name in KERNELS if not name.startswith("int4")),
]
# At most so many instructions per product.
MARKS = [
    ("int4 GEMV", "dotprod", 0.185),
    ("int4 GEMM M=128", "i8mm", 0.073),
    ("int4 GEMM M=128", "dotprod", 0.113),
    ("int4 GEMM M=128", "sme", 0.020),
]
# Vectors of 256 bits, and streaming vectors of 512. That QEMU before version 10 computes some outer
# products wrongly does not change how many instructions run.
CPUS = {
    "sve": "max,sme=off,sve-default-vector-length=32",
    "sme": "max,sme-default-vector-length=64",
}
# At least so many products per cycle, with the scheduling model for a core.
CYCLES = [
    ("int4 GEMV", "dotprod", LITTLE, {"A510": 4.7}),
    ("int4 GEMV", "dotprod", BIG, {"N2": 12.8, "V1": 25.4, "V2": 25.5}),
    ("int4 GEMM M=128", "i8mm", LITTLE, {"A510": 11.1}),
    ("int4 GEMM M=128", "i8mm", BIG, {"N2": 29.7, "V1": 59.3, "V2": 59.3}),
]

CountKernel = Callable[[str, str], Counts]


def kernel(name: str, level: str, core: str = BIG):
    """A kernel with its default knobs, and the instruction set that it is compiled for."""
    family, shape = KERNELS[name]
    (plain,) = (isa for isa in ARM_LEVELS if isa.name == level)
    isa = plain.scheduled_for(scheduling_model(core))
    return KernelSpec("kernel", family, shape).make(isa), isa


def random_tensor(name: str, shape: tuple[int, ...], dtype: str):
    """Values that no kernel treats specially; positions are those of the token."""
    if name == "meta":
        return np.array([POSITION, 0], dtype)
    rng = np.random.default_rng(1)
    if np.dtype(dtype).kind == "f":
        return rng.normal(size=shape).astype(dtype)
    return rng.integers(0, 100, shape).astype(dtype)


@pytest.fixture(scope="module")
def count_again(tmp_path_factory: pytest.TempPathFactory) -> CountKernel:
    """`count_again(kernel, level)`: the instructions of one call with all work items."""
    folder = tmp_path_factory.mktemp("counted")
    if not find_emulator().has_plugins:
        pytest.skip("missing program: a qemu-aarch64 that loads plug-ins")

    @functools.cache
    def build(name: str, level: str):
        func, isa = kernel(name, level)
        *buffers, _begin, _end = func.params
        tensors = [
            random_tensor(str(b.name), tuple(map(int, b.shape)), str(b.dtype)) for b in buffers
        ]
        program = build_kernel_program(func, isa, folder / f"{name} {level}")
        return program, KernelCall(tensors, 0, work_items(func)).encode()

    def count(name: str, level: str) -> Counts:
        program, call = build(name, level)
        emulator = find_emulator(CPUS.get(level, "max,sme=off"))
        _, [counts] = count_instructions(emulator, [program], call)
        return counts

    return count


@pytest.fixture(scope="module")
def count(count_again: CountKernel) -> CountKernel:
    """The same, of each kernel once."""
    return functools.cache(count_again)


def update_golden(key: str, counts: Counts) -> None:
    """Replace one entry of the golden file."""
    golden = json.loads(GOLDEN.read_text("utf-8")) if GOLDEN.exists() else {}
    golden[key] = vars(counts)
    GOLDEN.parent.mkdir(exist_ok=True)
    GOLDEN.write_text(json.dumps(golden, indent=2, sort_keys=True) + "\n", "utf-8")


@pytest.mark.needs("qemu-aarch64")
@pytest.mark.parametrize(("name", "level"), CASES)
def test_counts_are_those_of_the_golden_file(name: str, level: str, count: CountKernel) -> None:
    """More is a regression, fewer an improvement that the file should hold."""
    counts, key = count(name, level), f"{name} {level}"
    if os.environ.get(UPDATE) == "1":
        update_golden(key, counts)
    golden = Counts(**json.loads(GOLDEN.read_text("utf-8"))[key])
    change = counts.total / golden.total - 1
    classes = ", ".join(f"{c} {n} -> {getattr(counts, c)}" for c, n in vars(golden).items() if n)
    assert abs(change) <= TOLERANCE, (
        f"{key}: {100 * change:+.1f} % instructions ({classes}); if that is intended, "
        f"run the test again with {UPDATE}=1 and commit {GOLDEN.name}"
    )


@pytest.mark.needs("qemu-aarch64")
@pytest.mark.parametrize(("name", "level"), [("int4 GEMV", "dotprod"), ("attention", "dotprod")])
def test_two_runs_count_the_same(
    name: str, level: str, count: CountKernel, count_again: CountKernel
) -> None:
    """To the instruction, class by class."""
    assert count_again(name, level) == count(name, level)


@pytest.mark.needs("qemu-aarch64")
@pytest.mark.parametrize(("name", "level", "most"), MARKS)
def test_instructions_per_product(name: str, level: str, most: float, count: CountKernel) -> None:
    """Fewer than the best kernels of others, counted in the same way."""
    shape = KERNELS[name][1]
    assert count(name, level).total / (shape.m * shape.n * shape.k) <= most


@pytest.mark.needs("llvm-mca-19")
@pytest.mark.parametrize(("name", "level", "core", "marks"), CYCLES)
def test_products_per_cycle_of_the_hot_loop(
    name: str, level: str, core: str, marks: Mapping[str, float]
) -> None:
    """At least what the models predict of the best kernels of others."""
    func, isa = kernel(name, level, core)
    assembly = compile_kernels({"kernel": func}, isa).inspect_source("asm")
    loop = hot_loop(parse_assembly(assembly))
    assert loop is not None
    found = {model: macs_per_cycle(loop, MODELS[model]) for model in marks}
    assert {model: found[model] for model in marks if found[model] < marks[model]} == {}
