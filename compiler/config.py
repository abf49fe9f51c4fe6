"""What a model is: sizes, RoPE, and how its weights are quantized.

Letters of shapes: V vocabulary, N outputs (rows) and K inputs (columns) of a linear layer, D head
size, P positions.
"""

from __future__ import annotations

import math
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from llamac.runtime.errors import ParamsInvalid

# Far above any Llama; they only stop a damaged file from asking for absurd allocations.
_LARGEST = {
    "dim": 1 << 16,
    "num_layers": 1 << 10,
    "num_heads": 1 << 10,
    "num_kv_heads": 1 << 10,
    "head_dim": 1 << 12,
    "ffn_dim": 1 << 18,
    "vocab_size": 1 << 21,
}


def _refuse(field: str, found: object, expected: str) -> ParamsInvalid:
    return ParamsInvalid(
        f"{field} is {found}, expected {expected}.",
        cause="The model's configuration contradicts itself or is damaged.",
        fix="Take the configuration file that belongs to these weights.",
    )


@dataclass(frozen=True)
class RopeScaling:
    """Llama 3's rule for stretching RoPE over a longer context.

    Wavelengths above `original_context / low_freq_factor` are divided by `factor`, those below
    `original_context / high_freq_factor` are kept, those between are blended.

    Raises:
        ParamsInvalid: a factor is not a finite number of the right order.
    """

    factor: float
    low_freq_factor: float = 1.0
    high_freq_factor: float = 4.0
    original_context: int = 8192

    def __post_init__(self) -> None:
        if not (math.isfinite(self.factor) and self.factor >= 1):
            raise _refuse("rope_scaling.factor", self.factor, "a finite number of at least 1")
        if not 0 < self.low_freq_factor < self.high_freq_factor < math.inf:
            found = f"{self.low_freq_factor} to {self.high_freq_factor}"
            raise _refuse(
                "rope_scaling.low_freq_factor to high_freq_factor", found, "0 < low < high"
            )
        if self.original_context < 1:
            raise _refuse("rope_scaling.original_context", self.original_context, "at least 1")


@dataclass(frozen=True)
class LlamaConfig:
    """The sizes and constants of one Llama.

    Attributes:
        dim: width of the residual stream.
        num_layers: transformer blocks.
        num_heads: query heads; `num_heads * head_dim` need not equal `dim`.
        num_kv_heads: key and value heads; divides `num_heads`.
        head_dim: D, even because RoPE turns pairs.
        ffn_dim: width between gate/up and down projections.
        vocab_size: V, rows of the embedding and of the output layer.
        norm_eps: added to the mean square in every RMSNorm.
        rope_theta: base of the RoPE frequencies.
        rope_scaling: Llama 3's stretching, or None for plain RoPE.

    Raises:
        ParamsInvalid: a size is out of bounds or contradicts another one; the message names it.
    """

    dim: int
    num_layers: int
    num_heads: int
    num_kv_heads: int
    head_dim: int
    ffn_dim: int
    vocab_size: int
    norm_eps: float
    rope_theta: float
    rope_scaling: RopeScaling | None

    def __post_init__(self) -> None:
        for field, largest in _LARGEST.items():
            if not 1 <= getattr(self, field) <= largest:
                raise _refuse(field, getattr(self, field), f"1 to {largest}")
        if self.num_heads % self.num_kv_heads:
            raise _refuse("num_kv_heads", self.num_kv_heads, f"a divisor of {self.num_heads} heads")
        if self.head_dim % 2:
            raise _refuse("head_dim", self.head_dim, "an even number, because RoPE turns pairs")
        if not 0 < self.norm_eps < 1:
            raise _refuse("norm_eps", self.norm_eps, "a number between 0 and 1")
        if not 1 < self.rope_theta < math.inf:
            raise _refuse("rope_theta", self.rope_theta, "a finite number above 1")

    @property
    def q_dim(self) -> int:
        """Width of all query heads together."""
        return self.num_heads * self.head_dim

    @property
    def kv_dim(self) -> int:
        """Width of all key (or value) heads together."""
        return self.num_kv_heads * self.head_dim

    def linear_shapes(self) -> dict[str, tuple[int, int]]:
        """Map the name of each linear layer inside a block to its (N outputs, K inputs).

        The names are canonical: the weight is `layers.<i>.<name>.weight`.
        """
        return {
            "attention.wq": (self.q_dim, self.dim),
            "attention.wk": (self.kv_dim, self.dim),
            "attention.wv": (self.kv_dim, self.dim),
            "attention.wo": (self.dim, self.q_dim),
            "feed_forward.w1": (self.ffn_dim, self.dim),
            "feed_forward.w2": (self.dim, self.ffn_dim),
            "feed_forward.w3": (self.ffn_dim, self.dim),
        }

    def num_linear_weights(self) -> int:
        """Count the weights of all blocks' linear layers, without embedding and output."""
        return self.num_layers * sum(n * k for n, k in self.linear_shapes().values())

    def num_lora_weights(self, rank: int) -> int:
        """Count the weights of rank-`rank` adaptors on every linear layer of the blocks."""
        return self.num_layers * sum(rank * (n + k) for n, k in self.linear_shapes().values())

    def kv_bytes_per_position(self, dtype: str = "float16") -> int:
        """Bytes of KV cache for one token, all layers; `dtype` is "float16" or "int8".

        The int8 cache adds a float32 scale and an int8 zero point per (position, head).
        """
        bytes_per_head = {"float16": 2 * self.head_dim, "int8": self.head_dim + 4 + 1}[dtype]
        return 2 * self.num_layers * self.num_kv_heads * bytes_per_head


