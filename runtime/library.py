"""The C interface of a bundle's library (`runtime/c/llamac.h`), bound with ctypes.

This is the only module that knows about C. ctypes releases the interpreter lock during each call.
Handles are released by `close`, and by the garbage collector for owners who forgot it.
"""

from __future__ import annotations

import ctypes
import os
import threading
import weakref
from collections.abc import Sequence
from ctypes import (
    POINTER,
    byref,
    c_char_p,
    c_double,
    c_float,
    c_int32,
    c_uint32,
    c_uint64,
    c_void_p,
)
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from llamac.runtime import system
from llamac.runtime.errors import AbiMismatch, BundleInvalid, SessionClosed
from llamac.runtime.manifest import ABI_VERSION
from llamac.runtime.status import error_of_status

__all__ = [
    "MAX_THREADS",
    "Library",
    "NativeInfo",
    "NativeModel",
    "NativeSession",
    "open_library",
]

MAX_THREADS = 64

_MACHINE_FIELD = slice(18, 20)  # of an ELF file: e_machine
_ELF_MACHINES = {62: "x86_64", 183: "aarch64"}


class _Error(ctypes.Structure):
    _fields_ = (("status", ctypes.c_int), ("message", ctypes.c_char * 256))


class _ModelInfo(ctypes.Structure):
    _fields_ = (
        ("struct_bytes", c_uint32),
        ("vocab_size", c_int32),
        ("context_length", c_int32),
        ("max_chunk", c_int32),
        ("weights_bytes", c_uint64),
        ("kv_bytes", c_uint64),
        ("arena_bytes", c_uint64),
        ("model_name", c_char_p),
        ("level", c_char_p),
    )


class _SessionOptions(ctypes.Structure):
    _fields_ = (
        ("struct_bytes", c_uint32),
        ("num_threads", c_int32),
        ("cpus", POINTER(c_int32)),
        ("num_cpus", c_int32),
        ("spin_us", c_int32),
    )


_I32S, _ERROR = POINTER(c_int32), POINTER(_Error)
# Result and arguments of every function; those that return "status" take an error last.
_PROTOTYPES: dict[str, tuple[Any, tuple[Any, ...]]] = {
    "llamac_abi_version": (c_uint32, ()),
    "llamac_model_open": ("status", (c_char_p, c_char_p, POINTER(c_void_p))),
    "llamac_model_close": (None, (c_void_p,)),
    "llamac_model_adapt": ("status", (c_void_p, c_char_p)),
    "llamac_model_info": (c_int32, (c_void_p, POINTER(_ModelInfo))),
    "llamac_session_create": ("status", (c_void_p, POINTER(_SessionOptions), POINTER(c_void_p))),
    "llamac_session_destroy": (None, (c_void_p,)),
    "llamac_session_eval": ("status", (c_void_p, _I32S, c_int32)),
    "llamac_session_logits": (POINTER(c_float), (c_void_p,)),
    "llamac_session_argmax": (c_int32, (c_void_p,)),
    "llamac_session_position": (c_int32, (c_void_p,)),
    "llamac_session_rewind": ("status", (c_void_p, c_int32)),
    "llamac_session_run_steps": ("status", (c_void_p, c_char_p, c_uint32, c_uint32)),
    "llamac_session_memory": (c_void_p, (c_void_p, c_int32)),
    "llamac_session_profile": (c_int32, (c_void_p, c_int32)),
    "llamac_session_step_ns": (POINTER(c_uint64), (c_void_p, c_char_p, POINTER(c_uint32))),
    "llamac_read_bandwidth": (c_double, (c_int32, c_uint64, c_int32, _I32S, c_int32)),
}
# What libraries of earlier versions lack.
_YOUNGER = ("llamac_model_adapt",)


@dataclass(frozen=True)
class NativeInfo:
    """What a library says about its model; sizes in bytes, lengths in tokens."""

    vocab_size: int
    context_length: int
    max_chunk: int
    weights_bytes: int
    kv_bytes: int
    arena_bytes: int
    model_name: str
    level: str


