"""llamac-runner, built for this machine: the protocol, its errors, and what the client makes of it.

The chain model (chain_model.c) stands for a model; its library in this process is the reference.
"""

from __future__ import annotations

import gc
import os
import signal
import struct
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Iterator
from pathlib import Path

import numpy as np
import pytest
from numpy.testing import assert_array_equal

from llamac.runtime import load
from llamac.runtime.backend import BackendModel
from llamac.runtime.errors import (
    AbiMismatch,
    BundleCorrupt,
    ContextFull,
    CpuUnsupported,
    DeviceError,
    SessionClosed,
    UsageError,
)
from llamac.runtime.manifest import Manifest
from llamac.runtime.remote import RemoteModel, RunnerProcess

PROMPT = (11, 70, 257, 3, 260, 99, 14, 15, 92, 65, 35, 89, 79, 32, 38, 46, 26, 43, 38, 32)
ARENA, KV = 1, 2


@pytest.fixture
def remote(runner: Path, bundle: Path) -> Iterator[RemoteModel]:
    """The chain model in a runner of this machine's architecture."""
    model = RemoteModel([str(runner), "--serve"], str(bundle / "weights.bin"), None)
    yield model
    model.close()


class Remote:
    """Runs bundles in a process of their own on this machine."""

    def __init__(self, runner: Path) -> None:
        self.runner = runner
        self.opened: list[RemoteModel] = []

    def check(self, bundle: Path, manifest: Manifest) -> None:
        pass

    def open(self, bundle: Path, manifest: Manifest, level: str | None) -> BackendModel:
        weights = str(bundle / manifest.file("weights"))
        self.opened.append(RemoteModel([str(self.runner), "--serve"], weights, level))
        return self.opened[-1]


# -- a model of the runtime on top of it ---------------------------------------------------------


def test_a_model_runs_in_another_process(
    bundle: Path, runner: Path, greedy_after: Callable[..., list[int]]
) -> None:
    """Sessions and generation are the same code on it, and give the same tokens."""
    machine = Remote(runner)
    with load(bundle, machine=machine, threads=2) as model:
        assert model.info.level == "portable"
        generation = model.generate(PROMPT, max_tokens=20)
        list(generation)
        assert len(generation.tokens) > 3
        assert list(generation.tokens) == greedy_after(PROMPT, len(generation.tokens))
        with model.session() as session:
            session.append(PROMPT)
            session.rewind(3)
            assert session.argmax() == greedy_after(PROMPT[:3], 1)[0]
    assert machine.opened[0].is_closed


def test_info_is_that_of_the_library(bundle: Path, remote: RemoteModel) -> None:
    """Sizes, names and lengths pass through the pipe."""
    with load(bundle) as model:
        assert remote.info == model.info


def test_a_session_has_what_a_native_one_has(
    bundle: Path, remote: RemoteModel, logits_after: Callable[..., np.ndarray]
) -> None:
    """Every method gives what the library in this process gives."""
    with load(bundle) as model:
        for session in (model.native.open_session(2, ()), remote.open_session(2, ())):
            session.eval(np.array(PROMPT, np.int32))
            assert session.position() == len(PROMPT)
            assert_array_equal(session.logits(), logits_after(PROMPT))
            assert session.argmax() == logits_after(PROMPT).argmax()
            session.rewind(5)
            session.profile(True)
            session.eval(np.array(PROMPT[5:7], np.int32))
            assert_array_equal(session.logits(), logits_after(PROMPT[:7]))
            assert len(session.step_ns("prefill_4")) == 3
            assert len(session.step_ns("nothing")) == 0
            session.profile(False)
            state = session.read_memory(KV, 0, 7 * 8)
            assert len(state) == 56 and state != bytes(56)
            # The steps of decode alone: tokens, then position and last token of the chunk.
            session.write_memory(ARENA, 128, struct.pack("<i", PROMPT[7]))
            session.write_memory(ARENA, 192, struct.pack("<ii", 7, 0))
            session.run_steps("decode", 0, 2)
            values = np.frombuffer(session.read_memory(ARENA, 256, 288 * 4), np.float32)
            assert_array_equal(values, logits_after(PROMPT[:8]))
            assert session.read_memory(ARENA, 0, 0) == b""


