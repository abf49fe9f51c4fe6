"""The graph of a chunk as far as it is the same in all schemes: its names, and how values move.

A scheme says how a value is computed; which rows of queries meet which keys, where the caches'
blocks go and how pairs are turned is said here. Values have the names of their ONNX tensors.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Callable
from typing import TYPE_CHECKING, Any

import numpy as np

from llamac.runtime.errors import CoverageError
from llamac.schedules.rope import CacheShape
from llamac.targets.chunk import Chunk, Step
from llamac.targets.hadamard import hadamard_grid
from llamac.targets.qnn_htp.onnx_file import OnnxFile

if TYPE_CHECKING:
    from llamac.targets.base import WeightReader

HIDDEN, HIDDEN_OUT, ROPE_COS, ROPE_SIN, MASK = "hidden hidden_out rope_cos rope_sin mask".split()


def interface(chunk: Chunk) -> tuple[tuple[str, ...], tuple[str, ...]]:
    """Names of a graph's inputs and outputs, in the order in which steps have them."""
    caches = chunk.caches()
    new = (new_rows_name(cache) for cache in caches)
    return (HIDDEN, ROPE_COS, ROPE_SIN, MASK, *caches), (HIDDEN_OUT, *new)


def new_rows_name(cache: str) -> str:
    """The output that goes with a cache: "layers.0.k_cache" -> "layers.0.k_new"."""
    return cache.removesuffix("_cache") + "_new"


