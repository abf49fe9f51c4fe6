"""What a manifest says of a graph."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from typing import Annotated, Any

from llamac.runtime.schema import Count, Matches, Name, NotNegative, SchemaError

__all__ = [
    "NEURON_DLA",
    "NEURON_NETWORK",
    "QNN_CONTEXT",
    "DlaEntry",
    "GraphEntry",
    "GraphTensorEntry",
    "NeuronEntry",
    "QnnEntry",
    "check_graphs",
    "shorten_graph",
]

QNN_CONTEXT, NEURON_NETWORK, NEURON_DLA = "qnn-context", "neuron-network", "neuron-dla"
"""Forms of graphs: Qualcomm's binary, compiled for one SoC; operations and weights as data, which
the phone's Neuron Adapter compiles when the bundle is opened there for the first time; and these
together with what MediaTek's SDK compiled of them for one SoC."""

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
class DlaEntry:
    """What MediaTek's SDK compiled: the file, the SDK by its own word, and its options."""

    file: Name
    sdk: str
    options: tuple[str, ...]


@dataclass(frozen=True)
class NeuronEntry:
    """What a network file is for, and what it was made from.

    `soc` names compiled networks in the cache of a device; `neuropilot` is the first number of the
    oldest adapter version that may build it; `network_sha256` is that of what follows the file's
    header; `tflite` is the file with the same operations that was translated; `dla` is there if an
    SDK compiled that one.
    """

    soc: Name
    neuropilot: Count
    network_sha256: Sha256
    tflite: Name
    dla: DlaEntry | None = None


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
        for file in (graph.file, *_neuron_files(graph.neuron)):
            if file not in files:
                raise SchemaError(f"{where}.file", f"is {file!r}, no file of the bundle")
        if _forms(graph) != [graph.form]:
            raise SchemaError(
                f"{where}.form", f"is {graph.form!r}, which the entry of a vendor must fit"
            )


def _neuron_files(neuron: NeuronEntry | None) -> list[str]:
    """The files beside that of the graph."""
    if neuron is None:
        return []
    return [neuron.tflite, *([neuron.dla.file] if neuron.dla else [])]


def _forms(graph: GraphEntry) -> list[str]:
    """The forms that a graph's entries of vendors are of."""
    forms = [QNN_CONTEXT] if graph.qnn is not None else []
    if graph.neuron is not None:
        forms.append(NEURON_NETWORK if graph.neuron.dla is None else NEURON_DLA)
    return forms


def shorten_graph(fields: dict[str, Any]) -> None:
    """Leave out of its JSON values what other vendors' graphs have, and all that is None."""
    for name in ("qnn", "neuron"):
        if fields[name] is None:
            del fields[name]
    if "neuron" in fields and fields["neuron"]["dla"] is None:
        del fields["neuron"]["dla"]
    for tensor in (*fields["inputs"], *fields["outputs"]):
        if tensor["scale"] is None:
            del tensor["scale"], tensor["zero_point"]
