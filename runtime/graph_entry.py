"""What a manifest says of a graph."""

from __future__ import annotations

from dataclasses import dataclass

from llamac.runtime.schema import Count, Name, NotNegative

__all__ = ["GraphEntry", "GraphTensorEntry"]


@dataclass(frozen=True)
class GraphTensorEntry:
    """A tensor at the edge of a graph; `dtype` is a word of numpy's."""

    name: Name
    shape: tuple[Count, ...]
    dtype: Name


@dataclass(frozen=True)
class GraphEntry:
    """Layers of a function that a vendor's compiler has compiled, as its binary says of itself.

    `soc_model` is the vendor's number of the SoC, `arch` the version of the processor (75 is v75).
    """

    name: Name
    graph: Name
    function: Name
    layers: tuple[NotNegative, ...]
    file: Name
    soc_model: NotNegative
    arch: NotNegative
    vtcm_bytes: NotNegative
    optimization: NotNegative
    build_id: Name
    core_api: str
    backend_api: str
    blob_version: str
    inputs: tuple[GraphTensorEntry, ...]
    outputs: tuple[GraphTensorEntry, ...]
