"""Write a chunk of layers as a .tflite with int16 activations, for MediaTek's APU.

Every value has a scale that is fixed here, from the ranges that a text showed (`Ranges` of
`compiler/calibration.py`), times HEADROOM. Weights are int8 ("a16w8") or int4 ("a16w4"), with one
scale for each row. Groups of columns with scales of their own are refused by MediaTek's compiler
plug-in for LiteRT, so weights come here re-expressed:

    <layer>.weight   int8 [N, K], -127..127 or -8..7      <layer>.scales   float32 [N]

Interface of every graph, all int16 with one scale each (T tokens, C capacity, H heads, D head
size), in names and shapes that of `qnn_htp/emitter.py`:

    hidden                  [1, T, K]            the residual stream
    rope_cos, rope_sin      [T, 1, D/2, 1]       rows of the RoPE table
    mask                    [T, C + T]           0 where a key is seen, its lowest code where not
    layers.<i>.k_cache      [Hkv, C/16, D, 16]   keys after RoPE, in transposed blocks
    layers.<i>.v_cache      [Hkv, C, D]          values
    -> hidden_out           [1, T, K]
    -> layers.<i>.k_new ... [Hkv, T, D]          new keys and values, in the scales of the caches

The graph does not write the caches. Places in them that hold no token may hold any codes.

Only operations that MediaTek's plug-in takes are used, and of their forms those that need no steps
over single elements: RoPE turns pairs by a product with a matrix of signs.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
from numpy.typing import NDArray

from llamac.runtime.errors import CoverageError, ValuesInvalid
from llamac.schedules.quantized import Quantization, ValueRange
from llamac.targets.chunk import Chunk, Step
from llamac.targets.hadamard import hadamard_grid, hadamard_signs
from llamac.targets.neuropilot.attention import Attention, Positions
from llamac.targets.neuropilot.norm import NormRanges, rms_norm
from llamac.targets.neuropilot.operations import Operations
from llamac.targets.neuropilot.tflite_file import TfliteFile, Value

if TYPE_CHECKING:
    from llamac.targets.base import WeightReader

HIDDEN, HIDDEN_OUT, ROPE_COS, ROPE_SIN, MASK = "hidden hidden_out rope_cos rope_sin mask".split()

HEADROOM = 1.25
"""Of every range: a text shows no extremes, and one clamped code costs more than 2 dB."""

BRANCH_HEADROOM = 2.0
"""More for values of LoRA branches: few values, which vary, and small beside what they go to."""

SCHEMES = {"a16w8": ("int8", -127, 127), "a16w4": ("int4", -8, 7)}
"""dtype of the weights, lowest and highest code."""

_LEAST_SILU = 0.2785  # x * sigmoid(x) is above -0.27847


@dataclass(frozen=True)
class QuantizedInterface:
    """How every input and output of a graph is quantized."""

    tensors: Mapping[str, Quantization]


def write_chunk(
    chunk: Chunk, weights: WeightReader, ranges: Mapping[str, ValueRange], scheme: str, path: Path
) -> QuantizedInterface:
    """Write `path`.

    Args:
        chunk: some layers.
        weights: codes and scales by rows, norms, and adaptors in any float dtype.
        ranges: of the values inside the chunk.
        scheme: "a16w8" or "a16w4".
        path: of the .tflite.

    Raises:
        CoverageError: a composite, or a form of one, that this scheme does not have.
        ValuesInvalid: a range is missing, or codes or scales are outside theirs.
    """
    with TfliteFile(path, chunk.name) as file:
        emitter = _Emitter(chunk, weights, ranges, scheme, file)
        emitter.run()
    return QuantizedInterface(emitter.interface)


class _Emitter:
    """Adds the operations of a chunk's steps to a file."""

    def __init__(
        self,
        chunk: Chunk,
        weights: WeightReader,
        ranges: Mapping[str, ValueRange],
        scheme: str,
        file: TfliteFile,
    ) -> None:
        if scheme not in SCHEMES:
            raise CoverageError(
                f"{chunk.name}: there is no scheme {scheme!r} for MediaTek's APU",
                cause=f"schemes are {', '.join(SCHEMES)}",
                fix="choose one of them",
            )
        self.chunk, self.weights, self.ranges, self.scheme = chunk, weights, ranges, scheme
        self.file, self.ops = file, Operations(file)
        self.interface: dict[str, Quantization] = {}
        self.values: dict[str, Value] = {}

    def run(self) -> None:
        """Emit everything."""
        emitters: dict[str, Callable[[Step], Value]] = {
            "llamac.rms_norm": self._rms_norm,
            "llamac.qlinear": self._linear,
            "llamac.linear": self._linear,
            "llamac.hadamard": self._hadamard,
            "llamac.rope": self._rope,
            "llamac.attention": self._attention,
            "llamac.swiglu": self._swiglu,
            "llamac.add": self._add,
        }
        for step in self.chunk.steps:
            if step.kind not in emitters:
                raise self._refuse(step.kind, step)
        self._declare()
        for step in self.chunk.steps:
            value = emitters[step.kind](step)
            self.values[step.results[0]] = value
            self.file.rename(value, self.chunk.labels[step.results[0]])
        sink = self.values[self.chunk.sink]
        self._output(self.ops.reshape(sink, 1, *sink.shape), HIDDEN_OUT)

    def _declare(self) -> None:
        """Declare the inputs that all layers share."""
        attentions = [step for step in self.chunk.steps if step.kind == "llamac.attention"]
        if not attentions:
            raise self._refuse("a run of layers without attention", self.chunk.steps[0])
        first = attentions[0]
        tokens, half = self.chunk.tokens, first.attrs["head_dim"] // 2
        width, capacity = self._shape(self.chunk.source)[1], self._shape(first.args[5])[1]
        source = self._quantized(self._label(self.chunk.source))
        hidden = self._input(HIDDEN, (1, tokens, width), source)
        self.values[self.chunk.source] = self.ops.reshape(hidden, tokens, width)
        turn = Quantization.symmetric(ValueRange(-1, 1), "int16")
        turns = [self._input(name, (tokens, 1, half, 1), turn) for name in (ROPE_COS, ROPE_SIN)]
        largest = max(self._scores(step) for step in attentions)
        masked = Quantization.symmetric(ValueRange(Positions.masked(largest), 0), "int16")
        mask = self._input(MASK, (tokens, capacity + tokens), masked)
        self.positions = Positions(self.ops, turns[0], turns[1], mask)

    def _refuse(self, what: str, step: Step) -> CoverageError:
        places = [name for name in step.args if self.chunk.specs[name].is_param]
        return CoverageError(
            f"{self.chunk.name}: {what} ({', '.join(places) or 'no weights'}) has no form on "
            f"MediaTek's APU in the scheme {self.scheme}",
            cause="the scheme has int16 activations and caches, and weights with scales by rows",
            fix="compile this model for the CPU",
        )

    def _shape(self, name: str) -> tuple[int, ...]:
        return self.chunk.specs[name].shape

    def _label(self, name: str) -> str:
        return self.chunk.labels[name]

    def _seen(self, label: str) -> ValueRange:
        """The range of a value, as it was seen."""
        if label not in self.ranges:
            raise ValuesInvalid(
                f"{self.chunk.name}: the range of {label} is not known",
                cause="the text that the model was calibrated with did not show this value",
                fix="calibrate the checkpoint that is compiled, not another form of it",
            )
        return self.ranges[label]

    def _range(self, label: str) -> ValueRange:
        """The range of a value, with headroom."""
        seen = self._seen(label)
        return ValueRange(seen.low * HEADROOM, seen.high * HEADROOM)

    def _quantized(self, label: str) -> Quantization:
        return Quantization.symmetric(self._range(label), "int16")

    def _scale(self, step: Step) -> float:
        """Of the value that a step makes."""
        return self._quantized(self._label(step.results[0])).scale

    def _scores(self, step: Step) -> float:
        """The largest magnitude of scores."""
        return self._range(f"{self._label(step.results[0])}.scores").largest

    def _input(self, name: str, shape: tuple[int, ...], quantization: Quantization) -> Value:
        self.interface[name] = quantization
        return self.file.input(name, shape, quantization.scale)

    def _output(self, value: Value, name: str) -> None:
        self.interface[name] = Quantization("int16", value.scale)
        self.file.output(value, name)

    def _rms_norm(self, step: Step) -> Value:
        x, gamma = step.args
        label = self._label(step.results[0])
        ranges = NormRanges(
            self._seen(f"{label}.mean_square"), self._range(f"{label}.unit").largest
        )
        values = _floats(self.weights.read(gamma))
        eps = float(step.attrs["eps"])
        return rms_norm(self.ops, self.values[x], values, eps, ranges, self._scale(step))

    def _linear(self, step: Step) -> Value:
        x, name = self.values[step.args[0]], step.args[1].removesuffix(".weight")
        adaptors = [n for n in step.args if ".adaptor." in n]
        codes, scales = self._codes(step, name)
        index = self.file.weight(step.args[1], codes, scales, SCHEMES[self.scheme][0])
        rows, scale = len(codes), self._scale(step)
        if not adaptors:
            return self.ops.fully_connected(x, index, rows, scale)
        # The product alone is the sum, which was seen, less the branch.
        branch = self._lora(x, name, adaptors, float(step.attrs["lora_scale"]))
        product = self.ops.fully_connected(x, index, rows, scale + branch.scale)
        return self.ops.add(product, branch, scale)

    def _codes(self, step: Step, name: str) -> tuple[NDArray[np.int8], NDArray[np.float32]]:
        """Codes and scales of a layer, checked."""
        _, lowest, highest = SCHEMES[self.scheme]
        scales = self.weights.read(f"{name}.scales")
        codes = self.weights.read(f"{name}.weight")
        if scales.ndim != 1:
            raise self._refuse("a product with weights in groups", step)
        low, high = int(codes.min()), int(codes.max())
        if codes.dtype != np.int8 or low < lowest or high > highest:
            raise ValuesInvalid(
                f"{name}.weight holds {codes.dtype} codes from {low} to {high}",
                cause=f"the scheme {self.scheme} has int8 codes from {lowest} to {highest}",
                fix="re-express the weights for this scheme",
            )
        if scales.shape != codes.shape[:1] or not (np.isfinite(scales) & (scales > 0)).all():
            raise ValuesInvalid(
                f"{name}.scales, {list(scales.shape)} from {scales.min():g} to {scales.max():g}, "
                f"are no scales of {len(codes)} rows",
                cause="a row has one finite scale above 0",
                fix="re-express the weights for this scheme",
            )
        return codes, scales.astype(np.float32)

    def _lora(self, x: Value, name: str, adaptors: list[str], factor: float) -> Value:
        """The branch factor * B (A x), with int8 weights; its factor goes into B's scales."""
        for adaptor, by in zip(adaptors, (1.0, factor), strict=True):
            codes, scales = row_codes(_floats(self.weights.read(adaptor)))
            index = self.file.weight(adaptor, codes, scales * np.float32(by), "int8")
            made = self._quantized(adaptor.removesuffix(".weight"))
            scale = made.scale * BRANCH_HEADROOM
            x = self.ops.fully_connected(x, index, len(codes), scale)
        return x

    def _hadamard(self, step: Step) -> Value:
        """Two matrix products, the left one by turning the grid: weights come second."""
        x, label = self.values[step.args[0]], self._label(step.results[0])
        tokens, width = x.shape
        rows, columns = hadamard_grid(width)
        if rows * columns != width:
            raise self._refuse(f"a Hadamard transform of {width} columns", step)
        middle = self._quantized(f"{label}.columns").scale
        grid = self.ops.reshape(x, tokens * rows, columns)
        grid = self.ops.signs(grid, hadamard_signs(columns), columns**-0.5, middle)
        grid = self.ops.transpose(self.ops.reshape(grid, tokens, rows, columns), 0, 2, 1)
        grid = self.ops.reshape(grid, tokens * columns, rows)
        grid = self.ops.signs(grid, hadamard_signs(rows), rows**-0.5, self._scale(step))
        grid = self.ops.transpose(self.ops.reshape(grid, tokens, columns, rows), 0, 2, 1)
        return self.ops.reshape(grid, tokens, width)

    def _rope(self, step: Step) -> Value:
        """Turn the pairs of q or k; q is divided by sqrt(D) on the way, for the scores."""
        x, size = self.values[step.args[0]], step.attrs["head_dim"]
        is_query = any(
            s.kind == "llamac.attention" and s.args[0] == step.results[0] for s in self.chunk.steps
        )
        factor = 1 / math.sqrt(size) if is_query else 1.0
        return self.positions.turn(x, size, factor, self._scale(step) * factor)

    def _attention(self, step: Step) -> Value:
        q, k, v, _, k_cache, v_cache, *_ = step.args
        heads, capacity, size = self._shape(v_cache)
        if capacity % 16:
            raise self._refuse(f"attention over {capacity} positions", step)
        caches = [
            self._input(name, shape, Quantization("int16", self.values[new].scale))
            for name, new, shape in (
                (k_cache, k, (heads, capacity // 16, size, 16)),
                (v_cache, v, (heads, capacity, size)),
            )
        ]
        attention = Attention(self.ops, self.positions, self._scores(step), self._scale(step))
        new = [attention.rows(self.values[name], heads) for name in (k, v)]
        for name, rows in zip((k_cache, v_cache), new, strict=True):
            self._output(rows, new_rows_name(name))
        return attention.attend(self.values[q], caches, new)

    def _swiglu(self, step: Step) -> Value:
        gate, up = (self.values[name] for name in step.args)
        high = max(self._range(self._label(step.args[0])).high, 0.0)
        largest = max(high / (1 + math.exp(-high)), _LEAST_SILU)
        silu = Quantization.symmetric(ValueRange(0, largest), "int16")
        inner = self.ops.multiply(gate, self.ops.logistic(gate), silu.scale)
        return self.ops.multiply(inner, up, self._scale(step))

    def _add(self, step: Step) -> Value:
        first, second = (self.values[name] for name in step.args)
        return self.ops.add(first, second, self._scale(step))


def new_rows_name(cache: str) -> str:
    """The output that goes with a cache: "layers.0.k_cache" -> "layers.0.k_new"."""
    return cache.removesuffix("_cache") + "_new"


def row_codes(values: NDArray[np.float32]) -> tuple[NDArray[np.int8], NDArray[np.float32]]:
    """int8 codes and scales of a matrix, by rows."""
    largest = np.abs(values).max(axis=1, keepdims=True)
    scales = np.where(largest > 0, largest / np.float32(127), np.float32(1))
    return np.rint(values / scales).astype(np.int8), scales[:, 0].astype(np.float32)


def _floats(values: NDArray[Any]) -> NDArray[np.float32]:
    """float32 of any float dtype; uint16 holds the bits of bfloat16."""
    if values.dtype == np.uint16:
        return (values.astype(np.uint32) << 16).view(np.float32)
    return values.astype(np.float32)
