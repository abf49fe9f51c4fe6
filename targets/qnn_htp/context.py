"""Compile chunks to context binaries for the HTP of one SoC, and check what came out.

QNN takes an unknown SoC for its oldest one, and any size of VTCM for any SoC, without a word. So
only SoCs of our own table are compiled for, with the VTCM of their SoC file, and the binary must
say of itself that it is for that SoC.
"""

from __future__ import annotations

import os
import shutil
import tempfile
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

from llamac.runtime.errors import BuildFailed, TargetUnknown
from llamac.targets.chunk import Chunk
from llamac.targets.qnn_htp.metadata import Metadata, read_metadata
from llamac.targets.qnn_htp.toolchain import JobFailed, build_failed, find_qnn, run_job
from llamac.targets.soc import SoC

if TYPE_CHECKING:
    from llamac.targets.base import Progress, WeightReader

SOC_MODELS = {
    "sm8350": 30,
    "sm8450": 36,
    "sm8550": 43,
    "sm8650": 57,
    "sm8750": 69,
    "sm8850": 87,
}
"""Qualcomm's numbers of SoCs. Source: ExecuTorch backends/qualcomm/serialization/qc_schema.py."""

FIRST_FLOAT16_ARCH = 69
"""HTP before v69 has no float16 activations with int4 weights in groups: QNN refuses them."""

WRONG_INTEGERS = (69,)
"""Where Qualcomm's library gives wrong scores of 16-bit queries and int8 keys behind the 32nd."""

MAX_BINARY_BYTES = 4 << 30
"""What one context can address on a device. Source: ExecuTorch, README of its Qualcomm Llama."""

MAX_WEIGHT_BYTES = 1 << 30
"""Weights of a chunk as they are in ONNX: far below the limit above, and below the memory that
compiling takes here, which is about seven times the size of the binary."""

OPTIMIZATION = 3
_MEBI = 1 << 20


@dataclass(frozen=True)
class HtpTarget:
    """The HTP of a SoC, in QNN's terms; made by `htp_of`."""

    soc: str
    soc_model: int
    arch: int
    vtcm_mib: int

    def options(self) -> dict[str, str]:
        """Options of the QNN execution provider."""
        return {
            "soc_model": str(self.soc_model),
            "htp_arch": str(self.arch),
            "vtcm_mb": str(self.vtcm_mib),
            "htp_graph_finalization_optimization_mode": str(OPTIMIZATION),
        }


@dataclass(frozen=True)
class ContextBinary:
    """A compiled chunk: the file, and what it says of itself."""

    path: Path
    layers: tuple[int, ...]
    metadata: Metadata


def has_float16(soc: SoC) -> bool:
    """Whether the HTP of a SoC takes float16 activations with int4 weights in groups."""
    return soc.hexagon is not None and _arch(soc.hexagon.version) >= FIRST_FLOAT16_ARCH


def has_integers(soc: SoC) -> bool:
    """Whether attention over int8 caches was right on the HTP of a SoC; v69's was not."""
    return soc.hexagon is not None and _arch(soc.hexagon.version) not in WRONG_INTEGERS


def _arch(version: str) -> int:
    return int(version.removeprefix("v"))


def htp_of(soc: SoC) -> HtpTarget:
    """Return the HTP of a SoC.

    Raises:
        TargetUnknown: the SoC has none, or we have no number for it, or its file lacks the VTCM.
    """
    hexagon = soc.hexagon
    if hexagon is None or soc.processor("htp") is None:
        raise TargetUnknown(
            f"{soc.name} has no HTP",
            cause="its SoC file lists no processor of that kind",
            fix="compile for its CPU, or choose one of " + ", ".join(SOC_MODELS),
        )
    if soc.name not in SOC_MODELS or hexagon.vtcm_mib is None:
        lacks = "the size of its VTCM" if soc.name in SOC_MODELS else "Qualcomm's number for it"
        raise TargetUnknown(
            f"cannot compile for the HTP of {soc.name}: {lacks} is not known",
            cause="QNN would silently compile for another SoC than this one",
            fix="choose one of " + ", ".join(SOC_MODELS),
        )
    return HtpTarget(soc.name, SOC_MODELS[soc.name], _arch(hexagon.version), hexagon.vtcm_mib)


