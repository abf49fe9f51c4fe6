"""Write a chunk of layers as ONNX in the scheme that HTP takes without calibration.

Activations are float16; int4 weights in groups stay as they are in the checkpoint, as MatMulNBits
with float16 scales. There is no dynamic quantization of activations on HTP, so the activation rule
of the checkpoint is not applied: results are nearer to the float model than the CPU's are.

Interface of every graph, all float16 (T tokens, C capacity, H heads, D head size):

    hidden                  [1, T, K]            the residual stream
    rope_cos, rope_sin      [T, 1, D/2, 1]       rows of the RoPE table
    mask                    [T, C + T]           0 where a key is seen, MASKED where not
    layers.<i>.k_cache      [Hkv, C/16, D, 16]   keys after RoPE, in transposed blocks
    layers.<i>.v_cache      [Hkv, C, D]          values
    -> hidden_out           [1, T, K]
    -> layers.<i>.k_new ... [Hkv, T, D]          new keys and values, for the caller to append

The caches are those of the CPU (`schedules/rope.py`), bit for bit, so that both can share one. The
graph does not write them: it attends over the caches and then over the new keys. Places that hold
no token may hold any finite numbers. Infinities and NaN are not allowed there: in Qualcomm's
library they do nothing on v69 and v75, and those of keys spoil the result on v81.
Values [T, K] of the IR are [1, T, K] here: QNN takes MatMulNBits of no other rank.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
from numpy.typing import NDArray

from llamac.runtime.errors import ValuesInvalid
from llamac.schedules.positions import MASKED
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
from llamac.targets.qnn_htp.onnx_file import CONTRIB, OnnxFile

if TYPE_CHECKING:
    from llamac.targets.base import WeightReader

__all__ = [
    "HIDDEN",
    "HIDDEN_OUT",
    "MASK",
    "ROPE_COS",
    "ROPE_SIN",
    "exact_factors",
    "float16_writer",
    "hadamard_pair",
    "interface",
    "mask_rows",
    "new_rows_name",
    "pack_int4",
    "write_chunk",
]

LIMIT = 30000.0
"""Scores are at most this where the mask is 0, and at most -LIMIT where it is MASKED.

