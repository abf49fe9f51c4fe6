"""The plug-in "neuropilot": runs of layers on MediaTek's APU, the rest on the CPU.

Each graph goes into the bundle twice, as a .tflite, which LiteRT's interpreter executes here and
MediaTek's own tools take, and as a network file, which the phone's Neuron Adapter compiles when
the bundle is opened there for the first time. Where the user has MediaTek's SDK (`sdk.py`), its
compiler makes of the .tflite a third form, compiled for the SoC's APU.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any, ClassVar

from llamac.runtime.errors import ToolchainMissing
from llamac.runtime.graph_entry import (
    NEURON_DLA,
    NEURON_NETWORK,
    DlaEntry,
    GraphEntry,
    GraphTensorEntry,
    NeuronEntry,
)
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
    from llamac.targets.neuropilot.network import Network
    from llamac.targets.neuropilot.sdk import OfflineCompiler
    from llamac.targets.program import Pack

FOLDER = "apu"
SOURCE_ROLE = "graph-source"
"""Role of the .tflite files: portable, compiled for nothing."""

FIRST_WITH_INT4 = 9
"""First version of NeuroPilot whose adapter takes int4 weights with a scale for each row. Source:
LiteRT's plug-in for MediaTek, whose calls the tests record."""

A16W8 = Scheme(
    "a16w8",
    "int16 activations, int8 weights with a scale for each row, int16 KV",
    weights="int8",
    kv_dtype="int16",
    is_calibrated=True,
)
A16W4 = replace(
    A16W8,
    name="a16w4",
    summary="int16 activations, int4 weights with a scale for each row, int16 KV",
    weights="int4",
)
WIDENED = "; on NeuroPilot 8 our runner gives the adapter these weights as int8"

NETWORK_NOTE = "compiled by the phone's Neuron Adapter when the bundle is first opened there; none \
of MediaTek's has seen it yet"
DLA_NOTE = "compiled by {} with {}; no APU has executed it yet"
SOURCE_NOTE = "portable, compiled for no APU: LiteRT's interpreter executes it with `--emulate`"


@dataclass(frozen=True)
class _Graph:
    """A chunk that was written; `dla` if an SDK compiled it."""

    chunk: Chunk
    tflite: Path
    codes: Mapping[str, Quantization]
    network: Network
    dla: DlaEntry | None = None

    @property
    def dla_file(self) -> Path:
        """What an SDK compiles, beside the .tflite."""
        return self.tflite.with_suffix(".dla")


