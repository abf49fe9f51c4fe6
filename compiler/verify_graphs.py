"""The reference of graphs, and of the kernels around them.

A graph computes whole layers in float16 or in integers with fixed scales. It is compared with the
same layers in float64, from the weights that it was made from, with activations that nobody
quantizes and the keys and values that its cache holds. Its error is that of its arithmetic: it is
measured as noise over a tensor and not value by value.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Any

import numpy as np
from numpy.typing import NDArray

from llamac.compiler.checkpoint import Checkpoint
from llamac.compiler.config import rope_table
from llamac.compiler.reference import Float64
from llamac.compiler.reference_model import KvCache, KvCodes, ReferenceModel
from llamac.compiler.verify_compare import (
    TOLERANCE,
    Comparison,
    compare_close,
    compare_equal,
    compare_float16,
    compare_noise,
)
from llamac.schedules.graph import GraphShape
from llamac.schedules.positions import MASKED
from llamac.schedules.quantized import Quantization

if TYPE_CHECKING:
    from llamac.compiler.verify_families import StepRun

Array = NDArray[Any]

# Of one layer; the noise of several adds up. For what was measured see docs/numerics.md: float16
# has 58 dB or more, integers have 48 dB or more.
LEAST_DB, LEAST_DB_INTEGER = 50.0, 33.0
# Of new rows of int8 keys and values: some codes are rounded the other way.
LEAST_DB_INT8_ROWS = 30.0
# How far from a tie a code of 16 bits may have been rounded the other way by float32 arithmetic.
TIE_SLACK = 1 / 32


class GraphReference:
    """Compares graphs with the layers that they stand for.

    Args:
        checkpoint: the model, its layers as the graphs were made from them.
    """

    def __init__(self, checkpoint: Checkpoint) -> None:
        self._config = checkpoint.config
        self._model = ReferenceModel(checkpoint, quantize_activations=False)

    def graph(self, run: StepRun) -> list[Comparison]:
        """Compare the stream, and the new keys and values of each layer."""
        shape = GraphShape.from_fields(run.kernel.shape)
        edge, codes = shape.inputs[0].codes, kv_codes([shape])
        x = _values(run.inputs[0][0], edge)
        position = _position(run.inputs[3], shape.inputs[3].codes)
        table = rope_table(self._config, position + len(x))[position:]
        names = list(run.cache_before)
        layers = [name.removesuffix(".k_cache") for name in names if name.endswith(".k_cache")]
        noise = 10 * math.log10(len(layers))
        least = (LEAST_DB if edge is None else LEAST_DB_INTEGER) - noise
        results = []
        for index, layer in enumerate(layers):
            kv = codes.get(int(layer.rpartition(".")[2]))
            of_layer, cache = kv or (None, None), KvCache("float16", kv)
            past = (run.cache_before[f"{layer}.{side}_cache"][:position] for side in "kv")
            cache.append(*map(_values, past, of_layer))
            x = self._model.layer(layer, x, table, cache, position)
            for side, rows in enumerate(cache.last()):
                new = run.outputs[1 + 2 * index + side]
                least_rows = LEAST_DB_INT8_ROWS - noise if new.dtype == np.int8 else least
                what, got = f"{layer}.{'kv'[side]}_new", _values(new, of_layer[side])
                results.append(compare_noise(what, got, rows.transpose(1, 0, 2), least_rows))
        hidden = _values(run.outputs[0][0], shape.outputs[0].codes)
        kept = [compare_equal(f"{n}, all rows", run.cache[n], run.cache_before[n]) for n in names]
        return [*results, compare_noise("hidden_out", hidden, x, least), *kept]

    def positions(self, run: StepRun) -> list[Comparison]:
        """Compare the rows of the RoPE table and the mask."""
        [meta], (cos, sin, mask) = run.inputs, run.outputs
        turns, mask_codes = (_codes(run.kernel.shape[name]) for name in ("turns", "mask"))
        first, count = int(meta[0]), len(cos)
        table = rope_table(self._config, first + count)[first:]
        seen, masked = (0, MASKED) if mask_codes is None else _mask_codes(mask_codes)
        expected = np.full(mask.shape, masked, mask.dtype)
        expected[:, :first] = seen
        expected[:, mask.shape[1] - count :][np.tril_indices(count)] = seen
        return [
            _compare_rounded("cos", cos[:, 0, :, 0], table[..., 0].astype(np.float64), turns),
            _compare_rounded("sin", sin[:, 0, :, 0], table[..., 1].astype(np.float64), turns),
            compare_equal("mask", mask, expected),
        ]

    @staticmethod
    def convert(run: StepRun) -> list[Comparison]:
        """Compare a conversion to what a graph has at its edges, or back."""
        [x], [y] = run.inputs, run.outputs
        codes = _codes(run.kernel.shape["codes"])
        if not run.kernel.shape["to_graph"]:
            limit = 0.0 if codes is None else TOLERANCE
            return [compare_close("y", y, _values(x[0], codes), limit=limit)]
        if codes is None:
            return [compare_equal("y", y[0], x.astype(np.float16))]
        return [_compare_rounded("y", y[0], x.astype(np.float64), codes)]

    @staticmethod
    def append(run: StepRun) -> list[Comparison]:
        """Compare the cache with its old rows and the new ones in their places."""
        *new, meta = run.inputs
        first, results = int(meta[0]), []
        for side, rows in zip("kv", new, strict=True):
            kept = slice(first, first + rows.shape[1])
            expected = run.cache_before[f"{side}_cache"].copy()
            expected[kept] = rows.transpose(1, 0, 2)
            results.append(compare_equal(f"{side} cache", run.cache[f"{side}_cache"], expected))
            params, codes = f"{side}_params", _codes(run.kernel.shape[f"{side}_codes"])
            if params in run.cache and codes is not None:
                expected = run.cache_before[params].copy()
                expected[kept] = (codes.scale, codes.zero_point)
                results.append(compare_equal(f"{side} scales", run.cache[params], expected))
        return results


def kv_codes(graphs: Sequence[GraphShape]) -> dict[int, KvCodes]:
    """Codes of the keys and values of each layer, where graphs have one scale for all."""
    found = {t.name: t.codes for graph in graphs for t in graph.inputs if t.codes is not None}
    sides = [name.removesuffix("k_cache") for name in found if name.endswith(".k_cache")]
    return {
        int(side.split(".")[1]): (found[f"{side}k_cache"], found[f"{side}v_cache"])
        for side in sides
    }


def graph_layers(graph: GraphShape) -> frozenset[int]:
    """Numbers of the layers that a graph computes."""
    return frozenset(int(name.split(".")[1]) for name in graph.layers)


def _codes(fields: Mapping[str, Any] | None) -> Quantization | None:
    return None if fields is None else Quantization(**fields)


def _values(stored: Array, codes: Quantization | None) -> Float64:
    """What an edge of a graph stands for."""
    return stored.astype(np.float64) if codes is None else codes.dequantize(stored)


def _mask_codes(codes: Quantization) -> tuple[int, int]:
    """What a mask has where a key is seen, and where not."""
    return codes.zero_point, codes.limits[0]


def _position(mask: Array, codes: Quantization | None) -> int:
    """How many positions of the cache the mask shows to the first token."""
    seen = 0 if codes is None else codes.zero_point
    return int((mask[0, : mask.shape[1] - len(mask)] == seen).sum())


def _compare_rounded(
    what: str, got: Array, values: Float64, codes: Quantization | None
) -> Comparison:
    """Compare float16 or codes with the values that were rounded to them."""
    if codes is None:
        return compare_float16(what, got, values)
    exact = np.clip(values / codes.scale + codes.zero_point, *codes.limits)
    slack = 0.5 + TIE_SLACK
    return compare_close(what, got, exact, scale=np.ones(()), slack=slack, limit=0.0)
