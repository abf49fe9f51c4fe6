"""A model in another process: llamac-runner, on this machine, under an emulator or on a device.

    command ──▶ process of llamac-runner ◀── requests over a pipe ── RemoteModel, RemoteSession

The protocol is described in `runtime/c/runner/serve.c`, the program's side of it. A process that
dies, and a call that is interrupted, close the model: nothing could tell what was computed.
"""

from __future__ import annotations

import signal
import struct
import subprocess
import tempfile
import threading
import weakref
from collections import deque
from collections.abc import Callable, Sequence
from enum import IntEnum
from typing import IO, cast

import numpy as np
from numpy.typing import NDArray

from llamac.runtime.errors import AbiMismatch, DeviceError, SessionClosed
from llamac.runtime.library import NativeInfo
from llamac.runtime.manifest import ABI_VERSION
from llamac.runtime.status import error_of_status
from llamac.runtime.system import interrupts_later

__all__ = ["Operation", "RemoteModel", "RemoteSession", "RunnerProcess"]

PROTOCOL_VERSION = 1

_FRAME = struct.Struct("<IIQ")
_HELLO = struct.Struct("<IIQ")
_INFO = struct.Struct("<iii4xQQQ")
_RANGE = struct.Struct("<I4xQQ")
_STEPS = struct.Struct("<II")
_NUMBER = struct.Struct("<i")

# Memory is moved in pieces; no reply is longer than the largest of them or logits are.
_PIECE_BYTES = 16 << 20
_MAX_REPLY_BYTES = 64 << 20
_SECONDS_TO_END = 10.0
_LAST_LINES = 8


class Operation(IntEnum):
    """What a request asks for."""

    HELLO = 1
    OPEN = 2
    CREATE = 3
    DESTROY = 4
    EVAL = 5
    LOGITS = 6
    ARGMAX = 7
    POSITION = 8
    REWIND = 9
    RUN_STEPS = 10
    READ = 11
    WRITE = 12
    PROFILE = 13
    STEP_NS = 14


class RunnerProcess:
    """A running llamac-runner; requests from several threads are answered one after the other.

    Args:
        command: how to start it so that it serves, for example under an emulator.

    Raises:
        DeviceError: it cannot be started.
    """

    def __init__(self, command: Sequence[str]) -> None:
        self._lock = threading.RLock()
        # Not a pipe: nobody reads it while the program runs, and a full one would stop it.
        self._errors = tempfile.TemporaryFile()
        with interrupts_later():
            self._process = self._start(command)
            self._release = weakref.finalize(self, _end, self._process, self._errors)
        self._dropped: deque[int] = deque()

    def _start(self, command: Sequence[str]) -> subprocess.Popen[bytes]:
        try:
            # A session of its own, so that Ctrl-C reaches this program alone, which then ends it.
            return subprocess.Popen(
                command,
                stdin=subprocess.PIPE,
                stdout=subprocess.PIPE,
                stderr=self._errors,
                start_new_session=True,
            )
        except OSError as error:
            self._errors.close()
            raise DeviceError(
                f"{command[0]} cannot be started: {error.strerror}",
                cause="it is missing, or no program of this machine",
                fix="check the bundle with `llamac inspect --check`, and its folder's permissions",
            ) from error

    @property
    def pid(self) -> int:
        """Id of the process."""
        return self._process.pid

    @property
    def is_closed(self) -> bool:
        """Whether it was ended, or ended by itself."""
        return not self._release.alive

    def close(self) -> None:
        """Let it end by itself; more calls do nothing."""
        with self._lock:
            self._release()

    def drop(self, session: int) -> None:
        """Destroy a session before the next request; may be called from any place."""
        self._dropped.append(session)

    def request(self, operation: int, session: int = 0, payload: bytes = b"") -> bytearray:
        """Send a request and return the reply.

        Raises:
            LlamacError: what the program reports.
            DeviceError: the program is gone; the cause says why.
            SessionClosed: it was closed.
        """
        with self._lock:
            if self.is_closed:
                raise SessionClosed(
                    "the model is closed",
                    cause="close() was called, its with block ended, or a call was interrupted",
                    fix="load the bundle again",
                )
            try:
                while self._dropped:
                    self._exchange(Operation.DESTROY, self._dropped.popleft(), b"")
                status, answer = self._exchange(operation, session, payload)
            except (OSError, EOFError) as error:
                raise self._death() from error
            except BaseException:
                self.kill()
                raise
        if status != 0:
            raise error_of_status(status, answer.decode("utf-8", "replace"))
        return answer

    def kill(self) -> None:
        """End it at once."""
        self._process.kill()
        self._release()

    def _exchange(self, operation: int, session: int, payload: bytes) -> tuple[int, bytearray]:
        to_program = cast("IO[bytes]", self._process.stdin)
        to_program.write(_FRAME.pack(operation, session, len(payload)) + payload)
        to_program.flush()
        status, _, num_bytes = _FRAME.unpack(self._read(_FRAME.size))
        if num_bytes > _MAX_REPLY_BYTES:
            self._process.kill()  # whatever it is, it is no runner
            raise EOFError
        return status, self._read(num_bytes)

    def _read(self, num_bytes: int) -> bytearray:
        data = bytearray(num_bytes)
        from_program = cast("IO[bytes]", self._process.stdout)
        if from_program.readinto(data) != num_bytes:  # type: ignore[attr-defined]
            raise EOFError
        return data

    def _death(self) -> DeviceError:
        """End what is left, and say how the program ended and what it said."""
        try:
            code = self._process.wait(_SECONDS_TO_END)
        except subprocess.TimeoutExpired:  # it lives, but has closed its output
            self._process.kill()
            code = self._process.wait()
        self._errors.seek(0)
        said = self._errors.read().decode("utf-8", "replace").strip().splitlines()[-_LAST_LINES:]
        self._release()
        how = f"ended with code {code}"
        if code < 0:
            how = f"was ended by {signal.Signals(-code).name}"
        is_illegal = code == -signal.SIGILL
        return DeviceError(
            f"the runner {how}",
            cause="; ".join(said) or "it said nothing",
            fix="choose another level or another CPU"
            if is_illegal
            else "check the bundle with `llamac inspect --check`",
        )


