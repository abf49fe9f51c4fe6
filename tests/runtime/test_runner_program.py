"""llamac-runner as a program: bytes that it must survive, and its command line for people."""

from __future__ import annotations

import struct
import subprocess
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest

from llamac.runtime import load
from llamac.runtime.remote import Operation

PROMPT = (11, 70, 257, 3, 260, 99, 14, 15, 92, 65, 35, 89, 79, 32, 38, 46, 26, 43, 38, 32)

# -- bytes that no client of ours sends ----------------------------------------------------------


def exchange(runner: Path, data: bytes) -> subprocess.CompletedProcess[bytes]:
    return subprocess.run(
        [runner, "--serve"], input=data, capture_output=True, timeout=20, check=False
    )


def frame(operation: int, payload: bytes = b"", session: int = 0) -> bytes:
    return struct.pack("<IIQ", operation, session, len(payload)) + payload


def replies(data: bytes) -> list[tuple[int, bytes]]:
    """Status and content of each reply."""
    found = []
    while data:
        status, zero, length = struct.unpack_from("<IIQ", data)
        assert zero == 0 and len(data) >= 16 + length
        found.append((status, data[16 : 16 + length]))
        data = data[16 + length :]
    return found


def test_requests_that_make_no_sense_are_refused_one_by_one(runner: Path, bundle: Path) -> None:
    """Short payloads, unknown operations and sessions, everything before a model is open."""
    weights = str(bundle / "weights.bin").encode()
    session_calls = [op for op in Operation if op > Operation.CREATE] + [0, 15, 1 << 31]
    before = [frame(op) for op in session_calls] + [frame(Operation.CREATE, b"\1\0\0\0")]
    before += [frame(Operation.OPEN), frame(Operation.OPEN, b"portable")]
    opening = [frame(Operation.OPEN, b"\0" + weights), frame(Operation.CREATE, b"\1\0\0\0")]
    after = [
        frame(Operation.OPEN, b"\0" + weights),
        frame(Operation.CREATE),
        frame(Operation.CREATE, bytes(4 * 66)),
        frame(Operation.EVAL),
        frame(Operation.EVAL, b"\1\2\3"),
        frame(Operation.RUN_STEPS),
        frame(Operation.RUN_STEPS, b"\0" * 7),
        frame(Operation.RUN_STEPS, b"\xff" * 8 + b"decode"),
        frame(Operation.READ),
        frame(Operation.READ, struct.pack("<IIQQ", 1, 0, 4096, 1)),
        frame(Operation.READ, struct.pack("<IIQQ", 1, 0, (1 << 64) - 1, 2)),
        frame(Operation.READ, struct.pack("<IIQQ", 1, 0, 8, (1 << 64) - 4)),
        frame(Operation.READ, struct.pack("<IIQQ", 9, 0, 0, 0)),
        frame(Operation.READ, bytes(25)),
        frame(Operation.WRITE, bytes(23)),
        frame(Operation.WRITE, struct.pack("<IIQQ", 0, 0, 0, 0) + b"x"),
        frame(Operation.EVAL, b"\1\0\0\0", session=1),
        frame(Operation.EVAL, b"\1\0\0\0", session=1 << 31),
        frame(99),
    ]
    fine = [frame(Operation.EVAL, b"\1\0\0\0"), frame(Operation.POSITION)]
    done = exchange(runner, b"".join(before + opening + after + fine))
    assert (done.returncode, done.stderr) == (0, b"")
    answers = replies(done.stdout)
    assert len(answers) == len(before) + 2 + len(after) + 2
    assert all(status == 1 and text for status, text in answers[: len(before)])
    assert [status for status, _ in answers[len(before) :][:2]] == [0, 0]
    assert all(status == 1 and text for status, text in answers[len(before) + 2 : -2])
    assert answers[-2:] == [(0, b""), (0, struct.pack("<i", 1))]


@pytest.mark.parametrize("cut", [0, 1, 15, 16, 20])
def test_input_that_ends_ends_the_runner(runner: Path, cut: int) -> None:
    """Between two requests, in a head, in a payload."""
    done = exchange(runner, (frame(Operation.HELLO) + frame(Operation.OPEN, b"x" * 9))[16:][:cut])
    assert (done.returncode, done.stdout, done.stderr) == (0, b"", b"")


def test_a_length_that_nobody_means_ends_the_runner(runner: Path) -> None:
    """It is not believed: nothing of that size is asked from the system."""
    done = exchange(runner, struct.pack("<IIQ", Operation.EVAL, 0, 1 << 62))
    assert done.returncode == 4
    assert replies(done.stdout) == [(1, b"the request is too long")]


def test_random_bytes_never_crash_it(runner: Path, bundle: Path) -> None:
    """Operations are right and everything else is random."""
    rng = np.random.default_rng(5)
    head = frame(Operation.OPEN, b"\0" + str(bundle / "weights.bin").encode())
    head += frame(Operation.CREATE, b"\1\0\0\0")
    for _ in range(20):
        calls = (
            frame(int(rng.integers(0, 17)), rng.bytes(int(rng.integers(0, 40)))) for _ in range(200)
        )
        assert exchange(runner, head + b"".join(calls)).returncode == 0


# -- the command line of the runner --------------------------------------------------------------


