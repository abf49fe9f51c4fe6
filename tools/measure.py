"""Measures one bundle with one thread count; `llamac bench` runs it as a child process.

A process of its own makes the memory figures those of one configuration. The request comes as JSON
in the first argument, the answer goes as JSON to standard output:

    python -m llamac.tools.measure '{"bundle": "out", "threads": 2, ...}'
"""

from __future__ import annotations

import json
import sys
import time
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any

from llamac.runtime.errors import LlamacError

if TYPE_CHECKING:
    from llamac.runtime import Model, Session
    from llamac.targets.emulator import Emulator
    from llamac.targets.stand_in import StandIn

BANDWIDTH_SECONDS = 0.5
SMALLEST_BUFFER, LARGEST_BUFFER = 256 << 20, 1 << 30


@dataclass(frozen=True)
class Request:
    """What to measure: counts of tokens, rounds and threads; `level` None: the best.

    With `emulate` the bundle runs under an emulator of the CPU model `cpu`, None for the default.
    """

    bundle: str
    threads: int
    prompt_tokens: int
    decode_tokens: int
    rounds: int
    level: str | None = None
    profile: bool = False
    emulate: bool = False
    cpu: str | None = None


@dataclass
class Measurement:
    """What one process measured; lists have one value per round, bandwidth one more.

    Attributes:
        threads: as asked for.
        level: name of the kernels that ran.
        emulator: what ran them, "" for this machine; there are no memory figures of others then.
        load_s: from the call of `load` to a session that is ready.
        prefill_s: evaluating the prompt.
        first_token_s: evaluating the prompt and choosing the first token.
        decode_s: the tokens after the first.
        bandwidth_gb_s: reading memory with as many threads, before, between and after the rounds.
        peak_resident_bytes: with the mapped weights.
        peak_anonymous_bytes: what cannot be dropped and read again.
        profile_ms: time per operation in one decode step, if asked for.
    """

    threads: int
    level: str = ""
    emulator: str = ""
    load_s: float = 0.0
    prefill_s: list[float] = field(default_factory=list)
    first_token_s: list[float] = field(default_factory=list)
    decode_s: list[float] = field(default_factory=list)
    bandwidth_gb_s: list[float] = field(default_factory=list)
    peak_resident_bytes: int = 0
    peak_anonymous_bytes: int = 0
    profile_ms: dict[str, float] = field(default_factory=dict)


def measure(request: Request) -> Measurement:
    """Load the bundle and run the rounds in this process."""
    from llamac.compiler.progress import SilentProgress  # noqa: PLC0415 (not part of load_s)
    from llamac.runtime import load  # noqa: PLC0415

    emulator = _find_emulator(request)
    result = Measurement(request.threads)
    memory = SilentProgress()
    with memory.stage("first round"):
        started = time.perf_counter()
        model = load(request.bundle, threads=request.threads, level=request.level, machine=emulator)
        session = model.session()
        result.load_s = time.perf_counter() - started
        result.level = model.info.level
        vocab_size = model.info.vocab_size
        _round(session, request, vocab_size, Measurement(request.threads))
    if emulator:
        result.emulator = emulator.description
    else:  # before the bandwidth probe, whose buffer would count
        result.peak_resident_bytes = peak_resident_bytes()
        result.peak_anonymous_bytes = memory.report.peak_anonymous_bytes
    result.bandwidth_gb_s.append(_bandwidth_gb_s(model, request.threads))
    for _ in range(request.rounds):
        _round(session, request, vocab_size, result)
        result.bandwidth_gb_s.append(_bandwidth_gb_s(model, request.threads))
    if request.profile:
        result.profile_ms = _profile(model, session, request.decode_tokens)
    session.close()
    model.close()
    return result


def _find_emulator(request: Request) -> Emulator | StandIn | None:
    if not request.emulate:
        return None
    from llamac.targets.emulator import emulator_for  # noqa: PLC0415

    return emulator_for(Path(request.bundle), request.cpu)


def prompt_tokens(count: int, vocab_size: int) -> list[int]:
    """Return tokens spread over the vocabulary, so that the embedding's rows are not cached."""
    return [(7919 * i + 1) % vocab_size for i in range(count)]


def _round(session: Session, request: Request, vocab_size: int, result: Measurement) -> None:
    """Evaluate the prompt, then decode greedily; add the times to `result`."""
    prompt = prompt_tokens(request.prompt_tokens, vocab_size)
    session.rewind(0)
    started = time.perf_counter()
    session.append(prompt)
    prefilled = time.perf_counter()
    token = session.argmax()
    first = time.perf_counter()
    for _ in range(request.decode_tokens):
        session.append([token])
        token = session.argmax()
    ended = time.perf_counter()
    result.prefill_s.append(prefilled - started)
    result.first_token_s.append(first - started)
    result.decode_s.append(ended - first)


def _bandwidth_gb_s(model: Model, threads: int) -> float:
    """Measure read bandwidth over as many bytes as a token needs, within limits; 0: unknown."""
    from llamac.runtime.library import NativeModel  # noqa: PLC0415 (not part of load_s)

    wanted = max(model.manifest.memory.weight_bytes_per_token, SMALLEST_BUFFER)
    num_bytes = min(wanted, LARGEST_BUFFER)
    if not isinstance(model.native, NativeModel):
        return 0.0
    return model.native.library.read_bandwidth(threads, num_bytes, BANDWIDTH_SECONDS)


def _profile(model: Model, session: Session, tokens: int) -> dict[str, float]:
    """Return milliseconds per decode step in each kernel, summed over the layers."""
    from llamac.targets.program import Program  # noqa: PLC0415

    program = Program.from_json((model.bundle / model.manifest.file("program")).read_text("utf-8"))
    session.native.profile(True)
    for _ in range(tokens):
        token = session.argmax()
        session.rewind(session.position - 1)
        session.append([token])
    nanoseconds = session.native.step_ns("decode")
    session.native.profile(False)
    result: dict[str, float] = {}
    for step, spent in zip(program.function("decode").steps, nanoseconds, strict=True):
        name = program.kernels[step.kernel].name
        result[name] = result.get(name, 0.0) + int(spent) / tokens / 1e6
    return result


def peak_resident_bytes() -> int:
    """Return the highest resident memory of this process in bytes, 0 where it is not known."""
    try:
        status = Path("/proc/self/status").read_bytes()
    except OSError:
        return 0
    _, found, rest = status.partition(b"VmHWM:")
    return int(rest.split(None, 1)[0]) * 1024 if found else 0


def main() -> int:
    """Answer one request; errors are part of the answer."""
    answer: dict[str, Any]
    try:
        answer = {"measurement": asdict(measure(Request(**json.loads(sys.argv[1]))))}
    except KeyboardInterrupt:  # the parent gets it too, and says so
        return 130
    except LlamacError as error:
        answer = {
            "error": {
                "code": error.code,
                "message": error.message,
                "cause": error.cause,
                "fix": error.fix,
            }
        }
    print(json.dumps(answer))
    return 0


if __name__ == "__main__":
    sys.exit(main())