class LayerGraph(ABC):
    """Adds the nodes of a chunk's steps to a file; a scheme is a subclass."""

    cause: str
    """Of refusals: what the scheme has."""
    fix: str

    def __init__(self, chunk: Chunk, weights: WeightReader, file: OnnxFile) -> None:
        self.chunk, self.weights, self.file = chunk, weights, file
        self.values = {chunk.source: HIDDEN}

    def run(self) -> None:
        """Emit everything."""
        emitters: dict[str, Callable[[Step], str]] = {
            "llamac.rms_norm": self._rms_norm,
            "llamac.linear": self._linear,
            "llamac.qlinear": self._qlinear,
            "llamac.hadamard": self._hadamard,
            "llamac.rope": self._rope,
            "llamac.attention": self._attention,
            "llamac.swiglu": self._swiglu,
            "llamac.add": self._add,
        }
        attention = next((s for s in self.chunk.steps if s.kind == "llamac.attention"), None)
        if attention is None:
            raise self._refuse("a run of layers without attention", self.chunk.steps[0])
        self._declare(attention)
        for step in self.chunk.steps:
            if step.kind not in emitters:
                raise self._refuse(step.kind, step)
            self.values[step.results[0]] = emitters[step.kind](step)
        self._finish(self.values[self.chunk.sink], (1, *self._shape(self.chunk.sink)))

    @abstractmethod
    def _declare(self, attention: Step) -> None:
        """Declare the inputs that all layers share."""

    @abstractmethod
    def _finish(self, sink: str, shape: tuple[int, ...]) -> None:
        """Make a value the output HIDDEN_OUT."""

    @abstractmethod
    def _move(self, op: str, *args: str, result: str = "", **attrs: Any) -> str:
        """Add an operation that puts the elements of its first operands into other places."""

    @abstractmethod
    def _rms_norm(self, step: Step) -> str: ...

    def _linear(self, step: Step) -> str:
        """A product with weights that are floats in the checkpoint."""
        raise self._refuse("a product with float weights", step)

    @abstractmethod
    def _qlinear(self, step: Step) -> str: ...

    @abstractmethod
    def _transform(self, grid: str, step: Step, *, is_last: bool) -> str:
        """Multiply the last axis of a grid by Sylvester's matrix, scaled to be orthogonal."""

    @abstractmethod
    def _turned(self, step: Step, even: str, odd: str) -> tuple[str, str]:
        """Turn pairs [T, H, D/2, 1] by ROPE_COS and ROPE_SIN."""

    @abstractmethod
    def _check_caches(self, shape: CacheShape, step: Step) -> None:
        """Refuse caches that the scheme does not have."""

    @abstractmethod
    def _cache(self, name: str, shape: tuple[int, ...]) -> str:
        """Declare an input."""

    @abstractmethod
    def _new_rows(self, x: str, cache: str) -> str:
        """New keys or values [Hkv, T, D], which are an output as well."""

    @abstractmethod
    def _query(self, value: str, size: int) -> str:
        """Divide by sqrt(D)."""

    @abstractmethod
    def _scores(self, step: Step, rows: str, keys: str) -> str:
        """Rows [Hkv, R, D] times keys [Hkv, D, P]."""

    @abstractmethod
    def _softmax(self, step: Step, scores: str) -> str:
        """Softmax [Hkv, R/T, T, C + T] of what the mask shows."""

    @abstractmethod
    def _mixed(self, step: Step, parts: list[tuple[str, str]]) -> str:
        """Sum of weights [Hkv, R, P] times values [Hkv, P, D]."""

    @abstractmethod
    def _swiglu(self, step: Step) -> str: ...

    @abstractmethod
    def _add(self, step: Step) -> str: ...

    def _refuse(self, what: str, step: Step) -> CoverageError:
        places = [name for name in step.args if self.chunk.specs[name].is_param]
        return CoverageError(
            f"{self.chunk.name}: {what} ({', '.join(places) or 'no weights'}) has no form on HTP "
            "in this scheme",
            cause=self.cause,
            fix=self.fix,
        )

    def _shape(self, name: str) -> tuple[int, ...]:
        return self.chunk.specs[name].shape

    def _turn_shape(self, step: Step) -> tuple[int, ...]:
        """Shape of ROPE_COS and ROPE_SIN."""
        return self.chunk.tokens, 1, step.attrs["head_dim"] // 2, 1

    def _mask_shape(self, attention: Step) -> tuple[int, int]:
        tokens = self.chunk.tokens
        return tokens, self._shape(attention.args[5])[1] + tokens

    def _integers(self, *values: int) -> str:
        return self.file.constant(np.array(values, np.int64))

    def _reshape(self, value: str, *shape: int) -> str:
        return self._move("Reshape", value, self._integers(*shape))

    def _transpose(self, value: str, *perm: int, result: str = "") -> str:
        return self._move("Transpose", value, result=result, perm=list(perm))

    def _slice(self, value: str, begin: int, end: int, axis: int) -> str:
        return self._move("Slice", value, *(self._integers(n) for n in (begin, end, axis)))

    def _hadamard(self, step: Step) -> str:
        """Two matrix products; the left one by turning the grid, for HTP multiplies by the last."""
        [x] = step.args
        tokens, width = self._shape(x)
        rows, columns = hadamard_grid(width)
        if rows * columns != width:
            raise self._refuse(f"a Hadamard transform of {width} columns", step)
        grid = self._reshape(self.values[x], tokens, rows, columns)
        grid = self._transpose(self._transform(grid, step, is_last=False), 0, 2, 1)
        grid = self._transpose(self._transform(grid, step, is_last=True), 0, 2, 1)
        return self._reshape(grid, 1, tokens, width)

    def _rope(self, step: Step) -> str:
        x, half = step.args[0], step.attrs["head_dim"] // 2
        tokens, width = self._shape(x)
        pairs = self._reshape(self.values[x], tokens, width // (2 * half), half, 2)
        even, odd = (self._slice(pairs, i, i + 1, 3) for i in (0, 1))
        joined = self._move("Concat", *self._turned(step, even, odd), axis=3)
        return self._reshape(joined, 1, tokens, width)

    def _attention(self, step: Step) -> str:
        """Scores of the past and of the new keys side by side; values of both in two products."""
        q, k, v, _, k_cache, v_cache, *_ = step.args
        (heads, capacity, size), tokens = self._shape(v_cache), self.chunk.tokens
        shape = CacheShape(heads, size, capacity, step.attrs["kv_dtype"])
        self._check_caches(shape, step)
        per = step.attrs["heads"] // heads
        new_keys, new_values = self._new_rows(k, k_cache), self._new_rows(v, v_cache)
        blocks = self._transpose(self._cache(k_cache, shape.k_shape), 0, 2, 1, 3)
        keys = self._reshape(blocks, heads, size, capacity)
        values = self._cache(v_cache, (heads, capacity, size))
        grouped = self._query(self._reshape(self.values[q], tokens, heads, per, size), size)
        rows = self._reshape(self._transpose(grouped, 1, 2, 0, 3), heads, per * tokens, size)
        new_columns = self._transpose(new_keys, 0, 2, 1)
        scores = [self._scores(step, rows, each) for each in (keys, new_columns)]
        joined = self._move("Concat", *scores, axis=2)
        places = capacity + tokens
        weights = self._softmax(step, self._reshape(joined, heads, per, tokens, places))
        weights = self._reshape(weights, heads, per * tokens, places)
        ends = ((0, capacity, values), (capacity, places, new_values))
        parts = [(self._slice(weights, begin, end, 2), each) for begin, end, each in ends]
        out = self._reshape(self._mixed(step, parts), heads, per, tokens, size)
        return self._reshape(self._transpose(out, 2, 0, 1, 3), 1, tokens, heads * per * size)

    def _rows_of(self, value: str, cache: str) -> tuple[str, tuple[int, ...]]:
        """A value as [T, Hkv, D], and the shape of its rows in a cache, [Hkv, T, D]."""
        heads, _, size = self._shape(cache)
        tokens = self.chunk.tokens
        return self._reshape(value, tokens, heads, size), (heads, tokens, size)
