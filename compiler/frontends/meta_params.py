"""Read Meta's `params.json`: sizes, RoPE scaling, and how the weights were quantized."""

from __future__ import annotations

import json
import math
from collections.abc import Mapping
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from llamac.compiler.config import (
    LLAMA_3_2_1B,
    LLAMA_3_2_3B,
    LLAMA_3_2_ROPE_FACTOR,
    LlamaConfig,
    LoraConfig,
    RopeScaling,
)
from llamac.runtime.errors import CheckpointMissing, ModelUnsupported, ParamsInvalid, UsageError

GROUP_SIZE = 32
_SCHEME = "int4_weight_int8_dynamic_activation"
_LARGEST_FILE_BYTES = 1 << 20
_LARGEST_NUMBER = 1 << 31


def shown(value: object) -> str:
    """A value of JSON for an error: short and printable."""
    if isinstance(value, list | dict):  # possibly too deeply nested for repr
        return f"a {type(value).__name__}"
    return "missing" if value is None else f"{value!r:.60}"


@dataclass(frozen=True)
class Fields:
    """Typed access to the fields of one JSON object; `prefix` names the object in errors."""

    path: Path
    values: Mapping[str, Any]
    prefix: str = ""

    def error(self, field: str, expected: str) -> ParamsInvalid:
        """Describe what is wrong with one field."""
        found = shown(self.values.get(field))
        return ParamsInvalid(
            f"{self.path}: {self.prefix}{field} is {found}, expected {expected}.",
            cause="The file is damaged, edited, or belongs to another model.",
            fix=f"Take the {self.path.name} that was published with these weights.",
        )

    def has(self, field: str) -> bool:
        """Whether the field is there and not null."""
        return self.values.get(field) is not None

    def integer(self, field: str) -> int:
        """Return a positive integer."""
        value = self.values.get(field)
        if isinstance(value, bool) or not isinstance(value, int):
            raise self.error(field, "an integer")
        if not 1 <= value <= _LARGEST_NUMBER:
            raise self.error(field, f"1 to {_LARGEST_NUMBER}")
        return value

    def number(self, field: str) -> float:
        """Return a finite number above 0."""
        value = self.values.get(field)
        if isinstance(value, bool) or not isinstance(value, int | float):
            raise self.error(field, "a number")
        if not 0 < value <= _LARGEST_NUMBER:  # false for NaN too
            raise self.error(field, f"a number above 0 and at most {_LARGEST_NUMBER}")
        return float(value)

    def boolean(self, field: str) -> bool | None:
        """Return true, false, or None when the field is missing."""
        value = self.values.get(field)
        if value is not None and not isinstance(value, bool):
            raise self.error(field, "true or false")
        return value

    def section(self, field: str) -> Fields:
        """Return the fields of an inner object."""
        value = self.values.get(field)
        if not isinstance(value, dict):
            raise self.error(field, "an object")
        return Fields(self.path, value, f"{self.prefix}{field}.")


def read_params(path: Path) -> Fields:
    """Read `params.json`; fields may stand at the top or under "model".

    Raises:
        CheckpointMissing: no such file.
        ParamsInvalid: not a JSON object.
    """
    if not path.is_file():
        raise CheckpointMissing(
            f"There is no params.json at {path}.",
            cause="Meta's checkpoints keep the model's sizes in a file of their own.",
            fix="Fetch params.json and put it beside the .pth file.",
        )
    content = read_object(path).values
    inner = content.get("model")
    return Fields(path, {**content, **inner} if isinstance(inner, dict) else content)


def read_object(path: Path) -> Fields:
    """Read a file that holds a JSON object.

    Raises:
        ParamsInvalid: it does not, or cannot be read.
    """
    try:
        if path.stat().st_size > _LARGEST_FILE_BYTES:
            raise ValueError(f"{path.stat().st_size} bytes are too many")
        content = json.loads(path.read_bytes())
        if not isinstance(content, dict):
            raise ValueError(f"it holds a {type(content).__name__}, not an object")
    except (OSError, ValueError, RecursionError) as error:
        raise ParamsInvalid(
            f"{path} is not a JSON object.",
            cause=f"The reader said: {error}",
            fix=f"Fetch {path.name} again.",
        ) from error
    return Fields(path, content)


def ffn_width(params: Fields, dim: int) -> int:
    """Width of the feed-forward layer, by the rule of Meta's reference model."""
    width = int(2 * (4 * dim) / 3)
    if params.has("ffn_dim_multiplier"):
        width = int(params.number("ffn_dim_multiplier") * width)
    multiple_of = params.integer("multiple_of")
    return multiple_of * math.ceil(width / multiple_of)


