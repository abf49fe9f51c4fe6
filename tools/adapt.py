"""`llamac adapt`: an adapter as a file that a compiled model takes while it is open."""

from __future__ import annotations

import argparse
from pathlib import Path

from llamac.tools.console import Subparsers, format_bytes, notice

EPILOG = """\
examples:
  llamac compile llama-1b-int4 --lora poet --target host -o llama-host
  llamac adapt llama-host llama-1b-int4 lawyer -o lawyer.adapter
  llamac run llama-host "What is a contract?" --adapter lawyer.adapter

Nothing is compiled: the file has the adapter's values as the bundle's kernels read them. In Python,
model.adapt("lawyer.adapter") takes it in a moment, and model.adapt(None) goes back.
The bundle must have been compiled with an adapter of the same or a larger rank.
"""


def add_parser(subparsers: Subparsers) -> None:
    """Add the command to the command line."""
    parser = subparsers.add_parser(
        "adapt",
        help="prepare another LoRA adapter for a bundle",
        description="Write a LoRA adapter as a file that a bundle takes without being compiled.",
        epilog=EPILOG,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument("bundle", metavar="BUNDLE", type=Path, help="compiled with --lora")
    parser.add_argument("model", metavar="MODEL", type=Path, help="that it was compiled from")
    parser.add_argument("adapter", metavar="ADAPTER", type=Path, help="folder that PEFT wrote")
    parser.add_argument("-o", "--output", metavar="FILE", type=Path, required=True)


def run(args: argparse.Namespace) -> int:
    """Write the file."""
    from llamac.compiler.adapter_file import write_adapter_file  # noqa: PLC0415

    size = write_adapter_file(args.bundle, args.model, args.adapter, args.output)
    notice(f"wrote {args.output}, {format_bytes(size)}")
    return 0
