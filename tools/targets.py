"""`llamac targets`: the SoCs that llamac knows, what serves them, how fast they can be."""

from __future__ import annotations

import argparse
import sys
from typing import TYPE_CHECKING

from llamac.tools.console import Row, Subparsers, print_error, print_json, print_rows

if TYPE_CHECKING:
    from llamac.targets.soc import SoC

EPILOG = """\
examples:
  llamac targets
  llamac targets sm8650                             one SoC, with the source of each figure
  llamac targets boards/my-board.toml               a SoC file of your own
  llamac targets --json | jq '.[].name'
"""
LEGEND = """\
*  no plug-in for it is installed        ?  from memory, not verified
1B / 3B: decode of Llama 3.2 in int4, tokens/s at most (bandwidth / bytes of the weights)
`llamac targets SOC` says more, and where each figure is from"""


def add_parser(subparsers: Subparsers) -> None:
    """Add the command to the command line."""
    parser = subparsers.add_parser(
        "targets",
        help="list the SoCs that llamac knows, or describe one",
        description="List the SoCs that llamac knows, or describe one: processors and the plug-ins "
        "that serve them, CPU features, memory bandwidth and the tokens/s it allows at most.",
        epilog=EPILOG,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument("soc", metavar="SOC", nargs="?", help="name or TOML file of one SoC")
    parser.add_argument("--json", action="store_true", help="print JSON")


def run(args: argparse.Namespace) -> int:
    """Print the list, or the description of one SoC.

    Returns:
        0, or 1 if a SoC file of the list is broken (it is named on standard error).
    """
    from llamac.targets.soc import load_soc  # noqa: PLC0415 (keeps `llamac --help` fast)

    return _describe(load_soc(args.soc), args) if args.soc else _list(args)


def _list(args: argparse.Namespace) -> int:
    from llamac.tools import soc_report  # noqa: PLC0415

    socs, broken = soc_report.load_all()
    if args.json:
        print_json([soc_report.as_json(soc) for soc in socs])
    else:
        rows: list[Row] = [soc_report.list_row(soc) for soc in socs]
        print_rows("SoCs", rows, plain=args.plain, header=soc_report.LIST_HEADER)
        print(LEGEND)
    for error in broken:
        print_error(error, sys.stderr)
    return 1 if broken else 0


def _describe(soc: SoC, args: argparse.Namespace) -> int:
    from llamac.tools import soc_report  # noqa: PLC0415

    plugins = [soc_report.plugin_state(soc, processor) for processor in soc.processors]
    if args.json:
        print_json(soc_report.as_json(soc) | {"plugins": [state.as_json() for state in plugins]})
    else:
        for title, rows in soc_report.sections(soc, plugins):
            print_rows(title, rows, plain=args.plain)
    return 0
