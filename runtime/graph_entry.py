"""What a manifest says of a graph."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from typing import Annotated, Any

from llamac.runtime.schema import Count, Matches, Name, NotNegative, SchemaError

__all__ = [
    "NEURON_NETWORK",
    "QNN_CONTEXT",
    "GraphEntry",
    "GraphTensorEntry",
    "NeuronEntry",
    "QnnEntry",
    "check_graphs",
    "shorten_graph",
]

QNN_CONTEXT, NEURON_NETWORK = "qnn-context", "neuron-network"
"""Forms of graphs: Qualcomm's binary, compiled for one SoC; and operations and weights as data,
which the phone's Neuron Adapter compiles when the bundle is opened there for the first time."""

Sha256 = Annotated[str, Matches("[0-9a-f]{64}")]


@dataclass(frozen=True)
class GraphTensorEntry:
    """A tensor at the edge of a graph; `dtype` is a word of numpy's.

    Integers stand for scale * (code - zero_point); `scale` is None where a value is the number that
    is stored, or where the file does not tell.
    """

    name: Name
    shape: tuple[Count, ...]
    dtype: Name
    scale: float | None = None
    zero_point: int = 0


@dataclass(frozen=True)
class QnnEntry:
    """What a context binary says of itself.

    `soc_model` is the vendor's number of the SoC, `arch` the version of the processor (75 is v75).
    """

    soc_model: NotNegative
    arch: NotNegative
    vtcm_bytes: NotNegative
    optimization: NotNegative
    build_id: Name
    core_api: str
    backend_api: str
    blob_version: str


@dataclass(frozen=True)
class NeuronEntry:
    """What a network file is for, and what it was made from.

    `soc` names compiled networks in the cache of a device; `neuropilot` is the first number of the
    oldest adapter version that may build it; `network_sha256` is that of what follows the file's
    header; `tflite` is the file with the same operations that was translated.
    """

    soc: Name
    neuropilot: Count
    network_sha256: Sha256
    tflite: Name


@dataclass(frozen=True)
class GraphEntry:
    """Layers of a function as a graph in the form of a vendor.

    `graph` is its name in `file`, `scheme` how it computes. `form` tells what kind of file that is;
    exactly the entry of that vendor is there.
    """

    name: Name
    graph: Name
    function: Name
    layers: tuple[NotNegative, ...]
    file: Name
    form: Name
    scheme: Name
    inputs: tuple[GraphTensorEntry, ...]
    outputs: tuple[GraphTensorEntry, ...]
    qnn: QnnEntry | None = None
    neuron: NeuronEntry | None = None


def check_graphs(graphs: Sequence[GraphEntry], files: Iterable[str]) -> None:
    """Check that the files of graphs are there, and that each has the entry of its form.

    Raises:
        SchemaError: they are not, or it has not exactly that one.
    """
    for graph in graphs:
        where = f"graphs[{graph.name!r}]"
        made_from = [graph.neuron.tflite] if graph.neuron else []
        for file in (graph.file, *made_from):
            if file not in files:
                raise SchemaError(f"{where}.file", f"is {file!r}, no file of the bundle")
        there = {QNN_CONTEXT: graph.qnn is not None, NEURON_NETWORK: graph.neuron is not None}
        if [form for form, is_there in there.items() if is_there] != [graph.form]:
            raise SchemaError(
                f"{where}.form", f"is {graph.form!r}, which the entry of a vendor must fit"
            )


def shorten_graph(fields: dict[str, Any]) -> None:
    """Leave out of its JSON values what other vendors' graphs have, and scales that are None."""
    for name in ("qnn", "neuron"):
        if fields[name] is None:
            del fields[name]
    for tensor in (*fields["inputs"], *fields["outputs"]):
        if tensor["scale"] is None:
            del tensor["scale"], tensor["zero_point"]
