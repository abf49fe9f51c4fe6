"""What a context binary holds, read back from it; damaged and foreign ones are refused.

Qualcomm's libraries take a binary with a flipped bit in its body without a word, and execute it. So
a binary is always accompanied by its SHA-256, which is compared before any library sees the file.
"""

from __future__ import annotations

import os
import tempfile
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from llamac.runtime.digest import file_sha256
from llamac.runtime.errors import BundleCorrupt, BundleInvalid
from llamac.runtime.graph_entry import GraphTensorEntry
from llamac.targets.qnn_htp.toolchain import JobFailed, find_qnn, run_job

HTP_BACKEND = 6
"""Id of the HTP back end among QNN's."""


@dataclass(frozen=True)
class GraphInfo:
    """The graph of a binary; `vtcm_bytes` and `optimization` are what it was compiled for."""

    name: str
    inputs: tuple[GraphTensorEntry, ...]
    outputs: tuple[GraphTensorEntry, ...]
    vtcm_bytes: int
    optimization: int


@dataclass(frozen=True)
class Metadata:
    """What libQnnSystem says of a binary.

    Attributes:
        sha256: of the file.
        file_bytes: its size.
        backend_id: 6, HTP.
        build_id: version of the QNN libraries that made it, "v2.51.0.260929181845".
        core_api, backend_api, blob_version: versions of interfaces and of the file's format.
        blob_bytes: size of the part that the device loads.
        soc_model: Qualcomm's number of the SoC, 57 for SM8650.
        arch: version of the Hexagon processor, 75.
        graph: its graph.
    """

    sha256: str
    file_bytes: int
    backend_id: int
    build_id: str
    core_api: str
    backend_api: str
    blob_version: str
    blob_bytes: int
    soc_model: int
    arch: int
    graph: GraphInfo


def check_sha256(binary: Path, expected: str) -> None:
    """Compare a file with the hash that was recorded when it was made.

    Raises:
        BundleCorrupt: it differs, or there is no such file.
    """
    if not binary.is_file():
        found = "is missing"
    elif (actual := file_sha256(binary)) != expected:
        found = f"has sha256 {actual}, recorded is {expected}"
    else:
        return
    raise BundleCorrupt(
        f"{binary.name} {found}",
        cause="the file was damaged or replaced after it was compiled",
        fix="compile it again, or copy it again from where it was compiled",
    )


def read_metadata(binary: Path, expected_sha256: str | None = None) -> Metadata:
    """Describe a context binary; nothing of it is executed.

    Args:
        binary: the file.
        expected_sha256: compared before any library sees the file. Without it, only what
            libQnnSystem notices is found: it does not notice changes in the body.

    Raises:
        BundleCorrupt: the hash differs.
        BundleInvalid: this is no context binary for HTP, or one of another layout.
        ToolchainMissing: the extra is not installed.
    """
    if expected_sha256 is not None or not binary.is_file():
        check_sha256(binary, expected_sha256 or "")
    qnn = find_qnn()
    job = {
        "job": "inspect",
        "library": str(qnn.system_library),
        "binary": os.path.abspath(binary),
    }
    with tempfile.TemporaryDirectory(prefix="llamac-qnn-") as folder:
        try:
            fields = run_job(Path(folder), job)
        except JobFailed as error:
            raise _foreign(binary, str(error)) from error
    if "refused" in fields:
        raise _foreign(binary, fields["refused"])
    if fields["backend_id"] != HTP_BACKEND:
        raise _foreign(binary, f"it is for QNN's back end {fields['backend_id']}, not HTP")
    graph = fields.pop("graph")
    for side in ("inputs", "outputs"):
        graph[side] = tuple(_tensor(tensor) for tensor in graph[side])
    size = binary.stat().st_size
    return Metadata(
        sha256=expected_sha256 or file_sha256(binary),
        file_bytes=size,
        graph=GraphInfo(**graph),
        **fields,
    )


def _tensor(fields: Mapping[str, Any]) -> GraphTensorEntry:
    return GraphTensorEntry(fields["name"], tuple(fields["shape"]), fields["dtype"])


def _foreign(binary: Path, why: str) -> BundleInvalid:
    return BundleInvalid(
        f"{binary.name} is no context binary that llamac can use",
        cause=why,
        fix="give a file that llamac compiled for an HTP, and compile it again if it is damaged",
    )
