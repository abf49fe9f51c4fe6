"""Write an ONNX file node by node, its weights streamed into a file beside it.

A weight goes to disk as soon as it is added, so that memory holds one of them at a time, whatever
the size of the model; the ONNX file itself has the nodes and small constants only.
"""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from types import TracebackType
from typing import Any, BinaryIO

import numpy as np
import onnx
from numpy.typing import NDArray
from onnx import TensorProto, helper, numpy_helper

OPSET = 23
"""The first version with RMSNormalization."""
IR_VERSION = 11
"""The version of the file format that belongs to opset 23."""
CONTRIB = "com.microsoft"
"""Domain of ONNX Runtime's own operators."""

# Pages of 4 KiB: ONNX Runtime maps external data, and wants its offsets so.
_ALIGNMENT = 4096
_SMALL = 1024


class OnnxFile:
    """An ONNX model that is being written; a context manager.

    Args:
        path: of the ONNX file; weights go to the same name with ".data" added.
        name: of the graph.
    """

    def __init__(self, path: Path, name: str) -> None:
        self.path, self._name = path, name
        self._nodes: list[onnx.NodeProto] = []
        self._tensors: list[onnx.TensorProto] = []
        self._inputs: list[onnx.ValueInfoProto] = []
        self._outputs: list[onnx.ValueInfoProto] = []
        self._constants: dict[tuple[str, tuple[int, ...], bytes], str] = {}
        self._data: BinaryIO | None = None

    def __enter__(self) -> OnnxFile:
        self._data = self.path.with_name(self.path.name + ".data").open("wb")
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        assert self._data is not None
        self._data.close()
        if kind is None:
            self._save()

    def add(
        self, op: str, args: Sequence[str], result: str = "", *, domain: str = "", **attrs: Any
    ) -> str:
        """Add a node with one result; return the result's name."""
        result = result or f"{op}_{len(self._nodes)}"
        name = f"{op}_{len(self._nodes)}"
        self._nodes.append(
            helper.make_node(op, list(args), [result], name=name, domain=domain, **attrs)
        )
        return result

    def input(self, name: str, shape: Sequence[int], dtype: str = "float16") -> str:
        """Declare an input."""
        kind = helper.np_dtype_to_tensor_dtype(np.dtype(dtype))
        self._inputs.append(helper.make_tensor_value_info(name, kind, shape))
        return name

    def output(self, name: str, shape: Sequence[int], dtype: str = "float16") -> str:
        """Declare an output."""
        kind = helper.np_dtype_to_tensor_dtype(np.dtype(dtype))
        self._outputs.append(helper.make_tensor_value_info(name, kind, shape))
        return name

    def constant(self, value: NDArray[Any]) -> str:
        """Add a small constant, once for each value; return its name."""
        key = (str(value.dtype), value.shape, value.tobytes())
        if key not in self._constants:
            name = f"const_{len(self._constants)}"
            self._tensors.append(numpy_helper.from_array(value, name))
            self._constants[key] = name
        return self._constants[key]

    def weight(self, name: str, value: NDArray[Any]) -> str:
        """Write a weight to disk; return its name."""
        if value.nbytes <= _SMALL:
            self._tensors.append(numpy_helper.from_array(value, name))
            return name
        kind = helper.np_dtype_to_tensor_dtype(value.dtype)
        return self._external(name, value, value.shape, kind)

    def int4_weight(self, name: str, codes: NDArray[np.int8]) -> str:
        """Write codes -8..7, of even number, as ONNX's int4; return the name."""
        nibbles = codes.reshape(-1, 2).view(np.uint8) & np.uint8(15)
        packed = nibbles[:, 0] | (nibbles[:, 1] << np.uint8(4))
        return self._external(name, packed, codes.shape, TensorProto.INT4)

    def _external(self, name: str, value: NDArray[Any], shape: Sequence[int], kind: int) -> str:
        """Append bytes to the file of weights and declare the tensor that they are."""
        assert self._data is not None
        self._data.write(b"\0" * (-self._data.tell() % _ALIGNMENT))
        tensor = TensorProto(
            name=name, dims=shape, data_type=kind, data_location=TensorProto.EXTERNAL
        )
        place = {
            "location": self.path.name + ".data",
            "offset": self._data.tell(),
            "length": value.nbytes,
        }
        for key, text in place.items():
            tensor.external_data.add(key=key, value=str(text))
        np.ascontiguousarray(value).tofile(self._data)
        self._tensors.append(tensor)
        return name

    def _save(self) -> None:
        graph = helper.make_graph(
            self._nodes, self._name, self._inputs, self._outputs, initializer=self._tensors
        )
        model = helper.make_model(
            graph,
            ir_version=IR_VERSION,
            opset_imports=[helper.make_opsetid("", OPSET), helper.make_opsetid(CONTRIB, 1)],
            producer_name="llamac",
        )
        self.path.write_bytes(model.SerializeToString(deterministic=True))
