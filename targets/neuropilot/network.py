"""Translate a .tflite into a network file, which our runner builds on a phone.

    layers.tflite ─▶ write_network ─▶ layers.neuron ─▶ runtime/c/neuron ─▶ the phone's adapter

The way of LiteRT's own plug-in for MediaTek is followed, operation by operation, and tests compare
the calls of both. Where it loses something we differ:

* int4 weights before version 9 of the adapter: LiteRT gives them without their channels' scales.
  Here the runner widens them to 8 bits and keeps the scales.
* a FULLY_CONNECTED with more than two dimensions gets a RESHAPE behind it before version 9, as with
  LiteRT, whose shape tensor has a wrong last value.

Weights in groups are refused: the adapter has no type for them.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from types import ModuleType
from typing import Any

import numpy as np

from llamac.runtime.errors import CoverageError, ToolchainMissing
from llamac.runtime.graph_entry import GraphTensorEntry
from llamac.targets.neuropilot.network_file import Kind, NetworkFile, NetworkWriter, OperandType
from llamac.targets.neuropilot.network_tensors import Tensors, uncovered, words

FIRST_MAJOR_WITH_RANKS = 9
"""From this version of the adapter on a FULLY_CONNECTED may have more than two dimensions."""
OLDEST_MAJOR = 8
"""The version of most SoCs that LiteRT's plug-in lists."""

_CODES = {
    "ADD": 0,
    "CONCATENATION": 2,
    "DEQUANTIZE": 6,
    "FULLY_CONNECTED": 9,
    "LOGISTIC": 14,
    "MUL": 18,
    "RESHAPE": 22,
    "SOFTMAX": 25,
    "MEAN": 31,
    "SUB": 36,
    "TRANSPOSE": 37,
    "QUANTIZE": 72,
    "RSQRT": 83,
    "SLICE": 86,
    "BATCH_MATMUL": 102,
}
_DTYPES = {"FLOAT32": "float32", "FLOAT16": "float16", "INT32": "int32", "INT16": "int16"}
_DTYPES |= {"INT8": "int8", "UINT8": "uint8"}
_CLAMPS = 4  # NONE, RELU, RELU_N1_TO_1, RELU6 have equal numbers on both sides


@dataclass(frozen=True)
class Network:
    """A network file that was written, and what goes in and out."""

    file: NetworkFile
    inputs: tuple[GraphTensorEntry, ...]
    outputs: tuple[GraphTensorEntry, ...]


def write_network(
    tflite: Path, out: Path, *, neuropilot: int = OLDEST_MAJOR, options: str = ""
) -> Network:
    """Translate the only graph of a .tflite.

    Args:
        tflite: operations as in `_CODES`, static shapes, int16, int8, uint8 or float activations,
            weights quantized per tensor or channel. It stays mapped until the file is written.
        out: the network file.
        neuropilot: first number of the oldest adapter version that shall build it.
        options: for the adapter's compiler.

    Raises:
        CoverageError: something has no translation; it names the operation and the tensor.
        ToolchainMissing: ai-edge-litert, which knows the format, is not installed.
    """
    schema = _schema()
    data = np.memmap(tflite, np.uint8, "r") if tflite.stat().st_size else np.zeros(0, np.uint8)
    if data[4:8].tobytes() != b"TFL3":
        raise uncovered(f"{tflite.name} is no .tflite file", "its identifier is not TFL3")
    model = schema.ModelT.InitFromObj(schema.Model.GetRootAs(data, 0))
    tensors, writer = Tensors(schema, model, data), NetworkWriter(neuropilot, options)
    return _Translator(model, words(schema.BuiltinOperator), tensors, writer, neuropilot).write(out)


def _schema() -> ModuleType:
    try:
        from ai_edge_litert import schema_py_generated  # noqa: PLC0415
    except ImportError as error:
        raise ToolchainMissing(
            "the Python package ai-edge-litert is not installed",
            cause="it knows the format of .tflite files",
            fix="pip install 'llamac[apu]'",
        ) from error
    module: ModuleType = schema_py_generated
    return module


