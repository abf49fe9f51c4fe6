"""Verification: does a built library compute what the reference says?

    report = verify_bundle(Path("llama-1b-host"), Path("Llama-3.2-1B-Instruct-SpinQuant_INT4_EO8"))
    if not report.passed:
        print(report.first_failure)

Two looks at the same library: every operation on its own (`verify_steps.py`), where an error is
tight and has a name, and the whole model on a text (`verify_text.py`), which also sees an operation
that is missing. What is compared how is told in docs/numerics.md.
"""

from __future__ import annotations

import tempfile
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any, TypeAlias

import numpy as np

from llamac.compiler.blas import single_threaded_blas
from llamac.compiler.bundle_model import open_same_model
from llamac.compiler.checkpoint import Checkpoint
from llamac.compiler.layers import LayerModel
from llamac.compiler.progress import Progress, SilentProgress
from llamac.compiler.reference_model import ReferenceModel
from llamac.compiler.verify_graphs import graph_layers, kv_codes
from llamac.compiler.verify_steps import OperationResult, StepVerifier, worst_by_kernel
from llamac.compiler.verify_text import TextResult, compare_text
from llamac.runtime.backend import BackendModel, BackendSession, Machine
from llamac.runtime.checks import verify_files
from llamac.runtime.errors import UsageError
from llamac.runtime.manifest import (
    OperationCheck,
    TokenizerEntry,
    Verification,
    read_manifest,
)
from llamac.runtime.model import ThisMachine
from llamac.runtime.tokenizer import Tokenizer
from llamac.targets.base import Progress as Advance
from llamac.targets.program import Function, Program

DEFAULT_TEXT = (
    "Once upon a time there was a little girl who lived near the sea. Every morning she walked "
    "down to the beach with her dog and looked for shells. One day they found a small wooden box "
    "in the sand. It was old and wet, and it had a key in its lock. She turned the key, opened "
    "the lid, and saw a letter that nobody had read for a hundred years."
)
PROGRAM_FILE = "program.json"

OpenModel: TypeAlias = Callable[[str | None], BackendModel]
"""Opens a built model with the kernels of a level, or with the best ones for None."""

# Tokens that are in the context before single steps are compared: an odd place inside a block of
# keys, so that a chunk of eight crosses into the next one.
WARM_UP = 11
LEAST_CHUNK = 8


@dataclass(frozen=True)
class VerifyReport:
    """What was compared, and how it came out.

    Attributes:
        level: kernels that ran, "avx512vnni".
        operations: every step that was compared.
        text: the whole model on a text.
        missing: for each function, layers of the checkpoint that it never reads.
    """

    level: str
    operations: tuple[OperationResult, ...]
    text: TextResult
    missing: tuple[str, ...] = ()

    @property
    def failures(self) -> tuple[str, ...]:
        """Everything that is wrong, single operations first, in the order of execution."""
        steps = tuple(
            f"{o.function}, step {o.step}, {o.name}: {o.failure}"
            for o in self.operations
            if o.failure
        )
        return (*self.missing, *steps, *filter(None, [self.text.failure]))

    @property
    def passed(self) -> bool:
        """Whether the library may be used."""
        return not self.failures

    @property
    def first_failure(self) -> str:
        """The first thing that is wrong, with its place; "" if nothing is."""
        return next(iter(self.failures), "")

    @property
    def nll_reference(self) -> float:
        """Mean negative log likelihood of the text in nats, by the reference."""
        return self.text.nll_reference

    @property
    def nll_library(self) -> float:
        """Mean negative log likelihood of the text in nats, by the library."""
        return self.text.nll_library

    @property
    def agreement(self) -> float:
        """Share of positions at which both predict the same token."""
        return self.text.agreement

    def to_json(self) -> dict[str, Any]:
        """Return the report as JSON values."""
        return {
            "status": "passed" if self.passed else "failed",
            "level": self.level,
            "failures": list(self.failures),
            "operations": [operation.to_json() for operation in self.operations],
            "text": self.text.to_json(),
        }

    def to_manifest(self) -> Verification:
        """Return the manifest's entry: per kernel and function the worst of its steps."""
        text = self.text
        return Verification(
            status="passed" if self.passed else "failed",
            probe_tokens=text.num_tokens,
            operations=tuple(
                OperationCheck(name, round(db, 1))
                for name, db in worst_by_kernel(self.operations).items()
            ),
            nll={
                "reference": text.nll_reference,
                "library": text.nll_library,
                "agreement": text.agreement,
                "logits_sqnr_db": text.sqnr_db,
            },
        )


