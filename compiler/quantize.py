"""Weight quantizers of our own: float weights in, tensors as Meta's checkpoints hold them out.

llamac compiles checkpoints that somebody else quantized. This module makes such checkpoints from a
float model, for the example model and for tests; `requantize.py` has the schemes of processors that
cannot read them as they are.

    ptq         int4 group-32, nothing else
    spinquant   rotate so that no feature stands out, fold the norms, then int4 group-32
    qlora       int4 group-32 and a rank-16 branch fitted to the quantization error
    float       bfloat16

All names are Meta's (`layers.N.attention.wq.weight`), q and k rows in interleaved-pair order. A
model without `output.weight` is tied: its output layer is the embedding.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import replace
from typing import Any, NamedTuple, TypeVar

import numpy as np
from numpy.typing import NDArray

from llamac.compiler.config import LlamaConfig, LoraConfig, QuantConfig
from llamac.compiler.floats import from_bfloat16, to_bfloat16
from llamac.compiler.reference import hadamard
from llamac.runtime.errors import ModelUnsupported

Float32 = NDArray[np.float32]
Float64 = NDArray[np.float64]
Tensors = dict[str, NDArray[Any]]
FloatT = TypeVar("FloatT", np.float32, np.float64)

GROUP_SIZE = 32
LORA = LoraConfig(rank=16, scale=2.0)

ATTENTION = ("wq", "wk", "wv", "wo")
FEED_FORWARD = ("w1", "w2", "w3")
EMBEDDING, OUTPUT, FINAL_NORM = "tok_embeddings.weight", "output.weight", "norm.weight"

_F32 = np.float32
_MIN_SCALE = _F32(np.finfo(np.float32).eps)


class CodeSpan(NamedTuple):
    """The smallest and the largest integer that a weight's code may be."""

    low: int
    high: int


# Meta's int4 files use the code -8. Its mirror image for int8, -128, would buy 0.4 % of a step.
INT4 = CodeSpan(-8, 7)
INT8 = CodeSpan(-127, 127)


class Codes(NamedTuple):
    """Integer weights and their scales: value = scale * code.

    Attributes:
        codes: [N, K] int8.
        scales: [N, K / group] float32, one per group of columns (one group: [N, 1]).
    """

    codes: NDArray[np.int8]
    scales: Float32

    def dequantize(self) -> Float32:
        """The weights that the codes stand for, [N, K]."""
        group = self.codes.shape[1] // self.scales.shape[1]
        return self.codes.astype(_F32) * np.repeat(self.scales, group, axis=1)


def quantize_int4(weight: NDArray[Any], group: int = GROUP_SIZE) -> Codes:
    """Symmetric int4 codes -8..7 with one scale per `group` columns.

    The largest magnitude of a group becomes 7.5 steps, so it rounds to 7 (8 when negative).

    Args:
        weight: [N, K] float, finite.
        group: columns per scale; divides K.

    Source: equal to torchao's `group_quantize_tensor_symmetric`, bit for bit, but for the scale
    of groups that are all zero.
    """
    groups = np.asarray(weight, _F32).reshape(len(weight), -1, group)
    low, high = np.minimum(groups.min(-1), _F32(0)), np.maximum(groups.max(-1), _F32(0))
    scales = _symmetric_scales(np.maximum(-low, high), 7.5)
    codes = nearest_codes(groups, scales[..., None], INT4)
    return Codes(codes.astype(np.int8).reshape(np.shape(weight)), scales)


def quantize_int8(weight: NDArray[Any]) -> Codes:
    """Symmetric int8 codes -127..127 with one scale per row (embedding and output).

    Args:
        weight: [N, K] float, finite.
    """
    values = np.asarray(weight, _F32)
    scales = _symmetric_scales(np.abs(values).max(-1, keepdims=True), 127)
    return Codes(nearest_codes(values, scales, INT8).astype(np.int8), scales)


def nearest_codes(
    values: NDArray[FloatT], scales: NDArray[FloatT], span: CodeSpan
) -> NDArray[FloatT]:
    """The codes nearest to `values / scales`, ties to even: the rounding rule of all weights.

    Args:
        values: [..., K] float32 or float64, finite.
        scales: of the same dtype, above 0; broadcast against `values`.
        span: the codes that there are.

    Returns:
        Whole numbers within `span`, of the dtype of `values`.
    """
    codes: NDArray[Any] = values * (1 / scales)
    np.rint(codes, out=codes)
    np.clip(codes, span.low, span.high, out=codes)
    return codes


def _symmetric_scales(largest: Float32, steps: float) -> Float32:
    """Scales that put the largest magnitude at `steps`; 1 for groups of zeros.

    Any scale stands for zeros, but torchao's smallest, 2^-23, is no normal number of float16, in
    which scales are stored later.
    """
    scales = np.maximum(largest / _F32(steps), _MIN_SCALE)
    return np.where(largest == 0, _F32(1), scales)