@dataclass(frozen=True)
class LoraConfig:
    """Low-rank adaptors: `y += scale * B(A(x))` with `rank` rows in A."""

    rank: int
    scale: float


@dataclass(frozen=True)
class QuantConfig:
    """How the weights of a checkpoint are stored and how the model must be computed.

    Attributes:
        form: "spinquant", "qlora", "ptq" (plain post-training quantization) or "float".
        group_size: columns per int4 scale (unused for "float").
        hadamard_r4: a Walsh-Hadamard transform stands before every w2 (SpinQuant's R4).
        lora: adaptors on every linear layer of the blocks, or None.
        activation_rule: how activations become int8.
        signed_scales: int4 scales may be negative or 0, as in GGUF's Q4_0.
    """

    form: str
    group_size: int = 32
    hadamard_r4: bool = False
    lora: LoraConfig | None = None
    activation_rule: str = "torchao"
    signed_scales: bool = False


# Neither Meta's params.json nor the file names say this factor; see rope_scaling in the front end.
LLAMA_3_2_ROPE_FACTOR = 32.0

LLAMA_3_2_1B = LlamaConfig(
    dim=2048,
    num_layers=16,
    num_heads=32,
    num_kv_heads=8,
    head_dim=64,
    ffn_dim=8192,
    vocab_size=128256,
    norm_eps=1e-5,
    rope_theta=500000.0,
    rope_scaling=RopeScaling(LLAMA_3_2_ROPE_FACTOR),
)

LLAMA_3_2_3B = LlamaConfig(
    dim=3072,
    num_layers=28,
    num_heads=24,
    num_kv_heads=8,
    head_dim=128,
    ffn_dim=8192,
    vocab_size=128256,
    norm_eps=1e-5,
    rope_theta=500000.0,
    rope_scaling=RopeScaling(LLAMA_3_2_ROPE_FACTOR),
)


def rope_frequencies(config: LlamaConfig) -> NDArray[np.float64]:
    """Angle per position of each RoPE pair, highest first: float64 [D/2]."""
    exponents = np.arange(0, config.head_dim, 2, dtype=np.float64) / config.head_dim
    plain = config.rope_theta**-exponents
    rule = config.rope_scaling
    if rule is None:
        return plain
    turns = rule.original_context * plain / (2 * np.pi)  # full turns within the original context
    keep = (turns - rule.low_freq_factor) / (rule.high_freq_factor - rule.low_freq_factor)
    keep = np.clip(keep, 0, 1)
    return keep * plain + (1 - keep) * plain / rule.factor


def rope_table(config: LlamaConfig, num_positions: int) -> NDArray[np.float32]:
    """Cosine and sine of every angle: float32 [P, D/2, 2], last axis (cos, sin).

    Computed in float64, because float32 libraries differ by up to 6e-4 within 8192 positions.
    """
    angles = np.arange(num_positions, dtype=np.float64)[:, None] * rope_frequencies(config)
    table = np.empty((*angles.shape, 2), np.float32)
    table[..., 0] = np.cos(angles)
    table[..., 1] = np.sin(angles)
    return table
