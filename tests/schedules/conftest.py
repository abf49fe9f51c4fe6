"""Fixtures of the kernel tests: the instruction sets, and a way to compile and call a kernel."""

from __future__ import annotations

import functools
import re
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import tvm
from numpy.typing import NDArray
from tvm.tirx import PrimFunc
from tvm_ffi import structural_equal

from llamac.compiler import reference
from llamac.schedules.intrin.arm import ArmNeon
from llamac.schedules.intrin.arm_levels import ARM_LEVELS
from llamac.schedules.intrin.arm_scalable import Scalable
from llamac.schedules.intrin.hexagon import HexagonHvx
from llamac.schedules.intrin.isa import Isa
from llamac.schedules.intrin.x86 import X86_LEVELS
from llamac.schedules.kernel import compile_kernels, num_outputs, work_items
from llamac.schedules.quantize import has_offsets
from llamac.targets.cpu import packing
from llamac.targets.kernel_runner import KernelCall, build_kernel_program, run_kernel_program

CANARY = 0x5A  # every byte of an output before the call

Array = NDArray[Any]
RunKernel = Callable[..., list[Array]]


@functools.cache
def cpu_features() -> frozenset[str]:
    """Features of this CPU in the manifest's words."""
    with open("/proc/cpuinfo") as file:
        flags = re.search(r"^flags\s*:(.*)$", file.read(), re.MULTILINE)
    return (
        frozenset(flag.replace("_", "") for flag in flags.group(1).split())
        if flags
        else frozenset()
    )


# A CPU model that has just the features of the level, so that any other instruction traps.
QEMU_CPUS = {
    "neon": "cortex-a57",
    "dotprod": "cortex-a76",
    "i8mm": "max,sve=off,sme=off",
    "sve": "max,sve-default-vector-length=32,sme=off",
    "sme": "max,sme_fa64=off,sme-default-vector-length=64",
}

needs_qemu = pytest.mark.needs("qemu-aarch64")
ARM_PARAMS = [pytest.param(level, marks=needs_qemu) for level in ARM_LEVELS]
NEON_PARAMS = [
    pytest.param(level, marks=needs_qemu) for level in ARM_LEVELS if not isinstance(level, Scalable)
]


def _skip_unless_runnable(level: Isa) -> Isa:
    if not isinstance(level, ArmNeon) and (missing := set(level.features) - cpu_features()):
        pytest.skip(f"this CPU lacks {', '.join(sorted(missing))}")
    return level


@pytest.fixture(params=[*X86_LEVELS, *NEON_PARAMS], ids=lambda isa: isa.name)
def isa(request: pytest.FixtureRequest) -> Isa:
    """Every x86 level that this CPU can run, and every NEON level under QEMU.

    SVE and SME have kernels of their own for products only, which take `each_isa`.
    """
    return _skip_unless_runnable(request.param)


@pytest.fixture(params=[*X86_LEVELS, *ARM_PARAMS], ids=lambda isa: isa.name)
def each_isa(request: pytest.FixtureRequest) -> Isa:
    """Every x86 level that this CPU can run, and every Arm level under QEMU."""
    return _skip_unless_runnable(request.param)


@pytest.fixture(params=X86_LEVELS, ids=lambda isa: isa.name)
def x86_isa(request: pytest.FixtureRequest) -> Isa:
    """Every x86 level that this CPU can run."""
    return _skip_unless_runnable(request.param)


@pytest.fixture(params=ARM_PARAMS, ids=lambda isa: isa.name)
def arm_isa(request: pytest.FixtureRequest) -> ArmNeon:
    """Every Arm level, which runs under QEMU."""
    level: ArmNeon = request.param
    return level


@pytest.fixture(params=[*X86_LEVELS, *ARM_LEVELS], ids=lambda isa: isa.name)
def any_isa(request: pytest.FixtureRequest) -> Isa:
    """Every level, for tests that only compile."""
    level: Isa = request.param
    return level


def find_external_symbols(library: Any) -> set[str]:
    """What the LLVM code of a kernel needs from outside: functions and TVM's function pointers."""
    text = library.inspect_source("ll")
    declared = re.findall(r"^declare\b[^@\n]*@([\w.]+)", text, re.MULTILINE)
    pointers = re.findall(r"^@(__TVM\w+) =", text, re.MULTILINE)
    return {name for name in (*declared, *pointers) if not name.startswith("llvm.")}


@pytest.fixture
def external_symbols() -> Callable[[Any], set[str]]:
    """`external_symbols(library)`: what a compiled kernel needs from outside."""
    return find_external_symbols


