"""`llamac farm`: devices that several tuners share."""

from __future__ import annotations

import argparse
import ipaddress
import time
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from llamac.runtime.errors import UsageError
from llamac.tools.console import Subparsers, notice, positive_int, print_json, print_rows

PORT = 9190
EPILOG = """\
examples:
  llamac farm tracker
  llamac farm serve --device adb:0a1b2c3d --key sm8650-cortex-x4 --cpu 7
  llamac farm serve --device ssh:pi@rpi5 --key rpi5-cortex-a76
  llamac farm serve --device qemu --key sm8650-cortex-x4
  llamac farm status --watch
  llamac tune llama-3.2-1b --target sm8650 --farm 127.0.0.1

Tracker and serve each keep a terminal, until Ctrl-C. The tracker knows devices by key and leases
each to one tuner at a time. An agent (serve) stands beside one device and needs nothing on it:
programs are static, and are copied, run and removed.

Nothing listens on other addresses than 127.0.0.1. To serve a tracker on another host, its ssh is
enough: llamac farm serve --via tuner@host ... Whoever reaches an agent can run programs on its
device: --expose opens it to a network, for one that you trust whole.
"""


def add_parser(subparsers: Subparsers) -> None:
    """Add the command to the command line."""
    parser = subparsers.add_parser(
        "farm",
        help="share devices between tuners",
        description="Lend devices to tuners: a tracker, an agent for each device, and their state.",
        epilog=EPILOG,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parts = parser.add_subparsers(dest="part", metavar="PART", required=True)
    tracker = parts.add_parser("tracker", help="keep devices and queues")
    tracker.add_argument("--port", type=positive_int, default=PORT, help=f"(default: {PORT})")
    _add_address(tracker)
    serve = parts.add_parser("serve", help="lend one device")
    _add_serve(serve)
    status = parts.add_parser("status", help="show devices and queues")
    status.add_argument("--tracker", metavar="HOST:PORT", default=f"127.0.0.1:{PORT}")
    status.add_argument("--watch", action="store_true", help="show it again every second")
    status.add_argument("--json", action="store_true", help="print it as JSON")


def _add_serve(parser: argparse.ArgumentParser) -> None:
    parser.add_argument(
        "--device", required=True, metavar="DEVICE", help="local, qemu, ssh:HOST or adb:SERIAL"
    )
    parser.add_argument(
        "--key", required=True, metavar="SOC-CORE", help="what it is: sm8650-cortex-x4, sm8650-v75"
    )
    parser.add_argument(
        "--cpu", type=int, metavar="N", help="CPU of the device that programs stay on"
    )
    parser.add_argument("--tracker", metavar="HOST:PORT", default=f"127.0.0.1:{PORT}")
    parser.add_argument(
        "--via", metavar="HOST", default="", help="reach the tracker through an ssh tunnel to HOST"
    )
    parser.add_argument("--ssh-config", metavar="FILE", default="", help="in place of ssh's own")
    _add_address(parser)


def _add_address(parser: argparse.ArgumentParser) -> None:
    parser.add_argument(
        "--bind", metavar="ADDRESS", default="127.0.0.1", help="(default: 127.0.0.1)"
    )
    parser.add_argument(
        "--expose", action="store_true", help="allow --bind another address than a loopback one"
    )


def run(args: argparse.Namespace) -> int:
    """Be a part of a farm, or show it."""
    return {"tracker": _tracker, "serve": _serve, "status": _status}[args.part](args)


def _check_address(args: argparse.Namespace) -> str:
    """The address to listen on.

    Raises:
        UsageError: it is no address, or others could reach it and that was not asked for.
    """
    address = str(args.bind)
    try:
        is_loopback = ipaddress.IPv4Address(address).is_loopback
    except ValueError as error:
        raise UsageError(
            f"--bind {address} is no address",
            cause=str(error),
            fix="give one of this machine, such as 127.0.0.1",
        ) from error
    if not (is_loopback or args.expose):
        raise UsageError(
            f"--bind {address} would let other machines in",
            cause="whoever reaches a tracker or an agent can run programs on its devices",
            fix="use ssh (--via), or add --expose if everybody on that network is trusted",
        )
    return address


def _tracker(args: argparse.Namespace) -> int:
    from llamac.compiler.farm.tracker import Address, serve  # noqa: PLC0415

    address = Address(_check_address(args), args.port)

    def ready() -> None:
        if not args.quiet:
            notice(f"tracker at {address}; Ctrl-C ends it")

    serve(address, ready)
    return 0


def _serve(args: argparse.Namespace) -> int:
    from llamac.compiler.farm.devices import Device  # noqa: PLC0415
    from llamac.compiler.farm.supervisor import Service, supervise  # noqa: PLC0415
    from llamac.compiler.farm.tracker import Address  # noqa: PLC0415

    if args.ssh_config and not Path(args.ssh_config).is_file():
        raise UsageError(
            f"there is no file {args.ssh_config}",
            cause="--ssh-config names it",
            fix="leave the option out for ssh's own configuration",
        )
    address = Address(_check_address(args), 0)
    device = Device.parse(args.device, args.cpu, args.ssh_config)
    tracker = Address.parse(args.tracker)
    via, config = args.via, args.ssh_config
    supervise(
        Service(args.key, device, tracker, address, via=via, ssh_config=config, quiet=args.quiet)
    )
    return 0


def _status(args: argparse.Namespace) -> int:
    from llamac.compiler.farm.tracker import Address, agents  # noqa: PLC0415

    tracker = Address.parse(args.tracker)
    if args.json:
        print_json([dict(info) for info in agents(tracker)])
    elif args.watch and not args.plain:
        _watch(tracker)
    else:
        while True:
            _print(agents(tracker), f"farm at {tracker}", plain=args.plain)
            if not args.watch:
                break
            time.sleep(1)
    return 0


def _watch(tracker: Any) -> None:
    """Show the table in one place until interrupted; a tracker that goes away is waited for."""
    from rich.console import Console  # noqa: PLC0415
    from rich.live import Live  # noqa: PLC0415
    from rich.table import Table  # noqa: PLC0415

    from llamac.compiler.farm.tracker import agents  # noqa: PLC0415
    from llamac.runtime.errors import FarmUnreachable  # noqa: PLC0415

    with Live(console=Console(), auto_refresh=False) as live:
        while True:
            table = Table(title=f"farm at {tracker}")
            for name in HEADER:
                table.add_column(name)
            try:
                for row in map(_row, agents(tracker)):
                    table.add_row(*row)
            except FarmUnreachable as error:
                table.caption = f"{error.message}: {error.cause}"
            live.update(table, refresh=True)
            time.sleep(1)


HEADER = ("key", "agent", "device", "measures", "state", "trials", "faults", "temperature")


def _row(info: Mapping[str, Any]) -> tuple[str, ...]:
    """What an agent says of itself, without trusting it."""
    from llamac.compiler.farm.protocol import printable  # noqa: PLC0415

    state = str(info.get("state", ""))
    note = str(info.get("note") or "")
    degrees = info.get("temperature")
    cells = (
        str(info.get("key", "")).removeprefix("server:"),
        info.get("name", ""),
        info.get("device", ""),
        info.get("cost", ""),
        f"{state}: {note}" if note else state,
        info.get("trials", 0),
        f"{info.get('candidate_faults', 0)} candidates, {info.get('device_faults', 0)} device",
        f"{degrees:.0f} °C" if isinstance(degrees, (int, float)) else "",
    )
    return tuple(printable(str(cell))[:80] for cell in cells)


def _print(infos: Sequence[Mapping[str, Any]], title: str, *, plain: bool) -> None:
    if not infos:
        notice(f"{title}: no devices")
        return
    print_rows(title, [_row(info) for info in infos], plain=plain, header=HEADER)
