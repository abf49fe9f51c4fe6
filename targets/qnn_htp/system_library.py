"""Ask Qualcomm's libQnnSystem what a context binary holds; runs in the worker process only.

The declarations are our own: offsets of the fields that we read, in the structures that version
1.15 of the interface returns on 64-bit Linux, found by reading them back for binaries whose
content we knew. Everything that is read is checked for sense, so that another layout is an error
and not a wrong answer.
"""

from __future__ import annotations

import ctypes
from pathlib import Path
from typing import Any

SYSTEM_API = (1, 15)
"""Version of the system interface that the offsets belong to; a newer minor version appends."""

_INFO_VERSION = 3
_MAX_GRAPHS, _MAX_TENSORS, _MAX_RANK, _TENSOR_BYTES = 64, 4096, 8, 144

_DTYPES = {
    0x0032: "int32",
    0x0108: "uint8",
    0x0132: "uint32",
    0x0216: "float16",
    0x0232: "float32",
    0x0308: "int8",
    0x0316: "int16",
    0x0408: "uint8",
    0x0416: "uint16",
    0x0508: "bool8",
}
"""Qnn_DataType_t: two digits of kind, two of bits."""


class DescriptionError(Exception):
    """The library refused the binary, or answered in a form that we do not know."""


def read_binary(library: Path, binary: Path) -> dict[str, Any]:
    """Return the fields of `metadata.Metadata` as JSON types.

    Raises:
        DescriptionError: see there.
        OSError: the library or the file cannot be opened.
    """
    data = binary.read_bytes()
    functions = _functions(ctypes.CDLL(str(library)))
    create = ctypes.CFUNCTYPE(ctypes.c_uint64, ctypes.c_void_p)(functions[0])
    get_info = ctypes.CFUNCTYPE(
        ctypes.c_uint64,
        ctypes.c_void_p,
        ctypes.c_char_p,
        ctypes.c_uint64,
        ctypes.c_void_p,
        ctypes.c_void_p,
    )(functions[1])
    handle, info, size = ctypes.c_void_p(), ctypes.c_void_p(), ctypes.c_uint64()
    if code := create(ctypes.byref(handle)):
        raise DescriptionError(f"libQnnSystem: create returned {code}")
    code = get_info(handle, data, len(data), ctypes.byref(info), ctypes.byref(size))
    if code or not info.value:
        raise DescriptionError(f"libQnnSystem does not know it as a context binary (code {code})")
    # The handle is not freed: the answer lives in it, and the process ends soon.
    return _read_info(info.value, len(data))


def _functions(library: ctypes.CDLL) -> list[int]:
    """The table of the first provider: [0] create, [1] info about a binary."""
    providers, count = ctypes.c_void_p(), ctypes.c_uint32()
    get = library.QnnSystemInterface_getProviders
    get.restype = ctypes.c_uint64
    if get(ctypes.byref(providers), ctypes.byref(count)) or not count.value or not providers.value:
        raise DescriptionError("libQnnSystem has no provider")
    provider = _u64(providers.value)
    version = _u32(provider + 16), _u32(provider + 20)
    if version[0] != SYSTEM_API[0] or version[1] < SYSTEM_API[1]:
        raise DescriptionError(
            f"libQnnSystem has interface {version[0]}.{version[1]}, known is "
            f"{SYSTEM_API[0]}.{SYSTEM_API[1]}"
        )
    return [_u64(provider + 32), _u64(provider + 40)]


def _u32(address: int) -> int:
    return ctypes.c_uint32.from_address(address).value


def _u64(address: int) -> int:
    return ctypes.c_uint64.from_address(address).value


def _text(address: int) -> str:
    pointer = _u64(address)
    return ctypes.string_at(pointer).decode("utf-8", "replace") if pointer else ""


def _version(address: int) -> str:
    return ".".join(str(_u32(address + 4 * i)) for i in range(3))


def _bounded(what: str, value: int, largest: int) -> int:
    if not 0 <= value <= largest:
        raise DescriptionError(f"{value} {what}, at most {largest} expected: the layout differs")
    return value


def _read_info(info: int, file_bytes: int) -> dict[str, Any]:
    """Read the binary's description, version 3 of the structure."""
    if _u32(info) != _INFO_VERSION:
        raise DescriptionError(
            f"the description has version {_u32(info)}, known is {_INFO_VERSION}"
        )
    graphs = _bounded("graphs", _u32(info + 96), _MAX_GRAPHS)
    if graphs != 1:
        raise DescriptionError(f"{graphs} graphs; binaries of ours have one")
    hardware = _u64(info + 128)
    return {
        "backend_id": _u32(info + 8),
        "build_id": _text(info + 16),
        "core_api": _version(info + 24),
        "backend_api": _version(info + 36),
        "blob_version": _version(info + 56),
        "blob_bytes": _bounded("bytes", _u64(info + 72), file_bytes),
        "soc_model": _u32(info + 136),
        "arch": _u32(hardware + 4) if hardware else 0,
        "graph": _read_graph(_u64(info + 104)),
    }


def _read_graph(graph: int) -> dict[str, Any]:
    """Read the description of a graph, version 3 of the structure."""
    if _u32(graph) != _INFO_VERSION:
        raise DescriptionError(f"the graph has version {_u32(graph)}, known is {_INFO_VERSION}")
    blob = _u64(graph + 72) if _u64(graph + 64) >= 24 else 0
    return {
        "name": _text(graph + 8),
        "inputs": _read_tensors(_u64(graph + 24), _u32(graph + 16)),
        "outputs": _read_tensors(_u64(graph + 40), _u32(graph + 32)),
        "vtcm_bytes": _u32(blob + 16) if blob else 0,
        "optimization": _u32(blob + 20) if blob else 0,
    }


def _read_tensors(first: int, count: int) -> list[dict[str, Any]]:
    """Read an array of tensors, version 1 of the structure."""
    tensors = []
    for index in range(_bounded("tensors", count, _MAX_TENSORS)):
        tensor = first + index * _TENSOR_BYTES
        rank, dims = _bounded("dimensions", _u32(tensor + 80), _MAX_RANK), _u64(tensor + 88)
        dtype = _u32(tensor + 32)
        tensors.append(
            {
                "name": _text(tensor + 16),
                "shape": [_u32(dims + 4 * i) for i in range(rank)],
                "dtype": _DTYPES.get(dtype, f"0x{dtype:04x}"),
            }
        )
    return tensors
