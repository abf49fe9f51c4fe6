"""Write a chunk of layers as ONNX in the calibrated scheme "a16w4": 16-bit integer activations.

Every value is uint16 with a scale and a zero point that are fixed here, from the ranges that a text
showed (`Ranges` of `compiler/calibration.py`), times HEADROOM. Weights are int4 in groups of 32
columns whose scales are an integer 1..16 times one of the row (LPBQ):

    <layer>.weight        int8 [N, K], -8..7
    <layer>.multipliers   uint8 [N, K/32], 1..16      <layer>.row_scales   float32 [N]

Names and shapes of inputs and outputs are those of `emitter.py`, as codes: uint16, and int8 for the
caches and the new rows, which have one symmetric scale each for keys and for values of a layer. The
graph does not write the caches. Places in them that hold no token may hold any codes.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
from numpy.typing import NDArray

from llamac.runtime.errors import ValuesInvalid
from llamac.schedules.quantized import Quantization, ValueRange
from llamac.schedules.rope import CacheShape
from llamac.targets.chunk import Chunk, Step
from llamac.targets.hadamard import hadamard_grid, hadamard_signs
from llamac.targets.qnn_htp.layer_graph import (
    HIDDEN,
    HIDDEN_OUT,
    MASK,
    ROPE_COS,
    ROPE_SIN,
    LayerGraph,
    interface,
    new_rows_name,
)
from llamac.targets.qnn_htp.onnx_file import OnnxFile
from llamac.targets.qnn_htp.qdq import Qdq

if TYPE_CHECKING:
    from llamac.targets.base import WeightReader

GROUP = 32

HEADROOM = 1.25
"""Of every range: a text shows no extremes, and one clamped code costs more than 2 dB."""

BRANCH_HEADROOM = 2.0
"""More for values of LoRA branches: few values, which vary, and small beside what they go to."""

BELOW = 16.0
"""How far masked scores are below all others: exp(-16) is 1e-7."""

SIGN = 127
"""Code of 1 in R4's matrices: with codes of 1, QNN's products have 29 dB only."""

_UNIT = Quantization("uint16", 2.0**-16)
_TURN = Quantization.symmetric(ValueRange(-1, 1), "uint16")


@dataclass(frozen=True)
class QuantizedInterface:
    """How every input and output of a graph is quantized."""

    tensors: Mapping[str, Quantization]


def write_quantized_chunk(
    chunk: Chunk, weights: WeightReader, ranges: Mapping[str, ValueRange], path: Path
) -> QuantizedInterface:
    """Write `path` and `path`.data.

    Args:
        chunk: some layers.
        weights: LPBQ of the linear layers, norms, and adaptors in any float dtype.
        ranges: of the values inside the chunk.
        path: of the ONNX file.

    Raises:
        CoverageError: a composite, or a form of one, that this scheme does not have.
        ValuesInvalid: a range is missing, or codes or scales are outside theirs.
    """
    with OnnxFile(path, chunk.name) as file:
        graph = _QuantizedGraph(chunk, weights, ranges, file)
        graph.run()
    names = (name for side in interface(chunk) for name in side)
    return QuantizedInterface({name: graph.qdq.made[name] for name in names})


class _QuantizedGraph(LayerGraph):
    cause = "the scheme a16w4 has uint16 activations, LPBQ weights of 4 bits, an int8 KV cache"
    fix = "compile this model for the CPU"

    def __init__(
        self,
        chunk: Chunk,
        weights: WeightReader,
        ranges: Mapping[str, ValueRange],
        file: OnnxFile,
    ) -> None:
        super().__init__(chunk, weights, file)
        self.ranges, self.qdq = ranges, Qdq(file)
        self.factors = _query_factors(chunk)

    def _declare(self, attention: Step) -> None:
        source = (1, *self._shape(self.chunk.source))
        self.qdq.input(HIDDEN, source, self._quantized(self.chunk.source))
        for name in (ROPE_COS, ROPE_SIN):
            self.qdq.input(name, self._turn_shape(attention), _TURN)
        lowest = min(
            _masked(self._score_range(step))
            for step in self.chunk.steps
            if step.kind == "llamac.attention"
        )
        mask = Quantization("uint16", float(np.float32(-lowest / 65535)), 65535)
        self.qdq.input(MASK, self._mask_shape(attention), mask)

    def _finish(self, sink: str, shape: tuple[int, ...]) -> None:
        self.file.output(HIDDEN_OUT, shape, self.qdq.made[sink].dtype)

    def _move(self, op: str, *args: str, result: str = "", **attrs: Any) -> str:
        return self.qdq.move(op, *args, result=result, **attrs)

    def _seen(self, label: str) -> ValueRange:
        """The range of a value, as it was seen."""
        if label not in self.ranges:
            raise ValuesInvalid(
                f"{self.chunk.name}: the range of {label} is not known",
                cause="the text that the model was calibrated with did not show this value",
                fix="calibrate the checkpoint that is compiled, not another form of it",
            )
        return self.ranges[label]

    def _range(self, name: str) -> ValueRange:
        """The range of a value of the chunk, with headroom."""
        factor = self.factors.get(name, 1.0) * HEADROOM
        return _scaled(self._seen(self.chunk.labels[name]), factor)

    def _quantized(self, name: str) -> Quantization:
        return Quantization.asymmetric(self._range(name), "uint16")

    def _score_range(self, step: Step) -> ValueRange:
        label = self.chunk.labels[step.results[0]]
        return _scaled(self._seen(f"{label}.scores"), HEADROOM)

    def _rms_norm(self, step: Step) -> str:
        x, name = step.args
        gamma = _floats(self.weights.read(name))
        seen = ValueRange(float(gamma.min()), float(gamma.max()))
        scale = self.qdq.constant(name, gamma, Quantization.asymmetric(seen, "uint16"))
        to = self._quantized(step.results[0])
        epsilon = float(step.attrs["eps"])
        return self.qdq.add(
            "RMSNormalization", self.values[x], scale, to=to, axis=-1, epsilon=epsilon
        )

    def _linear(self, step: Step) -> str:
        """Floats in the checkpoint only; here they have become LPBQ."""
        x, name = self.values[step.args[0]], step.args[1].removesuffix(".weight")
        result = step.results[0]
        return self._lpbq(x, name, self.factors.get(result, 1.0), self._quantized(result))

    def _qlinear(self, step: Step) -> str:
        x, name = self.values[step.args[0]], step.args[1].removesuffix(".weight")
        if step.attrs["weight"] != "int4" or step.attrs.get("group") != GROUP:
            raise self._refuse(f"a product with {step.attrs['weight']} weights", step)
        result = step.results[0]
        factor = self.factors.get(result, 1.0)
        adaptors = [n for n in step.args if ".adaptor." in n]
        if not adaptors:
            return self._lpbq(x, name, factor, self._quantized(result))
        branch = self._lora(x, adaptors, (1.0, factor * float(step.attrs["lora_scale"])))
        # The product alone is the sum, which was seen, less the branch.
        whole, part = self._range(result), self.qdq.made[branch]
        low, high = (float(part.dequantize(np.array(code))) for code in part.limits)
        alone = ValueRange(whole.low - high, whole.high - low)
        product = self._lpbq(x, name, factor, Quantization.asymmetric(alone, "uint16"))
        return self.qdq.add("Add", product, branch, to=self._quantized(result))

    def _lpbq(self, x: str, name: str, factor: float, to: Quantization) -> str:
        codes = self.weights.read(f"{name}.weight")
        multipliers = self.weights.read(f"{name}.multipliers")
        scales = self.weights.read(f"{name}.row_scales")
        _check_lpbq(name, codes, multipliers, scales)
        weight = self.file.int4_weight(f"{name}.weight", np.ascontiguousarray(codes.T))
        groups = self.file.weight(f"{name}.multipliers", np.ascontiguousarray(multipliers.T))
        narrow = (scales.astype(np.float64) * factor).astype(np.float32)
        return self.qdq.groups_product(x, weight, groups, narrow, codes.shape[1], GROUP, to)

    def _lora(self, x: str, adaptors: list[str], factors: tuple[float, float]) -> str:
        """The branch factor * B (A x), with int8 weights; factors go into their scales."""
        seen_as = (1.0, factors[1])
        for name, factor, part in zip(adaptors, factors, seen_as, strict=True):
            codes, scales = row_codes(_floats(self.weights.read(name)))
            weight = self.file.weight(name, np.ascontiguousarray(codes.T))
            label = name.removesuffix(".weight")
            shrink = 1.0 if label.endswith("A") else part
            seen = _scaled(self._seen(label), BRANCH_HEADROOM * shrink)
            to = Quantization.asymmetric(seen, "uint16")
            x = self.qdq.rows_product(x, weight, scales * np.float32(factor), to)
        return x

    def _transform(self, grid: str, step: Step, *, is_last: bool) -> str:
        rows, columns = hadamard_grid(self._shape(step.args[0])[1])
        size = rows if is_last else columns
        label = f"{self.chunk.labels[step.results[0]]}.columns"
        middle = Quantization.asymmetric(_scaled(self._seen(label), HEADROOM), "uint16")
        to = self._quantized(step.results[0]) if is_last else middle
        signs = self.file.constant(hadamard_signs(size) * np.int8(SIGN))
        scales = np.full(size, size**-0.5 / SIGN, np.float32)
        return self.qdq.rows_product(grid, signs, scales, to)

    def _turned(self, step: Step, even: str, odd: str) -> tuple[str, str]:
        to = self._quantized(step.results[0])
        part = self.qdq.made[even]

        def turned(first: str, second: str, op: str) -> str:
            products = (
                self.qdq.add("Mul", pair, turn, to=part)
                for pair, turn in ((even, first), (odd, second))
            )
            return self.qdq.add(op, *products, to=to)

        return turned(ROPE_COS, ROPE_SIN, "Sub"), turned(ROPE_SIN, ROPE_COS, "Add")

    def _check_caches(self, shape: CacheShape, step: Step) -> None:
        if shape.dtype != "int8" or not shape.is_valid:
            raise self._refuse(f"attention over {shape}", step)

    def _cache_made(self, x: str) -> Quantization:
        return Quantization.symmetric(self._range(x), "int8")

    def _cache(self, name: str, shape: tuple[int, ...]) -> str:
        return self.qdq.input(name, shape, self.qdq.made[new_rows_name(name)])

    def _new_rows(self, x: str, cache: str) -> str:
        """Codes first, then places: QNN joins the reverse to a step that rounds down for T = 1."""
        name, to = new_rows_name(cache), self._cache_made(x)
        rows, shape = self._rows_of(self.qdq.convert(self.values[x], to), cache)
        self.file.output(name, shape, to.dtype)
        return self._transpose(rows, 1, 0, 2, result=name)

    def _query(self, value: str, size: int) -> str:
        """Queries are divided by sqrt(D) already: the scales of wq are."""
        return value

    def _scores(self, step: Step, rows: str, keys: str) -> str:
        to = Quantization.asymmetric(self._score_range(step), "uint16")
        return self.qdq.add("MatMul", rows, keys, to=to)

    def _softmax(self, step: Step, scores: str) -> str:
        """Sums below the lowest score less BELOW are clamped to that, whatever the mask is."""
        seen = self._score_range(step)
        to = Quantization.asymmetric(ValueRange(min(seen.low, 0.0) - BELOW, seen.high), "uint16")
        masked = self.qdq.add("Add", scores, MASK, to=to)
        return self.qdq.add("Softmax", masked, to=_UNIT, axis=-1)

    def _mixed(self, step: Step, parts: list[tuple[str, str]]) -> str:
        """Weights sum up to 1 at most, so that no part exceeds the largest value."""
        largest = self._range(step.args[2])
        part = Quantization.asymmetric(largest, "uint16")
        products = [self.qdq.add("MatMul", *pair, to=part) for pair in parts]
        return self.qdq.add("Add", *products, to=self._quantized(step.results[0]))

    def _swiglu(self, step: Step) -> str:
        gate, up = (self.values[name] for name in step.args)
        opened = self.qdq.add("Sigmoid", gate, to=_UNIT)
        inner = self.qdq.add("Mul", opened, up, to=self.qdq.made[up])
        return self.qdq.add("Mul", inner, gate, to=self._quantized(step.results[0]))

    def _add(self, step: Step) -> str:
        first, second = (self.values[name] for name in step.args)
        result = HIDDEN_OUT if step.results[0] == self.chunk.sink else ""
        return self.qdq.add(
            "Add", first, second, to=self._quantized(step.results[0]), result=result
        )


def _query_factors(chunk: Chunk) -> dict[str, float]:
    """1 / sqrt(D) for queries, before and after RoPE: so much smaller are the scales of wq."""
    made_by = {name: step for step in chunk.steps for name in step.results}
    factors = {}
    for step in (step for step in chunk.steps if step.kind == "llamac.attention"):
        query = step.args[0]
        for name in (query, made_by[query].args[0]):
            factors[name] = 1 / math.sqrt(step.attrs["head_dim"])
    return factors


def _masked(scores: ValueRange) -> float:
    """What brings the highest score BELOW the lowest."""
    return min(scores.low, 0.0) - max(scores.high, 0.0) - BELOW


def _scaled(seen: ValueRange, factor: float) -> ValueRange:
    return ValueRange(seen.low * factor, seen.high * factor)


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


def _check_lpbq(
    name: str, codes: NDArray[Any], multipliers: NDArray[Any], scales: NDArray[Any]
) -> None:
    rows, columns = codes.shape
    good = (
        codes.dtype == np.int8
        and multipliers.dtype == np.uint8
        and multipliers.shape == (rows, columns // GROUP)
        and scales.shape == (rows,)
        and codes.min() >= -8
        and codes.max() <= 7
        and multipliers.min() >= 1
        and multipliers.max() <= 16
        and bool((np.isfinite(scales) & (scales > 0)).all())
    )
    if not good:
        raise ValuesInvalid(
            f"{name} holds {codes.dtype} codes {list(codes.shape)}, multipliers "
            f"{list(multipliers.shape)} and row scales {list(scales.shape)} that are not LPBQ",
            cause="LPBQ has codes -8..7, multipliers 1..16 by groups of 32, row scales above 0",
            fix="re-express the weights for this scheme",
        )
