"""Execute a context binary here, by Qualcomm's own HTP library for x86-64 Linux.

It computes what the SoC that the binary was compiled for computes, as far as Qualcomm models it,
and tells nothing about speed. Nothing else is used: a graph that the library cannot run is an
error, never computed by other means.
"""

from __future__ import annotations

import os
import tempfile
from collections.abc import Mapping
from pathlib import Path

import numpy as np
import onnx
from numpy.typing import NDArray
from onnx import helper

from llamac.runtime.errors import DeviceError, UsageError
from llamac.targets.qnn_htp.metadata import Metadata, check_sha256
from llamac.targets.qnn_htp.onnx_file import CONTRIB, IR_VERSION, OPSET
from llamac.targets.qnn_htp.toolchain import JobFailed, find_qnn, run_job

Arrays = Mapping[str, NDArray[np.float16]]


def run_binary(binary: Path, metadata: Metadata, feeds: Arrays) -> dict[str, NDArray[np.float16]]:
    """Execute the graph of a binary once.

    Args:
        binary: the file; its hash must be the one in `metadata`.
        metadata: as it was read when the binary was compiled.
        feeds: every input, float16, in the graph's shapes.

    Returns:
        Every output by name.

    Raises:
        BundleCorrupt: the file is not the one that was described.
        ToolchainMissing: the extra is not installed.
        UsageError: an input is missing, superfluous or of another form.
        DeviceError: the library failed.
    """
    check_sha256(binary, metadata.sha256)
    find_qnn()
    _check_feeds(metadata, feeds)
    with tempfile.TemporaryDirectory(prefix="llamac-qnn-") as text:
        folder = Path(text)
        (folder / "context_qnn.bin").symlink_to(os.path.abspath(binary))
        (folder / "wrapper.onnx").write_bytes(_wrapper(metadata, "context_qnn.bin"))
        np.savez(folder / "feeds.npz", **feeds)  # type: ignore[arg-type]
        job = {
            "job": "run",
            "model": "wrapper.onnx",
            "feeds": "feeds.npz",
            "results": "results.npz",
            "options": {"soc_model": str(metadata.soc_model), "htp_arch": str(metadata.arch)},
        }
        try:
            run_job(folder, job)
        except JobFailed as error:
            raise DeviceError(
                f"Qualcomm's library could not execute {binary.name}",
                cause=str(error),
                fix="compile it again; if that does not help, run this model on the CPU",
            ) from error
        with np.load(folder / "results.npz") as results:
            return {name: results[name] for name in results.files}


def _check_feeds(metadata: Metadata, feeds: Arrays) -> None:
    expected = {t.name: (t.shape, t.dtype) for t in metadata.graph.inputs}
    given = {name: (value.shape, str(value.dtype)) for name, value in feeds.items()}
    wrong = sorted(n for n in expected | given if expected.get(n) != given.get(n))
    if wrong:
        name = wrong[0]
        raise UsageError(
            f"the graph's input {name} is {expected.get(name)}, given was {given.get(name)}",
            cause="inputs must have the names, shapes and dtypes that the binary was compiled for",
            fix="give what `metadata.graph.inputs` lists",
        )


def _wrapper(metadata: Metadata, binary: str) -> bytes:
    """An ONNX model of one node that stands for the binary, as ONNX Runtime takes it."""
    graph = metadata.graph
    node = helper.make_node(
        "EPContext",
        [tensor.name for tensor in graph.inputs],
        [tensor.name for tensor in graph.outputs],
        name=graph.name,
        domain=CONTRIB,
        main_context=1,
        embed_mode=0,
        ep_cache_context=binary,
        ep_sdk_version=metadata.build_id,
        source="QNNExecutionProvider",
        partition_name=graph.name,
        max_size=0,
        is_multi_soc_ep_context=0,
    )
    inputs, outputs = (
        [
            helper.make_tensor_value_info(
                tensor.name, helper.np_dtype_to_tensor_dtype(np.dtype(tensor.dtype)), tensor.shape
            )
            for tensor in side
        ]
        for side in (graph.inputs, graph.outputs)
    )
    opsets = [helper.make_opsetid("", OPSET), helper.make_opsetid(CONTRIB, 1)]
    model: onnx.ModelProto = helper.make_model(
        helper.make_graph([node], "context", inputs, outputs),
        ir_version=IR_VERSION,
        opset_imports=opsets,
        producer_name="llamac",
    )
    return bytes(model.SerializeToString(deterministic=True))
