"""Models with weights by rows, calibrated, and what their layers compute in float64."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from functools import cache
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
from numpy.typing import NDArray

from llamac.compiler.calibration import calibrate
from llamac.compiler.checkpoint import Checkpoint, TensorInfo
from llamac.compiler.config import rope_table
from llamac.compiler.floats import widen
from llamac.compiler.frontends.meta import from_meta
from llamac.compiler.llama import ModelOptions, build_llama
from llamac.compiler.reference import Float64
from llamac.compiler.reference_model import KvCache, ReferenceModel
from llamac.schedules.quantized import ValueRange
from llamac.targets.chunk import Chunk, cut_chunks

EXAMPLES = Path(__file__).resolve().parents[3] / "examples" / "tiny-llama"
LIMITS = {"a16w8": (-127, 127), "a16w4": (-7, 7)}


def by_rows(values: Float64, scheme: str) -> tuple[NDArray[np.int8], NDArray[np.float32]]:
    """The simplest codes and scales: the largest of a row gets the last code."""
    low, high = LIMITS[scheme]
    scales = (np.abs(values).max(axis=1) / high).astype(np.float32)
    codes = np.clip(np.rint(values / scales[:, None]), low, high).astype(np.int8)
    return codes, scales


class RowWeights:
    """A checkpoint's weights with the linear layers of its blocks by rows; a `WeightReader`."""

    def __init__(self, checkpoint: Checkpoint, scheme: str) -> None:
        self._weights, self._scheme = checkpoint.weights, scheme
        self._cached: tuple[str, Any] = ("", None)

    def names(self) -> Sequence[str]:
        return self._weights.names()

    def info(self, name: str) -> TensorInfo:
        return self._weights.info(name)

    def read(self, name: str) -> NDArray[Any]:
        layer, _, part = name.rpartition(".")
        if not name.startswith("layers.") or ".adaptor." in name or layer.endswith("norm"):
            return self._weights.read(name)
        if self._cached[0] != layer:
            self._cached = (layer, by_rows(self._wide(layer), self._scheme))
        return self._cached[1][part == "scales"]

    def _wide(self, layer: str) -> Float64:
        weight = widen(self._weights.read(f"{layer}.weight"))
        if f"{layer}.scales" not in self._weights.names():
            return weight
        scales = self._weights.read(f"{layer}.scales").astype(np.float64)
        grouped = weight.reshape(*scales.shape, -1) * scales[..., None]
        return grouped.reshape(weight.shape)


class RowModel(ReferenceModel):
    """The reference with the weights that a graph has, and activations that nobody quantizes."""

    def __init__(self, checkpoint: Checkpoint, scheme: str, observe: Any = None) -> None:
        super().__init__(checkpoint, quantize_activations=False, observe=observe)
        self._rows = RowWeights(checkpoint, scheme)

    def _product(self, name: str, x: Float64) -> Float64:
        if not name.startswith("layers."):
            return super()._product(name, x)
        codes, scales = (self._rows.read(f"{name}.{part}") for part in ("weight", "scales"))
        return self._float_linear(name, x, codes, scales[:, None])

    def _lora(self, name: str) -> Any:
        lora = super()._lora(name)
        if lora is None:
            return None
        a, b = (self._int8(matrix) for matrix in (lora.a, lora.b))
        return lora._replace(a=a, b=b)

    def _int8(self, matrix: NDArray[Any]) -> Float64:
        from llamac.targets.neuropilot.emitter import row_codes  # noqa: PLC0415

        codes, scales = row_codes(widen(matrix).astype(np.float32))
        return codes.astype(np.float64) * scales.astype(np.float64)[:, None]