def test_sessions_are_apart_and_can_be_closed(
    remote: RemoteModel, logits_after: Callable[..., np.ndarray]
) -> None:
    """More are opened one after the other than fit at once; those that are dropped make room."""
    first = remote.open_session(1, ())
    first.eval(np.array([1, 2], np.int32))
    for token in range(100):
        other = remote.open_session(1, ())
        other.eval(np.array([token], np.int32))
        other.close()
        other.close()
        assert other.is_closed
    assert_array_equal(first.logits(), logits_after([1, 2]))
    with pytest.raises(SessionClosed):
        other.position()


def test_memory_goes_in_pieces(remote: RemoteModel, monkeypatch: pytest.MonkeyPatch) -> None:
    """A part that is longer than one request may be."""
    monkeypatch.setattr("llamac.runtime.remote._PIECE_BYTES", 100)
    session = remote.open_session(1, ())
    data = np.random.default_rng(0).bytes(890)
    session.write_memory(KV, 3, data)
    assert session.read_memory(KV, 0, 896) == bytes(3) + data + bytes(3)


def test_threads_may_share_a_model(
    remote: RemoteModel, logits_after: Callable[..., np.ndarray]
) -> None:
    """Requests do not get mixed up."""
    wrong: list[int] = []

    def work(token: int) -> None:
        session = remote.open_session(1, ())
        for _ in range(50):
            session.rewind(0)
            session.eval(np.array([token], np.int32))
            if session.argmax() != logits_after([token]).argmax():
                wrong.append(token)

    threads = [threading.Thread(target=work, args=(token,)) for token in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert not wrong


# -- errors that travel --------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("call", "error"),
    [
        (lambda s: s.eval(np.zeros(0, np.int32)), UsageError),
        (lambda s: s.eval(np.array([288], np.int32)), UsageError),
        (lambda s: s.eval(np.zeros(97, np.int32)), ContextFull),
        (lambda s: s.eval(np.array([255], np.int32)), DeviceError),
        (lambda s: s.logits(), DeviceError),
        (lambda s: s.rewind(1), UsageError),
        (lambda s: s.run_steps("decode", 2, 2), UsageError),
        (lambda s: s.run_steps("nothing", 0, 1), UsageError),
        (lambda s: s.read_memory(KV, 890, 7), UsageError),
        (lambda s: s.read_memory(KV, 1 << 63, 7), UsageError),
        (lambda s: s.read_memory(3, 0, 1), UsageError),
        (lambda s: s.read_memory(-1, 0, 1), UsageError),
        (lambda s: s.write_memory(ARENA, 4090, b"too long"), UsageError),
        (lambda s: s.write_memory(0, 0, b"x"), UsageError),
    ],
)
def test_errors_have_the_class_of_their_status(
    remote: RemoteModel, call: Callable, error: type[Exception]
) -> None:
    """A refused call leaves the session as it was, here and in a native one."""
    session = remote.open_session(1, ())
    with pytest.raises(error) as info:
        call(session)
    assert info.value.cause and info.value.fix  # type: ignore[attr-defined]
    session.eval(np.array([7], np.int32))
    assert session.position() == 1


def test_errors_while_opening(runner: Path, bundle: Path, tmp_path: Path) -> None:
    """Weights that are missing or others, a level that is unknown or that this CPU cannot run."""
    command, weights = [str(runner), "--serve"], str(bundle / "weights.bin")
    other = tmp_path / "other.bin"
    other.write_bytes(b"x" * 8192)
    with pytest.raises(BundleCorrupt, match="cannot open"):
        RemoteModel(command, str(tmp_path / "none"), None)
    with pytest.raises(BundleCorrupt, match="not a llamac weights file"):
        RemoteModel(command, str(other), None)
    with pytest.raises(UsageError, match="no level named 'best'"):
        RemoteModel(command, weights, "best")
    with pytest.raises(CpuUnsupported, match="lacks sme"):
        RemoteModel(command, weights, "foreign")
    with pytest.raises(UsageError):
        RemoteModel(command, weights, None).open_session(65, ())