def _end(process: subprocess.Popen[bytes], errors: IO[bytes]) -> None:
    """Close its input, at which it ends by itself; end it if it does not."""
    for pipe in (process.stdin, process.stdout):
        if pipe is not None:
            try:
                pipe.close()
            except OSError:  # what it has not read any more
                pass
    try:
        process.wait(_SECONDS_TO_END)
    except BaseException:
        process.kill()
        process.wait()
        raise
    finally:
        errors.close()


class RemoteModel:
    """A model that a runner has open.

    Args:
        command: starts the runner so that it serves.
        weights: path of weights.bin as the runner sees it.
        level: kernels to use; None takes the best that its CPU can run.

    Raises:
        AbiMismatch: the runner speaks another version of the protocol.
        DeviceError: it cannot be started, or dies.
        LlamacError: it refuses the weights or the level.

    Attributes:
        process: the runner.
        info: what it says about the model.
        features: names of its CPU's features.
        after_eval: called with the number of tokens after each evaluation, to show progress.
    """

    after_eval: Callable[[int], None] | None = None

    def __init__(self, command: Sequence[str], weights: str, level: str | None) -> None:
        self.process = RunnerProcess(command)
        try:
            self.features = self._hello()
            self.info = self._open(weights, level)
        except BaseException:
            self.process.close()
            raise

    def _hello(self) -> tuple[str, ...]:
        """Compare versions; return the names of the CPU's features."""
        answer = self.process.request(Operation.HELLO)
        protocol, abi, _ = _HELLO.unpack_from(answer) if len(answer) >= _HELLO.size else (0, 0, 0)
        if (protocol, abi) != (PROTOCOL_VERSION, ABI_VERSION):
            raise AbiMismatch(
                f"the runner speaks protocol {protocol} and ABI version {abi}, this runtime "
                f"{PROTOCOL_VERSION} and {ABI_VERSION}",
                cause="bundle and runtime come from different versions of llamac",
                fix="compile the model again",
            )
        return tuple(answer[_HELLO.size :].decode("utf-8", "replace").split())

    def _open(self, weights: str, level: str | None) -> NativeInfo:
        payload = f"{level or ''}\0{weights}".encode("utf-8", "surrogateescape")
        answer = self.process.request(Operation.OPEN, payload=payload)
        vocab, context, chunk, weight_bytes, kv, arena = _INFO.unpack_from(answer)
        name, _, used = answer[_INFO.size :].decode("utf-8", "replace").partition("\0")
        return NativeInfo(vocab, context, chunk, weight_bytes, kv, arena, name, used)

    def open_session(self, threads: int, cpus: Sequence[int]) -> RemoteSession:
        """Open a session; without CPUs its threads may move."""
        return RemoteSession(self, threads, cpus)

    @property
    def is_closed(self) -> bool:
        """Whether it was closed, or its process is gone."""
        return self.process.is_closed

    def close(self) -> None:
        """End the process; more calls do nothing."""
        self.process.close()


