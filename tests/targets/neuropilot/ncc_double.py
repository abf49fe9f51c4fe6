"""A TEST DOUBLE of MediaTek's ncc-tflite. It compiles nothing.

It takes the options that llamac gives, reads the .tflite, and writes a text that says that it is no
DLA, with the sizes of the graph's inputs and outputs. What it refuses is told by variables:

    NCC_DOUBLE_REFUSES    name of an operation, "SOFTMAX"
    NCC_DOUBLE_KNOWS      accelerators that --arch=? lists, "mdla2.0 mdla5.5"
    NCC_DOUBLE_FAILS      "version": it does not start; "silent": it writes nothing
"""

from __future__ import annotations

import argparse
import math
import os
import sys
from pathlib import Path
from typing import Any

HEAD = "NOT A REAL DLA: a test double made this."
ITEM_BYTES = {"INT16": 2, "INT8": 1, "FLOAT32": 4, "INT32": 4}


def main() -> int:
    fails, knows = (os.environ.get(f"NCC_DOUBLE_{name}", "") for name in ("FAILS", "KNOWS"))
    parser = argparse.ArgumentParser(prog="ncc-tflite", allow_abbrev=False)
    parser.add_argument("--version", action="store_true")
    parser.add_argument("--arch")
    parser.add_argument("--l1-size-kb", type=int)
    parser.add_argument("--num-mdla", type=int)
    parser.add_argument("--relax-fp32", action="store_true")
    parser.add_argument("--opt", choices="0123")
    parser.add_argument("--opt-footprint", action="store_true")
    parser.add_argument("-d", dest="dla", type=Path)
    parser.add_argument("tflite", type=Path, nargs="?")
    args = parser.parse_args()
    if args.version:
        print("no license" if fails == "version" else "ncc-tflite TEST DOUBLE 8.0")
        return int(fails == "version")
    if args.arch == "?":
        print("Available architectures:", *(f"  - {name}" for name in knows.split()), sep="\n")
        return 0
    Path("left-behind.log").write_text("the real one leaves such files, too")
    return 0 if fails == "silent" else compile_graph(args)


def compile_graph(args: argparse.Namespace) -> int:
    """Write what is no DLA, or refuse an operation by name."""
    from ai_edge_litert import schema_py_generated as schema  # noqa: PLC0415

    model = schema.ModelT.InitFromPackedBuf(args.tflite.read_bytes(), 0)
    operations = {value: name for name, value in vars(schema.BuiltinOperator).items()}
    for code in model.operatorCodes:
        if operations[code.builtinCode] == os.environ.get("NCC_DOUBLE_REFUSES"):
            name = operations[code.builtinCode]
            print(f"ERROR: {name} is not supported by {args.arch}", file=sys.stderr)
            return 3
    graph = model.subgraphs[0]
    types = {value: name for name, value in vars(schema.TensorType).items()}

    def size(index: int) -> int:
        tensor: Any = graph.tensors[index]
        return math.prod(tensor.shape) * ITEM_BYTES[types[tensor.type]]

    sizes = [size(index) for index in (*graph.inputs, *graph.outputs)]
    numbers = " ".join(map(str, (len(graph.inputs), len(graph.outputs), *sizes)))
    args.dla.write_text(f"{HEAD} {numbers}".ljust(256) + "\0")
    return 0


if __name__ == "__main__":
    sys.exit(main())
