"""A float checkpoint turned so that no feature stands out, computing the same function.

Quantizers with one scale per row or per tensor suffer from features that are much larger than the
others. SpinQuant's rotations spread them, and cost nothing when the model runs, because a weight
takes each of them in:

    R1   turns the residual stream: embedding, inputs of q, k, v, gate, up and output layer,
         outputs of o and down
    R2   turns the values of each head: outputs of v, inputs of o

RMSNorm commutes with R1 once its weights have moved into the layers that read it. Both are Walsh-
Hadamard matrices with random signs (Q of a Gaussian matrix for sizes that are no power of two), and
not trained. On request w2 also takes in R4, a Hadamard transform of its inputs, which the runtime
then has to compute ("online"); else nothing is.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from typing import Any

import numpy as np
from numpy.typing import NDArray

from llamac.compiler.checkpoint import Checkpoint, TensorInfo
from llamac.compiler.floats import to_bfloat16, widen
from llamac.compiler.quantize import (
    EMBEDDING,
    FINAL_NORM,
    OUTPUT,
    check_hadamard,
    norm_names,
    random_rotation,
)
from llamac.compiler.reference import hadamard
from llamac.runtime.errors import ModelUnsupported

Float64 = NDArray[np.float64]

# Rows that are widened and turned at once: 16 MiB of the 1B model's embedding.
_ROWS = 1024


def rotate_checkpoint(
    checkpoint: Checkpoint, *, seed: int = 0, dtype: str = "bfloat16", r4: bool = False
) -> Checkpoint:
    """Look at a float checkpoint through R1 and R2; tensors are turned when they are read.

    Args:
        checkpoint: of the form "float".
        seed: of the random signs.
        dtype: of the weights that are read: "bfloat16" (as its bits) or "float64", with which the
            model computes the same up to the rounding of float64.
        r4: turn the inputs of w2, too; the result's `quant` then asks for it.

    Returns:
        The checkpoint with other weights. All norm weights are 1, and the output layer is a tensor
        of its own: the final norm is folded into it.

    Raises:
        ModelUnsupported: the checkpoint is quantized, or R4 has no Hadamard matrix of its width.
        ValueError: another dtype.
    """
    if dtype not in ("bfloat16", "float64"):
        raise ValueError(f"rotated weights cannot be {dtype!r}: not one of bfloat16, float64")
    form = checkpoint.quant.form
    if form != "float":
        raise ModelUnsupported(
            f"{checkpoint.name} has the form {form!r}, and only float weights can be rotated.",
            cause="Turned int4 weights would have to be rounded once more.",
            fix="Start from the bfloat16 checkpoint of the same model.",
        )
    if r4:
        check_hadamard(checkpoint.config)
    weights = RotatedWeights(checkpoint, seed, dtype, r4=r4)
    names = "R1, R2, R4" if r4 else "R1, R2"
    note = f"rotated by random Hadamard matrices ({names}, seed {seed}), norms folded"
    return replace(
        checkpoint,
        weights=weights,
        notes=(*checkpoint.notes, note),
        shared_embedding=False,
        quant=replace(checkpoint.quant, hadamard_r4=r4),
    )


class RotatedWeights:
    """A `WeightSource` over the one of a float checkpoint; see `rotate_checkpoint`."""

    def __init__(self, checkpoint: Checkpoint, seed: int, dtype: str, *, r4: bool = False) -> None:
        self._source, self._config = checkpoint.weights, checkpoint.config
        self._dtype, self._r4 = dtype, r4
        self._norms = frozenset(norm_names(self._config))
        rng = np.random.default_rng(seed)
        self._r1 = random_rotation(self._config.dim, rng)
        self._r2 = [
            random_rotation(self._config.head_dim, rng) for _ in range(self._config.num_layers)
        ]

    def names(self) -> Sequence[str]:
        """All tensors, in the order of use; the output layer is always among them."""
        names = list(self._source.names())
        return names if OUTPUT in names else [*names, OUTPUT]

    def info(self, name: str) -> TensorInfo:
        """Shape and dtype, without touching the data.

        Raises:
            KeyError: no tensor of that name.
        """
        shape = self._source.info(self._stored_name(name)).shape
        return TensorInfo(shape, "float32" if name in self._norms else self._dtype)

    def read(self, name: str) -> NDArray[Any]:
        """One tensor, turned.

        Raises:
            KeyError: no tensor of that name.
        """
        stored = self._source.read(self._stored_name(name))
        if name in self._norms:
            return np.ones(stored.shape, np.float32)
        if name in (EMBEDDING, OUTPUT):
            return self._turn_inputs(stored, self._gamma_before(name))
        _, layer, _, part, _ = name.split(".")
        r2 = self._r2[int(layer)]
        if part == "wv":
            turned = (widen(stored) * self._gamma_before(name)) @ self._r1
            return self._rounded(_turn_heads(turned.T, r2).T)
        if part in ("wo", "w2"):
            turned = self._r1.T @ widen(stored)
            if part == "wo":
                turned = _turn_heads(turned, r2)
            elif self._r4:
                turned = hadamard(turned)
            return self._rounded(turned)
        return self._turn_inputs(stored, self._gamma_before(name))

    def read_rows(self, name: str, rows: slice) -> NDArray[Any]:
        """Some rows of the embedding or the output layer, turned: a whole one is large."""
        stored = self._source.read(self._stored_name(name))[rows]
        return self._turn_inputs(stored, self._gamma_before(name))

    def _stored_name(self, name: str) -> str:
        is_tied = name == OUTPUT and OUTPUT not in self._source.names()
        return EMBEDDING if is_tied else name

    def _gamma_before(self, name: str) -> Float64:
        """The weights of the norm whose output a layer reads; 1 for the embedding."""
        if name == EMBEDDING:
            return np.ones(self._config.dim)
        norm = FINAL_NORM
        if name != OUTPUT:
            _, layer, block, _, _ = name.split(".")
            kind = "attention_norm" if block == "attention" else "ffn_norm"
            norm = f"layers.{layer}.{kind}.weight"
        return widen(self._source.read(norm))

    def _turn_inputs(self, stored: NDArray[Any], gamma: Float64) -> NDArray[Any]:
        """Fold a norm's weights into the columns and turn them by R1, some rows at a time."""
        turned = np.empty(stored.shape, np.uint16 if self._dtype == "bfloat16" else np.float64)
        for start in range(0, len(stored), _ROWS):
            rows = slice(start, start + _ROWS)
            turned[rows] = self._rounded((widen(stored[rows]) * gamma) @ self._r1)
        return turned

    def _rounded(self, values: Float64) -> NDArray[Any]:
        return to_bfloat16(values) if self._dtype == "bfloat16" else values


def _turn_heads(columns: Float64, r2: Float64) -> Float64:
    """Turn the columns [N, H * D] of every head by R2."""
    heads = columns.reshape(len(columns), -1, len(r2)) @ r2
    return np.asarray(heads.reshape(columns.shape))
