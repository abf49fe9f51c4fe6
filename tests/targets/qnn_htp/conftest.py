"""Models cut into chunks, and what a layer computes in float64 with the same weights."""

from __future__ import annotations

import importlib.util
from collections.abc import Callable
from dataclasses import dataclass, field
from functools import cache
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import pytest
from numpy.typing import NDArray

from llamac.compiler.checkpoint import Checkpoint
from llamac.compiler.config import rope_table
from llamac.compiler.floats import round_to
from llamac.compiler.frontends.meta import from_meta
from llamac.compiler.llama import ModelOptions, build_llama
from llamac.compiler.reference import Float64
from llamac.compiler.reference_model import KvCache, ReferenceModel
from llamac.targets.chunk import Chunk, cut_chunks
from llamac.targets.qnn_htp import emitter
from llamac.targets.qnn_htp.context import ContextBinary, compile_chunks, htp_of
from llamac.targets.soc import load_soc

EXAMPLES = Path(__file__).resolve().parents[3] / "examples" / "tiny-llama"
CAPACITY = 64
UNUSED = 60000.0  # in places of a cache that hold no token; any finite value will do


def htp_chunks(
    checkpoint: Checkpoint, tokens: int, capacity: int, layers_per_chunk: int = 1
) -> list[Chunk]:
    """The chunks of the function for that many tokens."""
    options = ModelOptions(capacity, (tokens,) if tokens > 1 else ())
    function = "decode" if tokens == 1 else f"prefill_{tokens}"
    return cut_chunks(build_llama(checkpoint, options), function, layers_per_chunk)


class FloatModel(ReferenceModel):
    """The reference with the same weights and activations that nobody quantizes, the output's too.

    What HTP computes in float16 is compared with this: the reference of the CPU rounds activations
    to int8, which is 40 dB away by definition.
    """

    def _linear(self, name: str, x: Float64) -> Float64:
        weight = self._weights.read(f"{name}.weight")
        scales = round_to(self._weights.read(f"{name}.scales"), "float16")
        return self._float_linear(name, x, weight, scales)