def layers_per_chunk(weight_bytes: int, num_layers: int) -> int:
    """How many layers go into one binary, so that chunks are equal and none is too large.

    Args:
        weight_bytes: of one layer, see `layer_weight_bytes`.
        num_layers: of the model.
    """
    most = max(1, MAX_WEIGHT_BYTES // max(1, weight_bytes))
    num_chunks = -(-num_layers // most)
    return -(-num_layers // num_chunks)


def layer_weight_bytes(weights: WeightReader, layer: int = 0) -> int:
    """Bytes of a layer's weights in ONNX: codes at 4 bits, everything else at 16."""
    total = 0
    for name in weights.names():
        if name.startswith(f"layers.{layer}."):
            info = weights.info(name)
            count = 1
            for size in info.shape:
                count *= size
            total += count // 2 if info.dtype == "int8" else count * 2
    return total


def compile_chunks(
    chunks: Sequence[Chunk],
    write: Callable[[Chunk, Path], None],
    target: HtpTarget,
    out: Path,
    progress: Progress,
) -> list[ContextBinary]:
    """Compile chunks, one after the other, into `out`/<name of the chunk>.bin.

    The bytes depend on what is written, the target and QNN's version, and on nothing else.

    Args:
        chunks: runs of layers.
        write: writes the ONNX file of a chunk.
        target: what to compile for.
        out: folder of the binaries.
        progress: called before each.

    Raises:
        CoverageError: a composite that the scheme does not have.
        ValuesInvalid: values outside float16's range.
        ToolchainMissing: the extra is not installed.
        BuildFailed: QNN refused the graph, or made something else than was asked for.
    """
    find_qnn()
    binaries = []
    for done, chunk in enumerate(chunks):
        progress(f"htp: {chunk.name}", done, len(chunks))
        binaries.append(_compile_chunk(chunk, write, target, out / f"{chunk.name}.bin"))
    progress("htp", len(chunks), len(chunks))
    return binaries


def _compile_chunk(
    chunk: Chunk, write: Callable[[Chunk, Path], None], target: HtpTarget, path: Path
) -> ContextBinary:
    """Emit, compile and read back one chunk, in a folder that is removed again."""
    with tempfile.TemporaryDirectory(prefix=".htp-", dir=path.parent) as text:
        folder = Path(text)
        # Relative names, always the same: QNN names the graph after a hash of the model's path.
        write(chunk, folder / "chunk.onnx")
        job = {
            "job": "compile",
            "model": "chunk.onnx",
            "context": "context.onnx",
            "options": target.options(),
        }
        try:
            run_job(folder, job)
        except JobFailed as error:
            raise build_failed(f"{chunk.name} for {target.soc}", error) from error
        made = folder / "context_qnn.bin"
        if not made.is_file():
            raise build_failed(chunk.name, JobFailed("it wrote no context binary"))
        shutil.copymode(folder / "chunk.onnx", made)
        os.replace(made, path)
    metadata = read_metadata(path)
    check_target(path.name, metadata, target)
    return ContextBinary(path, chunk.layers, metadata)


def check_target(name: str, metadata: Metadata, target: HtpTarget) -> None:
    """Check that a binary is for this SoC, with its VTCM, and small enough for a device.

    Raises:
        BuildFailed: it is for another one, or too large.
    """
    graph = metadata.graph
    pairs = {
        "SoC number": (target.soc_model, metadata.soc_model),
        "Hexagon version": (target.arch, metadata.arch),
        "VTCM in bytes": (target.vtcm_mib * _MEBI, graph.vtcm_bytes),
        "optimization": (OPTIMIZATION, graph.optimization),
    }
    wrong = [f"{k} {found}, not {want}" for k, (want, found) in pairs.items() if want != found]
    if metadata.file_bytes > MAX_BINARY_BYTES:
        wrong.append(f"{metadata.file_bytes} bytes, more than a context may have")
    if wrong:
        raise BuildFailed(
            f"{name} is not for {target.soc}: {'; '.join(wrong)}",
            cause="QNN compiled for another target than it was told, or the file is a foreign one",
            fix=f"compile again for {target.soc}; if that gives the same, report it",
        )