def linear_names(config: LlamaConfig) -> list[str]:
    """Names, without ".weight", of the linears inside the blocks."""
    shapes = config.linear_shapes()
    return [f"layers.{layer}.{part}" for layer in range(config.num_layers) for part in shapes]


def norm_names(config: LlamaConfig) -> list[str]:
    """Names of all RMSNorm weights."""
    kinds = ("attention_norm", "ffn_norm")
    names = [
        f"layers.{layer}.{kind}.weight" for layer in range(config.num_layers) for kind in kinds
    ]
    return [*names, FINAL_NORM]


def pad_ffn(
    config: LlamaConfig, weights: Mapping[str, NDArray[Any]], ffn_dim: int
) -> tuple[LlamaConfig, Tensors]:
    """Widen the feed-forward layers with zeros; the model computes the same function.

    SpinQuant's online Hadamard needs a width that is a power of two, and int4 groups a multiple
    of 32.
    """
    padded = dict(weights)
    extra = ffn_dim - config.ffn_dim
    for name in linear_names(config):
        key = f"{name}.weight"
        if name.endswith((".w1", ".w3")):
            padded[key] = np.pad(weights[key], ((0, extra), (0, 0)))
        elif name.endswith(".w2"):
            padded[key] = np.pad(weights[key], ((0, 0), (0, extra)))
    return replace(config, ffn_dim=ffn_dim), padded


def random_rotation(size: int, rng: np.random.Generator) -> Float64:
    """A random orthogonal matrix: a Hadamard matrix with random signs where there is one.

    For a size that is no power of two, the Q of a Gaussian matrix.
    """
    if size & (size - 1) == 0:
        return hadamard(np.diag(rng.choice([-1.0, 1.0], size)))
    q, r = np.linalg.qr(rng.standard_normal((size, size)))
    return np.asarray(q * np.sign(np.diag(r)))


def rotate_spinquant(
    config: LlamaConfig, weights: Mapping[str, NDArray[Any]], seed: int = 0
) -> Tensors:
    """Rotate a float model the way SpinQuant does; with the online R4 it computes the same.

    R1 turns the residual stream, R2 the values of each head, and every RMSNorm weight moves into
    the linears that read it (the norms become 1). w2 expects its input after an orthonormal
    Hadamard transform over the feed-forward width ("R4"), which the runtime has to apply. Unlike
    SpinQuant, which learns R1 and R2, these are random; the structure is the same.

    Args:
        config: of the model; `ffn_dim` a power of two.
        weights: float tensors under Meta's names.
        seed: of the random signs.

    Returns:
        float32 tensors under the same names, and `output.weight` of its own: the final norm is
        folded into it, so it no longer equals the embedding.

    Raises:
        ModelUnsupported: the feed-forward width has no Hadamard matrix.
    """
    check_hadamard(config)
    rng = np.random.default_rng(seed)
    r1 = random_rotation(config.dim, rng)
    wide = {name: np.asarray(value, np.float64) for name, value in weights.items()}
    rotated = {name: np.ones(config.dim) for name in norm_names(config)}
    rotated[EMBEDDING] = wide[EMBEDDING] @ r1
    rotated[OUTPUT] = (wide.get(OUTPUT, wide[EMBEDDING]) * wide[FINAL_NORM]) @ r1
    for layer in range(config.num_layers):
        r2 = random_rotation(config.head_dim, rng)
        rotated |= _rotate_attention(wide, f"layers.{layer}.", r1, r2)
        rotated |= _rotate_feed_forward(wide, f"layers.{layer}.", r1)
    return {name: value.astype(_F32) for name, value in rotated.items()}


def check_hadamard(config: LlamaConfig) -> None:
    """Check that R4 exists for a model.

    Raises:
        ModelUnsupported: the feed-forward width has no Hadamard matrix.
    """
    if config.ffn_dim & (config.ffn_dim - 1):
        raise ModelUnsupported(
            f"the feed-forward width {config.ffn_dim} is no power of two",
            cause="the SpinQuant form needs a Hadamard transform of that length",
            fix="widen the model with pad_ffn() first",
        )


def _rotate_attention(wide: dict[str, Float64], layer: str, r1: Float64, r2: Float64) -> Tensors:
    """The four linears of one attention block; R2 cancels between wv and wo."""
    gamma = wide[f"{layer}attention_norm.weight"]
    q, k, v, o = (f"{layer}attention.{name}.weight" for name in ATTENTION)
    values = (wide[v] * gamma) @ r1
    output = r1.T @ wide[o]
    per_head = values.reshape(-1, len(r2), values.shape[1])
    return {
        q: (wide[q] * gamma) @ r1,
        k: (wide[k] * gamma) @ r1,
        v: np.einsum("hdk,de->hek", per_head, r2).reshape(values.shape),
        o: (output.reshape(len(output), -1, len(r2)) @ r2).reshape(output.shape),
    }