def key_blocks(keys: NDArray[np.float16]) -> NDArray[np.float16]:
    """Keys [Hkv, C, D] as the caches of all targets have them: [Hkv, C/16, D, 16]."""
    heads, capacity, size = keys.shape
    return np.ascontiguousarray(keys.reshape(heads, capacity // 16, 16, size).swapaxes(2, 3))


@dataclass
class LayerCase:
    """Some layers at one moment: inputs as HTP takes them, outputs in float64."""

    feeds: dict[str, NDArray[np.float16]]
    expected: dict[str, Float64] = field(default_factory=dict)


def layer_case(
    checkpoint: Checkpoint,
    chunk: Chunk,
    x: Float64,
    past: dict[int, tuple[Float64, Float64]],
    capacity: int,
) -> LayerCase:
    """Inputs x [T, K] after past keys and values [P, Hkv, D] of each layer, and the outputs."""
    config, model = checkpoint.config, FloatModel(checkpoint)
    position, tokens = len(past[chunk.layers[0]][0]), chunk.tokens
    table = rope_table(config, position + tokens)[position:]
    x = x.astype(np.float16).astype(np.float64)
    case = LayerCase(
        {
            emitter.HIDDEN: x.astype(np.float16)[None],
            emitter.ROPE_COS: table[:, None, :, :1].astype(np.float16),
            emitter.ROPE_SIN: table[:, None, :, 1:].astype(np.float16),
            emitter.MASK: emitter.mask_rows(position, tokens, capacity),
        }
    )
    for layer in chunk.layers:
        prefix, cache = f"layers.{layer}", KvCache("float16")
        for side, rows in zip("kv", cache.append(*past[layer]), strict=True):
            full = np.full((config.num_kv_heads, capacity, config.head_dim), UNUSED, np.float16)
            full[:, :position] = rows.transpose(1, 0, 2)
            case.feeds[f"{prefix}.{side}_cache"] = key_blocks(full) if side == "k" else full
        x = model.layer(prefix, x, table, cache, position)
        for side, rows in zip("kv", cache.last(), strict=True):
            case.expected[f"{prefix}.{side}_new"] = rows.transpose(1, 0, 2)
    case.expected[emitter.HIDDEN_OUT] = x[None]
    return case


def real_inputs(
    checkpoint: Checkpoint, tokens: list[int], num_past: int
) -> tuple[list[Float64], dict[int, tuple[Float64, Float64]]]:
    """What each layer gets for the tokens after the first `num_past`, and the keys before them."""
    model, past = FloatModel(checkpoint), {}
    table = rope_table(checkpoint.config, len(tokens))
    x, inputs = model.embedding(tokens), []
    for layer in range(checkpoint.config.num_layers):
        cache = KvCache("float16")
        inputs.append(x[num_past:])
        x = model.layer(f"layers.{layer}", x, table, cache, 0)
        keys, values = cache.last()
        past[layer] = (keys[:num_past], values[:num_past])
    return inputs, past


class Compiled(NamedTuple):
    """A chunk, and its binary."""

    chunk: Chunk
    binary: ContextBinary


def sqnr_db(found: NDArray[Any], expected: Float64) -> float:
    """How far below the signal the error lies, in dB."""
    error = np.linalg.norm(found.astype(np.float64) - expected)
    return float(20 * np.log10(np.linalg.norm(expected) / error))


@pytest.fixture(scope="session")
def chunks_of() -> Callable[..., list[Chunk]]:
    """`htp_chunks`; test folders are no packages, so helpers come as fixtures."""
    return htp_chunks


@pytest.fixture(scope="session")
def make_case() -> Callable[..., LayerCase]:
    """`layer_case`."""
    return layer_case


@pytest.fixture(scope="session")
def inputs_of() -> Callable[..., Any]:
    """`real_inputs`."""
    return real_inputs


@pytest.fixture(scope="session")
def float_model() -> Callable[[Checkpoint], FloatModel]:
    """`FloatModel`."""
    return FloatModel


@pytest.fixture(scope="session")
def decibels() -> Callable[..., float]:
    """`sqnr_db`."""
    return sqnr_db


@pytest.fixture(scope="session")
def tiny() -> Callable[[str], Checkpoint]:
    """The tiny model in a form."""
    return lambda form: from_meta(EXAMPLES / form)


@pytest.fixture(scope="session")
def qnn() -> None:
    """Skips the test without the extra."""
    if importlib.util.find_spec("onnxruntime_qnn") is None:
        pytest.skip("optional extra: pip install 'llamac[qnn]' (Qualcomm's licence)")


@pytest.fixture(scope="session")
def compiled(qnn: None, tmp_path_factory: pytest.TempPathFactory) -> Callable[..., Compiled]:
    """Layer 0 of the tiny model, compiled once for each form, number of tokens and SoC."""

    @cache
    def compile_one(form: str = "spinquant", tokens: int = 1, soc: str = "sm8650") -> Compiled:
        checkpoint = from_meta(EXAMPLES / form)
        chunk = htp_chunks(checkpoint, tokens, CAPACITY)[0]
        out = tmp_path_factory.mktemp("htp")
        target = htp_of(load_soc(soc))
        write = emitter.float16_writer(checkpoint.weights)
        [binary] = compile_chunks([chunk], write, target, out, lambda *_: None)
        return Compiled(chunk, binary)

    return compile_one


@pytest.fixture(scope="session")
def case_of() -> Callable[..., LayerCase]:
    """A case of a chunk of the tiny model: T tokens after some others."""

    def make(form: str, chunk: Chunk, num_past: int = 20) -> LayerCase:
        checkpoint = from_meta(EXAMPLES / form)
        rng = np.random.default_rng(0)
        tokens = rng.integers(0, checkpoint.config.vocab_size, num_past + chunk.tokens)
        inputs, past = real_inputs(checkpoint, tokens.tolist(), num_past)
        return layer_case(checkpoint, chunk, inputs[chunk.layers[0]], past, CAPACITY)

    return make
