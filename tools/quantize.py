"""`llamac quantize`: a float model in, a quantized checkpoint in Meta's layout out."""

from __future__ import annotations

import argparse
from pathlib import Path

from llamac.tools.console import (
    Subparsers,
    format_bytes,
    notice,
    positive_int,
    progress_for,
    write_json,
)

METHODS = ("rtn", "gptq")  # of `compiler/quantize_checkpoint.py`, which imports more

EPILOG = """\
examples:
  llamac quantize Llama-3.2-1B-Instruct -o llama-1b-int4
  llamac quantize Llama-3.2-1B-Instruct --rotate --method gptq --calibrate pages.txt -o out
  llamac quantize model-BF16.gguf --precision layers.toml --eval held-out.txt -o out

MODEL has bfloat16 or other float weights, in any form that `llamac compile` reads. The result has
Meta's arithmetic: int4 weights in groups of 32, int8 embedding and output layer, activations
quantized while the model runs. --precision names layers that stay bfloat16:
  "layers.0.*" = "bfloat16"
"""


def add_parser(subparsers: Subparsers) -> None:
    """Add the command to the command line."""
    parser = subparsers.add_parser(
        "quantize",
        help="quantize a float model into a checkpoint in Meta's layout",
        description="Quantize a float model to int4, layer by layer, into a checkpoint.",
        epilog=EPILOG,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument("model", metavar="MODEL", type=Path, help="folder, .pth or GGUF file")
    parser.add_argument("-o", "--output", metavar="DIR", type=Path, required=True)
    parser.add_argument("--force", action="store_true", help="replace a checkpoint that is there")
    add_method_options(parser)
    add_text_options(parser)
    parser.add_argument(
        "--rope-factor",
        metavar="F",
        type=float,
        help="of the llama3 RoPE scaling, if MODEL's is not",
    )
    parser.add_argument("--tokenizer", metavar="FILE", type=Path, help="default: MODEL's own")
    parser.add_argument(
        "--report", metavar="FILE", type=Path, help="write times and memory as JSON"
    )


def add_method_options(group: argparse._ActionsContainer) -> None:
    """How to quantize."""
    group.add_argument(
        "--method",
        choices=METHODS,
        help="rtn: the nearest codes; gptq: codes that make the errors of outputs small on the "
        "text of --calibrate, 20 minutes for 1B (default: rtn)",
    )
    group.add_argument(
        "--rotate",
        action="store_true",
        help="rotate first (random Hadamard matrices R1, R2, R4), so that no feature stands out",
    )
    group.add_argument(
        "--precision", metavar="FILE", type=Path, help="TOML file of layers that stay bfloat16"
    )
    group.add_argument(
        "--eval",
        metavar="FILE",
        type=Path,
        help="text for the likelihoods before and after (default: the last part of --calibrate)",
    )


def add_text_options(group: argparse._ActionsContainer) -> None:
    """What to calibrate with."""
    group.add_argument(
        "--calibrate",
        metavar="FILE",
        type=Path,
        help="text like what the model will be used on; gptq needs it",
    )
    group.add_argument(
        "--calibration-tokens",
        metavar="N",
        type=positive_int,
        default=2048,
        help="of that text, at most (default: 2048)",
    )


def run(args: argparse.Namespace) -> int:
    """Quantize; print likelihoods and what it took."""
    from llamac.compiler.quantize_request import QuantizeRequest, quantize  # noqa: PLC0415

    request = QuantizeRequest(
        method=args.method or METHODS[0],
        rotate=args.rotate,
        calibrate=args.calibrate,
        calibration_tokens=args.calibration_tokens,
        evaluate=args.eval,
        precision=args.precision,
    )
    progress = progress_for(args)
    likelihood = quantize(
        args.model,
        args.output,
        request,
        progress,
        rope_factor=args.rope_factor,
        tokenizer=args.tokenizer,
        overwrite=args.force,
    )
    if not args.quiet:
        for note in progress.report.notes:
            notice(f"note: {note}")
        notice("\n".join(progress.report.lines()))
        for name, size in progress.report.files.items():
            notice(f"{args.output / name}: {format_bytes(size)}")
    if args.report:
        write_json(progress.report.to_json(), args.report)
    if likelihood is None:
        notice("no likelihoods: give a text with --eval or --calibrate")
    else:
        print(likelihood)
    notice(f"wrote {args.output}")
    return 0
