"""Make a context binary with two graphs, and what they compute: runs in a process of its own.

An operator that HTP lacks divides the model, and ONNX Runtime puts both parts into one context.
Writes two_qnn.bin and two.npz (x -> a by one graph, b -> y by the other) into the current folder.
"""

from __future__ import annotations

import importlib
from typing import Any

import numpy as np
import onnx
from onnx import TensorProto, helper, numpy_helper

PROVIDER = "QNNExecutionProvider"
SHAPE = (4, 32)


def model() -> bytes:
    """MatMul, Acosh (on the CPU), MatMul; intermediate values are outputs as well."""
    weight = np.random.default_rng(0).uniform(0.5, 1.5, (SHAPE[1], SHAPE[1])).astype(np.float16)
    nodes = [
        helper.make_node("MatMul", ["x", "w"], ["a"]),
        helper.make_node("Acosh", ["a"], ["b"]),
        helper.make_node("MatMul", ["b", "w"], ["y"]),
    ]
    values = {n: helper.make_tensor_value_info(n, TensorProto.FLOAT16, SHAPE) for n in "xaby"}
    outputs = [values[name] for name in "aby"]
    initializers = [numpy_helper.from_array(weight, "w")]
    graph = helper.make_graph(nodes, "two", [values["x"]], outputs, initializers)
    opsets = [helper.make_opsetid("", 17)]
    return bytes(helper.make_model(graph, opset_imports=opsets, ir_version=9).SerializeToString())


def main() -> None:
    """Compile and run it."""
    ort, qnn = (importlib.import_module(name) for name in ("onnxruntime", "onnxruntime_qnn"))
    ort.register_execution_provider_library(PROVIDER, qnn.get_library_path())
    devices = [device for device in ort.get_ep_devices() if device.ep_name == PROVIDER]
    options: Any = ort.SessionOptions()
    options.log_severity_level = 3
    options.add_session_config_entry("ep.context_enable", "1")
    options.add_session_config_entry("ep.context_file_path", "two.onnx")
    options.add_session_config_entry("ep.context_embed_mode", "0")
    settings = {"soc_model": "57", "htp_arch": "75", "offload_graph_io_quantization": "0"}
    backend = {"backend_path": qnn.get_qnn_htp_path()}
    options.add_provider_for_devices(devices[:1], backend | settings)
    session = ort.InferenceSession(model(), sess_options=options)
    x = np.random.default_rng(1).uniform(1, 2, SHAPE).astype(np.float16)
    a, b, y = session.run(["a", "b", "y"], {"x": x})
    nodes = onnx.load("two.onnx", load_external_data=False).graph.node
    names = [node.name for node in nodes if node.op_type == "EPContext"]
    np.savez("two.npz", x=x, a=a, b=b, y=y, names=np.array(names))


if __name__ == "__main__":
    main()
