"""`llamac compile`: a checkpoint in, a bundle out."""

from __future__ import annotations

import argparse
from pathlib import Path
from typing import TYPE_CHECKING

from llamac.runtime.errors import UsageError
from llamac.tools.console import (
    Subparsers,
    format_bytes,
    list_of_ints,
    notice,
    positive_int,
    progress_for,
    write_json,
)
from llamac.tools.quantize import add_method_options

if TYPE_CHECKING:
    from llamac.compiler.compile_config import CompileConfig
    from llamac.compiler.quantize_request import QuantizeRequest

DEFAULT_CHUNKS = (128, 32, 8)

EPILOG = """\
examples:
  llamac compile Llama-3.2-1B-Instruct-SpinQuant_INT4_EO8 --target host -o llama-1b-host
  llamac compile model.pth --target host -o out --context 4096 --kv-cache int8
  llamac compile Llama-3.2-1B-Instruct-Q4_0.gguf --target host -o llama-1b-host
  llamac compile MODEL --target host -o out --dump ir/ --report report.json
  llamac compile MODEL --target sm8650 --processors cpu,htp --chunks 128 -o phone
  llamac compile MODEL --targets sm8650,sm8750,rpi5 --builder local[2] -o bundles
  llamac compile Llama-3.2-1B-Instruct --quantize int4 --rotate --target host -o llama-1b-host
  llamac compile MODEL --target sm8350 --processors cpu,htp --calibrate pages.txt -o phone

Kernels get their knobs from the records of `llamac tune`, then from those that came with
llamac, else from their generators; one line says how many got which.

MODEL is a folder with params.json, tokenizer.model and a .pth file, as Meta publishes them, or the
.pth file itself, or a GGUF file, or a folder of Hugging Face (config.json, *.safetensors,
tokenizer.json), or an ONNX file, or a .pt2 file that torch.export saved (both with a tokenizer
beside them, or --tokenizer). TARGET is a name from `llamac targets`; `host` is this machine.
The bundle appears under its name when it is complete and verified, and not before.
"""


