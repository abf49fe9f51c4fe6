"""Compiled kernels by what they were compiled from, so that a second compilation takes seconds.

An object file is found again by the hash of everything that decides its bytes: the generators'
source, the kernel's shape, knobs and name, the instruction set, and the versions of TVM and of its
LLVM. The cache lies in `$XDG_CACHE_HOME/llamac/kernels` and may be deleted at any time;
`LLAMAC_KERNEL_CACHE=0` turns it off.
"""

from __future__ import annotations

import hashlib
import inspect
import json
import os
import shutil
from contextlib import suppress
from functools import cache
from importlib.metadata import version
from pathlib import Path

from llamac.schedules.intrin.isa import Isa
from llamac.schedules.kernel import compile_kernels
from llamac.targets.cpu.kernels import KernelSpec
from llamac.targets.toolchain import cache_folder

SWITCH = "LLAMAC_KERNEL_CACHE"
SCHEDULES = Path(inspect.getfile(Isa)).parents[1]


def compile_object(spec: KernelSpec, isa: Isa, symbol: str, out: Path) -> bool:
    """Write the object file of a level's kernel, from the cache if it is there.

    Returns:
        Whether it came from the cache.
    """
    isa = spec.isa_of(isa)
    cached = None if os.environ.get(SWITCH) == "0" else _place(spec, isa, symbol)
    if cached is not None and cached.is_file():
        shutil.copyfile(cached, out)
        return True
    data = _compile(spec, isa, symbol)
    out.write_bytes(data)
    if cached is not None:
        _keep(data, cached)
    return False


def _compile(spec: KernelSpec, isa: Isa, symbol: str) -> bytes:
    """Compile a kernel in memory: LLVM would end the process if it met a full disk."""
    module = compile_kernels({symbol: spec.make(isa, symbol)}, isa)
    with open(os.memfd_create(symbol), "rb") as file:
        module.write_to_file(f"/proc/self/fd/{file.fileno()}", "o")
        return file.read()


def _keep(data: bytes, cached: Path) -> None:
    """Put an object into the cache; a cache that cannot be written is not an error."""
    partial = cached.with_name(f"{cached.name}.{os.getpid()}.partial")
    try:
        cached.parent.mkdir(parents=True, exist_ok=True)
        partial.write_bytes(data)
        partial.replace(cached)
    except OSError:
        with suppress(OSError):
            partial.unlink()


def _place(spec: KernelSpec, isa: Isa, symbol: str) -> Path:
    key = object_key(spec, isa, symbol)
    return cache_folder() / "kernels" / key[:2] / f"{key}.o"


def object_key(spec: KernelSpec, isa: Isa, symbol: str) -> str:
    """Hash of everything that decides the bytes of a kernel, compiled for an instruction set."""
    parts = {
        "generators": generators_hash(),
        "isa": inspect.getsource(type(isa)),
        "target": isa.target,
        "family": spec.family,
        "shape": repr(spec.shape),
        "knobs": dict(spec.choice(isa).knobs),
        "symbol": symbol,
        "tvm": version("apache-tvm"),
        "tvm-ffi": version("apache-tvm-ffi"),
    }
    return hashlib.sha256(json.dumps(parts, sort_keys=True).encode()).hexdigest()


@cache
def generators_hash() -> str:
    """Hash of the source of all generators."""
    digest = hashlib.sha256()
    for path in sorted(SCHEDULES.rglob("*.py")):
        digest.update(path.read_bytes())
    return digest.hexdigest()