def read_config(params: Fields, rope_factor: float | None) -> tuple[LlamaConfig, list[str]]:
    """Return the model's configuration, and notes about what the file left open.

    Args:
        params: fields of params.json.
        rope_factor: the user's RoPE scaling factor, or None for the default rule.

    Raises:
        ParamsInvalid: a field is missing, of the wrong type, or contradicts another.
        UsageError: `rope_factor` is not a finite number of at least 1.
    """
    dim, num_heads = params.integer("dim"), params.integer("n_heads")
    num_kv_heads = params.integer("n_kv_heads") if params.has("n_kv_heads") else num_heads
    if dim % num_heads:
        raise params.error("n_heads", f"a divisor of dim, which is {dim}")
    if num_heads % num_kv_heads:
        raise params.error("n_kv_heads", f"a divisor of n_heads, which is {num_heads}")
    config = LlamaConfig(
        dim=dim,
        num_layers=params.integer("n_layers"),
        num_heads=num_heads,
        num_kv_heads=num_kv_heads,
        head_dim=dim // num_heads,
        ffn_dim=ffn_width(params, dim),
        vocab_size=params.integer("vocab_size"),
        norm_eps=params.number("norm_eps"),
        rope_theta=params.number("rope_theta"),
        rope_scaling=None,
    )
    scaling, note = _rope_scaling(params, config, rope_factor)
    return replace(config, rope_scaling=scaling), [note]


def users_scaling(rope_factor: float) -> tuple[RopeScaling, str]:
    """The RoPE scaling by a factor that the user gave, and a note.

    Raises:
        UsageError: the factor is not a finite number of at least 1.
    """
    if not 1 <= rope_factor < math.inf:
        raise UsageError(
            f"The RoPE factor is {rope_factor}, expected a finite number of at least 1.",
            cause="The factor divides frequencies to stretch the context.",
            fix="Leave it out, or give 32 for Llama 3.2 and 8 for Llama 3.1.",
        )
    return RopeScaling(float(rope_factor)), f"RoPE factor {rope_factor:g}, given by the user"


def _rope_scaling(
    params: Fields, config: LlamaConfig, rope_factor: float | None
) -> tuple[RopeScaling | None, str]:
    """Decide the RoPE scaling. Meta's file only says whether to scale, not by how much.

    Three independent readers of the 3.2 models use 32; Meta's reference code has 8 built in, which
    is 3.1's factor. A wrong factor shows only in long texts, so the choice is always noted.
    """
    if rope_factor is not None:
        return users_scaling(rope_factor)
    use_scaled_rope = params.boolean("use_scaled_rope")
    known = any(
        replace(config, rope_scaling=preset.rope_scaling) == preset
        for preset in (LLAMA_3_2_1B, LLAMA_3_2_3B)
    )
    if use_scaled_rope is False or (use_scaled_rope is None and not known):
        state = "false" if use_scaled_rope is False else "missing"
        return None, f"no RoPE scaling: use_scaled_rope is {state} in params.json"
    if params.has("rope_scaling_factor"):
        factor = params.number("rope_scaling_factor")
        return RopeScaling(factor), f"RoPE factor {factor:g} from params.json"
    why = "use_scaled_rope is true" if use_scaled_rope else "the sizes are those of Llama 3.2"
    note = f"RoPE factor {LLAMA_3_2_ROPE_FACTOR:g} assumed: {why}, params.json names no factor"
    return RopeScaling(LLAMA_3_2_ROPE_FACTOR), note


def read_spinquant(params: Fields) -> bool | None:
    """Check `quantization_args` of an int4 checkpoint and return its `spinquant` flag, if any.

    Raises:
        ParamsInvalid: the section or its group size is missing.
        ModelUnsupported: another scheme or group size than Meta's released checkpoints.
    """
    arguments = params.section("quantization_args")
    group_size = arguments.integer("group_size")
    scheme = arguments.values.get("scheme")
    if group_size != GROUP_SIZE or scheme not in (None, _SCHEME):
        raise ModelUnsupported(
            f"{params.path}: quantization_args asks for scheme {scheme!r:.60} with group_size "
            f"{group_size}, expected {_SCHEME!r} with {GROUP_SIZE}.",
            cause="llamac reads the layout of Meta's SpinQuant and QLoRA releases only.",
            fix="Use an INT4_EO8 checkpoint, or the BF16 original.",
        )
    return arguments.boolean("spinquant")


def read_lora(params: Fields) -> LoraConfig:
    """Return rank and scale of the adaptors.

    Raises:
        ParamsInvalid: `lora_args` or one of its fields is missing.
    """
    arguments = params.section("lora_args")
    return LoraConfig(arguments.integer("rank"), arguments.number("scale"))