class RemoteSession:
    """A session of a RemoteModel, with the methods of NativeSession."""

    def __init__(self, model: RemoteModel, threads: int, cpus: Sequence[int]) -> None:
        self._model = model
        self._process = model.process
        numbers = np.array([threads, *cpus], "<i4").tobytes()
        answer = self._process.request(Operation.CREATE, payload=numbers)
        (self._handle,) = _NUMBER.unpack(answer)
        self._release = weakref.finalize(self, self._process.drop, self._handle)
        self._release.atexit = False

    @property
    def is_closed(self) -> bool:
        """Whether it was closed, or its process is gone."""
        return not self._release.alive or self._process.is_closed

    def close(self) -> None:
        """Free its memory, with the next request of any session; more calls do nothing."""
        self._release()

    def _request(self, operation: Operation, payload: bytes = b"") -> bytearray:
        if not self._release.alive:
            raise SessionClosed(
                "the session is closed",
                cause="close() was called for it or for its model, or its with block ended",
                fix="open a new session, and use it inside the with block of its model",
            )
        return self._process.request(operation, self._handle, payload)

    def eval(self, tokens: NDArray[np.int32]) -> None:
        """Append tokens, at least one, and compute the logits of the last."""
        self._request(Operation.EVAL, np.asarray(tokens, "<i4").tobytes())
        if self._model.after_eval is not None:
            self._model.after_eval(len(tokens))

    def logits(self) -> NDArray[np.float32]:
        """Return a copy of the logits (vocab) of the last evaluated token."""
        return np.frombuffer(self._request(Operation.LOGITS), np.float32)

    def argmax(self) -> int:
        """Return the token with the highest logit."""
        return self._number(Operation.ARGMAX)

    def position(self) -> int:
        """Return the number of tokens in the KV cache."""
        return self._number(Operation.POSITION)

    def _number(self, operation: Operation) -> int:
        (value,) = _NUMBER.unpack(self._request(operation))
        return int(value)

    def rewind(self, position: int) -> None:
        """Forget all tokens from `position` on."""
        self._request(Operation.REWIND, _NUMBER.pack(position))

    def run_steps(self, function: str, first: int, count: int) -> None:
        """Run some steps of a compiled function on the memory as it is (for verification)."""
        self._request(Operation.RUN_STEPS, _STEPS.pack(first, count) + function.encode())

    def read_memory(self, space: int, offset: int, num_bytes: int) -> bytes:
        """Return a copy of a part of a space: 0 weights, 1 arena, 2 KV (for verification)."""
        end = offset + num_bytes
        pieces = (
            _range(space, at, min(_PIECE_BYTES, end - at))
            for at in range(offset, end, _PIECE_BYTES)
        )
        return b"".join(self._request(Operation.READ, piece) for piece in pieces)

    def write_memory(self, space: int, offset: int, data: bytes) -> None:
        """Replace a part of the arena or of the KV cache (for verification)."""
        for at in range(0, len(data), _PIECE_BYTES):
            piece = data[at : at + _PIECE_BYTES]
            self._request(Operation.WRITE, _range(space, offset + at, 0) + piece)

    def profile(self, enable: bool) -> None:
        """Start or stop measuring how long each step takes."""
        self._request(Operation.PROFILE, _NUMBER.pack(enable))

    def step_ns(self, function: str) -> NDArray[np.uint64]:
        """Return the nanoseconds spent in each step of a function since profiling started."""
        return np.frombuffer(self._request(Operation.STEP_NS, function.encode()), np.uint64)


def _range(space: int, offset: int, num_bytes: int) -> bytes:
    if min(space, offset, num_bytes) < 0:
        raise error_of_status(1, f"{num_bytes} bytes at {offset} of space {space}")
    return _RANGE.pack(space, offset, num_bytes)