A minimum and no sum: keys in unused places of the cache may have scores of any size, even infinite
ones. No difference of two scores overflows.
"""

EXP_FLOOR = -40.0
"""exp() of anything below -17.4 is 0 in float16."""

_GROUPS = (16, 32, 64, 128)
_F16 = np.float16


def write_chunk(chunk: Chunk, weights: WeightReader, path: Path) -> None:
    """Write `path` and `path`.data.

    Raises:
        CoverageError: a composite, or a form of one, that this scheme does not have.
        ValuesInvalid: scales or adaptors outside float16's range.
    """
    with OnnxFile(path, chunk.name) as file:
        _Float16Graph(chunk, weights, file).run()


def float16_writer(weights: WeightReader) -> Callable[[Chunk, Path], None]:
    """Return `write_chunk` for these weights."""
    return lambda chunk, path: write_chunk(chunk, weights, path)


def mask_rows(position: int, tokens: int, capacity: int) -> NDArray[np.float16]:
    """The mask of a chunk whose first token stands at `position`: [T, C + T]."""
    mask = np.full((tokens, capacity + tokens), MASKED, _F16)
    mask[:, :position] = 0
    mask[:, capacity:][np.tril_indices(tokens)] = 0
    return mask


def exact_factors(value: float) -> tuple[float, float]:
    """Two float16 numbers whose product is `value` to about 1e-7; the first near its square root.

    One float16 alone is off by up to 2^-12, the same for every value.
    """
    root = _F16(math.sqrt(value))
    bits = np.arange(-256, 257) + int(root.view(np.uint16))
    first = bits.astype(np.uint16).view(_F16).astype(np.float64)
    second = (value / first).astype(_F16).astype(np.float64)
    best = int(np.argmin(np.abs(first * second - value)))
    return float(first[best]), float(second[best])


def hadamard_pair(length: int) -> tuple[NDArray[np.float16], NDArray[np.float16]]:
    """Matrices L [r, r] and R [c, c] with H(x) = L X R for x as X [r, c], r * c = length."""
    factors = exact_factors(1 / math.sqrt(length))
    left, right = (
        (hadamard_signs(n) * factor).astype(_F16)
        for n, factor in zip(hadamard_grid(length), factors, strict=True)
    )
    return left, right


def pack_int4(codes: NDArray[np.int8], group: int) -> NDArray[np.uint8]:
    """Codes [N, K] of -8..7 as MatMulNBits has them: [N, K/group, group/2] of code + 8.

    The lower half of a byte is the even column. Source: ONNX Runtime's ContribOperators.md.
    """
    shifted = (codes + np.int8(8)).view(np.uint8).reshape(len(codes), -1, group // 2, 2)
    return np.asarray(shifted[..., 0] | (shifted[..., 1] << np.uint8(4)))


class _Float16Graph(LayerGraph):
    cause = "the default scheme has float16 activations, int4 weights in groups, float16 KV"
    fix = "compile this model for the CPU, or take a checkpoint with int4 weights"

    def _declare(self, attention: Step) -> None:
        self.file.input(HIDDEN, (1, *self._shape(self.chunk.source)))
        self.file.input(ROPE_COS, self._turn_shape(attention))
        self.file.input(ROPE_SIN, self._turn_shape(attention))
        self.file.input(MASK, self._mask_shape(attention))
        # From 0 and MASKED to LIMIT and -LIMIT.
        middle = self._node("Sub", MASK, self._scalar(MASKED / 2))
        self.limits = self._node("Mul", middle, self._scalar(-2 * LIMIT / MASKED))

    def _finish(self, sink: str, shape: tuple[int, ...]) -> None:
        self.file.add("Identity", [sink], HIDDEN_OUT)
        self.file.output(HIDDEN_OUT, shape)

    def _move(self, op: str, *args: str, result: str = "", **attrs: Any) -> str:
        return self.file.add(op, args, result, **attrs)

    def _node(self, op: str, *args: str, **attrs: Any) -> str:
        return self.file.add(op, args, **attrs)

    def _scalar(self, value: float) -> str:
        return self.file.constant(np.array(value, _F16))

    def _float16(self, name: str, values: NDArray[Any], factor: float = 1.0) -> NDArray[np.float16]:
        """Values (bfloat16 as its bits) times a factor in float16, refused if they do not fit."""
        if values.dtype == np.uint16:
            values = (values.astype(np.uint32) << 16).view(np.float32)
        with np.errstate(over="ignore"):
            narrow = (values.astype(np.float32) * np.float32(factor)).astype(_F16)
        if not np.isfinite(narrow).all():
            raise ValuesInvalid(
                f"{name} holds values up to {np.abs(values).max():g}, outside float16's range",
                cause="HTP computes in float16, whose largest number is 65504",
                fix="compile this model for the CPU, which computes in float32",
            )
        return narrow

    def _rms_norm(self, step: Step) -> str:
        x, gamma = step.args
        scale = self.file.weight(gamma, self._float16(gamma, self.weights.read(gamma)))
        epsilon = float(step.attrs["eps"])
        return self._node("RMSNormalization", self.values[x], scale, axis=-1, epsilon=epsilon)

    def _qlinear(self, step: Step) -> str:
        x, codes, scales, *lora = step.args
        group = step.attrs.get("group")
        if step.attrs["weight"] != "int4" or group not in _GROUPS:
            raise self._refuse(f"a product with {step.attrs['weight']} weights", step)
        rows, columns = self._shape(codes)
        packed = self.file.weight(codes, pack_int4(self.weights.read(codes), group))
        values = self.weights.read(scales)
        narrow = self._float16(scales, values)
        smallest = np.abs(narrow[values != 0]).min(initial=1)
        if smallest < np.finfo(_F16).smallest_normal:
            raise ValuesInvalid(
                f"{scales} holds scales down to {smallest:g}, below float16's normal numbers",
                cause="HTP takes the scales of int4 weights as float16, which loses their bits",
                fix="compile this model for the CPU, with bfloat16 scales",
            )
        y = self._node(
            *("MatMulNBits", self.values[x], packed, self.file.weight(scales, narrow.reshape(-1))),
            domain=CONTRIB,
            **{"K": columns, "N": rows, "bits": 4, "block_size": group},
        )
        return self._node("Add", y, self._lora(x, lora, step)) if lora else y

    def _lora(self, x: str, names: list[str], step: Step) -> str:
        """The branch scale * B (A x); its scale goes into B."""
        value = self.values[x]
        for name, factor in zip(names, (1.0, float(step.attrs["lora_scale"])), strict=True):
            weight = self._float16(name, self.weights.read(name), factor)
            value = self._node("MatMul", value, self.file.weight(name, weight.T))
        return value

    def _transform(self, grid: str, step: Step, *, is_last: bool) -> str:
        left, right = hadamard_pair(self._shape(step.args[0])[1])
        return self._node("MatMul", grid, self.file.constant(left if is_last else right))

    def _turned(self, step: Step, even: str, odd: str) -> tuple[str, str]:
        def turned(first: str, second: str, op: str) -> str:
            return self._node(op, self._node("Mul", even, first), self._node("Mul", odd, second))

        return turned(ROPE_COS, ROPE_SIN, "Sub"), turned(ROPE_SIN, ROPE_COS, "Add")

    def _check_caches(self, shape: CacheShape, step: Step) -> None:
        if shape.dtype != "float16" or not shape.is_valid:
            raise self._refuse(f"attention over {shape}", step)

    def _cache(self, name: str, shape: tuple[int, ...]) -> str:
        return self.file.input(name, shape)

    def _new_rows(self, x: str, cache: str) -> str:
        rows, shape = self._rows_of(self.values[x], cache)
        self.file.output(new_rows_name(cache), shape)
        return self._transpose(rows, 1, 0, 2, result=new_rows_name(cache))

    def _query(self, value: str, size: int) -> str:
        """Exact for D = 64; for others off by 1e-4, less than a second product would round."""
        return self._node("Mul", value, self._scalar(1 / math.sqrt(size)))

    def _scores(self, step: Step, rows: str, keys: str) -> str:
        return self._node("MatMul", rows, keys)

    def _softmax(self, step: Step, scores: str) -> str:
        """Softmax in steps: HTP's own is off by up to 0.4 % (57 dB), these steps have 68 dB.

        Measured on Qualcomm's library for x86-64; its Exp is NaN somewhere below -50. Its quotients
        are 7e-4 too small on average; a step of Newton's behind them made layers worse, not better.
        """
        last = self._integers(-1)
        scores = self._node("Min", scores, self.limits)
        largest = self._node("ReduceMax", scores, last, keepdims=1)
        below = self._node("Sub", scores, largest)
        powers = self._node("Exp", self._node("Max", below, self._scalar(EXP_FLOOR)))
        return self._node("Div", powers, self._node("ReduceSum", powers, last, keepdims=1))

    def _mixed(self, step: Step, parts: list[tuple[str, str]]) -> str:
        return self._node("Add", *(self._node("MatMul", *part) for part in parts))

    def _swiglu(self, step: Step) -> str:
        """Products in this order: HTP joins gate * sigmoid(gate) to an operation of 10 dB less.

        Nor may gate * up come first: it can overflow where the whole is almost 0.
        """
        gate, up = (self.values[name] for name in step.args)
        return self._node("Mul", self._node("Mul", self._node("Sigmoid", gate), up), gate)

    def _add(self, step: Step) -> str:
        first, second = (self.values[name] for name in step.args)
        return self._node("Add", first, second)
