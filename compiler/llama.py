"""The model as Relax functions of composites: `prefill_<n>` for each chunk length, and `decode`.

Parameters of every function, in this order: tokens int32 [T], meta int32 [2], the weights under
their names in the checkpoint, the RoPE table, and the KV caches of each layer. It returns logits
[1, V] of the last valid token, their argmax [1], and the caches.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from tvm import relax
from tvm.ir import IRModule
from tvm.relax import BlockBuilder, Var

from llamac.compiler.checkpoint import Checkpoint
from llamac.compiler.composites import CompositeBuilder

ROPE_TABLE = "rope.table"


@dataclass(frozen=True)
class ModelOptions:
    """What is decided before the IR is built.

    Attributes:
        capacity: positions in the KV cache, including room for a padded chunk.
        chunks: prefill lengths, largest first.
        kv_dtype: of the KV cache: "float16", "int8", or "int16" for graphs.
        cpu_layers: layers whose cache is the CPU's own, because no graph computes them.
        cpu_kv_dtype: of that.
    """

    capacity: int
    chunks: tuple[int, ...]
    kv_dtype: str = "float16"
    cpu_layers: frozenset[int] = frozenset()
    cpu_kv_dtype: str = "float16"

    def kv_dtype_of(self, layer: int) -> str:
        """What the keys and values of a layer are stored as."""
        return self.cpu_kv_dtype if layer in self.cpu_layers else self.kv_dtype


def build_llama(checkpoint: Checkpoint, options: ModelOptions) -> IRModule:
    """Build the module of a Llama: one Relax function for each chunk length, and `decode`."""
    builder = BlockBuilder()
    composites = CompositeBuilder(builder)
    for tokens in (*options.chunks, 1):
        name = "decode" if tokens == 1 else f"prefill_{tokens}"
        _Function(builder, composites, checkpoint, options, tokens).build(name)
    return builder.finalize()


def cache_names(kv_dtype: str, layer: int) -> list[str]:
    """Names of the cache tensors of a layer, in the order of the attention composite."""
    parts = ["k_cache", "v_cache"]
    if kv_dtype == "int8":
        parts += ["k_params", "v_params"]
    return [f"layers.{layer}.{part}" for part in parts]


class _Function:
    """Builds one function for a static number of tokens."""

    def __init__(
        self,
        builder: BlockBuilder,
        composites: CompositeBuilder,
        checkpoint: Checkpoint,
        options: ModelOptions,
        tokens: int,
    ) -> None:
        self.builder, self.composites = builder, composites
        self.config, self.quant = checkpoint.config, checkpoint.quant
        self.checkpoint, self.options, self.tokens = checkpoint, options, tokens
        self.params: dict[str, Var] = {}

    def build(self, name: str) -> None:
        """Emit the function into the module."""
        self._declare()
        with self.builder.function(name, list(self.params.values())):
            with self.builder.dataflow():
                outputs = [self.builder.emit_output(value) for value in self._body()]
            self.builder.emit_func_output(relax.Tuple(outputs))

    def _declare(self) -> None:
        """Make the parameters."""
        config, options = self.config, self.options
        self._param("tokens", (self.tokens,), "int32")
        self._param("meta", (2,), "int32")
        for name in self.checkpoint.weights.names():
            info = self.checkpoint.weights.info(name)
            if not (self.checkpoint.shared_embedding and name.startswith("output.")):
                self._param(name, info.shape, info.dtype)
        self._param(ROPE_TABLE, (options.capacity, config.head_dim // 2, 2), "float32")
        heads, capacity = config.num_kv_heads, options.capacity
        for layer in range(config.num_layers):
            kv_dtype = options.kv_dtype_of(layer)
            for name in cache_names(kv_dtype, layer):
                if name.endswith("params"):
                    self._param(name, (heads, capacity, 2), "float32")
                else:
                    self._param(name, (heads, capacity, config.head_dim), kv_dtype)

    def _param(self, name: str, shape: Sequence[int], dtype: str) -> None:
        self.params[name] = relax.Var(name, relax.TensorType(list(shape), dtype))

    def _body(self) -> list[Any]:
        call, config, p = self.composites.call, self.config, self.params
        table = [p[n] for n in ("tok_embeddings.weight", "tok_embeddings.scales") if n in p]
        x = call("embedding", [p["tokens"], *table])
        caches: list[Any] = []
        for layer in range(config.num_layers):
            x, updated = self._layer(x, layer)
            caches += updated
        last = call("take_row", [x, p["meta"]])
        last = call("rms_norm", [last, p["norm.weight"]], eps=config.norm_eps)
        logits = self._output(last)
        return [logits, call("argmax", [logits]), *caches]

    def _layer(self, x: Any, layer: int) -> tuple[Any, list[Any]]:
        """One transformer block: attention and feed-forward, each added to the residual stream."""
        call, eps, prefix = self.composites.call, self.config.norm_eps, f"layers.{layer}"
        normed = call("rms_norm", [x, self.params[f"{prefix}.attention_norm.weight"]], eps=eps)
        attended, caches = self._attention(normed, layer)
        x = call("add", [x, self._linear(attended, f"{prefix}.attention.wo")])
        normed = call("rms_norm", [x, self.params[f"{prefix}.ffn_norm.weight"]], eps=eps)
        gate = self._linear(normed, f"{prefix}.feed_forward.w1")
        up = self._linear(normed, f"{prefix}.feed_forward.w3")
        hidden = call("swiglu", [gate, up])
        if self.quant.hadamard_r4:
            hidden = call("hadamard", [hidden])
        return call("add", [x, self._linear(hidden, f"{prefix}.feed_forward.w2")]), caches

    def _attention(self, normed: Any, layer: int) -> tuple[Any, list[Any]]:
        call, config, p = self.composites.call, self.config, self.params
        q, k, v = (
            self._linear(normed, f"layers.{layer}.attention.{w}") for w in ("wq", "wk", "wv")
        )
        q, k = (
            call("rope", [x, p[ROPE_TABLE], p["meta"]], head_dim=config.head_dim) for x in (q, k)
        )
        kv_dtype = self.options.kv_dtype_of(layer)
        names = cache_names(kv_dtype, layer)
        result = call(
            "attention",
            [q, k, v, p["meta"], *(p[name] for name in names)],
            heads=config.num_heads,
            kv_heads=config.num_kv_heads,
            head_dim=config.head_dim,
            kv_dtype=kv_dtype,
        )
        parts = [self.builder.emit(relax.TupleGetItem(result, i)) for i in range(1 + len(names))]
        return parts[0], parts[1:]

    def _linear(self, x: Any, name: str) -> Any:
        """A linear layer of a block, in the form that the checkpoint has it."""
        call, p = self.composites.call, self.params
        if f"{name}.scales" not in p:
            return call("linear", [x, p[f"{name}.weight"]])
        args = [x, p[f"{name}.weight"], p[f"{name}.scales"]]
        attrs: dict[str, Any] = {}
        if self.quant.lora is not None:
            args += [p[f"{name}.adaptor.A.weight"], p[f"{name}.adaptor.B.weight"]]
            attrs["lora_scale"] = self.quant.lora.scale
        if self.quant.signed_scales:
            attrs["signed_scales"] = True
        return call(
            "qlinear",
            args,
            weight="int4",
            group=self.quant.group_size,
            rule=self.quant.activation_rule,
            **attrs,
        )

    def _output(self, x: Any) -> Any:
        """The output layer; it shares the embedding table when both are equal."""
        p = self.params
        source = "output" if "output.weight" in p else "tok_embeddings"
        if f"{source}.scales" not in p:
            return self.composites.call("linear", [x, p[f"{source}.weight"]])
        args = [x, p[f"{source}.weight"], p[f"{source}.scales"]]
        rule = self.quant.activation_rule
        return self.composites.call("qlinear", args, weight="int8", rule=rule)
