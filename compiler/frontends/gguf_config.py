"""The configuration of a Llama from a GGUF file's metadata, its RoPE scaling from a tensor.

llama.cpp writes Llama 3's scaling as `rope_freqs.weight`: float32 [D/2], by what each RoPE
frequency is divided, from 1 up to the factor. Here the rule is found that gives these divisors,
because the rule is what a configuration holds.
"""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import Any

import numpy as np
from numpy.typing import NDArray

from llamac.compiler.config import LlamaConfig, RopeScaling, rope_frequencies
from llamac.compiler.frontends.gguf_blocks import decode
from llamac.compiler.frontends.gguf_file import GgufFile
from llamac.compiler.frontends.meta_params import users_scaling
from llamac.runtime.errors import ModelUnsupported, ParamsInvalid, TensorInvalid

ROPE_FREQS = "rope_freqs.weight"
_LARGEST_NUMBER = 1 << 31
_DEFAULT_ROPE_BASE = 10000.0  # of llama.cpp, for files of Llama 1 and 2 that do not name one


@dataclass(frozen=True)
class _Fields:
    """Typed access to the metadata of a file; names lack the architecture in front."""

    file: GgufFile

    def get(self, name: str) -> Any:
        """A field, or None."""
        return self.file.metadata.get(f"llama.{name}")

    def error(self, name: str, expected: str) -> ParamsInvalid:
        value = self.get(name)
        is_plain = isinstance(value, bool | int | float | str)
        found = "missing" if value is None else repr(value)[:60] if is_plain else "an array"
        return ParamsInvalid(
            f"{self.file.path}: llama.{name} is {found}, expected {expected}.",
            cause="The file is damaged, or was written by a converter that llamac does not know.",
            fix="Convert the model again with llama.cpp's convert_hf_to_gguf.py.",
        )

    def integer(self, name: str, default: int | None = None) -> int:
        value = default if self.get(name) is None else self.get(name)
        if isinstance(value, bool) or not isinstance(value, int):
            raise self.error(name, "one integer for all layers")
        if not 1 <= value <= _LARGEST_NUMBER:
            raise self.error(name, f"1 to {_LARGEST_NUMBER}")
        return value

    def number(self, name: str, default: float | None = None) -> float:
        """A number above 0. It is float32 in the file; the shortest decimal is what was meant."""
        value = default if self.get(name) is None else self.get(name)
        if isinstance(value, bool) or not isinstance(value, int | float):
            raise self.error(name, "a number")
        if not 0 < value <= _LARGEST_NUMBER:
            raise self.error(name, f"a number above 0 and at most {_LARGEST_NUMBER}")
        return float(str(np.float32(value)))


