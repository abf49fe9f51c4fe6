"""One kernel of another processor as a program of its own: compile, link, run, read the results.

The programs (`runtime/c/kernel/`) are static, so they run under an emulator or on a device without
any library. Tensors go in on standard input and come back on standard output. `kernel_main.c` calls
the kernel, `timed_main.c` also measures how long it takes, in turns with another.
"""

from __future__ import annotations

import os
import struct
import subprocess
from collections.abc import Mapping, Sequence
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
REFERENCE = "reference"
SOURCES = Path(__file__).parents[1] / "runtime" / "c"
STATIC_TARGET = "aarch64-linux-musl"
HEXAGON_TARGET = "hexagon-linux-musl"
X86_TARGET = "x86_64-linux-musl"
# What QEMU 7.2 needs of Hexagon programs: from v65 on LLVM makes packets that load what they store,
# which it gets wrong behind a cancelled store; its pages are of 64 KiB.
HEXAGON_FLAGS = ("-mcpu=hexagonv62", "-fno-pic", "-fno-pie", "-Wl,-z,max-page-size=65536")

_CALL = struct.Struct("<8sqqIIQ")
_TIMING = struct.Struct("<qQIIII")
_TENSOR = struct.Struct("<QBBB5x4q")
_COSTS = struct.Struct("<3Q")
_DTYPE_CODES = {"i": 0, "u": 1, "f": 2}


def build_kernel_program(func: PrimFunc, isa: Isa, out: Path) -> Path:
    """Compile a kernel and link it into a static program.

    Args:
        func: the kernel, with any name.
        isa: an instruction set of x86-64, AArch64 or Hexagon.
        out: the program's path.
    """
    return _build({SYMBOL: func}, "kernel_main.c", isa, out)


def build_timed_program(func: PrimFunc, reference: PrimFunc, isa: Isa, out: Path) -> Path:
    """Compile two kernels that take the same tensors, and link a program that measures them.

    Args:
        func: the kernel.
        reference: that it is measured beside.
        isa: an instruction set of x86-64 or AArch64.
        out: the program's path.
    """
    return _build({SYMBOL: func, REFERENCE: reference}, "timed_main.c", isa, out)


def _build(funcs: Mapping[str, PrimFunc], main: str, isa: Isa, out: Path) -> Path:
    renamed = {name: func.with_attr("global_symbol", name) for name, func in funcs.items()}
    module = compile_kernels(renamed, isa)
    kernels = out.with_suffix(".o")
    with open(os.memfd_create(SYMBOL), "rb") as file:  # LLVM ends the process on a full disk
        module.write_to_file(f"/proc/self/fd/{file.fileno()}", "o")
        kernels.write_bytes(file.read())
    target, flags = _platform(isa)
    link_executable(
        find_toolchain(),
        sources=[],
        objects=[*_support_objects(main, out.parent, target, flags), kernels],
        include_dirs=[],
        out=out,
        target=target,
        cflags=["-static", *flags],
    )
    return out


def _platform(isa: Isa) -> tuple[str, tuple[str, ...]]:
    """Zig's target and flags of programs for an instruction set."""
    triple = str(isa.target.get("mtriple", ""))
    if triple.startswith("hexagon"):
        return HEXAGON_TARGET, HEXAGON_FLAGS
    return (X86_TARGET if triple.startswith("x86_64") else STATIC_TARGET), ()


def _support_objects(main: str, folder: Path, target: str, flags: Sequence[str]) -> list[Path]:
    """The compiled main program and what kernels call, made once per folder."""
    objects = []
    for source in (SOURCES / "kernel" / main, SOURCES / "sme.c"):
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
        return self._encode(b"LLAMACK1")

    def _encode(self, magic: bytes, behind_head: bytes = b"") -> bytes:
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
        head = (magic, self.begin, self.end, len(self.tensors), self.repeats, size)
        return b"".join([_CALL.pack(*head), behind_head, *records, bytes(data)])

    @property
    def data_bytes(self) -> int:
        """Size of all tensors with what lies between them."""
        return sum(map(self._padded, self.tensors))

    @property
    def output_bytes(self) -> int:
        """Size of what the program writes."""
        return self.data_bytes + _COSTS.size

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
        return Packets(*_COSTS.unpack_from(data, self.data_bytes))

    def _padded(self, tensor: Array) -> int:
        return -(-tensor.nbytes // self.alignment) * self.alignment


@dataclass(frozen=True)
class TimedCall(KernelCall):
    """A call of a program of `build_timed_program`.

    Attributes:
        num_outputs: the last tensors, which come back.
        reference_end: behind the last work item of the reference.
        rounds: in which both kernels are measured.
        sample_us: microseconds that a sample takes at least.
        streamed: numbers of the tensors that are weights.
        copies: of the weights; each call reads the next.
    """

    num_outputs: int = 1
    reference_end: int = 0
    rounds: int = 7
    sample_us: int = 4000
    streamed: Sequence[int] = ()
    copies: int = 1

    def encode(self) -> bytes:
        """The input of the program."""
        bits = sum(1 << number for number in self.streamed)
        fields = (self.rounds, self.sample_us, bits, self.copies)
        return self._encode(
            b"LLAMACT1", _TIMING.pack(self.reference_end, self._inputs_bytes, *fields)
        )

    @property
    def output_bytes(self) -> int:
        """Size of what the program writes."""
        return sum(map(self._padded, self._outputs)) + 16 * self.rounds

    @property
    def _outputs(self) -> Sequence[Array]:
        return self.tensors[len(self.tensors) - self.num_outputs :]

    @property
    def _inputs_bytes(self) -> int:
        return sum(map(self._padded, self.tensors[: len(self.tensors) - self.num_outputs]))

    def decode_times(self, data: bytes) -> tuple[list[Array], Array]:
        """Outputs of a call, and nanoseconds [rounds, 2] of the reference and the kernel.

        Raises:
            ValueError: the program wrote something else.
        """
        if len(data) != self.output_bytes:
            raise ValueError(f"{len(data)} bytes came back instead of {self.output_bytes}")
        call = KernelCall(self._outputs, 0, 0, alignment=self.alignment)
        times = np.frombuffer(data, np.float64, 2 * self.rounds, len(data) - 16 * self.rounds)
        return call.decode(data), times.reshape(-1, 2)


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
