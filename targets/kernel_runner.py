"""One kernel of another processor as a program of its own: compile, link, run, read the results.

The program (`runtime/c/kernel/kernel_main.c`) is static, so it runs under an emulator or on a
device without any library. Tensors go in on standard input and come back on standard output.
"""

from __future__ import annotations

import os
import struct
import subprocess
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray
from tvm.tirx import PrimFunc

from llamac.runtime.errors import DeviceError
from llamac.schedules.intrin.isa import Isa
from llamac.schedules.kernel import compile_kernels
from llamac.targets.toolchain import find_toolchain, link_executable

Array = NDArray[Any]

SYMBOL = "kernel"
SOURCES = Path(__file__).parents[1] / "runtime" / "c"
STATIC_TARGET = "aarch64-linux-musl"

_CALL = struct.Struct("<8sqqIIQ")
_TENSOR = struct.Struct("<QBBB5x4q")
_ALIGNMENT = 64
_DTYPE_CODES = {"i": 0, "u": 1, "f": 2}


def build_kernel_program(func: PrimFunc, isa: Isa, out: Path) -> Path:
    """Compile a kernel and link it into a static program.

    Args:
        func: the kernel, with any name.
        isa: an AArch64 instruction set.
        out: the program's path.
    """
    renamed = func.with_attr("global_symbol", SYMBOL)
    module = compile_kernels({SYMBOL: renamed}, isa)
    kernel = out.with_suffix(".o")
    with open(os.memfd_create(SYMBOL), "rb") as file:  # LLVM ends the process on a full disk
        module.write_to_file(f"/proc/self/fd/{file.fileno()}", "o")
        kernel.write_bytes(file.read())
    link_executable(
        find_toolchain(),
        sources=[],
        objects=[*_support_objects(out.parent), kernel],
        include_dirs=[],
        out=out,
        target=STATIC_TARGET,
        cflags=["-static"],
    )
    return out


def _support_objects(folder: Path) -> list[Path]:
    """The compiled main program and what kernels call, made once per folder."""
    objects = []
    for source in (SOURCES / "kernel" / "kernel_main.c", SOURCES / "sme.c"):
        objects.append(folder / f"{source.stem}.o")
        if not objects[-1].exists():
            link_executable(
                find_toolchain(),
                sources=[source],
                include_dirs=[SOURCES],
                out=objects[-1],
                target=STATIC_TARGET,
                cflags=["-c", "-DLLAMAC_MARK_KERNELS"],
            )
    return objects


@dataclass(frozen=True)
class KernelCall:
    """Arguments of one run: all tensors in the kernel's order, and its range of work items."""

    tensors: Sequence[Array]
    begin: int
    end: int
    repeats: int = 1

    def encode(self) -> bytes:
        """The input of the program."""
        offsets, size = [], 0
        for tensor in self.tensors:
            offsets.append(size)
            size += -(-tensor.nbytes // _ALIGNMENT) * _ALIGNMENT
        data = bytearray(size)
        records = []
        for tensor, offset in zip(self.tensors, offsets, strict=True):
            data[offset : offset + tensor.nbytes] = np.ascontiguousarray(tensor).tobytes()
            shape = (*tensor.shape, *([0] * (4 - tensor.ndim)))
            code = _DTYPE_CODES[tensor.dtype.kind]
            bits = 8 * tensor.dtype.itemsize
            records.append(_TENSOR.pack(offset, code, bits, tensor.ndim, *shape))
        head = (b"LLAMACK1", self.begin, self.end, len(self.tensors), self.repeats, size)
        return b"".join([_CALL.pack(*head), *records, bytes(data)])

    def decode(self, data: bytes) -> list[Array]:
        """The tensors after the call."""
        results, offset = [], 0
        for tensor in self.tensors:
            flat = np.frombuffer(data, tensor.dtype, tensor.size, offset)
            results.append(flat.reshape(tensor.shape).copy())
            offset += -(-tensor.nbytes // _ALIGNMENT) * _ALIGNMENT
        return results


def run_kernel_program(command: Sequence[str], call: KernelCall) -> list[Array]:
    """Run a program that `build_kernel_program` made; `command` may start with an emulator.

    Raises:
        DeviceError: it crashed, or the kernel refused its arguments.
    """
    done = subprocess.run(command, input=call.encode(), capture_output=True, check=False)
    if done.returncode != 0:
        raise DeviceError(
            f"{Path(command[-1]).name} ended with code {done.returncode}",
            cause=done.stderr.decode(errors="replace").strip()
            or "a crash: an instruction that this CPU lacks, or a wrong address",
            fix="compile the kernel for the features of this CPU",
        )
    return call.decode(done.stdout)
