"""A whole model in the reference arithmetic, straight from a checkpoint.

What a compiled library must agree with, and what the quality of a quantization is measured by. It
is written for being right and for little memory, not for speed: weights are read one at a time
and widened to float64 in blocks of rows.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import Any, TypeAlias

import numpy as np
from numpy.typing import NDArray

from llamac.compiler import reference
from llamac.compiler.checkpoint import Checkpoint
from llamac.compiler.config import rope_table
from llamac.compiler.floats import round_to, widen
from llamac.compiler.reference import Float64
from llamac.schedules.quantized import Quantization
from llamac.targets.hadamard import hadamard_grid

Observe: TypeAlias = Callable[[str, Float64], None]
"""Called with the label of a value (`targets/chunk.py`) and the value of some or all tokens."""

# Positions whose logits are held at once by `nll`.
_NLL_CHUNK = 64


KvCodes: TypeAlias = tuple[Quantization, Quantization]
"""Of keys and of values, where each has one scale for all."""


class KvCache:
    """Keys and values of one layer as a bundle stores them.

    Args:
        dtype: "float32", "float16", or "int8" (one scale per position and head).
        codes: as codes with these scales, whatever the dtype.

    Raises:
        ValueError: another dtype.
    """

    def __init__(self, dtype: str, codes: KvCodes | None = None) -> None:
        if dtype not in ("float32", "float16", "int8"):
            raise ValueError(f"a KV cache of {dtype!r} is not one of float32, float16, int8")
        self.dtype, self.codes = dtype, codes
        self._sides: list[list[Float64]] = [[], []]

    def append(self, k: Float64, v: Float64) -> tuple[Float64, Float64]:
        """Store new rows [T, Hkv, D]; return all keys and values as they read back, [P, Hkv, D]."""
        for index, rows in enumerate((k, v)):
            self._sides[index].append(self._stored(index, rows))
        keys, values = (np.concatenate(side) for side in self._sides)
        return keys, values

    def last(self) -> tuple[Float64, Float64]:
        """Return the keys and values that were stored last, as they read back, [T, Hkv, D]."""
        keys, values = (side[-1] for side in self._sides)
        return keys, values

    def _stored(self, side: int, rows: Float64) -> Float64:
        if self.codes is not None:
            return self.codes[side].dequantize(self.codes[side].quantize(rows))
        if self.dtype == "int8":
            return reference.dequantize_kv(reference.quantize_kv(rows))
        return round_to(rows, self.dtype).astype(np.float64)


class ReferenceModel:
    """Runs a checkpoint of any form ("spinquant", "qlora", "ptq", "float") in float64.

    Args:
        checkpoint: the model; its weights are read again for every call.
        scale_dtype: what the bundle stores group scales as: "float16", "float32", "bfloat16".
        kv_dtype: what the bundle stores keys and values as: "float16", "float32", "int8".
        apply_r4: run the online Hadamard transform where the checkpoint asks for it. Without it
            a SpinQuant model is wrong; tests use this to see that they would notice.
        quantize_activations: before products with int4 weights, as the checkpoint asks for it. A
            processor that computes layers in float16 does not.
        float_layers: layers before whose products they are not, even so.
        kv_codes: of the KV cache of each layer, where it is stored so.
        observe: called with every value inside the layers.
    """

    def __init__(
        self,
        checkpoint: Checkpoint,
        *,
        scale_dtype: str = "float16",
        kv_dtype: str = "float16",
        apply_r4: bool = True,
        quantize_activations: bool = True,
        float_layers: frozenset[int] = frozenset(),
        kv_codes: Mapping[int, KvCodes] | None = None,
        observe: Observe | None = None,
    ) -> None:
        self.checkpoint = checkpoint
        self.scale_dtype = scale_dtype
        self.kv_dtype = kv_dtype
        self._quantize_activations = quantize_activations
        self._float_layers = float_layers
        self._kv_codes = kv_codes or {}
        self._observe = observe
        self.apply_r4 = apply_r4 and checkpoint.quant.hadamard_r4
        self._weights = checkpoint.weights
        self._names = frozenset(self._weights.names())

    def logits(self, tokens: Sequence[int], all_positions: bool = True) -> Float64:
        """Logits after every token, or after the last one only: [T, V] or [1, V] float64."""
        hidden = self._hidden(tokens, self._empty_cache(), 0)
        return self._output(hidden if all_positions else hidden[-1:])

    def nll(self, tokens: Sequence[int]) -> float:
        """Mean negative log likelihood, in nats, of each token after the first.

        Raises:
            ValueError: fewer than two tokens.
        """
        if len(tokens) < 2:
            raise ValueError(f"a likelihood needs at least 2 tokens, not {len(tokens)}")
        hidden = self._hidden(tokens[:-1], self._empty_cache(), 0)
        total = 0.0
        for start in range(0, len(hidden), _NLL_CHUNK):
            logits = self._output(hidden[start : start + _NLL_CHUNK])
            targets = np.asarray(tokens[start + 1 : start + 1 + len(logits)])
            logits -= logits.max(-1, keepdims=True)
            chosen = logits[np.arange(len(logits)), targets]
            total += float(np.sum(np.log(np.exp(logits).sum(-1)) - chosen))
        return total / (len(tokens) - 1)

    def greedy(self, prompt: Sequence[int], n: int) -> list[int]:
        """The `n` tokens that follow `prompt` when the likeliest one is taken each time."""
        return self.generate(prompt, n, lambda logits: int(reference.argmax(logits[None])[0]))

    def generate(
        self, prompt: Sequence[int], n: int, choose: Callable[[Float64], int]
    ) -> list[int]:
        """The `n` tokens that follow `prompt`, each chosen from its logits [V]."""
        cache = self._empty_cache()
        generated: list[int] = []
        pending, position = list(prompt), 0
        while len(generated) < n:
            hidden = self._hidden(pending, cache, position)
            position += len(pending)
            pending = [choose(self._output(hidden[-1:])[0])]
            generated += pending
        return generated

    def _empty_cache(self) -> list[KvCache]:
        layers = range(self.checkpoint.config.num_layers)
        return [KvCache(self.kv_dtype, self._kv_codes.get(layer)) for layer in layers]

    def _hidden(self, tokens: Sequence[int], cache: list[KvCache], position: int) -> Float64:
        """The residual stream after the last layer, [T, dim], for tokens from `position` on."""
        table = rope_table(self.checkpoint.config, position + len(tokens))[position:]
        x = self.embedding(tokens)
        for layer, layer_cache in enumerate(cache):
            x = self.layer(f"layers.{layer}", x, table, layer_cache, position)
        return x

    def layer(
        self, prefix: str, x: Float64, table: NDArray[np.float32], cache: KvCache, position: int
    ) -> Float64:
        """The residual stream [T, dim] after one layer; its new keys and values go into the cache.

        Args:
            prefix: of the layer's names, "layers.0".
            x: the stream before it.
            table: rows of the RoPE table for these tokens.
            cache: of the layer, with `position` rows.
            position: of the first token.
        """
        mixed = self._attention(prefix, x, table, cache, position)
        x = self._seen(f"{prefix}.attention.wo.add", x + mixed)
        return self._seen(f"{prefix}.feed_forward.w2.add", x + self._feed_forward(prefix, x))

    def _seen(self, label: str, value: Float64) -> Float64:
        if self._observe is not None:
            self._observe(label, value)
        return value

    def _see_columns(self, label: str, value: Float64) -> None:
        """Observe the first of the two products that R4 consists of on some processors."""
        if self._observe is not None:
            grid = value.reshape(-1, *hadamard_grid(value.shape[-1]))
            self._observe(label, reference.hadamard(grid))

    def embedding(self, tokens: Sequence[int]) -> Float64:
        """The residual stream before the first layer, [T, dim]."""
        table = self._weights.read("tok_embeddings.weight")
        if "tok_embeddings.scales" not in self._names:
            return reference.embedding_float(tokens, table)
        return reference.embedding(tokens, table, self._weights.read("tok_embeddings.scales"))

    def _attention(
        self, prefix: str, x: Float64, table: NDArray[np.float32], cache: KvCache, position: int
    ) -> Float64:
        config, name = self.checkpoint.config, f"{prefix}.attention"
        normed = self._norm(f"{prefix}.attention_norm", x)
        q, k, v = (
            self._linear(f"{name}.{side}", normed).reshape(len(x), -1, config.head_dim)
            for side in ("wq", "wk", "wv")
        )
        q = self._seen(f"{name}.wq.rope", reference.rope(q, table))
        k = self._seen(f"{name}.wk.rope", reference.rope(k, table))
        keys, values = cache.append(k, v)
        if self._observe is not None:
            for scores in reference.attention_scores(q, keys, position):
                self._observe(f"{name}.wv.attention.scores", scores[np.isfinite(scores)])
        mixed = reference.attention(q, keys, values, position).reshape(len(x), -1)
        return self._linear(f"{name}.wo", self._seen(f"{name}.wv.attention", mixed))

    def _feed_forward(self, prefix: str, x: Float64) -> Float64:
        normed = self._norm(f"{prefix}.ffn_norm", x)
        gate = self._linear(f"{prefix}.feed_forward.w1", normed)
        up = self._linear(f"{prefix}.feed_forward.w3", normed)
        label = f"{prefix}.feed_forward.w3.swiglu"
        inner = self._seen(label, reference.swiglu(gate, up))
        if self.apply_r4:
            self._see_columns(f"{label}.hadamard.columns", inner)
            inner = self._seen(f"{label}.hadamard", reference.hadamard(inner))
        return self._linear(f"{prefix}.feed_forward.w2", inner)

    def _output(self, hidden: Float64) -> Float64:
        has_output = "output.weight" in self._names
        return self._linear(
            "output" if has_output else "tok_embeddings", self._norm("norm", hidden)
        )

    def _norm(self, name: str, x: Float64) -> Float64:
        if self._observe is not None:
            square = np.mean(x * x, axis=-1, keepdims=True)
            self._observe(f"{name}.mean_square", square)
            self._observe(f"{name}.unit", x / np.sqrt(np.where(square > 0, square, 1.0)))
        gamma = widen(self._weights.read(f"{name}.weight"))
        return self._seen(name, reference.rms_norm(x, gamma, self.checkpoint.config.norm_eps))

    def _linear(self, name: str, x: Float64) -> Float64:
        """Apply the linear layer `name`; its scales tell which kind it is."""
        return self._seen(name, self._product(name, x))

    def _product(self, name: str, x: Float64) -> Float64:
        weight = self._weights.read(f"{name}.weight")
        if f"{name}.scales" not in self._names:
            return reference.linear(x, weight)
        scales = self._weights.read(f"{name}.scales")
        rule = self.checkpoint.quant.activation_rule
        # Scales of groups are stored narrow, but for those of LPBQ, which are products.
        is_exact = scales.ndim == 1 or f"{name}.row_scales" in self._names
        stored = scales if is_exact else round_to(scales, self.scale_dtype)
        if name.startswith("layers.") and self._is_float(name):
            return self._float_linear(name, x, weight, stored)
        if scales.ndim == 1:
            return reference.qlinear_int8(x, weight, scales, rule=rule)
        return reference.qlinear_int4(x, weight, stored, self._lora(name), rule=rule)

    def _is_float(self, name: str) -> bool:
        """Whether a layer of a block gets its activations as they are."""
        return not self._quantize_activations or int(name.split(".")[1]) in self._float_layers

    def _float_linear(
        self, name: str, x: Float64, weight: NDArray[np.int8], scales: NDArray[Any]
    ) -> Float64:
        """Apply a layer of codes to activations as they are; scales [N] or [N, K/group]."""
        grouped = weight.astype(np.float64).reshape(*scales.shape, -1)
        wide = (grouped * scales.astype(np.float64)[..., None]).reshape(weight.shape)
        result, lora = reference.linear(x, wide), self._lora(name)
        if lora is None:
            return result
        inner = self._seen(f"{name}.adaptor.A", reference.linear(x, lora.a))
        branch = self._seen(f"{name}.adaptor.B", lora.scale * reference.linear(inner, lora.b))
        return result + branch

    def _lora(self, name: str) -> reference.Lora | None:
        config = self.checkpoint.quant.lora
        if config is None or f"{name}.adaptor.A.weight" not in self._names:
            return None
        a, b = (self._weights.read(f"{name}.adaptor.{side}.weight") for side in "AB")
        return reference.Lora(a, b, config.scale)