def test_a_program_that_is_no_runner(tmp_path: Path) -> None:
    """It is not there, says nothing, says something else, or speaks another version."""
    with pytest.raises(DeviceError, match="cannot be started"):
        RemoteModel([str(tmp_path / "none")], "", None)
    with pytest.raises(DeviceError, match="ended with code 1") as info:
        RemoteModel([sys.executable, "-c", "import sys; sys.exit('so it is')"], "", None)
    assert "so it is" in info.value.cause
    with pytest.raises(DeviceError):
        RemoteModel(["yes", "no reply"], "", None)
    hello = struct.pack("<IIQIIQ", 0, 0, 16, 99, 1, 0)
    program = f"import sys; sys.stdin.buffer.read(1); sys.stdout.buffer.write({hello!r})"
    with pytest.raises(AbiMismatch, match="protocol 99"):
        RemoteModel([sys.executable, "-c", program], "", None)


# -- the end of the process ----------------------------------------------------------------------


def is_running(pid: int) -> bool:
    try:
        os.kill(pid, 0)
    except ProcessLookupError:
        return False
    return True


def test_closing_ends_the_process(remote: RemoteModel) -> None:
    """Its input ends, so it does; sessions are closed with it."""
    session = remote.open_session(2, ())
    remote.close()
    remote.close()
    assert not is_running(remote.process.pid)
    assert session.is_closed and remote.is_closed
    with pytest.raises(SessionClosed):
        session.position()
    with pytest.raises(SessionClosed):
        remote.open_session(1, ())


def test_a_process_that_dies_is_an_error_with_its_cause(remote: RemoteModel) -> None:
    """The next call says how it ended; then the model is closed."""
    session = remote.open_session(1, ())
    os.kill(remote.process.pid, signal.SIGILL)
    with pytest.raises(DeviceError, match="was ended by SIGILL") as info:
        session.eval(np.array([1], np.int32))
    assert "another level" in info.value.fix
    assert session.is_closed and remote.is_closed


def test_an_interrupted_call_leaves_no_process(
    runner: Path, bundle: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Ctrl-C during an evaluation ends the runner; the session says that it is closed."""
    machine = Remote(runner)
    model = load(bundle, machine=machine)
    session = model.session()
    session.append([1])

    def interrupt(*arguments: object) -> None:
        raise KeyboardInterrupt

    monkeypatch.setattr(RunnerProcess, "_read", interrupt)
    with pytest.raises(KeyboardInterrupt):
        session.append([2])
    assert not is_running(machine.opened[0].process.pid)
    assert session.is_closed
    model.close()


def test_a_forgotten_model_ends_its_process(runner: Path, bundle: Path) -> None:
    """The garbage collector does what close() was not asked to."""
    model = RemoteModel([str(runner), "--serve"], str(bundle / "weights.bin"), None)
    pid = model.process.pid
    del model
    assert not is_running(pid)


def test_an_interrupt_while_a_runner_starts_leaves_no_process(
    runner: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Ctrl-C may come before the new process is known to anybody."""
    started = []

    class Interrupted(subprocess.Popen[bytes]):
        def __init__(self, *args: object, **options: object) -> None:
            super().__init__(*args, **options)  # type: ignore[call-overload]
            started.append(self.pid)
            signal.raise_signal(signal.SIGINT)

    monkeypatch.setattr(subprocess, "Popen", Interrupted)
    with pytest.raises(KeyboardInterrupt):
        RunnerProcess([str(runner), "--serve"])
    gc.collect()
    assert len(started) == 1
    assert not is_running(started[0])


def test_a_runner_ends_with_its_client(runner: Path, bundle: Path) -> None:
    """A Python that is killed leaves no process behind."""
    program = (
        "from llamac.runtime.remote import RemoteModel; import time; "
        f"m = RemoteModel([{str(runner)!r}, '--serve'], {str(bundle / 'weights.bin')!r}, None); "
        "print(m.process.pid, flush=True); time.sleep(60)"
    )
    client = subprocess.Popen([sys.executable, "-c", program], stdout=subprocess.PIPE)
    assert client.stdout is not None
    pid = int(client.stdout.readline())
    client.kill()
    client.communicate()
    deadline = time.monotonic() + 10
    while is_running(pid) and time.monotonic() < deadline:
        time.sleep(0.01)
    assert not is_running(pid)
