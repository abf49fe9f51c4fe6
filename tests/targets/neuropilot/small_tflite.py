"""Write small .tflite files for tests, tensor by tensor; needs ai-edge-litert."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import flatbuffers
import numpy as np
from ai_edge_litert import schema_py_generated as schema
from numpy.typing import NDArray

VERSIONS = {
    "FULLY_CONNECTED": 12,
    "ADD": 4,
    "MUL": 4,
    "SUB": 5,
    "SLICE": 4,
    "RESHAPE": 1,
    "TRANSPOSE": 4,
    "QUANTIZE": 2,
}
OPTIONS = {
    "FULLY_CONNECTED": "FullyConnectedOptions",
    "BATCH_MATMUL": "BatchMatMulOptions",
    "ADD": "AddOptions",
    "MUL": "MulOptions",
    "SUB": "SubOptions",
    "MEAN": "ReducerOptions",
    "SOFTMAX": "SoftmaxOptions",
    "CONCATENATION": "ConcatenationOptions",
    "RESHAPE": "ReshapeOptions",
    "SLICE": "SliceOptions",
    "TRANSPOSE": "TransposeOptions",
    "QUANTIZE": "QuantizeOptions",
    "DEQUANTIZE": "DequantizeOptions",
}


def pack_int4(codes: NDArray[np.int8]) -> NDArray[np.uint8]:
    """Two codes a byte, the first one in the lower half."""
    flat = codes.reshape(-1).view(np.uint8) & 15
    flat = np.append(flat, np.zeros(flat.size % 2, np.uint8))
    return (flat[0::2] | flat[1::2] << 4).astype(np.uint8)


class SmallTflite:
    """A model with one subgraph; tensors are named by the caller."""

    def __init__(self) -> None:
        self.subgraph = schema.SubGraphT()
        self.subgraph.tensors, self.subgraph.operators = [], []
        self.model = schema.ModelT()
        self.model.version = 3
        self.model.buffers, self.model.operatorCodes = [schema.BufferT()], []
        self.model.subgraphs = [self.subgraph]

    def tensor(
        self,
        name: str,
        shape: Sequence[int],
        dtype: str = "INT16",
        scale: float | Sequence[float] | None = None,
        data: NDArray[Any] | None = None,
        *,
        zero_point: int = 0,
        dim: int = 0,
    ) -> int:
        """Add a tensor; a sequence of scales is per channel of `dim`. Gives its number."""
        tensor = schema.TensorT()
        tensor.name, tensor.shape, tensor.hasRank = name, list(shape), True
        tensor.type = getattr(schema.TensorType, dtype)
        if scale is not None:
            scales = [scale] if isinstance(scale, float) else list(scale)
            quantization = schema.QuantizationParametersT()
            quantization.scale = scales
            quantization.zeroPoint = [zero_point] * len(scales)
            quantization.quantizedDimension = dim
            tensor.quantization = quantization
        if data is not None:
            buffer = schema.BufferT()
            packed = pack_int4(data) if dtype == "INT4" else data
            buffer.data = np.frombuffer(packed.tobytes(), np.uint8)
            tensor.buffer = len(self.model.buffers)
            self.model.buffers.append(buffer)
        self.subgraph.tensors.append(tensor)
        return len(self.subgraph.tensors) - 1

    def op(
        self,
        name: str,
        inputs: Sequence[int],
        outputs: Sequence[int],
        options: Mapping[str, Any] = {},
    ) -> None:
        """Add an operation."""
        code = schema.OperatorCodeT()
        code.builtinCode = getattr(schema.BuiltinOperator, name)
        code.deprecatedBuiltinCode = min(code.builtinCode, 127)
        code.version = VERSIONS.get(name, 3)
        operator = schema.OperatorT()
        operator.opcodeIndex = len(self.model.operatorCodes)
        operator.inputs, operator.outputs = list(inputs), list(outputs)
        if name in OPTIONS:
            operator.builtinOptionsType = getattr(schema.BuiltinOptions, OPTIONS[name])
            operator.builtinOptions = getattr(schema, OPTIONS[name] + "T")()
            for field, value in options.items():
                assert hasattr(operator.builtinOptions, field)
                setattr(operator.builtinOptions, field, value)
        self.model.operatorCodes.append(code)
        self.subgraph.operators.append(operator)

    def write(self, path: Path, inputs: Sequence[int], outputs: Sequence[int]) -> Path:
        """Write the file."""
        self.subgraph.inputs, self.subgraph.outputs = list(inputs), list(outputs)
        builder = flatbuffers.Builder()
        builder.Finish(self.model.Pack(builder), b"TFL3")
        path.write_bytes(builder.Output())
        return path


ROWS, WIDTH, HEADS = 4, 8, 2
SHAPE = (1, ROWS, WIDTH)
NUM_OPS = 17
"""Operations of `write_every_op`."""


def write_every_op(path: Path, weights: str = "INT8") -> Path:
    """A model with each operation that is translated, int16 activations, float32 at one end.

    Args:
        path: of the file.
        weights: of FULLY_CONNECTED, per channel: "INT8" or "INT4".
    """
    m = SmallTflite()
    x, past = m.tensor("x", SHAPE, scale=1e-3), m.tensor("past", SHAPE, scale=1e-3)
    query, key = _add_linear(m, _add_norm(m, x), weights)
    probabilities = _add_attention(m, query)
    both, real = _add_gate(m, past, key)
    return m.write(path, [x, past], [probabilities, both, real])


def _integers(m: SmallTflite, name: str, *values: int) -> int:
    return m.tensor(name, (len(values),), "INT32", data=np.array(values, np.int32))


def _add_norm(m: SmallTflite, x: int) -> int:
    """x * rsqrt(mean(x * x) + epsilon)"""
    squares = m.tensor("squares", SHAPE, scale=2e-3)
    m.op("MUL", [x, x], [squares])
    mean = m.tensor("mean", (1, ROWS, 1), scale=2e-3)
    m.op("MEAN", [squares, _integers(m, "axis", 2)], [mean], {"keepDims": True})
    epsilon = m.tensor("epsilon", (1,), scale=1e-5, data=np.array([1], np.int16))
    shifted = m.tensor("shifted", (1, ROWS, 1), scale=2e-3)
    m.op("ADD", [mean, epsilon], [shifted])
    root = m.tensor("root", (1, ROWS, 1), scale=3e-3)
    m.op("RSQRT", [shifted], [root])
    norm = m.tensor("norm", SHAPE, scale=4e-3)
    m.op("MUL", [x, root], [norm])
    return norm


def _add_linear(m: SmallTflite, x: int, dtype: str) -> tuple[int, int]:
    """The same weights twice, with a bias and without."""
    codes = np.random.default_rng(7).integers(-7, 8, (WIDTH, WIDTH)).astype(np.int8)
    scales = [0.01 + 0.001 * i for i in range(WIDTH)]
    wide = codes if dtype == "INT4" else (codes * 18).astype(np.int8)
    weight = m.tensor("weight", (WIDTH, WIDTH), dtype, scales, wide)
    bias_scales = [4e-3 * scale for scale in scales]
    bias = m.tensor("bias", (WIDTH,), "INT64", bias_scales, np.arange(WIDTH, dtype=np.int64))
    query, key = (m.tensor(name, SHAPE, scale=5e-3) for name in ("query", "key"))
    m.op("FULLY_CONNECTED", [x, weight, bias], [query], {"keepNumDims": True})
    m.op("FULLY_CONNECTED", [x, weight, -1], [key], {"keepNumDims": True})
    return query, key


def _add_attention(m: SmallTflite, query: int) -> int:
    """Probabilities of heads that look at themselves."""
    size = WIDTH // HEADS
    split = m.tensor("split", (1, ROWS, HEADS, size), scale=5e-3)
    m.op("RESHAPE", [query, _integers(m, "heads shape", 1, ROWS, HEADS, size)], [split])
    heads = m.tensor("heads", (1, HEADS, ROWS, size), scale=5e-3)
    m.op("TRANSPOSE", [split, _integers(m, "order", 0, 2, 1, 3)], [heads])
    scores = m.tensor("scores", (1, HEADS, ROWS, ROWS), scale=6e-3)
    m.op("BATCH_MATMUL", [heads, heads], [scores], {"adjY": True})
    probabilities = m.tensor("probabilities", (1, HEADS, ROWS, ROWS), scale=1 / 32768)
    m.op("SOFTMAX", [scores], [probabilities], {"beta": 1.0})
    return probabilities


def _add_gate(m: SmallTflite, past: int, key: int) -> tuple[int, int]:
    """Rows behind others, and something of the last ones as float32."""
    level = m.tensor("level", SHAPE, scale=5e-3)
    m.op("QUANTIZE", [past], [level])
    both = m.tensor("both", (1, 2 * ROWS, WIDTH), scale=5e-3)
    m.op("CONCATENATION", [level, key], [both], {"axis": 1})
    last = m.tensor("last", SHAPE, scale=5e-3)
    begin, size = _integers(m, "begin", 0, ROWS, 0), _integers(m, "size", *SHAPE)
    m.op("SLICE", [both, begin, size], [last])
    gate = m.tensor("gate", SHAPE, scale=1 / 32768)
    m.op("LOGISTIC", [last], [gate])
    difference = m.tensor("difference", SHAPE, scale=5e-3)
    m.op("SUB", [last, gate], [difference])
    real = m.tensor("real", SHAPE, "FLOAT32")
    m.op("DEQUANTIZE", [difference], [real])
    return both, real