class _Translator:
    """One graph on its way; operands are added when an operation first mentions them."""

    def __init__(
        self,
        model: Any,
        builtins: dict[int, str],
        tensors: Tensors,
        writer: NetworkWriter,
        neuropilot: int,
    ) -> None:
        self._model, self._builtins = model, builtins
        self._graph = model.subgraphs[0]
        self._tensors, self._writer, self._neuropilot = tensors, writer, neuropilot
        self._operands: dict[int, int] = {}

    def write(self, out: Path) -> Network:
        inputs, outputs = self._side("inputs", Kind.INPUT), self._side("outputs", Kind.OUTPUT)
        for operator in self._graph.operators:
            self._operation(operator)
        numbers = ([self._operands[index] for index in side] for side in (inputs, outputs))
        file = self._writer.write(out, *numbers)
        entries = (tuple(self._entry(index) for index in side) for side in (inputs, outputs))
        return Network(file, *entries)

    def _side(self, side: str, kind: Kind) -> list[int]:
        """Add the graph's inputs or outputs; each tensor may be one of them only once."""
        indices = [int(index) for index in getattr(self._graph, side)]
        for index in indices:
            if index in self._operands or self._tensors.constant(index) is not None:
                why = "it is constant, or more than once among the graph's inputs and outputs"
                raise self._tensors.refuse(index, why)
            self._operand(index, kind)
        return indices

    def _entry(self, index: int) -> GraphTensorEntry:
        tensors = self._tensors
        return GraphTensorEntry(
            tensors.name(index), tensors.shape(index), _DTYPES[tensors.dtype(index)]
        )

    def _operand(self, index: int, kind: Kind = Kind.TEMPORARY) -> int:
        """The operand of a tensor."""
        if index not in self._operands:
            tensors = self._tensors
            scales, zero_point = tensors.quantization(index)
            type_, data = tensors.typed(index)
            per_channel = len(scales) > 1
            self._operands[index] = self._writer.operand(
                type_,
                tensors.shape(index),
                kind=kind,
                name=tensors.name(index),
                scale=scales[0] if len(scales) == 1 else 0.0,
                zero_point=zero_point,
                scales=scales if per_channel else (),
                channel_dim=tensors.channel_dim(index) if per_channel else 0,
                data=data,
            )
        return self._operands[index]

    def _operation(self, operator: Any) -> None:
        code = self._model.operatorCodes[operator.opcodeIndex]
        word = self._builtins.get(max(code.builtinCode, code.deprecatedBuiltinCode), "?")
        inputs, outputs = ([int(i) for i in side] for side in (operator.inputs, operator.outputs))
        self._tensors.operation = f"{word} '{self._tensors.name(outputs[0]) if outputs else '?'}'"
        if word not in _CODES:
            raise self._refuse("the adapter is not known to have it")
        given = [self._operand(index) for index in inputs if index >= 0]
        if word in _OPTIONS:
            given += _OPTIONS[word](self, operator, inputs)
        if word == "FULLY_CONNECTED":
            self._fully_connected(given, outputs[0])
        else:
            self._add(word, given, [self._operand(index) for index in outputs])

    def _add(self, word: str, inputs: list[int], outputs: list[int]) -> None:
        self._writer.operation(_CODES[word], inputs, outputs, self._tensors.operation)

    def _refuse(self, why: str) -> CoverageError:
        return uncovered(f"{self._tensors.operation} has no form in a network file", why)

    def _fully_connected(self, inputs: list[int], output: int) -> None:
        """With two dimensions for older adapters, and a RESHAPE behind it."""
        shape, result = self._tensors.shape(output), self._operand(output)
        if len(shape) <= 2 or self._neuropilot >= FIRST_MAJOR_WITH_RANKS:
            self._add("FULLY_CONNECTED", inputs, [result])
            return
        scales, zero_point = self._tensors.quantization(output)
        rows = int(np.prod(shape[:-1]))
        flat = self._writer.operand(
            self._tensors.typed(output)[0],
            (rows, shape[-1]),
            scale=scales[0] if scales else 0.0,
            zero_point=zero_point,
        )
        self._add("FULLY_CONNECTED", inputs, [flat])
        self._add("RESHAPE", [flat, self._integers(shape)], [result])

    def _integers(self, values: tuple[int, ...]) -> int:
        data = np.array(values, "<i4")
        return self._writer.operand(OperandType.TENSOR_INT32, (len(values),), data=data)

    def _scalar(self, type_: OperandType, value: float) -> int:
        dtype = {OperandType.BOOL: "u1", OperandType.FLOAT32: "<f4"}.get(type_, "<i4")
        return self._writer.operand(type_, (), data=np.array([value], dtype))

    # ---- What follows the inputs of an operation: its options, as operands ----

    def _clamp(self, operator: Any, inputs: list[int]) -> list[int]:
        options = operator.builtinOptions
        function = options.fusedActivationFunction if options else 0
        if function >= _CLAMPS:
            raise self._refuse(f"its activation function has number {function}")
        return [self._scalar(OperandType.INT32, function)]

    def _linear(self, operator: Any, inputs: list[int]) -> list[int]:
        """A bias if there is none, and the activation function."""
        if operator.builtinOptions and operator.builtinOptions.weightsFormat:
            raise self._tensors.refuse(inputs[1], "its weights are shuffled")
        bias = []
        if len(inputs) < 3 or inputs[2] < 0:
            rows = self._tensors.shape(inputs[1])[0]
            is_float = self._tensors.dtype(inputs[0]) == "FLOAT32"
            type_ = OperandType.TENSOR_FLOAT32 if is_float else OperandType.TENSOR_INT32
            sides = [self._tensors.quantization(index)[0] for index in inputs[:2]]
            scale = float(np.prod(sides)) if all(len(side) == 1 for side in sides) else 0.0
            zeros = np.zeros(rows, "<i4")
            bias.append(self._writer.operand(type_, (rows,), scale=scale, data=zeros))
        return [*bias, *self._clamp(operator, inputs)]

    def _matmul(self, operator: Any, inputs: list[int]) -> list[int]:
        options = operator.builtinOptions
        sides = (options.adjX, options.adjY) if options else (False, False)
        return [self._scalar(OperandType.BOOL, side) for side in sides]

    def _mean(self, operator: Any, inputs: list[int]) -> list[int]:
        keep = bool(operator.builtinOptions and operator.builtinOptions.keepDims)
        return [self._scalar(OperandType.INT32, keep)]

    def _softmax(self, operator: Any, inputs: list[int]) -> list[int]:
        beta = operator.builtinOptions.beta if operator.builtinOptions else 1.0
        return [self._scalar(OperandType.FLOAT32, beta)]

    def _concatenation(self, operator: Any, inputs: list[int]) -> list[int]:
        options = operator.builtinOptions
        if options and options.fusedActivationFunction:
            raise self._refuse("it has an activation function")
        axis = options.axis if options else 0
        axis += len(self._tensors.shape(inputs[0])) if axis < 0 else 0
        return [self._scalar(OperandType.INT32, axis)]

    def _reshape(self, operator: Any, inputs: list[int]) -> list[int]:
        """The shape, if it is an option and no input."""
        return [] if len(inputs) > 1 else [self._integers(self._tensors.shape(operator.outputs[0]))]


_OPTIONS: dict[str, Callable[[_Translator, Any, list[int]], list[int]]] = {
    "ADD": _Translator._clamp,
    "MUL": _Translator._clamp,
    "SUB": _Translator._clamp,
    "FULLY_CONNECTED": _Translator._linear,
    "BATCH_MATMUL": _Translator._matmul,
    "MEAN": _Translator._mean,
    "SOFTMAX": _Translator._softmax,
    "CONCATENATION": _Translator._concatenation,
    "RESHAPE": _Translator._reshape,
}