def read_config(file: GgufFile, rope_factor: float | None) -> tuple[LlamaConfig, list[str]]:
    """Return the model's configuration, and notes about what the file left open.

    Args:
        file: with the metadata.
        rope_factor: the user's RoPE scaling factor, or None for what the file says.

    Raises:
        ModelUnsupported: another architecture, or parts that llamac cannot compute.
        ParamsInvalid: a field is missing, of the wrong type, or contradicts another.
        UsageError: `rope_factor` is not a finite number of at least 1.
    """
    fields = _Fields(file)
    _check_supported(file, fields)
    dim, num_heads = fields.integer("embedding_length"), fields.integer("attention.head_count")
    if dim % num_heads and fields.get("attention.key_length") is None:
        raise fields.error("attention.head_count", f"a divisor of {dim}")
    num_kv_heads = fields.integer("attention.head_count_kv", num_heads)
    if num_heads % num_kv_heads:
        raise fields.error("attention.head_count_kv", f"a divisor of {num_heads} heads")
    head_dim = fields.integer("attention.key_length", dim // num_heads)
    for name in ("attention.value_length", "rope.dimension_count"):
        if fields.integer(name, head_dim) != head_dim:
            raise fields.error(name, f"{head_dim}, the size of a head")
    config = LlamaConfig(
        dim=dim,
        num_layers=fields.integer("block_count"),
        num_heads=num_heads,
        num_kv_heads=num_kv_heads,
        head_dim=head_dim,
        ffn_dim=fields.integer("feed_forward_length"),
        vocab_size=_vocab_size(file, fields),
        norm_eps=fields.number("attention.layer_norm_rms_epsilon"),
        rope_theta=fields.number("rope.freq_base", _DEFAULT_ROPE_BASE),
        rope_scaling=None,
    )
    scaling, note = _rope_scaling(file, config, rope_factor)
    return replace(config, rope_scaling=scaling), [note]


def _check_supported(file: GgufFile, fields: _Fields) -> None:
    """Refuse what is no dense Llama in one file."""
    architecture = file.metadata.get("general.architecture")
    problem = None
    if architecture != "llama":
        problem = f"of the architecture {str(architecture)[:40]!r}"
    elif fields.get("expert_count") not in (None, 0):
        problem = "a mixture of experts"
    elif file.metadata.get("split.count") not in (None, 0, 1):
        problem = "one of several files that a model was split into"
    elif fields.get("rope.scaling.type") not in (None, "none"):
        problem = f"stretched by RoPE scaling of type {str(fields.get('rope.scaling.type'))[:40]!r}"
    elif fields.get("rope.scale_linear") not in (None, 1.0):
        problem = "stretched by linear RoPE scaling"
    if problem:
        raise ModelUnsupported(
            f"{file.path} is {problem}.",
            cause="llamac compiles dense models of the Llama 3 family from single files.",
            fix="Use a GGUF file of Llama 3; join a split one with llama-gguf-split --merge.",
        )


def _vocab_size(file: GgufFile, fields: _Fields) -> int:
    """Rows of the embedding, which the field `vocab_size` may repeat."""
    embedding = file.tensors.get("token_embd.weight")
    if embedding is None:
        raise TensorInvalid(
            f"{file.path} lacks token_embd.weight.",
            cause="It holds no model (a vocabulary or an adaptor alone), or it is incomplete.",
            fix="Fetch the file of the whole model.",
        )
    return fields.integer("vocab_size", embedding.shape[0])


def _rope_scaling(
    file: GgufFile, config: LlamaConfig, rope_factor: float | None
) -> tuple[RopeScaling | None, str]:
    """Decide the RoPE scaling, and say how."""
    if rope_factor is not None:
        return users_scaling(rope_factor)
    if ROPE_FREQS not in file.tensors:
        return None, f"no RoPE scaling: the file has no {ROPE_FREQS}"
    divisors = _read_divisors(file, config.head_dim // 2)
    if np.array_equal(divisors, np.ones_like(divisors)):
        return None, f"no RoPE scaling: {ROPE_FREQS} holds ones"
    scaling = RopeScaling(max(1.0, float(divisors.max())))
    expected = rope_frequencies(config) / rope_frequencies(replace(config, rope_scaling=scaling))
    if not np.allclose(divisors, expected, rtol=1e-4, atol=0):
        raise ModelUnsupported(
            f"{file.path}: {ROPE_FREQS} is not what Llama 3's rule gives for a factor of "
            f"{scaling.factor:g}.",
            cause="llamac knows the rule with low 1, high 4 and an original context of 8192.",
            fix="Give the factor with --rope-factor if the tensor is wrong.",
        )
    return scaling, f"RoPE factor {scaling.factor:g}, found from {ROPE_FREQS}"


def _read_divisors(file: GgufFile, count: int) -> NDArray[np.float32]:
    """The divisors of the frequencies, float32 [D/2]."""
    tensor = file.tensors[ROPE_FREQS]
    if tensor.shape != (count,) or tensor.data is None or tensor.type not in ("F32", "F16"):
        raise TensorInvalid(
            f"{ROPE_FREQS} is {tensor.type} {list(tensor.shape)}, expected F32 [{count}].",
            cause="The file is damaged, or its metadata belong to another model.",
            fix="Fetch the file again.",
        )
    divisors: NDArray[np.float32] = decode(tensor.type_id, tensor.data)[0]
    if not (np.isfinite(divisors).all() and (divisors > 0).all()):
        raise TensorInvalid(
            f"{ROPE_FREQS} holds {float(divisors.min()):g} to {float(divisors.max()):g}, expected "
            "finite numbers above 0.",
            cause="The file is damaged.",
            fix="Fetch the file again.",
        )
    return divisors