def add_parser(subparsers: Subparsers) -> None:
    """Add the command to the command line."""
    parser = subparsers.add_parser(
        "compile",
        help="compile a checkpoint into a bundle",
        description="Compile a quantized Llama checkpoint into a bundle for one SoC.",
        epilog=EPILOG,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument(
        "model", metavar="MODEL", type=Path, help="folder, .pth, GGUF, ONNX or .pt2 file"
    )
    targets = parser.add_mutually_exclusive_group(required=True)
    targets.add_argument("--target", metavar="SOC", help="the SoC to compile for")
    targets.add_argument(
        "--targets", metavar="LIST", type=_names, help="several, each into a folder of DIR"
    )
    parser.add_argument("-o", "--output", metavar="DIR", type=Path, required=True)
    parser.add_argument(
        "--processors",
        metavar="LIST",
        type=_names,
        default=("cpu",),
        help="processor of the SoC to use, or cpu,htp: the CPU, and the HTP for the layers "
        "(default: cpu)",
    )
    parser.add_argument(
        "--place",
        metavar="LIST",
        type=_pairs,
        default={},
        help="who computes the layers of a phase, as prefill=htp,decode=cpu (default: the HTP if "
        "it is among the processors)",
    )
    _add_scheme_options(parser.add_argument_group("accelerators"))
    parser.add_argument("--force", action="store_true", help="replace a bundle that is there")
    parser.add_argument("--name", help="name of the model in the manifest (default: MODEL's)")
    _add_quantize_options(parser.add_argument_group("adapters, and quantization of float models"))
    _add_tuning_options(parser.add_argument_group("tuning"))
    _add_model_options(parser.add_argument_group("model"))
    _add_check_options(parser.add_argument_group("verification and reports"))


def _add_scheme_options(group: argparse._ArgumentGroup) -> None:
    group.add_argument(
        "--scheme",
        metavar="NAME",
        help="how an accelerator computes layers: `llamac targets SOC` lists them (default: its "
        "first)",
    )
    group.add_argument(
        "--cpu-layers",
        metavar="LIST",
        type=_layers,
        default=(),
        help="layers that the accelerator leaves to the CPU, as 0,14-15, with the checkpoint's own "
        "weights; the manifest tells what each layer loses on the accelerator (default: none)",
    )
    group.add_argument(
        "--calibrate",
        metavar="FILE",
        type=Path,
        help="text like what the model will be used on; schemes with integer activations take the "
        "ranges of values from it, and weights that suit them; so does --method gptq",
    )
    group.add_argument(
        "--calibration-tokens",
        metavar="N",
        type=positive_int,
        help="of that text, at most (default: 512 for a scheme, 2048 for --quantize)",
    )


def _layers(text: str) -> tuple[int, ...]:
    """Numbers and ranges of layers: "0,14-15"."""
    found: list[int] = []
    for part in _names(text):
        first, _, last = part.partition("-")
        if not (first.isdecimal() and (last.isdecimal() or last == first or "-" not in part)):
            raise argparse.ArgumentTypeError(f"{text!r} is not like 0,14-15")
        found += range(int(first), int(last or first) + 1)
    return tuple(dict.fromkeys(found))


def _names(text: str) -> tuple[str, ...]:
    return tuple(part.strip() for part in text.split(",") if part.strip())


def _pairs(text: str) -> dict[str, str]:
    parts = [part.partition("=") for part in _names(text)]
    if not all(name and value for name, _, value in parts):
        raise argparse.ArgumentTypeError(f"{text!r} is not like prefill=htp,decode=cpu")
    return {name: value for name, _, value in parts}


def _add_model_options(group: argparse._ArgumentGroup) -> None:
    group.add_argument(
        "--context",
        metavar="N",
        type=positive_int,
        help="positions in the KV cache (default: 8192)",
    )
    group.add_argument(
        "--chunks",
        metavar="LIST",
        type=list_of_ints,
        default=DEFAULT_CHUNKS,
        help="lengths of the prefill functions (default: 128,32,8)",
    )
    group.add_argument(
        "--scales",
        choices=("float16", "bfloat16"),
        default="float16",
        help="dtype of the int4 group scales (default: float16, checked for range)",
    )
    group.add_argument(
        "--kv-cache",
        choices=("float16", "int8"),
        help="dtype of the KV cache (default: what the scheme has, else float16)",
    )
    group.add_argument(
        "--rope-factor",
        metavar="F",
        type=float,
        help="factor of the llama3 RoPE scaling, where params.json does not say (3.2 has 32)",
    )
    group.add_argument("--tokenizer", metavar="FILE", type=Path, help="default: MODEL's own")
    group.add_argument(
        "--requantize",
        action="store_true",
        help="make int4 of linear layers of GGUF and Hugging Face that no int4 kernel reads as "
        "they are: small and fast, with a loss that is printed (default: bfloat16, nearly exact)",
    )


def _add_quantize_options(group: argparse._ArgumentGroup) -> None:
    group.add_argument(
        "--lora",
        metavar="DIR",
        type=Path,
        help="a LoRA adapter as PEFT saves it: merged into float layers, a branch beside int4 ones",
    )
    group.add_argument(
        "--quantize",
        choices=("int4",),
        help="quantize first, as `llamac quantize` does; its result is not kept",
    )
    add_method_options(group)


def _quantize_request(args: argparse.Namespace) -> QuantizeRequest | None:
    """What is asked of the quantization.

    Raises:
        UsageError: options of it without --quantize.
    """
    from llamac.compiler.quantize_request import QuantizeRequest  # noqa: PLC0415

    if args.quantize is None:
        given = [
            f"--{name}" for name in ("method", "rotate", "precision", "eval") if getattr(args, name)
        ]
        if given:
            raise UsageError(
                f"{given[0]} has no effect without --quantize int4",
                cause="models are compiled as they are unless you ask for more",
                fix="add --quantize int4, or leave it out",
            )
        return None
    tokens = {"calibration_tokens": args.calibration_tokens} if args.calibration_tokens else {}
    return QuantizeRequest(
        method=args.method or "rtn",
        rotate=args.rotate,
        calibrate=args.calibrate,
        evaluate=args.eval,
        precision=args.precision,
        **tokens,
    )


def _add_tuning_options(group: argparse._ArgumentGroup) -> None:
    group.add_argument(
        "--records",
        metavar="FILE",
        type=Path,
        help="tuning records to use (default: those that `llamac tune` wrote for you)",
    )
    group.add_argument(
        "--require-tuned",
        action="store_true",
        help="fail if a kernel of the best level has no record and would get its defaults",
    )


def _add_check_options(group: argparse._ArgumentGroup) -> None:
    group.add_argument(
        "--no-verify",
        action="store_true",
        help="write the bundle without comparing it with the reference (the manifest says so)",
    )
    group.add_argument("--verify-text", metavar="FILE", type=Path, help="text to verify with")
    group.add_argument("--dump", metavar="DIR", type=Path, help="write the IR after every stage")
    group.add_argument("--report", metavar="FILE", type=Path, help="write times and memory as JSON")
    group.add_argument(
        "--threads", metavar="N", type=positive_int, default=2, help="for verifying (default: 2)"
    )
    group.add_argument(
        "--builder",
        metavar="WHERE",
        default="local[1]",
        help="of --targets: local, local[N] or dask://HOST:PORT (default: local[1])",
    )


def _config(args: argparse.Namespace) -> CompileConfig:
    """What is asked of the compiler."""
    from llamac.compiler.compile_config import CompileConfig  # noqa: PLC0415

    return CompileConfig(
        model=args.model,
        target=args.target,
        out=args.output,
        processors=args.processors,
        placement=args.place,
        cpu_layers=args.cpu_layers,
        scheme=args.scheme,
        calibration=args.calibrate,
        calibration_tokens=args.calibration_tokens or CompileConfig.calibration_tokens,
        context_length=args.context,
        chunks=args.chunks,
        scale_dtype=args.scales,
        kv_dtype=args.kv_cache,
        rope_factor=args.rope_factor,
        tokenizer=args.tokenizer,
        requantize=args.requantize,
        lora=args.lora,
        quantize=_quantize_request(args),
        name=args.name,
        verify=not args.no_verify,
        verify_text=args.verify_text,
        dump=args.dump,
        overwrite=args.force,
        threads=args.threads,
        records=args.records,
        require_tuned=args.require_tuned,
    )


def run(args: argparse.Namespace) -> int:
    """Compile; print what it took."""
    if args.targets is not None:
        from llamac.tools.compile_matrix import run_matrix  # noqa: PLC0415

        return run_matrix(args, _config(args))
    from llamac.compiler.pipeline import compile_bundle  # noqa: PLC0415

    report = compile_bundle(_config(args), progress_for(args))
    if not args.quiet:
        for note in report.notes:
            notice(f"note: {note}")
        notice("\n".join(report.lines()))
        for name, size in report.files.items():
            notice(f"{args.output / name}: {format_bytes(size)}")
    if args.report:
        write_json(report.to_json(), args.report)
    notice(f"wrote {args.output}")
    return 0
