"""Builds the support library with a fake program and calls it through plain ctypes."""

from __future__ import annotations

import ctypes
import platform
import struct
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from ctypes import (
    POINTER,
    byref,
    c_char,
    c_char_p,
    c_double,
    c_float,
    c_int,
    c_int32,
    c_uint32,
    c_uint64,
    c_void_p,
)
from pathlib import Path

import numpy as np
import pytest
from numpy.typing import NDArray

import llamac.runtime
from llamac.targets.toolchain import find_toolchain, link_shared

VOCAB, DIM, CONTEXT, MAX_CHUNK = 32, 16, 20, 8
HEADER_BYTES, BUILD_ID = 4096, b"0123456789abcdef0123456789abcde\0"
STATUSES = ("OK", "ARGUMENT", "IO", "WEIGHTS", "CPU", "MEMORY", "CONTEXT", "KERNEL", "THREAD")
OK = 0
WEIGHTS_SPACE, ARENA_SPACE, KV_SPACE = range(3)
LOG_OFFSET, LOG_ENTRIES = 576, 64

HOST = f"{platform.machine()}-linux-gnu.2.34"
C_SOURCES = Path(llamac.runtime.__file__).parent / "c"
FAKE_PROGRAM = Path(__file__).with_name("fake_program.c")


class Error(ctypes.Structure):
    _fields_ = (("status", c_int), ("message", c_char * 256))


class Info(ctypes.Structure):
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


class Options(ctypes.Structure):
    _fields_ = (
        ("struct_bytes", c_uint32),
        ("num_threads", c_int32),
        ("cpus", POINTER(c_int32)),
        ("num_cpus", c_int32),
        ("spin_us", c_int32),
    )


class Failed(Exception):
    """A call returned a status other than OK."""

    def __init__(self, status: int, message: str) -> None:
        super().__init__(f"{status}: {message}")
        self.status = status
        self.message = message


def load_library(path: Path) -> ctypes.CDLL:
    """The library with the types of its functions."""
    lib = ctypes.CDLL(str(path))
    error = POINTER(Error)
    signatures = {
        "abi_version": (c_uint32,),
        "model_open": (c_int, c_char_p, c_char_p, POINTER(c_void_p), error),
        "model_close": (None, c_void_p),
        "model_info": (c_int, c_void_p, POINTER(Info)),
        "session_create": (c_int, c_void_p, POINTER(Options), POINTER(c_void_p), error),
        "session_destroy": (None, c_void_p),
        "session_eval": (c_int, c_void_p, POINTER(c_int32), c_int32, error),
        "session_logits": (POINTER(c_float), c_void_p),
        "session_argmax": (c_int32, c_void_p),
        "session_position": (c_int32, c_void_p),
        "session_rewind": (c_int, c_void_p, c_int32, error),
        "session_run_steps": (c_int, c_void_p, c_char_p, c_uint32, c_uint32, error),
        "session_memory": (c_void_p, c_void_p, c_int32),
        "session_profile": (c_int, c_void_p, c_int),
        "session_step_ns": (POINTER(c_uint64), c_void_p, c_char_p, POINTER(c_uint32)),
        "read_bandwidth": (c_double, c_int32, c_uint64, c_int32, POINTER(c_int32), c_int32),
    }
    for name, (result, *arguments) in signatures.items():
        function = getattr(lib, f"llamac_{name}")
        function.restype, function.argtypes = result, arguments
    return lib


class Session:
    """A session of the fake model that raises Failed."""

    def __init__(self, lib: ctypes.CDLL, model: c_void_p, options: Options | None) -> None:
        self.lib, self.handle = lib, c_void_p()
        error = Error()
        given = byref(options) if options is not None else None
        _check(lib.llamac_session_create(model, given, byref(self.handle), byref(error)), error)

    def eval(self, tokens: Sequence[int]) -> NDArray[np.float32]:
        array, error = (c_int32 * len(tokens))(*tokens), Error()
        _check(self.lib.llamac_session_eval(self.handle, array, len(tokens), byref(error)), error)
        return self.logits()

    def logits(self) -> NDArray[np.float32]:
        pointer = self.lib.llamac_session_logits(self.handle)
        return np.ctypeslib.as_array(pointer, (VOCAB,)).copy()

    @property
    def has_logits(self) -> bool:
        return bool(self.lib.llamac_session_logits(self.handle))

    @property
    def argmax(self) -> int:
        return int(self.lib.llamac_session_argmax(self.handle))

    @property
    def position(self) -> int:
        return int(self.lib.llamac_session_position(self.handle))

    def rewind(self, position: int) -> None:
        error = Error()
        _check(self.lib.llamac_session_rewind(self.handle, position, byref(error)), error)

    def run_steps(self, function: str, first: int, count: int) -> None:
        error = Error()
        name = function.encode()
        _check(
            self.lib.llamac_session_run_steps(self.handle, name, first, count, byref(error)), error
        )

    def memory(self, space: int, offset: int, shape: tuple[int, ...], ctype: type) -> NDArray:
        base = self.lib.llamac_session_memory(self.handle, space)
        return np.ctypeslib.as_array(ctypes.cast(base + offset, POINTER(ctype)), shape)

    def log(self) -> NDArray[np.int32]:
        """The log of the kernels `trace` and `argmax`; see fake_program.c."""
        return self.memory(ARENA_SPACE, LOG_OFFSET, (LOG_ENTRIES,), c_int32)

    def take_chunks(self) -> list[tuple[int, int, int]]:
        """(chunk length, position, last valid index) of the chunks since the last call."""
        log = self.log()
        count, log[0] = int(log[0]), 0
        return [tuple(map(int, row)) for row in log[1 : 1 + 3 * count].reshape(-1, 3)]

    def step_ns(self, function: str) -> NDArray[np.uint64] | None:
        count = c_uint32(99)
        times = self.lib.llamac_session_step_ns(self.handle, function.encode(), byref(count))
        if not times:
            assert count.value == 0
            return None
        return np.ctypeslib.as_array(times, (count.value,)).copy()

    def close(self) -> None:
        self.lib.llamac_session_destroy(self.handle)


