"""`llamac compile --targets`: one model for several SoCs."""

from __future__ import annotations

import argparse
import sys
from dataclasses import replace
from typing import TYPE_CHECKING, Any

from llamac.runtime.errors import LlamacError, OutputError, UsageError
from llamac.tools.console import format_bytes, notice, print_error, progress_for, write_json

if TYPE_CHECKING:
    from llamac.compiler.compile_config import CompileConfig
    from llamac.compiler.matrix import Compiled


def run_matrix(args: argparse.Namespace, config: CompileConfig) -> int:
    """Compile for each target; 1 if one of them failed.

    Raises:
        LlamacError: nothing can be compiled for any.
    """
    from llamac.compiler.executors import executor_of  # noqa: PLC0415
    from llamac.compiler.matrix import compile_matrix  # noqa: PLC0415

    open_executor = executor_of(args.builder)
    configs = [_for_target(config, target) for target in _check_targets(args.targets)]
    try:
        args.output.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise OutputError(
            f"{args.output} cannot be made",
            cause=str(error.strerror),
            fix="give a folder in one that exists",
        ) from error
    ended: list[Compiled] = []

    def done(compiled: Compiled) -> None:
        ended.append(compiled)
        _show(compiled, quiet=args.quiet)

    compile_matrix(configs, open_executor, progress_for(args), done)
    if args.report:
        write_json({c.config.target: _as_json(c) for c in ended}, args.report)
    failed = sorted(c.config.target for c in ended if c.error)
    notice(f"wrote {len(ended) - len(failed)} of {len(configs)} bundles into {args.output}")
    return 1 if failed else 0


def _check_targets(names: tuple[str, ...]) -> tuple[str, ...]:
    """Names of SoCs, each once.

    Raises:
        UsageError: one is there twice.
        LlamacError: there is no such SoC.
    """
    from llamac.targets.soc import load_soc  # noqa: PLC0415

    found: dict[str, str] = {}
    for name in names:
        soc = load_soc(name).name
        if soc in found:
            raise UsageError(
                f"--targets has {soc} twice",
                cause="each has a folder of its own",
                fix="leave one out",
            )
        found[soc] = name
    return tuple(found)


def _for_target(config: CompileConfig, target: str) -> CompileConfig:
    dump = config.dump / target if config.dump else None
    return replace(config, target=target, out=config.out / target, dump=dump)


def _show(compiled: Compiled, *, quiet: bool) -> None:
    target, report = compiled.config.target, compiled.report
    if report is None:
        assert compiled.error is not None
        code, message, cause, fix = compiled.error
        error = LlamacError(f"{target}: {message}", cause=cause, fix=fix)
        error.code = code  # type: ignore[misc]
        print_error(error, sys.stderr)
    elif not quiet:
        size = format_bytes(sum(report.files.values()))
        notice(f"{target}: {size} in {report.seconds:.1f} s, {compiled.config.out}")


def _as_json(compiled: Compiled) -> dict[str, Any]:
    if compiled.report is not None:
        return compiled.report.to_json()
    assert compiled.error is not None
    return {"error": dict(zip(("code", "message", "cause", "fix"), compiled.error, strict=True))}
