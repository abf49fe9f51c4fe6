"""`llamac inspect`: what a bundle is, from its manifest."""

from __future__ import annotations

import argparse
from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

from llamac.tools.console import Row, Subparsers, format_bytes, print_json, print_rows

if TYPE_CHECKING:
    from llamac.runtime.graph_entry import NeuronEntry
    from llamac.runtime.manifest import FunctionEntry, GraphEntry, GraphTensorEntry, Manifest

EPILOG = """\
examples:
  llamac inspect llama-1b-host
  llamac inspect llama-1b-host --check              hash every file
  llamac inspect llama-1b-host --json | jq .memory
"""


def add_parser(subparsers: Subparsers) -> None:
    """Add the command to the command line."""
    parser = subparsers.add_parser(
        "inspect",
        help="show what a bundle is",
        description="Show a bundle's model, arithmetic, target, memory plan, checks and files.",
        epilog=EPILOG,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument("bundle", metavar="BUNDLE", type=Path)
    parser.add_argument("--json", action="store_true", help="print the manifest as JSON")
    parser.add_argument("--check", action="store_true", help="hash every file of the bundle")


def run(args: argparse.Namespace) -> int:
    """Print the manifest; with --check compare every file with it first."""
    from llamac.runtime.manifest import read_manifest  # noqa: PLC0415

    manifest = read_manifest(args.bundle)
    if args.check:
        from llamac.runtime.checks import verify_files  # noqa: PLC0415

        verify_files(args.bundle, manifest, full=True)
    document = manifest.to_dict()
    if args.json:
        print_json(document)
        return 0
    for title, rows in sections(manifest):
        print_rows(title, rows, plain=args.plain)
    if args.check:
        print(f"all {len(manifest.files)} files are as the manifest says")
    return 0


def sections(manifest: Manifest) -> list[tuple[str, list[Row]]]:
    """Return the whole manifest as titled rows of text."""
    memory = manifest.memory
    total = memory.weights_bytes + memory.kv_cache_bytes + memory.arena_bytes
    document = manifest.to_dict()
    sizes = {name: format_bytes(size) for name, size in document["memory"].items()}
    head = ("format", "format_version", "abi_version", "build_id")
    return [
        ("bundle", _rows({name: document[name] for name in head} | document["created_with"])),
        ("model", _rows(document["model"])),
        ("quantization", _rows(document["quantization"])),
        ("target", _target_rows(document["target"])),
        ("memory", [*_rows(sizes), ("all while running", format_bytes(total))]),
        ("functions", _function_rows(manifest)),
        *((f"graph {graph.name}", _graph_rows(graph)) for graph in manifest.graphs),
        ("tokenizer", _tokenizer_rows(document["tokenizer"])),
        ("verification", _verification_rows(manifest)),
        ("files", [_file_row(name, entry) for name, entry in document["files"].items()]),
    ]


def _rows(values: Mapping[str, Any]) -> list[Row]:
    return [(name.replace("_", " "), _text(value)) for name, value in values.items()]


def _text(value: Any) -> str:
    """Write a JSON value the way a person would."""
    if value is None:
        return "none"
    if isinstance(value, bool):
        return "yes" if value else "no"
    if isinstance(value, Mapping):
        return ", ".join(f"{name.replace('_', ' ')} {_text(v)}" for name, v in value.items())
    if isinstance(value, list | tuple):
        return ", ".join(_text(v) for v in value) or "none"
    return str(value)


def _target_rows(target: Mapping[str, Any]) -> list[Row]:
    rows = _rows({name: value for name, value in target.items() if name != "levels"})
    for level in target["levels"]:
        rows.append((f"level {level['name']}", " ".join(level["features"]) or "any CPU"))
    return rows


def _function_rows(manifest: Manifest) -> list[Row]:
    """Who computes the functions, and layers that are left to the CPU everywhere."""
    rows = [_function_row(function) for function in manifest.functions]
    if manifest.scheme is not None and manifest.scheme.cpu_layers:
        rows.append(("layers on cpu", ", ".join(map(str, manifest.scheme.cpu_layers))))
    return rows


def _function_row(function: FunctionEntry) -> Row:
    count, where = function.num_tokens, f"layers on {function.processor}"
    return (function.name, "1 token a call" if count == 1 else f"{count} tokens a call", where)


def _graph_rows(graph: GraphEntry) -> list[Row]:
    """What is known of a graph's file; its tensors with shapes and scales."""
    sides = (("input", graph.inputs), ("output", graph.outputs))
    return [
        ("file", graph.file),
        ("form", graph.form),
        ("scheme", graph.scheme),
        ("layers", f"{graph.layers[0]} to {graph.layers[-1]} of {graph.function}"),
        *_vendor_rows(graph),
        *((side, tensor.name, _tensor_text(tensor)) for side, ts in sides for tensor in ts),
    ]


def _vendor_rows(graph: GraphEntry) -> list[Row]:
    """What only one vendor's graphs have."""
    if graph.qnn is not None:
        qnn = graph.qnn
        interfaces = f"core {qnn.core_api}, HTP {qnn.backend_api}, {qnn.blob_version}"
        return [
            ("for", f"SoC number {qnn.soc_model}, v{qnn.arch}"),
            ("VTCM", format_bytes(qnn.vtcm_bytes)),
            ("optimization", str(qnn.optimization)),
            ("made by", f"QNN {qnn.build_id}"),
            ("interfaces", interfaces),
        ]
    if graph.neuron is not None:
        neuron = graph.neuron
        return [
            ("for", f"{neuron.soc}, NeuroPilot {neuron.neuropilot} or newer"),
            ("compiled", _compiled_by(neuron)),
            ("network", f"sha256 {neuron.network_sha256[:16]}…"),
            ("the same as .tflite", neuron.tflite),
        ]
    return []


def _compiled_by(neuron: NeuronEntry) -> str:
    """Who compiles a graph, or has compiled it."""
    on_phone = "by the adapter of the phone, when the bundle is opened there"
    if neuron.dla is None:
        return on_phone
    called = " ".join(neuron.dla.options)
    return f"{neuron.dla.file}, by {neuron.dla.sdk} ({called}); if it is refused, {on_phone}"


def _tensor_text(tensor: GraphTensorEntry) -> str:
    text = f"{tensor.dtype} {list(tensor.shape)}"
    if tensor.scale is None:
        return text
    return f"{text}, scale {tensor.scale:.4g}, zero point {tensor.zero_point}"


def _tokenizer_rows(tokenizer: Mapping[str, Any]) -> list[Row]:
    # Llama 3 has 256 special tokens; their names and ids are in the JSON form.
    return _rows(dict(tokenizer) | {"special_tokens": len(tokenizer["special_tokens"])})


def _verification_rows(manifest: Manifest) -> list[Row]:
    check = manifest.verification
    rows: list[Row] = [("status", check.status), ("probe tokens", str(check.probe_tokens))]
    if check.operations:
        worst = min(check.operations, key=lambda operation: operation.sqnr_db)
        rows.append(("operations compared", str(len(check.operations))))
        rows.append(("worst operation", f"{worst.name}, SQNR {worst.sqnr_db:.1f} dB"))
    rows += [(name.replace("_", " "), f"{value:.4f}") for name, value in check.nll.items()]
    if check.where:
        rows.append(("where", check.where))
    return rows + [(name, entry.note) for name, entry in manifest.files.items() if entry.note]


def _file_row(name: str, entry: Mapping[str, Any]) -> Row:
    flavour = f" for {entry['flavour']}" if "flavour" in entry else ""
    digest = f"sha256 {entry['sha256'][:16]}…"
    return (name, entry["role"] + flavour, format_bytes(entry["bytes"]), digest)
