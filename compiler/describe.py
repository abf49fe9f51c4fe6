"""What the manifest says of a model: its sizes, its arithmetic, its tokenizer."""

from __future__ import annotations

from importlib.metadata import PackageNotFoundError, version

from llamac.compiler.checkpoint import Checkpoint
from llamac.compiler.frontends.tiktoken_form import count_ranks
from llamac.runtime.manifest import (
    LoraEntry,
    ModelEntry,
    QuantizationEntry,
    RopeScalingEntry,
    TokenizerEntry,
)

TOOLS = ("llamac", "apache-tvm", "ziglang", "numpy", "torch")

# Llama 3's special tokens, in the order of their ids after the ordinary ones. The others are
# reserved.
SPECIAL_TOKENS = {
    0: "<|begin_of_text|>",
    1: "<|end_of_text|>",
    4: "<|finetune_right_pad_id|>",
    6: "<|start_header_id|>",
    7: "<|end_header_id|>",
    8: "<|eom_id|>",
    9: "<|eot_id|>",
    10: "<|python_tag|>",
}
STOP_TOKENS = ("<|end_of_text|>", "<|eom_id|>", "<|eot_id|>")
CHAT_TOKENS = ("<|begin_of_text|>", "<|start_header_id|>", "<|end_header_id|>", "<|eot_id|>")


def tool_versions() -> dict[str, str]:
    """Versions of the packages that made a bundle; what is not installed is left out."""
    versions = {}
    for name in TOOLS:
        try:
            versions[name] = version(name)
        except PackageNotFoundError:
            continue
    return versions


def describe_model(checkpoint: Checkpoint, name: str, context_length: int) -> ModelEntry:
    """Architecture of the model."""
    config, scaling = checkpoint.config, checkpoint.config.rope_scaling
    entry = None
    if scaling is not None:
        factors = (scaling.factor, scaling.low_freq_factor, scaling.high_freq_factor)
        entry = RopeScalingEntry(*factors, scaling.original_context)
    return ModelEntry(
        name=name,
        family="llama",
        dim=config.dim,
        num_layers=config.num_layers,
        num_heads=config.num_heads,
        num_kv_heads=config.num_kv_heads,
        head_dim=config.head_dim,
        ffn_dim=config.ffn_dim,
        vocab_size=config.vocab_size,
        norm_eps=config.norm_eps,
        rope_theta=config.rope_theta,
        rope_scaling=entry,
        context_length=context_length,
    )


def describe_quantization(
    checkpoint: Checkpoint, scale_dtype: str, kv_dtype: str, notes: tuple[str, ...]
) -> QuantizationEntry:
    """The arithmetic that the library uses."""
    quant, is_float = checkpoint.quant, checkpoint.quant.form == "float"
    embedding, output = (_table(checkpoint, name) for name in ("tok_embeddings", "output"))
    has_codes = not is_float or output != "bfloat16"
    return QuantizationEntry(
        form=quant.form,
        weights=_linear_weights(checkpoint),
        scale_dtype="none" if is_float else scale_dtype,
        activations="int8 per token, asymmetric" if has_codes else "float32",
        activation_rule=quant.activation_rule if has_codes else "none",
        embedding=embedding,
        output=output,
        shared_embedding=checkpoint.shared_embedding,
        hadamard_r4=quant.hadamard_r4,
        lora=LoraEntry(quant.lora.rank, quant.lora.scale) if quant.lora else None,
        kv_cache=kv_dtype,
        notes=notes,
    )


def _table(checkpoint: Checkpoint, name: str) -> str:
    """The form of the embedding or the output layer."""
    has_scales = f"{name}.scales" in checkpoint.weights.names()
    return "int8 per channel" if has_scales else "bfloat16"


def _linear_weights(checkpoint: Checkpoint) -> str:
    """The forms of the blocks' linear layers; a file may mix them."""
    names, config = frozenset(checkpoint.weights.names()), checkpoint.config
    layers = (
        f"layers.{i}.{part}" for i in range(config.num_layers) for part in config.linear_shapes()
    )
    has_int4 = [f"{layer}.scales" in names for layer in layers]
    int4 = f"int4 group-{checkpoint.quant.group_size}"
    if all(has_int4):
        return int4
    return f"{int4} and bfloat16" if any(has_int4) else "bfloat16"


def describe_tokenizer(checkpoint: Checkpoint, file: str) -> TokenizerEntry:
    """Ids of the special tokens, which follow the ordinary ones in Llama 3's order."""
    ranks = count_ranks(checkpoint.tokenizer)
    special = _special_tokens(ranks, checkpoint.config.vocab_size - ranks)
    has_chat = all(name in special for name in CHAT_TOKENS)
    return TokenizerEntry(
        file=file,
        format="tiktoken",
        pattern="llama3",
        special_tokens=special,
        bos_id=special.get("<|begin_of_text|>"),
        stop_ids=tuple(special[name] for name in STOP_TOKENS if name in special),
        chat_template="llama3" if has_chat else None,
    )


def _special_tokens(first: int, count: int) -> dict[str, int]:
    special: dict[str, int] = {}
    reserved = 0
    for index in range(count):
        name = SPECIAL_TOKENS.get(index)
        if name is None:
            name = f"<|reserved_special_token_{reserved}|>"
            reserved += 1
        special[name] = first + index
    return special
