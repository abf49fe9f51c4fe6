"""The configuration of a Llama from Hugging Face's `config.json` and `generation_config.json`.

Fields that are missing have the defaults of transformers' `LlamaConfig`. What would change the
arithmetic, such as biases or another rule of RoPE, is refused by name: a model that is computed
without it would talk nonsense.

Source: configuration_llama.py and modeling_rope_utils.py of huggingface/transformers.
"""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import Any

from llamac.compiler.config import LlamaConfig, RopeScaling
from llamac.compiler.frontends.meta_params import Fields, read_object, shown, users_scaling
from llamac.runtime.errors import CheckpointMissing, ModelUnsupported

# Fields of other models, with the values that mean nothing.
_NEUTRAL: dict[str, tuple[Any, ...]] = {
    "attention_bias": (None, False),
    "mlp_bias": (None, False),
    "hidden_act": (None, "silu", "swish"),
    "sliding_window": (None,),
    "partial_rotary_factor": (None, 1, 1.0),
    "num_local_experts": (None, 0, 1),
    "attention_multiplier": (None,),
    "logit_scale": (None, 1, 1.0),
    "qk_norm": (None, False),
}
_DEFAULT_THETA = 10000.0
_DEFAULT_EPS = 1e-6


def open_config(folder: Path) -> Fields:
    """Read `config.json`.

    Raises:
        CheckpointMissing: no such file.
        ParamsInvalid: not a JSON object.
    """
    path = folder / "config.json"
    if not path.is_file():
        raise CheckpointMissing(
            f"There is no config.json in {folder}.",
            cause="Models of Hugging Face keep their sizes in a file of their own.",
            fix="Fetch config.json as well.",
        )
    return read_object(path)


def read_config(fields: Fields, rope_factor: float | None) -> tuple[LlamaConfig, list[str]]:
    """Return the model's configuration, and a note about its RoPE.

    Args:
        fields: of config.json.
        rope_factor: the user's RoPE scaling factor, or None for the file's.

    Raises:
        ModelUnsupported: another architecture, or parts that llamac cannot compute.
        ParamsInvalid: a field is missing, of the wrong type, or contradicts another.
        UsageError: `rope_factor` is not a finite number of at least 1.
    """
    _check_supported(fields)
    dim, num_heads = fields.integer("hidden_size"), fields.integer("num_attention_heads")
    num_kv_heads = _optional_integer(fields, "num_key_value_heads", num_heads)
    if not fields.has("head_dim") and dim % num_heads:
        raise fields.error("num_attention_heads", f"a divisor of {dim}")
    if num_heads % num_kv_heads:
        raise fields.error("num_key_value_heads", f"a divisor of {num_heads} heads")
    config = LlamaConfig(
        dim=dim,
        num_layers=fields.integer("num_hidden_layers"),
        num_heads=num_heads,
        num_kv_heads=num_kv_heads,
        head_dim=_optional_integer(fields, "head_dim", dim // num_heads),
        ffn_dim=fields.integer("intermediate_size"),
        vocab_size=fields.integer("vocab_size"),
        norm_eps=_optional_number(fields, "rms_norm_eps", _DEFAULT_EPS),
        rope_theta=_rope_theta(fields),
        rope_scaling=None,
    )
    if rope_factor is not None:
        scaling, note = users_scaling(rope_factor)
        return replace(config, rope_scaling=scaling), [note]
    rule, note = _rope_scaling(fields)
    return replace(config, rope_scaling=rule), [note]


def _optional_integer(fields: Fields, name: str, default: int) -> int:
    return fields.integer(name) if fields.has(name) else default


def _optional_number(fields: Fields, name: str, default: float) -> float:
    return fields.number(name) if fields.has(name) else default


def _unsupported(fields: Fields, what: str) -> ModelUnsupported:
    return ModelUnsupported(
        f"{fields.path}: {what}.",
        cause="llamac computes dense models of the Llama 3 family; without this part the results "
        "would be others.",
        fix="Use a model with the architecture LlamaForCausalLM as Meta trained it.",
    )


def _listed(value: object) -> str:
    """A list of texts for an error; what is none as `shown` says it."""
    is_list = isinstance(value, list) and all(isinstance(part, str) for part in value)
    return f"{value!r:.80}" if is_list else shown(value)


def _check_supported(fields: Fields) -> None:
    """Refuse what is not Llama's arithmetic."""
    if fields.values.get("model_type") != "llama":
        raise _unsupported(fields, f"model_type is {shown(fields.values.get('model_type'))}")
    architectures = fields.values.get("architectures")
    if architectures not in (None, ["LlamaForCausalLM"]):
        raise _unsupported(fields, f"architectures is {_listed(architectures)}")
    for name, neutral in _NEUTRAL.items():
        value = fields.values.get(name)
        if value not in neutral:
            raise _unsupported(fields, f"{name} is {shown(value)}")
    kinds = fields.values.get("layer_types")
    if kinds is not None and (
        not isinstance(kinds, list) or any(kind != "full_attention" for kind in kinds)
    ):
        raise _unsupported(fields, "layer_types has others than full_attention")


def _rope_section(fields: Fields) -> Fields | None:
    """The rule of RoPE: `rope_parameters` since transformers 5, `rope_scaling` before."""
    for name in ("rope_parameters", "rope_scaling"):
        if fields.has(name):
            return fields.section(name)
    return None


def _rope_theta(fields: Fields) -> float:
    section = _rope_section(fields)
    if section is not None and section.has("rope_theta"):
        return section.number("rope_theta")
    return _optional_number(fields, "rope_theta", _DEFAULT_THETA)


def _rope_scaling(fields: Fields) -> tuple[RopeScaling | None, str]:
    """Decide the RoPE scaling, and say how."""
    section = _rope_section(fields)
    if section is None:
        return None, "no RoPE scaling: config.json has none"
    kind = section.values.get("rope_type", section.values.get("type", "default"))
    if section.values.get("partial_rotary_factor") not in (None, 1, 1.0):
        raise _unsupported(fields, f"{section.prefix}partial_rotary_factor is not 1")
    if kind == "default":
        return None, "no RoPE scaling: its type is default in config.json"
    if kind != "llama3":
        raise _unsupported(fields, f"RoPE scaling is of type {shown(kind)}")
    scaling = RopeScaling(
        section.number("factor"),
        section.number("low_freq_factor"),
        section.number("high_freq_factor"),
        section.integer("original_max_position_embeddings"),
    )
    return scaling, f"RoPE factor {scaling.factor:g} from config.json"


def end_tokens(folder: Path, fields: Fields) -> dict[str, tuple[Path, list[Any]]]:
    """What begins and ends texts: "bos_token_id" and "eos_token_id" with their file and ids.

    `generation_config.json` counts more than `config.json`; a field that neither has is left out.

    Raises:
        ParamsInvalid: `generation_config.json` is not a JSON object.
    """
    path = folder / "generation_config.json"
    sources = [read_object(path)] if path.is_file() else []
    found: dict[str, tuple[Path, list[Any]]] = {}
    for name in ("bos_token_id", "eos_token_id"):
        for source in (*sources, fields):
            if source.has(name):
                value = source.values[name]
                found[name] = (source.path, value if isinstance(value, list) else [value])
                break
    return found
