"""Compile the layers of a checkpoint for the HTP of a SoC, and print what that takes.

    python -m llamac.tools.htp_chunks CHECKPOINT --target sm8650 --context 512 -o DIR

A developer's script: it leaves context binaries in DIR, one for each chunk of layers, which no
bundle holds yet. Needs the optional extra `llamac[qnn]`. Memory is the highest resident set: of
Qualcomm's compiler, which runs in a process of its own, and of this process, whose weights are
pages of the mapped checkpoint.
"""

from __future__ import annotations

import argparse
import resource
import sys
import time
from collections.abc import Sequence
from pathlib import Path

from llamac.compiler.frontends.meta import from_meta
from llamac.compiler.llama import ModelOptions, build_llama
from llamac.runtime.errors import LlamacError, UsageError
from llamac.targets.chunk import Chunk, cut_chunks
from llamac.targets.qnn_htp.context import (
    ContextBinary,
    compile_chunks,
    has_float16,
    htp_of,
    layer_weight_bytes,
    layers_per_chunk,
)
from llamac.targets.qnn_htp.emitter import float16_writer
from llamac.targets.soc import load_soc


def compile_layers(given: argparse.Namespace) -> tuple[list[Chunk], list[ContextBinary]]:
    """Do what the command line asks for; return the chunks and their binaries.

    Raises:
        LlamacError: see `compile_chunks`.
    """
    target = htp_of(load_soc(given.target))
    if not has_float16(load_soc(given.target)):
        raise UsageError(
            f"the HTP of {given.target} has no scheme in float16",
            cause="before v69 it takes no int4 weights in groups beside float16 activations",
            fix="use `llamac compile --scheme a16w4`, or another --target",
        )
    checkpoint = from_meta(given.checkpoint)
    num_layers = checkpoint.config.num_layers
    per_chunk = given.layers_per_chunk or layers_per_chunk(
        layer_weight_bytes(checkpoint.weights), num_layers
    )
    options = ModelOptions(given.context, (given.tokens,) if given.tokens > 1 else ())
    function = f"prefill_{given.tokens}" if given.tokens > 1 else "decode"
    chunks = cut_chunks(build_llama(checkpoint, options), function, per_chunk)
    given.output.mkdir(parents=True, exist_ok=True)

    def progress(what: str, done: int, total: int) -> None:
        print(f"{what}: {done} of {total}", file=sys.stderr)

    write = float16_writer(checkpoint.weights)
    return chunks, compile_chunks(chunks, write, target, given.output, progress)


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(prog="llamac.tools.htp_chunks", description=__doc__)
    parser.formatter_class = argparse.RawDescriptionHelpFormatter
    parser.add_argument("checkpoint", type=Path, help="a folder in Meta's layout, int4 weights")
    parser.add_argument("--target", default="sm8650", help="the SoC")
    parser.add_argument("--context", type=int, default=512, help="positions of the caches")
    parser.add_argument("--tokens", type=int, default=1, help="1: decode, more: prefill")
    parser.add_argument("--layers-per-chunk", type=int, help="default: as many as may be")
    parser.add_argument("-o", "--output", type=Path, required=True, help="folder to write")
    return parser


def main(arguments: Sequence[str] | None = None) -> int:
    """Run the command line."""
    given = _parser().parse_args(arguments)
    start = time.monotonic()
    try:
        _, binaries = compile_layers(given)
    except LlamacError as error:
        print(f"{error}\n  cause: {error.cause}\n  fix: {error.fix}", file=sys.stderr)
        return 1
    for binary in binaries:
        metadata = binary.metadata
        print(f"{binary.path.name}: {metadata.file_bytes} bytes, sha256 {metadata.sha256}")
    compiler, own = (
        resource.getrusage(who).ru_maxrss / 1024
        for who in (resource.RUSAGE_CHILDREN, resource.RUSAGE_SELF)
    )
    print(
        f"{len(binaries)} binaries in {time.monotonic() - start:.1f} s; highest memory: Qualcomm's "
        f"compiler {compiler:.0f} MiB, llamac {own:.0f} MiB"
    )
    return 0


if __name__ == "__main__":
    sys.exit(main())
