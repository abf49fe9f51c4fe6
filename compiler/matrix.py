"""One model for several SoCs: the same compilation for each, in any number of processes.

A quantization that is asked for is done once. Kernels come from one cache, so that targets which
share a kernel compile it once, too. Each target packs the weights as its kernels read them.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import BrokenExecutor, Executor, as_completed
from contextlib import contextmanager
from dataclasses import dataclass, replace
from pathlib import Path
from tempfile import TemporaryDirectory

from llamac.compiler.compile_config import CompileConfig
from llamac.compiler.pipeline import compile_bundle, read_checkpoint
from llamac.compiler.progress import Progress, Report, SilentProgress
from llamac.runtime.errors import LlamacError


@dataclass(frozen=True)
class Compiled:
    """What became of one target.

    Attributes:
        config: of its compilation.
        report: what it took; None if it failed.
        error: code, message, cause and fix of why it failed.
    """

    config: CompileConfig
    report: Report | None = None
    error: tuple[str, str, str, str] | None = None


def compile_matrix(
    configs: Sequence[CompileConfig],
    open_executor: Callable[[], Executor] | None,
    progress: Progress,
    done: Callable[[Compiled], None],
) -> None:
    """Compile all; one that fails stops no other.

    Args:
        configs: one for each target, alike but for the target and the places of output.
        open_executor: starts what does the work; None: this process does, one after the other.
        progress: shows what happens in this process.
        done: called with each target that has ended.

    Raises:
        LlamacError: the model cannot be read or quantized.
    """
    with _quantized_once(configs, progress) as ready:
        if open_executor is None:
            for config in ready:
                done(_compile(config, progress))
            return
        with progress.stage(f"compile for {len(configs)} targets", len(configs)) as stage:
            for compiled in _in_processes(ready, open_executor):
                stage.advance(1)
                done(compiled)


def _in_processes(
    configs: Sequence[CompileConfig], open_executor: Callable[[], Executor]
) -> Iterator[Compiled]:
    executor = open_executor()
    try:
        futures = {executor.submit(compile_quietly, config): config for config in configs}
        for future in as_completed(futures):
            try:
                yield future.result()
            except BrokenExecutor as error:
                yield Compiled(futures[future], error=_crash(error))
    finally:
        executor.shutdown(wait=True, cancel_futures=True)


def _crash(error: BrokenExecutor) -> tuple[str, str, str, str]:
    what = "a process ended while it compiled"
    return "internal", what, str(error), "compile this target alone, with --target"


def compile_quietly(config: CompileConfig) -> Compiled:
    """Compile one target, in another process."""
    return _compile(config, SilentProgress())


def _compile(config: CompileConfig, progress: Progress) -> Compiled:
    before = progress.report
    progress.report = Report()
    try:
        return Compiled(config, compile_bundle(config, progress))
    except LlamacError as error:
        return Compiled(config, error=(error.code, error.message, error.cause, error.fix))
    finally:
        progress.report = before


@contextmanager
def _quantized_once(
    configs: Sequence[CompileConfig], progress: Progress
) -> Iterator[Sequence[CompileConfig]]:
    """The same targets of a model that is quantized as they ask; it is removed in the end."""
    first = configs[0]
    if first.quantize is None or first.lora is not None:
        yield configs
        return
    from llamac.compiler.quantize_request import quantize_into  # noqa: PLC0415 (imports torch)

    checkpoint = read_checkpoint(first)
    with TemporaryDirectory(prefix=".quantized-", dir=first.out.parent) as folder:
        made = Path(folder) / "model"
        quantize_into(made, checkpoint, first.quantize, progress)
        name = first.name or checkpoint.name
        yield [
            replace(config, model=made, quantize=None, requantize=False, name=name)
            for config in configs
        ]