class Library:
    """A loaded library of a bundle. Loading runs code: load only bundles that you trust.

    Raises:
        BundleInvalid: the system's loader refuses the file.
        AbiMismatch: the library speaks another version of the interface.
    """

    def __init__(self, path: Path) -> None:
        try:
            self._functions = ctypes.CDLL(str(path.resolve()))
        except OSError as error:
            raise BundleInvalid(
                f"the library {path} cannot be loaded: {_foreign_code(path) or error}",
                cause="it was built for another system, or lies where programs may not run",
                fix="compile for this system; move the bundle to a folder that allows programs",
            ) from error
        try:
            self._check_version(self._functions.llamac_abi_version())
            for name, (result, arguments) in _PROTOTYPES.items():
                function = getattr(self._functions, name, None)
                if function is None and name in _YOUNGER:
                    continue
                if function is None:
                    raise AttributeError(name)
                has_error = result == "status"
                function.restype = c_int32 if has_error else result
                function.argtypes = (*arguments, _ERROR) if has_error else arguments
        except AttributeError as error:
            raise _abi_mismatch(f"the library lacks a function: {error}", is_newer=False) from error

    def has(self, name: str) -> bool:
        """Whether the library has a function; those of an earlier version lack some."""
        return hasattr(self._functions, name)

    @staticmethod
    def _check_version(version: int) -> None:
        if version != ABI_VERSION:
            raise _abi_mismatch(
                f"the library has ABI version {version}, this runtime {ABI_VERSION}",
                is_newer=version > ABI_VERSION,
            )

    def call(self, name: str, *arguments: object) -> None:
        """Call a function that returns a status.

        Raises:
            LlamacError: of the class that belongs to the status.
        """
        error = _Error()
        status = getattr(self._functions, name)(*arguments, byref(error))
        if status != 0:
            raise error_of_status(status, error.message.decode("utf-8", "replace"))

    def value(self, name: str, *arguments: object) -> Any:
        """Call a function that cannot fail and return its result."""
        return getattr(self._functions, name)(*arguments)

    def read_bandwidth(
        self, threads: int, num_bytes: int, seconds: float, cpus: Sequence[int] = ()
    ) -> float:
        """Return the measured read bandwidth of this machine in 1e9 bytes per second.

        Args:
            threads: how many read at the same time.
            num_bytes: size of the buffer, several times the last level of cache.
            seconds: how long to measure, in steps of a tenth.
            cpus: one CPU for each thread; empty lets them move.
        """
        tenths = max(1, round(10 * seconds))
        array = (c_int32 * len(cpus))(*cpus)
        result = self.value(
            "llamac_read_bandwidth", threads, num_bytes, tenths, array if cpus else None, len(cpus)
        )
        return float(result)


def _foreign_code(path: Path) -> str:
    """Say whose code an ELF file holds if not this process's; glibc says "no such file" then."""
    with path.open("rb") as file:
        header = file.read(_MACHINE_FIELD.stop)
    machine = int.from_bytes(header[_MACHINE_FIELD], "little")
    name = _ELF_MACHINES.get(machine, f"ELF machine {machine}")
    if not header.startswith(b"\x7fELF") or name == system.machine():
        return ""
    return f"it holds code for {name}, this process runs code for {system.machine()}"


def _abi_mismatch(message: str, *, is_newer: bool) -> AbiMismatch:
    return AbiMismatch(
        message,
        cause="bundle and runtime come from different versions of llamac",
        fix="update llamac on this machine" if is_newer else "compile the model again",
    )


class NativeModel:
    """An open model: mapped weights and the kernels chosen for this CPU."""

    def __init__(self, library: Library, weights: Path, level: str | None) -> None:
        handle = c_void_p()
        name = None if level is None else level.encode()
        library.call("llamac_model_open", os.fsencode(weights), name, byref(handle))
        self.library = library
        self.handle = handle
        self._release = weakref.finalize(self, library.value, "llamac_model_close", handle)
        info = _ModelInfo(struct_bytes=ctypes.sizeof(_ModelInfo))
        library.value("llamac_model_info", handle, byref(info))
        self.info = NativeInfo(
            info.vocab_size,
            info.context_length,
            info.max_chunk,
            info.weights_bytes,
            info.kv_bytes,
            info.arena_bytes,
            info.model_name.decode("utf-8", "replace"),
            info.level.decode("utf-8", "replace"),
        )

    def open_session(self, threads: int, cpus: Sequence[int]) -> NativeSession:
        """Open a session; without CPUs its threads may move."""
        return NativeSession(self, threads, cpus)

    def adapt(self, path: Path | None) -> None:
        """Take an adapter's values for some of the weights; None: the bundle's own again.

        Raises:
            BundleInvalid: the file is damaged, or for another bundle.
            AbiMismatch: the library is of a version that cannot exchange adapters.
        """
        if not self.library.has("llamac_model_adapt"):
            raise _abi_mismatch("the library cannot exchange adapters", is_newer=False)
        name = None if path is None else os.fsencode(path)
        self.library.call("llamac_model_adapt", self.handle, name)

    @property
    def is_closed(self) -> bool:
        """Whether the model was closed."""
        return not self._release.alive

    def close(self) -> None:
        """Unmap the weights as soon as no session uses them; more calls do nothing."""
        self._release()


def open_library(library: Path, weights: Path, level: str | None) -> NativeModel:
    """Load a library and open its weights, with the kernels of a level or the best ones."""
    return NativeModel(Library(library), weights, level)


