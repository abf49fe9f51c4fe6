"""Options and words that the commands with `--emulate` share."""

from __future__ import annotations

import argparse
import shlex
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING

from llamac.runtime.errors import UsageError
from llamac.tools.console import notice, progress_for

if TYPE_CHECKING:
    from llamac.runtime import Model
    from llamac.targets.emulator import Emulator
    from llamac.targets.stand_in import StandIn


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Add --emulate and --cpu."""
    parser.add_argument(
        "--emulate",
        action="store_true",
        help="run a bundle for AArch64 under qemu-aarch64, one for Hexagon under qemu-hexagon, one "
        "with graphs on what executes these here",
    )
    parser.add_argument(
        "--cpu",
        metavar="MODEL",
        help="CPU to emulate, such as cortex-a76 or max,sve256=on (default: max, v67); "
        "`qemu-aarch64 -cpu help` lists them",
    )


def find(args: argparse.Namespace) -> Emulator | StandIn | None:
    """Return the emulator that the arguments ask for, None for this machine.

    Raises:
        UsageError: --cpu without --emulate, or an unknown model.
        ToolchainMissing: there is no emulator.
    """
    if not args.emulate:
        if args.cpu is not None:
            raise UsageError(
                "--cpu is for --emulate",
                cause="without emulation a bundle runs on the CPU that this machine has",
                fix="add --emulate, or leave out --cpu",
            )
        return None
    from llamac.targets.emulator import emulator_for  # noqa: PLC0415

    return emulator_for(args.bundle, args.cpu)


def announce(model: Model, emulator: Emulator | StandIn) -> None:
    """Say what runs under which emulator."""
    name = model.manifest.model.name
    notice(
        f"{name} for {model.manifest.target.soc}, kernels {model.info.level}, runs under "
        f"{emulator.description}; speeds are the emulator's"
    )


@contextmanager
def evaluation_shown(model: Model, args: argparse.Namespace) -> Iterator[None]:
    """Show how many tokens are evaluated, while nothing else is printed."""
    if args.quiet or not args.emulate:
        yield
        return
    from llamac.runtime.remote import RemoteModel  # noqa: PLC0415

    native = model.native
    if not isinstance(native, RemoteModel):  # this process: it is not slow
        yield
        return
    with progress_for(args).stage("evaluate the prompt") as stage:

        def show(count: int) -> None:
            stage.done += count
            stage.note = f"{stage.done} tokens"

        native.after_eval = show
        try:
            yield
        finally:
            native.after_eval = None


def device_command(model: Model, prompt: Sequence[int], args: argparse.Namespace) -> str:
    """Return the call of llamac-runner that continues a prompt greedily, beside its files."""
    files = (model.manifest.file(role) for role in ("weights", "tokenizer"))
    weights, tokenizer = (Path(name).name for name in files)
    words = ["./llamac-runner", weights, "--tokenizer", tokenizer]
    words += ["--tokens", ",".join(map(str, prompt))]
    if model.tokenizer.stop_ids:
        words += ["--stop", ",".join(map(str, sorted(model.tokenizer.stop_ids)))]
    words += ["--decode", str(args.max_tokens)]
    for option, value in (("--threads", args.threads), ("--level", args.level)):
        words += [option, str(value)] if value is not None else []
    return shlex.join(words)