class NeuroPilot(Target):
    """The processor "apu" of a MediaTek SoC, through NeuroPilot."""

    name: ClassVar[str] = "neuropilot"
    processor: ClassVar[str] = "apu"
    is_accelerator: ClassVar[bool] = True

    def check(self) -> Sequence[Missing]:
        """A version of NeuroPilot in the SoC file, the extra that writes .tflite, a whole SDK."""
        from llamac.targets.neuropilot.interpreter import find_litert  # noqa: PLC0415
        from llamac.targets.neuropilot.sdk import find_compiler  # noqa: PLC0415

        if self._version is None:
            return (self._no_version(),)
        what = "ai-edge-litert"
        try:
            find_litert()
            what = "the offline compiler of MediaTek's SDK"
            find_compiler(self.soc)
        except ToolchainMissing as error:
            why = f"{error.message}; {error.cause}"
            return (Missing(what=what, why=why, fix=error.fix),)
        return ()

    def schemes(self) -> Sequence[Scheme]:
        """int8 or int4 weights by rows; int4 first where the adapter takes them as they are."""
        if self._version is None:
            return ()
        if self._version >= FIRST_WITH_INT4:
            return (A16W4, A16W8)
        return (A16W8, replace(A16W4, summary=A16W4.summary + WIDENED))

    def offload(
        self,
        mod: IRModule,
        functions: Sequence[str],
        layers: Layers,
        out: Path,
        progress: Progress,
    ) -> Offloaded:
        """Write the layers of the functions to `apu/<graph>.tflite`, `.neuron`, maybe `.dla`."""
        from llamac.targets.chunk import cut_chunks  # noqa: PLC0415
        from llamac.targets.neuropilot.sdk import find_compiler  # noqa: PLC0415
        from llamac.targets.neuropilot.shards import (  # noqa: PLC0415
            layer_weight_bytes,
            layers_per_chunk,
        )
        from llamac.targets.outline import outline  # noqa: PLC0415

        weight_bytes = layer_weight_bytes(layers.weights, layers.scheme.name)
        count = layers_per_chunk(weight_bytes, len(cut_chunks(mod, functions[0], 1, layers.on_cpu)))
        chunks = [c for name in functions for c in cut_chunks(mod, name, count, layers.on_cpu)]
        folder = out / FOLDER
        folder.mkdir()
        compiler = find_compiler(self.soc)
        graphs = []
        for done, chunk in enumerate(chunks):
            progress(f"apu: {chunk.name}", done, len(chunks))
            graph = self._write(chunk, layers, folder)
            graphs.append(compiled(graph, compiler) if compiler else graph)
        progress("apu", len(chunks), len(chunks))
        shapes = [graph_shape(graph, self.soc.name) for graph in graphs]
        return Offloaded(
            outline(mod, list(zip(chunks, shapes, strict=True))),
            tuple(artifact for graph in graphs for artifact in _artifacts(graph)),
            tuple(self._entry(graph, layers.scheme.name) for graph in graphs),
        )

    @property
    def _version(self) -> int | None:
        return self.soc.apu.neuropilot if self.soc.apu else None

    def _no_version(self) -> Missing:
        """Why a SoC's APU is data only."""
        return Missing(
            what=f"a version of NeuroPilot for {self.soc.name}",
            why="its SoC file names none, since LiteRT's list of MediaTek's SoCs does not have it: "
            "which types its adapter takes is not known",
            fix="compile for its CPU (--processors cpu), or choose an mt6983, mt6985, mt6989, "
            "mt6991, mt6993 or mt6897",
        )

    def _write(self, chunk: Chunk, layers: Layers, folder: Path) -> _Graph:
        """Write one chunk in both forms."""
        from llamac.targets.neuropilot.emitter import write_chunk  # noqa: PLC0415
        from llamac.targets.neuropilot.network import OLDEST_MAJOR, write_network  # noqa: PLC0415

        tflite = folder / f"{chunk.name}.tflite"
        interface = write_chunk(chunk, layers.weights, layers.ranges, layers.scheme.name, tflite)
        network = write_network(
            tflite, tflite.with_suffix(".neuron"), neuropilot=self._version or OLDEST_MAJOR
        )
        return _Graph(chunk, tflite, interface.tensors, network)

    def _entry(self, graph: _Graph, scheme: str) -> GraphEntry:
        """Describe a graph for the manifest."""
        inputs, outputs = (
            tuple(replace(t, scale=graph.codes[t.name].scale) for t in side)
            for side in _sides(graph)
        )
        neuron = NeuronEntry(
            soc=self.soc.name,
            neuropilot=self._version or 0,
            network_sha256=graph.network.file.sha256,
            tflite=f"{FOLDER}/{graph.tflite.name}",
            dla=graph.dla,
        )
        return GraphEntry(
            name=graph.chunk.name,
            graph=graph.chunk.name,
            function=graph.chunk.function,
            layers=graph.chunk.layers,
            file=f"{FOLDER}/{graph.network.file.path.name}",
            form=NEURON_DLA if graph.dla else NEURON_NETWORK,
            scheme=scheme,
            inputs=inputs,
            outputs=outputs,
            neuron=neuron,
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


def compiled(graph: _Graph, compiler: OfflineCompiler) -> _Graph:
    """Compile a graph with the user's SDK."""
    from llamac.targets.neuropilot.sdk import compile_dla  # noqa: PLC0415

    compile_dla(compiler, graph.tflite, graph.dla_file)
    name = f"{FOLDER}/{graph.dla_file.name}"
    return replace(graph, dla=DlaEntry(name, compiler.sdk.version, compiler.options))


def graph_shape(graph: _Graph, soc: str) -> GraphShape:
    """Describe a graph as a step of a program."""
    from llamac.runtime.digest import file_sha256  # noqa: PLC0415
    from llamac.schedules.graph import GraphShape, GraphTensor, NeuronGraph  # noqa: PLC0415

    inputs, outputs = (
        tuple(GraphTensor(t.name, t.shape, graph.codes[t.name]) for t in side)
        for side in _sides(graph)
    )
    file = graph.network.file
    vendor = NeuronGraph(soc, file.sha256, f"{FOLDER}/{graph.tflite.name}")
    if graph.dla:
        size = graph.dla_file.stat().st_size
        vendor = replace(vendor, dla=graph.dla.file, dla_bytes=size)
    return GraphShape(
        name=graph.chunk.name,
        graph=graph.chunk.name,
        file=f"{FOLDER}/{file.path.name}",
        sha256=file_sha256(file.path),
        file_bytes=file.file_bytes,
        inputs=inputs,
        outputs=outputs,
        layers=graph.chunk.linear_layers(),
        vendor=vendor,
    )


def _sides(graph: _Graph) -> tuple[list[GraphTensorEntry], list[GraphTensorEntry]]:
    """Inputs and outputs in the order of a step's operands."""
    from llamac.targets.neuropilot import emitter  # noqa: PLC0415

    known = {t.name: t for t in (*graph.network.inputs, *graph.network.outputs)}
    caches = graph.chunk.caches()
    shared = (emitter.HIDDEN, emitter.ROPE_COS, emitter.ROPE_SIN, emitter.MASK)
    new = map(emitter.new_rows_name, caches)
    return [known[n] for n in (*shared, *caches)], [known[n] for n in (emitter.HIDDEN_OUT, *new)]


def _artifacts(graph: _Graph) -> tuple[Artifact, ...]:
    """The files of a graph."""
    folder = Path(FOLDER)
    files = (
        Artifact(folder / graph.network.file.path.name, GRAPH_ROLE, note=NETWORK_NOTE),
        Artifact(folder / graph.tflite.name, SOURCE_ROLE, note=SOURCE_NOTE),
    )
    if graph.dla is None:
        return files
    note = DLA_NOTE.format(graph.dla.sdk, " ".join(graph.dla.options))
    return (*files, Artifact(Path(graph.dla.file), GRAPH_ROLE, note=note))
