"""Write an adapter as a file that a bundle's model takes while it is open.

A bundle that was compiled with `--lora` has a branch beside its int4 layers. Another adapter for
the same model is the same tensors with other values: they are packed as the compiler packed the
first ones, and written with the places that they have in weights.bin. What a smaller rank leaves
free is zeros, and B takes in what the scales differ. The format is that of `runtime/c/program.h`,
whose reader (`runtime/c/adapter.c`) trusts nothing of it.
"""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

import numpy as np

from llamac.compiler.bundle_model import open_bundle_model
from llamac.compiler.checkpoint import Checkpoint
from llamac.compiler.config import LoraConfig
from llamac.compiler.lora_adapter import apply_adapter, read_adapter
from llamac.runtime.errors import UsageError
from llamac.runtime.manifest import Manifest, read_manifest
from llamac.targets.cpu.packing import Packer
from llamac.targets.program import Program, ProgramTensor

MAGIC, VERSION = b"LLAMACLA", 1
LAYOUTS = ("lora.a", "lora.b", "hvx.lora.b")
_PROGRAM, _ALIGNMENT = "program.json", 64

_HEADER = np.dtype(
    [
        ("magic", "S8"),
        ("version", "<u4"),
        ("num_entries", "<u4"),
        ("build_id", "V32"),
        ("file_bytes", "<u8"),
    ]
)
_ENTRY = np.dtype([("offset", "<u8"), ("bytes", "<u8"), ("place", "<u8")])


def write_adapter_file(bundle: Path, model: Path, adapter: Path, out: Path) -> int:
    """Write an adapter for a bundle.

    Args:
        bundle: its folder; it was compiled with an adapter or from a QLoRA checkpoint.
        model: that the bundle was compiled from.
        adapter: folder of the adapter, as PEFT saves it.
        out: the file.

    Returns:
        Its size in bytes.

    Raises:
        UsageError: the bundle has no branches, or the adapter's rank is larger than theirs.
        BundleError, CheckpointError: the bundle, the model or the adapter cannot be read.
    """
    manifest = read_manifest(bundle)
    lora = _branch_of(manifest)
    checkpoint = open_bundle_model(bundle, manifest, model)
    adapted = apply_adapter(checkpoint, read_adapter(adapter, checkpoint.config), branch=lora)
    program = Program.from_json((bundle / _PROGRAM).read_text("utf-8"))
    tensors = sorted(
        (t for t in program.tensors if t.pack is not None and t.pack.layout in LAYOUTS),
        key=lambda tensor: tensor.offset,
    )
    values = _packed(manifest, adapted, tensors)
    return _write(out, bytes.fromhex(manifest.build_id), tensors, values)


def _branch_of(manifest: Manifest) -> LoraConfig:
    """Rank and scale of a bundle's branches."""
    lora = manifest.quantization.lora
    if lora is None or manifest.graphs:
        raise UsageError(
            f"{manifest.model.name} has no branches that an adapter could be put into",
            cause="its layers are graphs of another processor"
            if manifest.graphs
            else "it was compiled without --lora, or its float layers took the adapter in",
            fix="compile an int4 model for the CPU with --lora, with the largest rank you need",
        )
    return LoraConfig(lora.rank, lora.scale)


def _packed(
    manifest: Manifest, adapted: Checkpoint, tensors: Sequence[ProgramTensor]
) -> list[bytes]:
    """The values of tensors as kernels read them."""
    packer = Packer(adapted.weights, manifest.quantization.scale_dtype, None)
    packed = []
    for tensor in tensors:
        assert tensor.pack is not None  # chosen by it
        parts = (np.ascontiguousarray(part) for part in packer.pack(tensor.pack))
        packed.append(b"".join(part.tobytes() for part in parts))
    return packed


def _write(
    out: Path, build_id: bytes, tensors: Sequence[ProgramTensor], values: Sequence[bytes]
) -> int:
    """Write the file, under another name until it is complete."""
    place = _HEADER.itemsize + len(tensors) * _ENTRY.itemsize
    entries = np.zeros(len(tensors), _ENTRY)
    for i, (tensor, data) in enumerate(zip(tensors, values, strict=True)):
        place = -(-place // _ALIGNMENT) * _ALIGNMENT
        entries[i] = (tensor.offset, len(data), place)
        place += len(data)
    header = np.array((MAGIC, VERSION, len(tensors), build_id, place), _HEADER)
    partial = out.with_name(out.name + ".partial")
    try:
        with partial.open("wb") as file:
            file.write(header.tobytes() + entries.tobytes())
            for entry, data in zip(entries, values, strict=True):
                file.seek(int(entry["place"]))
                file.write(data)
        partial.replace(out)
    finally:
        partial.unlink(missing_ok=True)
    return place