def probe_tokens(
    entry: TokenizerEntry, checkpoint: Checkpoint, text: str | None, max_tokens: int
) -> list[int]:
    """The tokens to verify with.

    Args:
        entry: how text becomes tokens.
        checkpoint: whose tokenizer file is read.
        text: what to encode; None takes a short text of our own.
        max_tokens: at most so many; at least two.

    Raises:
        UsageError: the text has fewer than two tokens.
        TokenizerError: the tokenizer file is damaged.
    """
    tokenizer = Tokenizer(checkpoint.tokenizer, entry, vocab_size=checkpoint.config.vocab_size)
    spoken = DEFAULT_TEXT if text is None else text
    tokens = tokenizer.encode(spoken, bos=entry.bos_id is not None)[: max(2, max_tokens)]
    if len(tokens) < 2:
        raise UsageError(
            f"the text has {len(tokens)} tokens, a likelihood needs at least 2",
            cause="the text is empty or a single word",
            fix="give a text of a few sentences",
        )
    return tokens


def verify_library(  # noqa: PLR0913 (keywords, each with a default)
    program: Program,
    open_model: OpenModel,
    checkpoint: Checkpoint,
    *,
    scale_dtype: str,
    kv_dtype: str,
    layers: LayerModel | None = None,
    tokens: Sequence[int],
    all_functions: bool = False,
    threads: int = 2,
    level: str | None = None,
    progress: Advance | None = None,
) -> VerifyReport:
    """Compare a built library with the reference arithmetic of a checkpoint.

    Args:
        program: what the library was built from.
        open_model: opens the library for a level, None for the best; it is run.
        checkpoint: the model, as it was read for compiling.
        scale_dtype: what int4 group scales are stored as.
        kv_dtype: what keys and values are stored as.
        layers: what graphs were made from, if there are any.
        tokens: of the text; single steps run on the first of them, repeated if they are few.
        all_functions: compare the steps of every prefill function, not of the smallest alone.
        threads: of the library.
        level: kernels to run; None takes the best for this CPU.
        progress: called as `progress(what, done, total)`.

    Raises:
        BundleError, CpuUnsupported, OutOfMemory: the library cannot be run here.
        NumericsError: the program has kernels that no reference exists for.
    """
    with (
        single_threaded_blas(),
        _session(open_model, level, threads) as (model, session),
    ):
        text = list(tokens[: model.info.context_length])
        functions = _functions_to_verify(program, all_functions)
        counter = _Counter(progress, sum(len(f.steps) for f in functions) + len(text))
        steps = StepVerifier(program, session, checkpoint, scale_dtype, model.info.level, layers)
        warm_up = min(WARM_UP, model.info.context_length - 1)
        operations: list[OperationResult] = []
        for function in functions:
            probe = np.resize(text, warm_up + function.num_tokens).astype(np.int32)
            session.rewind(0)
            session.eval(probe[:warm_up])
            operations += steps.verify(function, probe[warm_up:], warm_up, counter.step)
        decode, prefill = _references(program, checkpoint, scale_dtype, kv_dtype, layers)
        return VerifyReport(
            level=model.info.level,
            operations=tuple(operations),
            text=compare_text(session, decode, prefill, text, counter.add),
            missing=_missing(steps, functions),
        )


def _references(
    program: Program,
    checkpoint: Checkpoint,
    scale_dtype: str,
    kv_dtype: str,
    layers: LayerModel | None,
) -> tuple[ReferenceModel, ReferenceModel]:
    """The references of decode and of prefill, one object where they are the same.

    A graph quantizes no activations by rows, and has the weights that it was made from.
    """
    graphs = {graph.name: graph_layers(graph) for graph in program.graphs()}
    codes = kv_codes(program.graphs())
    models: dict[frozenset[int], ReferenceModel] = {}

    def model(function: Function) -> ReferenceModel:
        names = (program.kernels[step.kernel].name for step in function.steps)
        in_graphs = frozenset(layer for name in names for layer in graphs.get(name, ()))
        if in_graphs not in models:
            models[in_graphs] = ReferenceModel(
                layers.checkpoint if in_graphs and layers is not None else checkpoint,
                scale_dtype=scale_dtype,
                kv_dtype="float16" if codes else kv_dtype,
                float_layers=in_graphs,
                kv_codes=codes,
            )
        return models[in_graphs]

    return model(program.function("decode")), model(program.functions[0])