class KernelRunner:
    """Compiles kernels once per test session and calls them on numpy arrays.

    Kernels for another processor become programs that run under its emulator.
    """

    def __init__(self, folder: Path, sme_emulator: Callable[[], Path]) -> None:
        self._folder, self._sme_emulator = folder, sme_emulator
        self._built: dict[tuple[str, str], tuple[PrimFunc, Any]] = {}

    def __call__(
        self,
        func: PrimFunc,
        isa: Isa,
        *inputs: Array,
        begin: int = 0,
        end: int | None = None,
        cpu: str = "",
    ) -> list[Array]:
        """Run items begin .. end (default all) and return the outputs.

        Inputs that the kernel changes in place are changed here too. Outputs are filled with CANARY
        before the call. `cpu` is the emulated CPU, by default that of the level.
        """
        kernel = self._compile(func, isa)
        outputs = [_empty(buffer) for buffer in output_buffers(func)]
        last = work_items(func) if end is None else end
        if isinstance(kernel, Path):
            command = [*self._emulator(isa, cpu), str(kernel)]
            call = KernelCall([*inputs, *outputs], begin, last, alignment=isa.alignment)
            arrays = run_kernel_program(command, call)
        else:
            tensors = [tvm.runtime.tensor(array) for array in (*inputs, *outputs)]
            kernel(*tensors, begin, last)
            arrays = [tensor.numpy() for tensor in tensors]
        for array, after in zip(inputs, arrays, strict=False):
            if array.flags.writeable:
                array[...] = after
        return arrays[len(inputs) :]

    def _emulator(self, isa: Isa, cpu: str) -> list[str]:
        if isinstance(isa, HexagonHvx):
            return ["qemu-hexagon", "-cpu", cpu or "v67"]
        program = str(self._sme_emulator()) if isa.name == "sme" else "qemu-aarch64"
        return [program, "-cpu", cpu or QEMU_CPUS[isa.name]]

    def _compile(self, func: PrimFunc, isa: Isa) -> Any:
        name = str(func.attrs["global_symbol"])
        known, kernel = self._built.get((name, isa.name), (None, None))
        if known is None or not structural_equal(known, func):
            if isinstance(isa, ArmNeon | HexagonHvx):
                kernel = build_kernel_program(
                    func, isa, self._folder / f"{len(self._built)}_{isa.name}"
                )
            else:
                kernel = compile_kernels({name: func}, isa)[name]
            self._built[name, isa.name] = (func, kernel)
        return kernel


def output_buffers(func: PrimFunc) -> list[Any]:
    """The output tensors of a kernel, in order."""
    *tensors, _begin, _end = func.params
    return tensors[len(tensors) - num_outputs(func) :]


def _empty(buffer: Any) -> Array:
    array = np.empty([int(n) for n in buffer.shape], str(buffer.dtype))
    array.view(np.uint8)[...] = CANARY
    return array


@pytest.fixture(scope="session")
def run_kernel(
    tmp_path_factory: pytest.TempPathFactory, request: pytest.FixtureRequest
) -> RunKernel:
    """`run_kernel(func, isa, *inputs, begin=0, end=None) -> outputs`."""
    sme_emulator = functools.partial(request.getfixturevalue, "sme_emulator")
    return KernelRunner(tmp_path_factory.mktemp("kernels"), sme_emulator)


@pytest.fixture
def check_row_ranges(run_kernel: RunKernel) -> Callable[..., None]:
    """`check_row_ranges(func, isa, *inputs)`: items are rows, and a call writes only its own."""

    def check(func: PrimFunc, isa: Isa, *inputs: Array) -> None:
        work = work_items(func)

        def run(begin: int, end: int) -> list[Array]:
            outputs = run_kernel(func, isa, *inputs, begin=begin, end=end)
            is_panel = [out.dtype == np.int8 and out.ndim == 3 for out in outputs]
            return [
                packing.restore_codes(out, work, isa.codes) if panel else out
                for out, panel in zip(outputs, is_panel, strict=True)
            ]

        whole = run(0, work)
        for begin, end in ((0, 0), (0, 1), (1, work - 1), (work - 1, work)):
            part = run(begin, end)
            for expected, got in zip(whole, part, strict=True):
                np.testing.assert_array_equal(got[begin:end], expected[begin:end])
                others = np.delete(got, np.s_[begin:end], axis=0)
                assert (np.ascontiguousarray(others).view(np.uint8) == CANARY).all()

    return check


@pytest.fixture(scope="session")
def assert_quantized() -> Callable[[Isa, Sequence[Array], Array], None]:
    """`assert_quantized(isa, outputs, x)`: codes, parameters, offsets are the reference's of x."""

    def check(isa: Isa, outputs: Sequence[Array], x: Array) -> None:
        codes, qparams, *offsets = outputs
        expected = reference.quantize_per_token(x)
        restored = packing.restore_codes(codes, len(x), isa.codes)
        np.testing.assert_array_equal(restored, expected.codes)
        np.testing.assert_array_equal(qparams[:, 0], expected.scale)
        np.testing.assert_array_equal(qparams[:, 1], expected.zero_point)
        assert len(offsets) == has_offsets(isa)
        for found in offsets:
            np.testing.assert_array_equal(found, -8 * reference.group_sums(expected.codes, 32))

    return check
