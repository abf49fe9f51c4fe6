"""The reference of graphs, and of the kernels around them.

A graph computes whole layers in float16 from weights that nobody changed, so it is compared with
the same layers in float64 with activations that nobody quantizes. Its error is that of float16: it
is measured as noise over a tensor and not value by value.
"""

from __future__ import annotations

import math
from typing import TYPE_CHECKING, Any

import numpy as np
from numpy.typing import NDArray

from llamac.compiler.checkpoint import Checkpoint
from llamac.compiler.config import rope_table
from llamac.compiler.reference_model import KvCache, ReferenceModel
from llamac.compiler.verify_compare import (
    Comparison,
    compare_close,
    compare_equal,
    compare_float16,
    compare_noise,
)
from llamac.schedules.positions import MASKED

if TYPE_CHECKING:
    from llamac.compiler.verify_families import StepRun

Array = NDArray[Any]

# Of one layer; the noise of several adds up. Qualcomm's library has 58 dB or more for one layer of
# the models that were measured (docs/targets/hexagon-htp.md).
LEAST_DB = 50.0


class GraphReference:
    """Compares graphs with the layers that they stand for."""

    def __init__(self, checkpoint: Checkpoint) -> None:
        self._config = checkpoint.config
        self._model = ReferenceModel(checkpoint, quantize_activations=False)

    def graph(self, run: StepRun) -> list[Comparison]:
        """Compare the stream, and the new keys and values of each layer."""
        hidden, *_ = run.inputs
        x = hidden[0].astype(np.float64)
        position = self._position(run)
        table = rope_table(self._config, position + len(x))[position:]
        names = list(run.cache_before)
        layers = [name.removesuffix(".k_cache") for name in names if name.endswith(".k_cache")]
        least = LEAST_DB - 10 * math.log10(len(layers))
        results = []
        for index, layer in enumerate(layers):
            cache = KvCache("float16")
            past = (run.cache_before[f"{layer}.{side}_cache"][:position] for side in "kv")
            cache.append(*(rows.astype(np.float64) for rows in past))
            x = self._model.layer(layer, x, table, cache, position)
            for side, rows in zip("kv", cache.last(), strict=True):
                new = run.outputs[1 + 2 * index + "kv".index(side)]
                what = f"{layer}.{side}_new"
                results.append(compare_noise(what, new, rows.transpose(1, 0, 2), least))
        kept = [compare_equal(f"{n}, all rows", run.cache[n], run.cache_before[n]) for n in names]
        return [*results, compare_noise("hidden_out", run.outputs[0][0], x, least), *kept]

    @staticmethod
    def _position(run: StepRun) -> int:
        """How many positions of the cache the mask shows to the first token."""
        mask = run.inputs[3]
        return int((mask[0, : mask.shape[1] - len(mask)] == 0).sum())

    def positions(self, run: StepRun) -> list[Comparison]:
        """Compare the rows of the RoPE table and the mask."""
        [meta], (cos, sin, mask) = run.inputs, run.outputs
        first, count = int(meta[0]), len(cos)
        table = rope_table(self._config, first + count)[first:]
        expected = np.full(mask.shape, MASKED)
        expected[:, :first] = 0
        expected[:, mask.shape[1] - count :][np.tril_indices(count)] = 0
        return [
            compare_float16("cos", cos[:, 0, :, 0], table[..., 0].astype(np.float64)),
            compare_float16("sin", sin[:, 0, :, 0], table[..., 1].astype(np.float64)),
            compare_equal("mask", mask, expected.astype(np.float16)),
        ]

    @staticmethod
    def convert(run: StepRun) -> list[Comparison]:
        """Compare a conversion to float16 or back."""
        [x], [y] = run.inputs, run.outputs
        if y.dtype == np.float16:
            return [compare_equal("y", y[0], x.astype(np.float16))]
        return [compare_close("y", y, x[0].astype(np.float64), limit=0.0)]

    @staticmethod
    def append(run: StepRun) -> list[Comparison]:
        """Compare the cache with its old rows and the new ones in their places."""
        *new, meta = run.inputs
        first, results = int(meta[0]), []
        for side, rows in zip("kv", new, strict=True):
            expected = run.cache_before[f"{side}_cache"].copy()
            expected[first : first + rows.shape[1]] = rows.transpose(1, 0, 2)
            results.append(compare_equal(f"{side} cache", run.cache[f"{side}_cache"], expected))
        return results