class NativeSession:
    """An open session: KV cache, arena and threads.

    A lock orders calls from several threads, so that `close` waits for a running evaluation.
    """

    def __init__(self, model: NativeModel, threads: int, cpus: Sequence[int]) -> None:
        handle = c_void_p()
        array = (c_int32 * len(cpus))(*cpus)
        options = _SessionOptions(
            struct_bytes=ctypes.sizeof(_SessionOptions),
            num_threads=threads,
            cpus=ctypes.cast(array, _I32S) if cpus else None,
            num_cpus=len(cpus),
        )
        model.library.call("llamac_session_create", model.handle, byref(options), byref(handle))
        self._library = model.library
        info = model.info
        self._vocab_size = info.vocab_size
        self._space_bytes = (info.weights_bytes, info.arena_bytes, info.kv_bytes)
        self._handle = handle
        self._lock = threading.RLock()
        self._release = weakref.finalize(
            self, model.library.value, "llamac_session_destroy", handle
        )

    @property
    def is_closed(self) -> bool:
        """Whether the session was closed."""
        return not self._release.alive

    def close(self) -> None:
        """Stop the threads and free the memory; more calls do nothing."""
        with self._lock:
            self._release()

    def _call(self, name: str, *arguments: object) -> None:
        with self._lock:
            self._library.call(name, self._open_handle(), *arguments)

    def _value(self, name: str, *arguments: object) -> Any:
        with self._lock:
            return self._library.value(name, self._open_handle(), *arguments)

    def _open_handle(self) -> c_void_p:
        if self.is_closed:
            raise SessionClosed(
                "the session is closed",
                cause="close() was called for it or for its model, or its with block ended",
                fix="open a new session, and use it inside the with block of its model",
            )
        return self._handle

    def eval(self, tokens: NDArray[np.int32]) -> None:
        """Append tokens, at least one, and compute the logits of the last."""
        data = np.ascontiguousarray(tokens, dtype=np.int32)
        self._call("llamac_session_eval", data.ctypes.data_as(_I32S), len(data))

    def logits(self) -> NDArray[np.float32]:
        """Return a copy of the logits (vocab) of the last evaluated token.

        Raises:
            DeviceError: nothing was evaluated.
        """
        with self._lock:
            pointer = self._value("llamac_session_logits")
            if not pointer:
                raise error_of_status(7, "the library has no logits")
            return np.ctypeslib.as_array(pointer, (self._vocab_size,)).copy()

    def argmax(self) -> int:
        """Return the token with the highest logit."""
        return int(self._value("llamac_session_argmax"))

    def position(self) -> int:
        """Return the number of tokens in the KV cache."""
        return int(self._value("llamac_session_position"))

    def rewind(self, position: int) -> None:
        """Forget all tokens from `position` on."""
        self._call("llamac_session_rewind", position)

    def run_steps(self, function: str, first: int, count: int) -> None:
        """Run some steps of a compiled function on the memory as it is (for verification)."""
        self._call("llamac_session_run_steps", function.encode(), first, count)

    def read_memory(self, space: int, offset: int, num_bytes: int) -> bytes:
        """Return a copy of a part of a space: 0 weights, 1 arena, 2 KV (for verification).

        Raises:
            UsageError: the part is not inside the space.
        """
        with self._lock:
            return ctypes.string_at(self._place(space, offset, num_bytes), num_bytes)

    def write_memory(self, space: int, offset: int, data: bytes) -> None:
        """Replace a part of the arena or of the KV cache (for verification).

        Raises:
            UsageError: the part is not inside the space, or the space is read-only.
        """
        if space == 0:
            raise error_of_status(1, "the weights cannot be written")
        with self._lock:
            ctypes.memmove(self._place(space, offset, len(data)), data, len(data))

    def _place(self, space: int, offset: int, num_bytes: int) -> int:
        """Address of a part of a space, inside which it must lie."""
        size = self._space_bytes[space] if 0 <= space < len(self._space_bytes) else -1
        if not (0 <= offset <= size and 0 <= num_bytes <= size - offset):
            raise error_of_status(1, f"bytes {offset} to {offset + num_bytes} of space {space}")
        return int(self._value("llamac_session_memory", space)) + offset

    def profile(self, enable: bool) -> None:
        """Start or stop measuring how long each step takes."""
        status = self._value("llamac_session_profile", int(enable))
        if status != 0:
            raise error_of_status(status, "profiling cannot be switched")

    def step_ns(self, function: str) -> NDArray[np.uint64]:
        """Return the nanoseconds spent in each step of a function since profiling started."""
        count = c_uint32()
        with self._lock:
            times = self._value("llamac_session_step_ns", function.encode(), byref(count))
            if not times:
                return np.zeros(0, np.uint64)
            return np.ctypeslib.as_array(times, (count.value,)).copy()
