"""The plug-in "qnn-htp": runs of layers on Qualcomm's tensor processor, the rest on the CPU."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING, Any, ClassVar, TypeAlias

from llamac.runtime.errors import ToolchainMissing
from llamac.runtime.graph_entry import QNN_CONTEXT, GraphEntry, GraphTensorEntry, QnnEntry
from llamac.targets.base import (
    GRAPH_ROLE,
    Artifact,
    Identity,
    Layers,
    Lowered,
    LowerOptions,
    Missing,
    Offloaded,
    Progress,
    Scheme,
    Target,
    WeightReader,
)

if TYPE_CHECKING:
    from numpy.typing import NDArray
    from tvm.ir import IRModule

    from llamac.schedules.graph import GraphShape
    from llamac.schedules.quantized import Quantization
    from llamac.targets.chunk import Chunk
    from llamac.targets.program import Pack
    from llamac.targets.qnn_htp.context import ContextBinary

    Codes: TypeAlias = Mapping[str, Quantization]

FOLDER = "htp"
FLOAT16 = Scheme("float16", "float16 activations, int4 weights as in the checkpoint, float16 KV")
A16W4 = Scheme(
    "a16w4",
    "16-bit integer activations whose ranges a text shows, int4 weights whose groups have scales "
    "of 4 bits (LPBQ), int8 KV",
    weights="lpbq",
    kv_dtype="int8",
    is_calibrated=True,
)
NOTE = "executed by Qualcomm's library for x86-64 at most; not by a phone"


class QnnHtp(Target):
    """The processor "htp" of a Snapdragon, through QNN."""

    name: ClassVar[str] = "qnn-htp"
    processor: ClassVar[str] = "htp"
    is_accelerator: ClassVar[bool] = True

    def check(self) -> Sequence[Missing]:
        """The optional extra with Qualcomm's compiler."""
        from llamac.targets.qnn_htp.toolchain import PACKAGE, VERSION, find_qnn  # noqa: PLC0415

        try:
            find_qnn()
        except ToolchainMissing as error:
            why = f"{error.message}; {error.cause}"
            return (Missing(what=f"{PACKAGE} {VERSION}", why=why, fix=error.fix),)
        return ()

    def schemes(self) -> Sequence[Scheme]:
        """Float16 as the default from v69 on, integers where they are computed right."""
        from llamac.targets.qnn_htp.context import has_float16, has_integers  # noqa: PLC0415

        there = {FLOAT16: has_float16(self.soc), A16W4: has_integers(self.soc)}
        return tuple(scheme for scheme, is_there in there.items() if is_there)

    def offload(
        self,
        mod: IRModule,
        functions: Sequence[str],
        layers: Layers,
        out: Path,
        progress: Progress,
    ) -> Offloaded:
        """Compile the layers of the functions to context binaries, `htp/<graph>.bin`."""
        from llamac.targets.chunk import cut_chunks  # noqa: PLC0415
        from llamac.targets.outline import outline  # noqa: PLC0415
        from llamac.targets.qnn_htp.context import (  # noqa: PLC0415
            compile_chunks,
            htp_of,
            layer_weight_bytes,
            layers_per_chunk,
        )

        target, weights = htp_of(self.soc), layers.weights
        num_layers = len(cut_chunks(mod, functions[0], 1, layers.on_cpu))
        count = layers_per_chunk(layer_weight_bytes(weights), num_layers)
        chunks = [c for name in functions for c in cut_chunks(mod, name, count, layers.on_cpu)]
        folder = out / FOLDER
        folder.mkdir()
        codes: dict[str, Codes] = {}
        binaries = compile_chunks(chunks, _writer(layers, codes), target, folder, progress)
        made = [(c, b, codes.get(c.name, {})) for c, b in zip(chunks, binaries, strict=True)]
        shapes = [graph_shape(*each) for each in made]
        files = (Artifact(Path(shape.file), GRAPH_ROLE, note=NOTE) for shape in shapes)
        return Offloaded(
            outline(mod, list(zip(chunks, shapes, strict=True))),
            tuple(files),
            tuple(graph_entry(*each, layers.scheme.name) for each in made),
        )

    def lower(self, mod: IRModule, options: LowerOptions) -> Lowered:
        """Not an accelerator's work."""
        raise NotImplementedError(self.name)

    def pack(
        self, pack: Pack, weights: WeightReader, options: LowerOptions
    ) -> Iterator[NDArray[Any]]:
        """Not an accelerator's work."""
        raise NotImplementedError(self.name)

    def build(
        self, lowered: Lowered, identity: Identity, out: Path, progress: Progress
    ) -> Sequence[Artifact]:
        """Not an accelerator's work."""
        raise NotImplementedError(self.name)


def _writer(layers: Layers, codes: dict[str, Codes]) -> Callable[[Chunk, Path], None]:
    """Return what writes a chunk as ONNX, and remembers how its edges are quantized."""
    from llamac.targets.qnn_htp.emitter import float16_writer  # noqa: PLC0415
    from llamac.targets.qnn_htp.quantized_emitter import write_quantized_chunk  # noqa: PLC0415

    def write(chunk: Chunk, path: Path) -> None:
        made = write_quantized_chunk(chunk, layers.weights, layers.ranges, path)
        codes[chunk.name] = made.tensors

    return write if layers.scheme == A16W4 else float16_writer(layers.weights)


def graph_shape(chunk: Chunk, binary: ContextBinary, codes: Codes) -> GraphShape:
    """Describe a compiled chunk, whose edges may be codes, as a step of a program."""
    from llamac.schedules.graph import GraphShape, GraphTensor, QnnGraph  # noqa: PLC0415
    from llamac.targets.qnn_htp.emitter import interface  # noqa: PLC0415

    metadata = binary.metadata
    known = {t.name: t for t in (*metadata.graph.inputs, *metadata.graph.outputs)}
    inputs, outputs = (
        tuple(GraphTensor(name, known[name].shape, codes.get(name)) for name in names)
        for names in interface(chunk)
    )
    return GraphShape(
        name=chunk.name,
        graph=metadata.graph.name,
        file=f"{FOLDER}/{binary.path.name}",
        sha256=metadata.sha256,
        file_bytes=metadata.file_bytes,
        inputs=inputs,
        outputs=outputs,
        layers=chunk.linear_layers(),
        vendor=QnnGraph(metadata.soc_model, metadata.build_id),
    )


def graph_entry(chunk: Chunk, binary: ContextBinary, codes: Codes, scheme: str) -> GraphEntry:
    """Describe a compiled chunk for the manifest."""
    metadata = binary.metadata

    def described(tensor: GraphTensorEntry) -> GraphTensorEntry:
        made = codes.get(tensor.name)
        return replace(tensor, scale=made.scale, zero_point=made.zero_point) if made else tensor

    return GraphEntry(
        name=chunk.name,
        graph=metadata.graph.name,
        function=chunk.function,
        layers=chunk.layers,
        file=f"{FOLDER}/{binary.path.name}",
        form=QNN_CONTEXT,
        scheme=scheme,
        inputs=tuple(map(described, metadata.graph.inputs)),
        outputs=tuple(map(described, metadata.graph.outputs)),
        qnn=QnnEntry(
            soc_model=metadata.soc_model,
            arch=metadata.arch,
            vtcm_bytes=metadata.graph.vtcm_bytes,
            optimization=metadata.graph.optimization,
            build_id=metadata.build_id,
            core_api=metadata.core_api,
            backend_api=metadata.backend_api,
            blob_version=metadata.blob_version,
        ),
    )
