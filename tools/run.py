"""`llamac run`: generate text with a bundle."""

from __future__ import annotations

import argparse
import sys
import time
from pathlib import Path
from typing import TYPE_CHECKING, Any

from llamac.runtime.errors import UsageError
from llamac.tools import emulation
from llamac.tools.console import Subparsers, notice, positive_int

if TYPE_CHECKING:
    from llamac.runtime import Generation, Model

EPILOG = """\
examples:
  llamac run llama-1b-host "Why is the sky blue?"
  llamac run llama-1b-host "Write a haiku." --temperature 0.8 --top-p 0.9 --seed 7
  llamac run llama-1b-host - < prompt.txt > answer.txt
  llamac run tiny-llama-host "Once upon a time" --no-chat
  llamac run tiny-llama-rpi5 "Tell me a story." --emulate --cpu cortex-a76

Standard output carries the generated text and nothing else.
A model with a chat template gets the prompt as a user's message; --no-chat continues the text.
--emulate runs a bundle for an Arm CPU under qemu-aarch64, with the best kernels that the emulated
CPU can run: the tokens are those of a device, the speed is not.
"""

SAMPLING = ("temperature", "top_k", "top_p", "min_p", "repetition_penalty", "seed")


def add_parser(subparsers: Subparsers) -> None:
    """Add the command to the command line."""
    parser = subparsers.add_parser(
        "run",
        help="generate text with a bundle",
        description="Generate text with a bundle, on this machine or on an emulated one.",
        epilog=EPILOG,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument("bundle", metavar="BUNDLE", type=Path)
    parser.add_argument("prompt", metavar="PROMPT", help="text, or - for standard input")
    parser.add_argument(
        "--max-tokens", metavar="N", type=positive_int, default=256, help="(default: 256)"
    )
    parser.add_argument(
        "--chat",
        action=argparse.BooleanOptionalAction,
        help="use the chat template (default: if the bundle has one)",
    )
    parser.add_argument("--system", metavar="TEXT", help="the system's message in a chat")
    parser.add_argument(
        "--adapter",
        metavar="FILE",
        type=Path,
        help="an adapter that `llamac adapt` wrote for BUNDLE",
    )
    parser.add_argument("--threads", metavar="N", type=positive_int, help="(default: all cores)")
    parser.add_argument("--level", metavar="NAME", help="kernels to use (default: the best)")
    emulation.add_arguments(parser)
    parser.add_argument("--stats", action="store_true", help="print speeds to standard error")
    parser.add_argument(
        "--device-command",
        action="store_true",
        help="print the call of the bundle's llamac-runner that makes the same text on a device",
    )
    _add_sampling(parser.add_argument_group("sampling (default: the most likely token)"))


def _add_sampling(group: argparse._ArgumentGroup) -> None:
    group.add_argument("--temperature", metavar="T", type=float, default=0.0, help="0: greedy")
    group.add_argument("--top-k", metavar="K", type=int, default=0, help="0: all tokens")
    group.add_argument("--top-p", metavar="P", type=float, default=1.0, help="1: all tokens")
    group.add_argument("--min-p", metavar="P", type=float, default=0.0, help="0: all tokens")
    group.add_argument("--repetition-penalty", metavar="F", type=float, default=1.0)
    group.add_argument("--seed", metavar="N", type=int, help="makes sampling repeatable")


def run(args: argparse.Namespace) -> int:
    """Generate, writing each piece as it comes."""
    if args.system is not None and args.chat is False:
        raise UsageError(
            "--system and --no-chat contradict each other",
            cause="only a chat template has a place for the system's message",
            fix="leave out one of them",
        )
    prompt = read_prompt(args.prompt)
    from llamac.runtime import load  # noqa: PLC0415

    emulator = emulation.find(args)
    started = time.perf_counter()
    with load(args.bundle, threads=args.threads, level=args.level, machine=emulator) as model:
        if args.adapter:
            model.adapt(args.adapter)
        loaded = time.perf_counter()
        if emulator and not args.quiet:
            emulation.announce(model, emulator)
        generation = _generate(model, prompt, args)
        with emulation.evaluation_shown(model, args):
            piece = next(generation, "")
        first = time.perf_counter()
        while piece:
            sys.stdout.write(piece)
            sys.stdout.flush()
            piece = next(generation, "")
        ended = time.perf_counter()
        sys.stdout.write("\n")
        if args.device_command:
            notice(emulation.device_command(model, generation.prompt, args))
        if args.stats:
            later, seconds = max(len(generation.tokens) - 1, 0), max(ended - first, 1e-9)
            notice(f"loaded in {loaded - started:.3f} s, kernels {model.info.level}")
            where = ", emulated" if emulator else ""
            notice(f"first text after {first - loaded:.3f} s{where}")
            notice(f"then {later} tokens in {seconds:.3f} s: {later / seconds:.1f} tokens/s{where}")
            notice(f"ended by {generation.finish_reason}")
    return 0


def read_prompt(text: str) -> str:
    """Return the prompt: the argument itself, or standard input for "-".

    Raises:
        UsageError: there is no text.
    """
    if text == "-":
        text = sys.stdin.read()
    if not text:
        raise UsageError(
            "the prompt is empty",
            cause="there is nothing to continue or to answer",
            fix='give a text, llamac run BUNDLE "Why is the sky blue?", or - and standard input',
        )
    return text


def _generate(model: Model, prompt: str, args: argparse.Namespace) -> Generation:
    sampling: dict[str, Any] = {name: getattr(args, name) for name in SAMPLING}
    sampling["max_tokens"] = args.max_tokens
    has_template = model.manifest.tokenizer.chat_template is not None
    is_chat = has_template if args.chat is None else args.chat
    if is_chat or args.system is not None:
        return model.chat(system=args.system).send(prompt, **sampling)
    return model.generate(prompt, **sampling)
