"""`llamac verify`: compare a bundle with the reference arithmetic of its checkpoint."""

from __future__ import annotations

import argparse
from pathlib import Path
from typing import TYPE_CHECKING

from llamac.runtime.errors import UsageError
from llamac.tools import emulation
from llamac.tools.console import (
    Row,
    Subparsers,
    notice,
    positive_int,
    print_json,
    print_rows,
    progress_for,
)

if TYPE_CHECKING:
    from llamac.compiler.verify import VerifyReport
    from llamac.compiler.verify_steps import OperationResult

EPILOG = """\
examples:
  llamac verify llama-1b-host Llama-3.2-1B-Instruct-SpinQuant_INT4_EO8
  llamac verify BUNDLE MODEL --text story.txt --tokens 256 --json
  llamac verify BUNDLE MODEL --level avx2 --all-functions
  llamac verify tiny-llama-rpi5 examples/tiny-llama/spinquant --emulate --cpu cortex-a76

Every operation of the built library runs beside the reference in float64 of the same codes, on
the same inputs. Then both predict TEXT: negative log likelihood, and how often they agree on the
next token. Exit code 1 if the bundle is under the threshold.
"""


def add_parser(subparsers: Subparsers) -> None:
    """Add the command to the command line."""
    parser = subparsers.add_parser(
        "verify",
        help="compare a bundle with the reference arithmetic",
        description="Compare a bundle with the reference arithmetic of its checkpoint.",
        epilog=EPILOG,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument("bundle", metavar="BUNDLE", type=Path)
    parser.add_argument("model", metavar="MODEL", type=Path, help="what it was compiled from")
    parser.add_argument("--text", metavar="FILE", type=Path, help="text to predict")
    parser.add_argument(
        "--calibrate",
        metavar="FILE",
        type=Path,
        help="the text that the bundle's scheme was calibrated with",
    )
    parser.add_argument(
        "--tokens", metavar="N", type=positive_int, default=64, help="at most (default: 64)"
    )
    parser.add_argument(
        "--all-functions", action="store_true", help="all prefill functions, not only the smallest"
    )
    parser.add_argument(
        "--lora", metavar="DIR", type=Path, help="the adapter that the bundle was compiled with"
    )
    parser.add_argument("--level", metavar="NAME", help="kernels to run (default: the best)")
    parser.add_argument("--threads", metavar="N", type=positive_int, default=2, help="default: 2")
    emulation.add_arguments(parser)
    parser.add_argument("--json", action="store_true", help="print the report as JSON")


def run(args: argparse.Namespace) -> int:
    """Compare, print the report, say by the exit code whether the bundle passed."""
    text = read_text(args.text) if args.text else None
    from llamac.compiler.verify import verify_bundle  # noqa: PLC0415

    emulator = emulation.find(args)
    if emulator and not args.quiet:
        notice(f"{args.bundle} runs under {emulator.description}")
    report = verify_bundle(
        args.bundle,
        args.model,
        text,
        args.tokens,
        progress_for(args),
        threads=args.threads,
        level=args.level,
        all_functions=args.all_functions,
        machine=emulator,
        calibration=read_text(args.calibrate) if args.calibrate else None,
        lora=args.lora,
    )
    if args.json:
        print_json(report.to_json())
    else:
        _print_report(report, plain=args.plain)
    return 0 if report.passed else 1


def read_text(path: Path) -> str:
    """Read a text file of the user.

    Raises:
        UsageError: there is none, or it is not UTF-8.
    """
    try:
        return path.read_text("utf-8")
    except (OSError, UnicodeDecodeError) as error:
        raise UsageError(
            f"the text {path} cannot be read",
            cause=str(error),
            fix="give the path of a text file in UTF-8",
        ) from error


def _print_report(report: VerifyReport, *, plain: bool) -> None:
    header = ("kernel", "steps", "SQNR dB", "max error")
    print_rows(
        f"worst step of each kernel, {report.level}", _kernels(report), plain=plain, header=header
    )
    summary = [
        ("negative log likelihood, reference", f"{report.nll_reference:.4f}"),
        ("negative log likelihood, bundle", f"{report.nll_library:.4f}"),
        ("next token agrees", f"{100 * report.agreement:.1f} %"),
        *(("wrong", failure) for failure in report.failures),
        ("result", "passed" if report.passed else "FAILED"),
    ]
    print_rows("text", summary, plain=plain)


def _kernels(report: VerifyReport) -> list[Row]:
    """A row for each function and kernel, in the order of their first steps."""
    groups: dict[str, list[OperationResult]] = {}
    for step in report.operations:
        groups.setdefault(f"{step.function}: {step.kernel}", []).append(step)
    return [
        (
            name,
            str(len(steps)),
            f"{min(step.sqnr_db for step in steps):.1f}",
            f"{max(step.max_error for step in steps):.3g}",
        )
        for name, steps in groups.items()
    ]
