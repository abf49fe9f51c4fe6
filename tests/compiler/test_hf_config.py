"""config.json and generation_config.json of Hugging Face: sizes, RoPE, and what is refused."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest

from llamac.compiler.checkpoint import Checkpoint
from llamac.compiler.config import LLAMA_3_2_1B, LLAMA_3_2_3B, LlamaConfig, RopeScaling
from llamac.compiler.frontends.hf_config import end_tokens, open_config, read_config
from llamac.runtime.errors import LlamacError, ModelUnsupported, ParamsInvalid, UsageError

# As published with Llama-3.2-1B-Instruct.
PUBLISHED: dict[str, Any] = {
    "architectures": ["LlamaForCausalLM"],
    "attention_bias": False,
    "attention_dropout": 0.0,
    "bos_token_id": 128000,
    "eos_token_id": [128001, 128008, 128009],
    "head_dim": 64,
    "hidden_act": "silu",
    "hidden_size": 2048,
    "initializer_range": 0.02,
    "intermediate_size": 8192,
    "max_position_embeddings": 131072,
    "mlp_bias": False,
    "model_type": "llama",
    "num_attention_heads": 32,
    "num_hidden_layers": 16,
    "num_key_value_heads": 8,
    "pretraining_tp": 1,
    "rms_norm_eps": 1e-05,
    "rope_scaling": {
        "factor": 32.0,
        "high_freq_factor": 4.0,
        "low_freq_factor": 1.0,
        "original_max_position_embeddings": 8192,
        "rope_type": "llama3",
    },
    "rope_theta": 500000.0,
    "tie_word_embeddings": True,
    "torch_dtype": "bfloat16",
    "use_cache": True,
    "vocab_size": 128256,
}
RULE = PUBLISHED["rope_scaling"]


@pytest.fixture
def read(tmp_path: Path) -> Callable[..., tuple[LlamaConfig, list[str]]]:
    """read(factor=None, **fields): the published file with other fields; None removes one."""

    def run(factor: float | None = None, **fields: Any) -> tuple[LlamaConfig, list[str]]:
        content = {k: v for k, v in {**PUBLISHED, **fields}.items() if v is not None}
        (tmp_path / "config.json").write_text(json.dumps(content))
        return read_config(open_config(tmp_path), factor)

    return run


Read = Callable[..., tuple[LlamaConfig, list[str]]]


def test_published_sizes(read: Read) -> None:
    config, notes = read()
    assert config == LLAMA_3_2_1B
    assert notes == ["RoPE factor 32 from config.json"]
    larger = {"hidden_size": 3072, "num_hidden_layers": 28, "num_attention_heads": 24}
    assert read(**larger, head_dim=128)[0] == LLAMA_3_2_3B
    assert read(**larger, head_dim=None)[0] == LLAMA_3_2_3B


def test_rope_parameters_of_newer_files(read: Read) -> None:
    rule = RULE | {"rope_theta": 500000.0}
    assert read(rope_scaling=None, rope_theta=None, rope_parameters=rule)[0] == LLAMA_3_2_1B
    plain = {"rope_type": "default", "rope_theta": 1e4}
    config, notes = read(rope_scaling=None, rope_parameters=plain)
    assert (config.rope_scaling, config.rope_theta) == (None, 1e4)
    assert notes == ["no RoPE scaling: its type is default in config.json"]


def test_what_is_left_out_has_the_defaults_of_transformers(read: Read) -> None:
    config, notes = read(rope_scaling=None, rope_theta=None, rms_norm_eps=None)
    assert (config.rope_scaling, config.rope_theta, config.norm_eps) == (None, 1e4, 1e-6)
    assert notes == ["no RoPE scaling: config.json has none"]
    assert read(num_key_value_heads=None)[0].num_kv_heads == 32
    assert read(hidden_act="swish")[0] == LLAMA_3_2_1B


def test_defaults_are_those_of_transformers(read: Read) -> None:
    configuration = pytest.importorskip("transformers").LlamaConfig()
    assert configuration.rms_norm_eps == 1e-6
    assert configuration.tie_word_embeddings is False
    assert configuration.num_key_value_heads == configuration.num_attention_heads
    assert configuration.rope_parameters["rope_theta"] == 1e4


def test_a_factor_of_the_user(read: Read) -> None:
    config, [note] = read(8.0)
    assert config.rope_scaling == RopeScaling(8.0)
    assert note == "RoPE factor 8, given by the user"
    with pytest.raises(UsageError, match=r"RoPE factor is 0\.5"):
        read(0.5)


def test_heads_that_are_not_a_part_of_the_width(read: Read) -> None:
    assert read(head_dim=128)[0].q_dim == 4096


UNSUPPORTED: dict[str, tuple[str, dict[str, Any]]] = {
    "another model": ("model_type is 'mistral'", {"model_type": "mistral"}),
    "no model": ("model_type is missing", {"model_type": None}),
    "a classifier": (
        "architectures is",
        {"architectures": ["LlamaForSequenceClassification"]},
    ),
    "biases of attention": ("attention_bias is True", {"attention_bias": True}),
    "biases of the feed-forward": ("mlp_bias is True", {"mlp_bias": True}),
    "another activation": ("hidden_act is 'gelu'", {"hidden_act": "gelu"}),
    "a sliding window": ("sliding_window is 4096", {"sliding_window": 4096}),
    "layers with one": (
        "layer_types has",
        {"layer_types": ["full_attention", "sliding_attention"]},
    ),
    "half of RoPE": ("partial_rotary_factor is 0.5", {"partial_rotary_factor": 0.5}),
    "linear RoPE": ("of type 'linear'", {"rope_scaling": {"type": "linear", "factor": 2.0}}),
    "dynamic RoPE": ("of type 'dynamic'", {"rope_scaling": {"type": "dynamic", "factor": 2.0}}),
    "yarn": ("of type 'yarn'", {"rope_scaling": RULE | {"rope_type": "yarn"}}),
    "longrope": ("of type 'longrope'", {"rope_scaling": {"rope_type": "longrope"}}),
    "a type that is none": ("of type a list", {"rope_scaling": {"type": ["llama3"]}}),
}


@pytest.mark.parametrize("name", UNSUPPORTED)
def test_other_arithmetic(
    name: str, read: Read, check_advice: Callable[[LlamacError], None]
) -> None:
    match, fields = UNSUPPORTED[name]
    with pytest.raises(ModelUnsupported, match=match) as caught:
        read(**fields)
    check_advice(caught.value)


INVALID: dict[str, tuple[str, dict[str, Any]]] = {
    "no width": ("hidden_size is missing", {"hidden_size": None}),
    "a text": ("num_hidden_layers is '16'", {"num_hidden_layers": "16"}),
    "a truth": ("intermediate_size is True", {"intermediate_size": True}),
    "nothing": ("vocab_size is 0", {"vocab_size": 0}),
    "heads that do not divide": (
        "num_attention_heads is 30",
        {"num_attention_heads": 30, "num_key_value_heads": 30, "head_dim": None},
    ),
    "groups that do not divide": ("num_key_value_heads is 5", {"num_key_value_heads": 5}),
    "odd heads": ("head_dim is 63", {"head_dim": 63}),
    "a huge width": ("dim is 2147483648", {"hidden_size": 1 << 31}),
    "no factor": ("rope_scaling.factor is missing", {"rope_scaling": {"rope_type": "llama3"}}),
    "a factor below 1": ("rope_scaling.factor is 0.5", {"rope_scaling": RULE | {"factor": 0.5}}),
    "frequencies in reverse": ("low_freq", {"rope_scaling": RULE | {"low_freq_factor": 9.0}}),
    "scaling that is none": ("rope_scaling is a list", {"rope_scaling": [1]}),
    "a base of nothing": ("rope_theta is 0", {"rope_theta": 0}),
}


@pytest.mark.parametrize("name", INVALID)
def test_impossible_values(
    name: str, read: Read, check_advice: Callable[[LlamacError], None]
) -> None:
    match, fields = INVALID[name]
    with pytest.raises(ParamsInvalid, match=match) as caught:
        read(**fields)
    check_advice(caught.value)


def test_generation_config_counts_more(tmp_path: Path, read: Read) -> None:
    read()
    fields = open_config(tmp_path)
    assert end_tokens(tmp_path, fields)["eos_token_id"][1] == [128001, 128008, 128009]
    (tmp_path / "generation_config.json").write_text('{"eos_token_id": 128001}')
    found = end_tokens(tmp_path, fields)
    assert found["eos_token_id"] == (tmp_path / "generation_config.json", [128001])
    assert found["bos_token_id"] == (tmp_path / "config.json", [128000])


def test_the_tiny_model(hf_layout: ModuleType, tiny_float: Checkpoint, tmp_path: Path) -> None:
    hf_layout.make_layout(tiny_float).write(tmp_path)
    assert read_config(open_config(tmp_path), None)[0] == tiny_float.config