class FakeModel:
    """The built library, its weights and what it must compute."""

    host = HOST
    c_sources = C_SOURCES
    sources = (FAKE_PROGRAM, *sorted(C_SOURCES.glob("*.c")))

    def __init__(self, library: Path, weights: Path) -> None:
        self.library, self.weights_path = library, weights
        self.lib = load_library(library)
        rng = np.random.default_rng(7)
        self.table = rng.integers(-4, 5, (VOCAB, DIM)).astype(np.float32)
        self.bias = rng.integers(-4, 5, DIM).astype(np.float32)

    def weights_bytes(self, **changes: object) -> bytes:
        """The content of weights.bin, with other header fields if wanted."""
        body = self.table.tobytes() + self.bias.tobytes()
        fields = {
            "magic": b"LLAMACWT",
            "version": 1,
            "header_bytes": HEADER_BYTES,
            "build_id": BUILD_ID,
            "file_bytes": HEADER_BYTES + len(body),
        } | changes
        return struct.pack("<8sII32sQ", *fields.values()).ljust(HEADER_BYTES, b"\0") + body

    def open(self, weights: Path | None = None, level: str | None = None) -> c_void_p:
        model, error = c_void_p(), Error()
        name = level.encode() if level is not None else None
        path = str(weights or self.weights_path).encode()
        _check(self.lib.llamac_model_open(path, name, byref(model), byref(error)), error)
        return model

    @contextmanager
    def fails(self, status: str, match: str) -> Iterator[None]:
        """Expect the status and a message in which the pattern is found."""
        with pytest.raises(Failed, match=match) as caught:
            yield
        assert STATUSES[caught.value.status] == status

    def info(self, model: c_void_p) -> Info:
        info = Info(struct_bytes=ctypes.sizeof(Info))
        assert self.lib.llamac_model_info(model, byref(info)) == OK
        return info

    def session(
        self,
        model: c_void_p,
        num_threads: int = 1,
        cpus: Sequence[int] = (),
        spin_us: int = 0,
    ) -> Session:
        array = (c_int32 * len(cpus))(*cpus)
        size = ctypes.sizeof(Options)
        options = Options(size, num_threads, array, len(cpus), spin_us)
        return Session(self.lib, model, options)

    def expected(self, tokens: Sequence[int]) -> NDArray[np.float32]:
        """Logits after the tokens, by NumPy."""
        rows = self.table[list(tokens)] + self.bias
        factors = np.arange(len(tokens)) % 3 + 1
        return np.float32(2) * (self.table @ (factors.astype(np.float32) @ rows))


def _check(status: int, error: Error) -> None:
    if status != OK:
        assert error.status == status
        raise Failed(status, error.message.decode())


@pytest.fixture(scope="session")
def c_sources() -> Path:
    """The folder of the support library."""
    return C_SOURCES


@pytest.fixture(scope="session")
def link_fake(tmp_path_factory: pytest.TempPathFactory) -> Callable[..., Path]:
    """Link libmodel.so of the fake model, with more flags for the compiler if wanted."""

    def link(*cflags: str) -> Path:
        out = tmp_path_factory.mktemp("fake") / "libmodel.so"
        link_shared(
            find_toolchain(),
            sources=FakeModel.sources,
            objects=[],
            include_dirs=[C_SOURCES],
            out=out,
            target=HOST,
            soname="libmodel.so",
            cflags=("-Wall", "-Wextra", "-Werror", *cflags),
        )
        return out

    return link


@pytest.fixture(scope="session")
def fake_library(link_fake: Callable[..., Path]) -> Path:
    """libmodel.so of the fake model."""
    return link_fake()


@pytest.fixture(scope="session")
def fake(fake_library: Path) -> FakeModel:
    """The fake model with its weights on disk."""
    fake = FakeModel(fake_library, fake_library.with_name("weights.bin"))
    fake.weights_path.write_bytes(fake.weights_bytes())
    return fake


@pytest.fixture
def model(fake: FakeModel) -> Iterator[c_void_p]:
    """The opened fake model."""
    model = fake.open()
    yield model
    fake.lib.llamac_model_close(model)