def run(runner: Path, *arguments: object) -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        [runner, *map(str, arguments)], capture_output=True, text=True, timeout=20, check=False
    )


def test_the_runner_generates_by_itself(
    runner: Path, bundle: Path, greedy_after: Callable[..., list[int]]
) -> None:
    """New token ids on standard output, all else on standard error."""
    tokens = ",".join(map(str, PROMPT))
    arguments = (bundle / "weights.bin", "--tokens", tokens, "--decode", 9, "--threads", 2)
    done = run(runner, *arguments, "--profile", "--level", "portable")
    assert done.returncode == 0
    assert done.stdout == ",".join(map(str, greedy_after(PROMPT, 9))) + "\n"
    for part in ("chain, kernels portable, threads: 2", "prefill: 20 tokens", "decode: 9 tokens"):
        assert part in done.stderr
    assert "ms  logits" in done.stderr


def test_the_runner_prints_text_and_stops(
    runner: Path, bundle: Path, greedy_after: Callable[..., list[int]]
) -> None:
    """With the bundle's tokenizer; special tokens have no text; a stop id ends it."""
    tokens, expected = ",".join(map(str, PROMPT)), greedy_after(PROMPT, 40)
    arguments = (bundle / "weights.bin", "--tokens", tokens, "--decode", 40)
    with load(bundle) as model:
        special = set(model.tokenizer.special_tokens.values())
        text = model.tokenizer.decode([token for token in expected if token not in special])
    command = [runner, *map(str, arguments), "--tokenizer", bundle / "tokenizer.model"]
    done = subprocess.run(command, capture_output=True, check=True)
    assert done.stdout.decode("utf-8", "replace") == text + "\n"
    stop = expected[12]
    assert stop not in expected[:12]
    done = run(runner, *arguments, "--stop", f"287,{stop}")
    assert done.stdout == ",".join(map(str, expected[:12])) + "\n"
    assert "decode: 12 tokens" in done.stderr


@pytest.mark.parametrize(
    "content",
    [None, b"", b"\n", b"aGk=", b"aGk= x", b"aGk= 1 2", b"a-k= 1", b" 1", b"= 1", b"aGk= 1\n\0"],
)
def test_a_damaged_tokenizer_is_refused(
    runner: Path, bundle: Path, tmp_path: Path, content: bytes | None
) -> None:
    """Whatever the file holds; ids beyond the vocabulary are nobody's."""
    path = tmp_path / "tokenizer.model"
    if content is not None:
        path.write_bytes(content)
    done = run(runner, bundle / "weights.bin", "--tokens", "1", "--tokenizer", path)
    assert (done.returncode, done.stdout) == (1, "")
    assert "is missing or no tokenizer.model" in done.stderr
    path.write_bytes(b"aGk= 4000000000\r\naGk= 99999999999999999999\n")
    done = run(runner, bundle / "weights.bin", "--tokens", "1", "--tokenizer", path)
    assert (done.returncode, done.stdout) == (0, "\n")


def test_the_runner_explains_itself(runner: Path) -> None:
    """--help, and --info with what this CPU can run."""
    assert "adb push" in run(runner, "--help").stdout
    done = run(runner, "--info")
    assert done.returncode == 0
    assert "model: chain, vocabulary 288, context 96" in done.stdout
    assert "level foreign: needs sme: cannot run here" in done.stdout
    assert "level portable: needs none: can run here" in done.stdout


@pytest.mark.parametrize(
    ("arguments", "code", "says"),
    [
        ([], 2, "llamac-runner WEIGHTS"),
        (["W"], 2, "--tokens is missing"),
        (["--tokens", "1"], 2, "the weights file is missing"),
        (["W", "W", "--tokens", "1"], 2, "more than one weights file"),
        (["W", "--tokens"], 2, "lacks its value"),
        (["W", "--tokens", ""], 2, "not a number"),
        (["W", "--tokens", "1,"], 2, "not a number"),
        (["W", "--tokens", "1;2"], 2, "not token ids"),
        (["W", "--tokens", "99999999999"], 2, "not a number in its range"),
        (["W", "--tokens", "1", "--threads", "0"], 2, "not a number in its range"),
        (["W", "--tokens", "1", "--decode", "x"], 2, "not a number"),
        (["W", "--tokens", "1", "--frobnicate", "2"], 2, "unknown option"),
        (["none.bin", "--tokens", "1"], 1, "cannot open 'none.bin'"),
        (["W", "--tokens", "1", "--level", "foreign"], 1, "this CPU lacks sme"),
        (["W", "--tokens", "288"], 1, "token 0 is 288"),
        (["W", "--tokens", "1", "--threads", "65"], 1, ""),
        (["W", "--tokens", "1,255"], 1, "token 255 is unlucky"),
        (["W", "--tokens", "1,2", "--decode", "95"], 1, "do not fit"),
    ],
)
def test_wrong_arguments_of_the_runner(
    runner: Path, bundle: Path, arguments: list[str], code: int, says: str
) -> None:
    """Exit code 2 for the command line, 1 for what the library refuses, and a sentence."""
    weights = str(bundle / "weights.bin")
    done = run(runner, *(weights if argument == "W" else argument for argument in arguments))
    assert done.returncode == code
    assert done.stderr and says in done.stderr