def key_blocks(keys: NDArray[np.int16]) -> NDArray[np.int16]:
    """Keys [Hkv, C, D] as the caches of all targets have them: [Hkv, C/16, D, 16]."""
    heads, capacity, size = keys.shape
    return np.ascontiguousarray(keys.reshape(heads, capacity // 16, 16, size).swapaxes(2, 3))


def function_chunks(
    checkpoint: Checkpoint, tokens: int, capacity: int, layers_per_chunk: int = 1
) -> list[Chunk]:
    """The chunks of the function for that many tokens."""
    options = ModelOptions(capacity, (tokens,) if tokens > 1 else ())
    function = "decode" if tokens == 1 else f"prefill_{tokens}"
    return cut_chunks(build_llama(checkpoint, options), function, layers_per_chunk)


@dataclass
class LayerCase:
    """Some layers at one moment: inputs as codes, outputs in float64, and values inside."""

    feeds: dict[str, NDArray[np.int16]]
    expected: dict[str, Float64] = field(default_factory=dict)
    inside: dict[str, Float64] = field(default_factory=dict)


Past = Mapping[int, tuple[Float64, Float64]]


def mask_rows(position: int, tokens: int, capacity: int) -> NDArray[np.int16]:
    """The mask of a chunk whose first token stands at `position`: [T, C + T]."""
    mask = np.full((tokens, capacity + tokens), -32767, np.int16)
    mask[:, :position] = 0
    mask[:, capacity:][np.tril_indices(tokens)] = 0
    return mask


def layer_case(
    checkpoint: Checkpoint,
    scheme: str,
    chunk: Chunk,
    interface: Any,
    x: Float64,
    past: Past,
) -> LayerCase:
    """Inputs x [T, K] after past keys and values [P, Hkv, D] of each layer, and the outputs."""
    from llamac.targets.neuropilot import emitter  # noqa: PLC0415

    case, made = LayerCase({}), interface.tensors
    model = RowModel(checkpoint, scheme, case.inside.__setitem__)
    config = checkpoint.config
    position = len(past[chunk.layers[0]][0])
    capacity = chunk.specs[f"layers.{chunk.layers[0]}.v_cache"].shape[1]
    table = rope_table(config, position + chunk.tokens)[position:]
    codes = made[emitter.HIDDEN].quantize(x)
    case.feeds = {
        emitter.HIDDEN: codes[None],
        emitter.ROPE_COS: made[emitter.ROPE_COS].quantize(table[:, None, :, :1]),
        emitter.ROPE_SIN: made[emitter.ROPE_SIN].quantize(table[:, None, :, 1:]),
        emitter.MASK: mask_rows(position, chunk.tokens, capacity),
    }
    x = made[emitter.HIDDEN].dequantize(codes)
    for layer in chunk.layers:
        prefix = f"layers.{layer}"
        sides = [made[f"{prefix}.{side}_cache"] for side in "kv"]
        cache = KvCache("float32", sides)
        for side, rows, side_made in zip("kv", cache.append(*past[layer]), sides, strict=True):
            full = np.zeros((config.num_kv_heads, capacity, config.head_dim), np.int16)
            full[:, :position] = side_made.quantize(rows).transpose(1, 0, 2)
            case.feeds[f"{prefix}.{side}_cache"] = key_blocks(full) if side == "k" else full
        x = model.layer(prefix, x, table, cache, position)
        for side, rows in zip("kv", cache.last(), strict=True):
            case.expected[f"{prefix}.{side}_new"] = rows.transpose(1, 0, 2)
    case.expected[emitter.HIDDEN_OUT] = x[None]
    return case


def real_inputs(
    checkpoint: Checkpoint, scheme: str, tokens: list[int], num_past: int
) -> tuple[list[Float64], Past]:
    """What each layer gets for the tokens after the first `num_past`, and the keys before them."""
    model, past = RowModel(checkpoint, scheme), {}
    table = rope_table(checkpoint.config, len(tokens))
    x, inputs = model.embedding(tokens), []
    for layer in range(checkpoint.config.num_layers):
        cache = KvCache("float32")
        inputs.append(x[num_past:])
        x = model.layer(f"layers.{layer}", x, table, cache, 0)
        keys, values = cache.last()
        past[layer] = (keys[:num_past], values[:num_past])
    return inputs, past


def sqnr_db(found: NDArray[Any], expected: Float64) -> float:
    """How far below the signal the error lies, in dB."""
    error = np.linalg.norm(found.astype(np.float64) - expected)
    return float(20 * np.log10(np.linalg.norm(expected) / error))


def random_tokens(checkpoint: Checkpoint, count: int, seed: int) -> list[int]:
    """Token numbers."""
    drawn = np.random.default_rng(seed).integers(0, checkpoint.config.vocab_size, count)
    return [int(token) for token in drawn]


def ranges_of(checkpoint: Checkpoint) -> dict[str, ValueRange]:
    """Ranges seen in 512 random tokens, with the checkpoint's own weights."""
    return calibrate(checkpoint, random_tokens(checkpoint, 512, 7), lambda *_: None)


@pytest.fixture(scope="session")
def kit() -> SimpleNamespace:
    """The functions of this file: test folders are no packages, so helpers come as fixtures."""

    @cache
    def tiny(form: str) -> Checkpoint:
        return from_meta(EXAMPLES / form)

    @cache
    def tiny_ranges(form: str) -> dict[str, ValueRange]:
        return ranges_of(tiny(form))

    return SimpleNamespace(
        RowModel=RowModel,
        RowWeights=RowWeights,
        chunks=function_chunks,
        layer_case=layer_case,
        random_tokens=random_tokens,
        ranges_of=ranges_of,
        real_inputs=real_inputs,
        sqnr_db=sqnr_db,
        tiny=tiny,
        tiny_ranges=tiny_ranges,
    )