def _rotate_feed_forward(wide: dict[str, Float64], layer: str, r1: Float64) -> Tensors:
    """The three linears of one feed-forward block; w2 takes the inverse of R4."""
    gamma = wide[f"{layer}ffn_norm.weight"]
    w1, w2, w3 = (f"{layer}feed_forward.{name}.weight" for name in FEED_FORWARD)
    return {
        w1: (wide[w1] * gamma) @ r1,
        w3: (wide[w3] * gamma) @ r1,
        w2: hadamard(r1.T @ wide[w2]),
    }


def fit_lora(error: NDArray[Any], lora: LoraConfig = LORA) -> tuple[Float32, Float32]:
    """The low-rank branch nearest to `error`: error ~ scale * B @ A, in bfloat16 precision.

    Args:
        error: [N, K], the weight minus what its codes stand for.
        lora: rank and scale.

    Returns:
        A [rank, K] and B [N, rank], float32 values that bfloat16 holds exactly.
    """
    u, s, vt = np.linalg.svd(np.asarray(error, np.float64), full_matrices=False)
    root = np.sqrt(s[: lora.rank])
    a, b = root[:, None] * vt[: lora.rank], u[:, : lora.rank] * root / lora.scale
    return from_bfloat16(to_bfloat16(a)), from_bfloat16(to_bfloat16(b))


def quantize_model(
    config: LlamaConfig, weights: Mapping[str, NDArray[Any]], form: str, seed: int = 0
) -> tuple[QuantConfig, Tensors]:
    """Make one of the four forms from float weights.

    Args:
        config: of the model; all inputs of linears multiples of 32 unless the form is "float".
        weights: float tensors under Meta's names.
        form: "float", "ptq", "spinquant" or "qlora".
        seed: of the random rotation.

    Returns:
        The quantization and the tensors exactly as Meta's files hold them: int4 codes one per
        byte, scales float32 ([N, K/32] or [V, 1]), norms and LoRA as bfloat16 bits in uint16.

    Raises:
        ModelUnsupported: the shapes do not suit the form.
        ValueError: unknown form.
    """
    if form not in ("float", "ptq", "spinquant", "qlora"):
        raise ValueError(f"unknown form {form!r}: not one of float, ptq, spinquant, qlora")
    if form == "float":
        return QuantConfig(form), {name: to_bfloat16(value) for name, value in weights.items()}
    check_groups(config)
    source = rotate_spinquant(config, weights, seed) if form == "spinquant" else dict(weights)
    lora = LORA if form == "qlora" else None
    tensors = _quantize_tables(source)
    tensors |= {name: to_bfloat16(source[name]) for name in norm_names(config)}
    for name in linear_names(config):
        tensors |= _quantize_linear(name, source[f"{name}.weight"], lora)
    return QuantConfig(form, GROUP_SIZE, hadamard_r4=form == "spinquant", lora=lora), tensors


def check_groups(config: LlamaConfig) -> None:
    """Check that all linears of the blocks can be int4.

    Raises:
        ModelUnsupported: an input is no multiple of 32.
    """
    widths = sorted({inputs for _, inputs in config.linear_shapes().values()})
    if any(width % GROUP_SIZE for width in widths):
        raise ModelUnsupported(
            f"an input of a linear is no multiple of {GROUP_SIZE}: widths {widths}",
            cause=f"int4 weights have one scale per {GROUP_SIZE} columns",
            fix="widen the feed-forward layers with pad_ffn(), or use the float form",
        )


def _quantize_tables(weights: Mapping[str, NDArray[Any]]) -> Tensors:
    """Embedding and output as int8; a tied table is stored twice, as Meta does."""
    tables = {EMBEDDING: weights[EMBEDDING], OUTPUT: weights.get(OUTPUT, weights[EMBEDDING])}
    tensors: Tensors = {}
    for name, table in tables.items():
        tensors[name], tensors[_scales_of(name)] = quantize_int8(table)
    return tensors


def _quantize_linear(name: str, weight: NDArray[Any], lora: LoraConfig | None) -> Tensors:
    quantized = quantize_int4(weight)
    tensors: Tensors = {f"{name}.weight": quantized.codes, f"{name}.scales": quantized.scales}
    if lora is not None:
        a, b = fit_lora(weight - quantized.dequantize(), lora)
        tensors[f"{name}.adaptor.A.weight"] = to_bfloat16(a)
        tensors[f"{name}.adaptor.B.weight"] = to_bfloat16(b)
    return tensors


def _scales_of(weight_name: str) -> str:
    return weight_name.removesuffix("weight") + "scales"
