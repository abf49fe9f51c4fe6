"""The layers of a model in the form in which an accelerator computes them.

Its scheme may need the ranges of values, and other weights than the checkpoint has. A text shows
the ranges, and what the inputs of each linear layer have in common, which tells where an error of a
weight can be made good by the weights that follow (`gptq.py`). Layer by layer the new weights go to
files, from where the compiler of the accelerator and the reference of its graphs read them.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from llamac.compiler.calibration import calibrate
from llamac.compiler.checkpoint import Checkpoint, TensorInfo, WeightSource
from llamac.compiler.gptq import HessianSum, compensate_lpbq, compensate_per_channel
from llamac.compiler.quantize import Codes
from llamac.compiler.reference import Float64
from llamac.compiler.requantize import Lpbq, PerChannel, quantize_lpbq, weights_of
from llamac.schedules.quantized import ValueRange
from llamac.targets.base import Progress, Scheme

BITS = {"int8": 8, "int4": 4}
LARGEST_DB = 300.0


@dataclass(frozen=True)
class LayerModel:
    """A model whose layers are in the form of a scheme.

    Attributes:
        scheme: of the accelerator.
        checkpoint: the model; weights of its layers are in the scheme's form.
        ranges: of values, empty without calibration.
        loss: of each layer of the checkpoint that got other weights, the signal to noise of its
            outputs on the text in dB.
    """

    scheme: Scheme
    checkpoint: Checkpoint
    ranges: Mapping[str, ValueRange] = field(default_factory=dict)
    loss: Mapping[str, float] = field(default_factory=dict)


def prepare_layers(
    checkpoint: Checkpoint,
    scheme: Scheme,
    inputs: Mapping[str, str],
    tokens: Sequence[int],
    folder: Path,
    progress: Progress,
) -> LayerModel:
    """Bring the layers of a model into the form of a scheme.

    Args:
        checkpoint: the model.
        scheme: what is needed.
        inputs: labels of the values that linear layers read, by the layers' names.
        tokens: of the text to calibrate with.
        folder: for the new weights; must live as long as the result.
        progress: called while it lasts.

    Raises:
        UsageError: the text is too short.
        CoverageError, ValuesInvalid: weights that the scheme cannot hold.
    """
    if not scheme.is_calibrated:
        return LayerModel(scheme, checkpoint)
    if scheme.weights == "checkpoint":
        return LayerModel(scheme, checkpoint, calibrate(checkpoint, tokens, progress))
    writer = _Writer(checkpoint, scheme, inputs, folder)
    ranges = calibrate(
        checkpoint, tokens, progress, also=writer.observe, after_layer=writer.write_layer
    )
    weights = LayerWeights(checkpoint.weights, folder)
    return LayerModel(scheme, replace(checkpoint, weights=weights), ranges, writer.loss)


class _Writer:
    """Sums up the inputs of linear layers, and writes their new weights."""

    def __init__(
        self, checkpoint: Checkpoint, scheme: Scheme, inputs: Mapping[str, str], folder: Path
    ) -> None:
        self._weights, self._scheme = checkpoint.weights, scheme
        self._inputs, self._folder = inputs, folder
        self._read = set(inputs.values())
        self._sums: dict[str, HessianSum] = {}
        self.loss: dict[str, float] = {}

    def observe(self, label: str, value: Float64) -> None:
        """Add the values that a linear layer reads."""
        if label in self._read:
            if label not in self._sums:
                self._sums[label] = HessianSum(value.shape[-1])
            self._sums[label].add(value)

    def write_layer(self, layer: int) -> None:
        """Write the weights of a layer and forget its sums."""
        for name, label in self._inputs.items():
            if name.startswith(f"layers.{layer}."):
                self._write(name, self._sums[label].matrix())
        self._sums = {}

    def _write(self, name: str, hessian: Float64) -> None:
        given = _given(self._weights, name)
        if self._scheme.weights == "lpbq":
            # Codes in groups hardly change: nothing to make good, see docs/numerics.md.
            is_int4 = isinstance(given, Codes) and given.scales.ndim == 2
            lpbq = (
                quantize_lpbq(given, np.diagonal(hessian))
                if is_int4
                else compensate_lpbq(given, hessian)
            )
            scales = lpbq.group_scales().astype(np.float32)
            self._save(name, "multipliers", lpbq.multipliers)
            self._save(name, "row_scales", lpbq.row_scales)
            made: Lpbq | PerChannel = lpbq
        else:
            made = compensate_per_channel(given, hessian, BITS[self._scheme.weights])
            scales = made.scales
        self._save(name, "weight", made.codes)
        self._save(name, "scales", scales)
        self.loss[name] = _output_db(weights_of(given), made.dequantize(), hessian)

    def _save(self, name: str, part: str, values: NDArray[Any]) -> None:
        np.save(self._folder / f"{name}.{part}.npy", values)


class LayerWeights:
    """A checkpoint's tensors, those of its layers from the files that were written for them.

    A layer has codes `weight` [N, K] int8 and `scales` float32, [N] or of LPBQ [N, K/32]; LPBQ's
    are the products of `multipliers` uint8 [N, K/32] and `row_scales` float32 [N].
    """

    def __init__(self, weights: WeightSource, folder: Path) -> None:
        self._weights = weights
        self._files = {path.name.removesuffix(".npy"): path for path in folder.glob("*.npy")}

    def names(self) -> list[str]:
        """All tensors; those that are new come last."""
        return list(dict.fromkeys((*self._weights.names(), *sorted(self._files))))

    def info(self, name: str) -> TensorInfo:
        """Shape and dtype."""
        if name not in self._files:
            return self._weights.info(name)
        values = self._open(name)
        return TensorInfo(values.shape, str(values.dtype))

    def read(self, name: str) -> NDArray[Any]:
        """The values."""
        return self._open(name) if name in self._files else self._weights.read(name)

    def _open(self, name: str) -> NDArray[Any]:
        values: NDArray[Any] = np.load(self._files[name], mmap_mode="r", allow_pickle=False)
        return values


def _given(weights: WeightSource, name: str) -> NDArray[Any] | Codes:
    """A layer as the checkpoint has it."""
    values, scales = weights.read(f"{name}.weight"), f"{name}.scales"
    return Codes(values, weights.read(scales)) if scales in weights.names() else values


def _output_db(wanted: Float64, made: Float64, hessian: Float64) -> float:
    """Signal to noise of a layer's outputs on the inputs that H was summed over, in dB."""
    noise = wanted - made
    powers = [float(np.einsum("nk,nk->", rows @ hessian, rows)) for rows in (wanted, noise)]
    return (
        LARGEST_DB
        if powers[1] <= 0
        else min(LARGEST_DB, 10 * float(np.log10(powers[0] / powers[1])))
    )