@contextmanager
def _session(
    open_model: OpenModel, level: str | None, threads: int
) -> Iterator[tuple[BackendModel, BackendSession]]:
    """A session, closed at the end."""
    model = open_model(level)
    try:
        session = model.open_session(threads, ())
        try:
            yield model, session
        finally:
            session.close()
    finally:
        model.close()


def _functions_to_verify(program: Program, all_functions: bool) -> list[Function]:
    """Prefill functions, smallest first, then decode; or of those one, of at least 8 tokens."""
    chunks = sorted((f for f in program.functions if f.num_tokens > 1), key=lambda f: f.num_tokens)
    decode = program.function("decode")
    if all_functions or not chunks:
        return [*chunks, decode]
    large_enough = [f for f in chunks if f.num_tokens >= LEAST_CHUNK]
    return [(large_enough or chunks[-1:])[0], decode]


def _missing(steps: StepVerifier, functions: Sequence[Function]) -> tuple[str, ...]:
    """What each function leaves out, in words."""
    missing = ((function, steps.missing_weights(function)) for function in functions)
    return tuple(f"{f.name} never reads {', '.join(layers)}" for f, layers in missing if layers)


class _Counter:
    """Counts what is done and says so."""

    def __init__(self, progress: Advance | None, total: int) -> None:
        self._progress, self._done, self._total = progress, 0, total

    def add(self, count: int, what: str) -> None:
        """Say that `count` more are done, and what the work is now."""
        self._done += count
        if self._progress is not None:
            self._progress(what, self._done, self._total)

    def step(self, what: str) -> None:
        """Say that the next step begins."""
        self.add(1, what)


def verify_bundle(  # noqa: PLR0913 (keywords, each with a default)
    bundle: Path,
    model: Path,
    text: str | None = None,
    max_tokens: int = 64,
    progress: Progress | None = None,
    *,
    threads: int = 2,
    level: str | None = None,
    all_functions: bool = False,
    machine: Machine | None = None,
    calibration: str | None = None,
    lora: Path | None = None,
) -> VerifyReport:
    """Compare a bundle with the reference arithmetic of the checkpoint it was compiled from.

    Args:
        bundle: its folder.
        model: folder or file of the checkpoint.
        text: to predict; None takes a short one of our own.
        max_tokens: of the text.
        progress: shows the stages.
        threads: of the library.
        level: kernels to run; None takes the best for this CPU.
        all_functions: compare the steps of every prefill function.
        machine: where the bundle runs; None: here.
        calibration: the text that a scheme of the bundle was calibrated with.
        lora: folder of the adapter that the bundle was compiled with.

    Raises:
        BundleError: the bundle is damaged.
        CheckpointError: the checkpoint cannot be read.
        UsageError: the checkpoint, or the calibration, is not what the bundle was compiled from.
    """
    from llamac.compiler.offload import layers_of_bundle  # noqa: PLC0415 (imports us)

    progress = progress or SilentProgress()
    with progress.stage("read the checkpoint"):
        manifest = read_manifest(bundle)
        (machine := machine or ThisMachine()).check(bundle, manifest)
        verify_files(bundle, manifest)
        checkpoint = open_same_model(bundle, manifest, model, lora)
        tokens = probe_tokens(manifest.tokenizer, checkpoint, text, max_tokens)
        program = Program.from_json((bundle / PROGRAM_FILE).read_text("utf-8"))
    with tempfile.TemporaryDirectory(prefix="llamac-layers-") as folder:
        layers = layers_of_bundle(manifest, checkpoint, calibration, Path(folder), progress)
        with progress.stage("verify") as stage:
            return verify_library(
                program,
                partial(machine.open, bundle, manifest),
                checkpoint,
                scale_dtype=manifest.quantization.scale_dtype,
                layers=layers,
                kv_dtype=manifest.quantization.kv_cache,
                tokens=tokens,
                all_functions=all_functions,
                threads=threads,
                level=level,
                progress=stage.update,
            )
