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
from llamac.targets.packets import Packets
from llamac.targets.toolchain import find_toolchain, link_executable

Array = NDArray[Any]

SYMBOL = "kernel"
SOURCES = Path(__file__).parents[1] / "runtime" / "c"
STATIC_TARGET = "aarch64-linux-musl"
HEXAGON_TARGET = "hexagon-linux-musl"
# What QEMU 7.2 needs of Hexagon programs: from v65 on LLVM makes packets that load what they store,
# which it gets wrong behind a cancelled store; its pages are of 64 KiB.
HEXAGON_FLAGS = ("-mcpu=hexagonv62", "-fno-pic", "-fno-pie", "-Wl,-z,max-page-size=65536")

_CALL = struct.Struct("<8sqqIIQ")
_TENSOR = struct.Struct("<QBBB5x4q")
_COSTS = struct.Struct("<3Q")
_DTYPE_CODES = {"i": 0, "u": 1, "f": 2}


def build_kernel_program(func: PrimFunc, isa: Isa, out: Path) -> Path:
    """Compile a kernel and link it into a static program.

    Args:
        func: the kernel, with any name.
        isa: an instruction set of AArch64 or Hexagon.
        out: the program's path.
    """
    renamed = func.with_attr("global_symbol", SYMBOL)
    module = compile_kernels({SYMBOL: renamed}, isa)
    kernel = out.with_suffix(".o")
    with open(os.memfd_create(SYMBOL), "rb") as file:  # LLVM ends the process on a full disk
        module.write_to_file(f"/proc/self/fd/{file.fileno()}", "o")
        kernel.write_bytes(file.read())
    target, flags = _platform(isa)
    link_executable(
        find_toolchain(),
        sources=[],
        objects=[*_support_objects(out.parent, target, flags), kernel],
        include_dirs=[],
        out=out,
        target=target,
        cflags=["-static", *flags],
    )
    return out


def _platform(isa: Isa) -> tuple[str, tuple[str, ...]]:
    """Zig's target and flags of programs for an instruction set."""
    if str(isa.target.get("mtriple", "")).startswith("hexagon"):
        return HEXAGON_TARGET, HEXAGON_FLAGS
    return STATIC_TARGET, ()


def _support_objects(folder: Path, target: str, flags: Sequence[str]) -> list[Path]:
    """The compiled main program and what kernels call, made once per folder."""
    objects = []
    for source in (SOURCES / "kernel" / "kernel_main.c", SOURCES / "sme.c"):
        objects.append(folder / f"{source.stem}-{target}.o")
        if not objects[-1].exists():
            link_executable(
                find_toolchain(),
                sources=[source],
                include_dirs=[SOURCES],
                out=objects[-1],
                target=target,
                cflags=["-c", "-DLLAMAC_MARK_KERNELS", *flags],
            )
    return objects


@dataclass(frozen=True)
class KernelCall:
    """Arguments of one run: all tensors in the kernel's order, and its range of work items.

    Attributes:
        tensors: inputs and outputs.
        begin: the first work item.
        end: behind the last one.
        repeats: how often the kernel is called.
        alignment: of the tensors, see `Isa.alignment`; the program refuses less than it needs.
    """

    tensors: Sequence[Array]
    begin: int
    end: int
    repeats: int = 1
    alignment: int = Isa.alignment

    def encode(self) -> bytes:
        """The input of the program."""
        offsets, size = [], 0
        for tensor in self.tensors:
            offsets.append(size)
            size += self._padded(tensor)
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
            offset += self._padded(tensor)
        return results

    def decode_costs(self, data: bytes) -> Packets:
        """What the calls executed."""
        return Packets(*_COSTS.unpack_from(data, sum(map(self._padded, self.tensors))))

    def _padded(self, tensor: Array) -> int:
        return -(-tensor.nbytes // self.alignment) * self.alignment


def run_kernel_program(command: Sequence[str], call: KernelCall) -> list[Array]:
    """Run a program that `build_kernel_program` made and return the tensors after the call.

    Args:
        command: may start with an emulator.
        call: what the kernel is called with.

    Raises:
        DeviceError: it crashed, or the kernel refused its arguments.
    """
    return call.decode(_run(command, call))


def count_kernel_program(command: Sequence[str], call: KernelCall) -> tuple[list[Array], Packets]:
    """Run it and return the tensors and what the call executed.

    Raises:
        DeviceError: see `run_kernel_program`.
    """
    data = _run(command, call)
    return call.decode(data), call.decode_costs(data)


def _run(command: Sequence[str], call: KernelCall) -> bytes:
    """Run it and return its output.

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
    return done.stdout
