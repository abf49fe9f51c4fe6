"""`llamac import`: what a model file is and what becomes of it, before anything is compiled."""

from __future__ import annotations

import argparse
from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING

from llamac.tools.console import (
    Row,
    Subparsers,
    format_bytes,
    list_of_ints,
    positive_int,
    print_json,
    print_rows,
)

if TYPE_CHECKING:
    from llamac.compiler.import_report import ImportReport

EPILOG = """\
examples:
  llamac import Llama-3.2-1B-Instruct-Q4_K_M.gguf
  llamac import Llama-3.2-1B-Instruct-SpinQuant_INT4_EO8 --report --target sm8650 --context 4096
  llamac import model.gguf --report --json | jq .memory
"""


def add_parser(subparsers: Subparsers) -> None:
    """Add the command to the command line."""
    parser = subparsers.add_parser(
        "import",
        help="tell what a model file is and what it needs, without compiling it",
        description="Open a model, choose kernels and plan memory for a SoC; compile nothing.",
        epilog=EPILOG,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument(
        "model", metavar="MODEL", type=Path, help="folder, .pth, GGUF, ONNX or .pt2 file"
    )
    parser.add_argument(
        "--report",
        action="store_true",
        help="sizes, losses, operators, kernels and memory (default: one line)",
    )
    parser.add_argument("--json", action="store_true", help="print the report as JSON")
    parser.add_argument("--target", metavar="SOC", default="host", help="default: this machine")
    parser.add_argument(
        "--context",
        metavar="N",
        type=positive_int,
        help="positions in the KV cache (default: 8192)",
    )
    parser.add_argument("--chunks", metavar="LIST", type=list_of_ints, default=(128, 32, 8))
    parser.add_argument("--kv-cache", choices=("float16", "int8"))
    parser.add_argument("--rope-factor", metavar="F", type=float, help="of the llama3 RoPE scaling")
    parser.add_argument("--tokenizer", metavar="FILE", type=Path, help="default: MODEL's own")
    parser.add_argument("--requantize", action="store_true", help="as in `llamac compile`")


def run(args: argparse.Namespace) -> int:
    """Print the report; exit code 1 if the target cannot compile the model."""
    from llamac.compiler.compile_config import CompileConfig  # noqa: PLC0415
    from llamac.compiler.import_report import import_report  # noqa: PLC0415

    report = import_report(
        CompileConfig(
            model=args.model,
            target=args.target,
            out=args.model,
            context_length=args.context,
            chunks=args.chunks,
            kv_dtype=args.kv_cache,
            rope_factor=args.rope_factor,
            tokenizer=args.tokenizer,
            requantize=args.requantize,
        )
    )
    if args.json:
        print_json(report.to_json())
    elif args.report:
        for title, rows in sections(report):
            print_rows(title, rows, plain=args.plain)
    else:
        print(summary(report))
    return 0 if report.uncovered is None else 1


def summary(report: ImportReport) -> str:
    """The report in one line."""
    what = f"{report.path}: {report.form}, {report.model['family']}"
    what += f", {report.model['num_layers']} layers, {report.quantization['weights']}"
    if report.memory is None:
        return f"{what}; not for {report.target}: {report.uncovered}"
    needed = f"{format_bytes(report.memory.total)} at {report.memory.context} positions"
    return f"{what}; {report.target} can run it with {needed}"


def sections(report: ImportReport) -> list[tuple[str, list[Row]]]:
    """The whole report as titled rows of text."""
    found: list[tuple[str, list[Row]]] = [
        ("file", [("path", report.path), ("form", report.form), ("target", report.target)]),
        ("model", _rows(report.model)),
        ("arithmetic", _rows(report.quantization)),
        ("kept", [(line,) for line in report.kept]),
        ("notes and losses", [(line,) for line in report.lost]),
        ("operators in decode", _rows(report.operators)),
    ]
    if report.memory is None:
        return [*found, ("not covered", [(str(report.uncovered),)])]
    memory = report.memory
    sizes = {
        "weights": memory.weights,
        f"KV cache of {memory.context} positions": memory.kv_cache,
        "arena": memory.arena,
        "all while running": memory.total,
    }
    return [
        *found,
        ("kernels in decode", _rows(report.kernels)),
        ("memory", [(name, format_bytes(size)) for name, size in sizes.items()]),
    ]


def _rows(values: Mapping[str, object]) -> list[Row]:
    return [(name.replace("_", " "), "none" if v is None else str(v)) for name, v in values.items()]
