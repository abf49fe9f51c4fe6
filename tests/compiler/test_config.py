"""Sizes, memory figures and RoPE tables of configurations."""

from __future__ import annotations

from dataclasses import replace

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from llamac.compiler.config import (
    LLAMA_3_2_1B,
    LLAMA_3_2_3B,
    LlamaConfig,
    RopeScaling,
    rope_frequencies,
    rope_table,
)
from llamac.runtime.errors import ParamsInvalid


def test_linear_shapes_of_1b() -> None:
    assert LLAMA_3_2_1B.linear_shapes() == {
        "attention.wq": (2048, 2048),
        "attention.wk": (512, 2048),
        "attention.wv": (512, 2048),
        "attention.wo": (2048, 2048),
        "feed_forward.w1": (8192, 2048),
        "feed_forward.w2": (2048, 8192),
        "feed_forward.w3": (8192, 2048),
    }


@pytest.mark.parametrize(
    ("config", "linear", "lora", "kv_float16", "kv_int8"),
    [
        (LLAMA_3_2_1B, 973_078_528, 11_272_192, 32_768, 17_664),
        (LLAMA_3_2_3B, 2_818_572_288, 24_313_856, 114_688, 59_584),
    ],
)
def test_figures_of_the_presets(
    config: LlamaConfig, linear: int, lora: int, kv_float16: int, kv_int8: int
) -> None:
    assert config.num_linear_weights() == linear
    assert config.num_lora_weights(16) == lora
    assert config.kv_bytes_per_position() == kv_float16
    assert config.kv_bytes_per_position("int8") == kv_int8


@pytest.mark.parametrize(
    ("config", "first", "last", "bands"),
    [
        (
            LLAMA_3_2_1B,
            [1, 0.66360124, 0.4403666],
            [2.13874228e-07, 1.41927203e-07, 9.41830673e-08],
            (15, 3, 14),
        ),
        (
            LLAMA_3_2_3B,
            [1, 0.81461723, 0.66360124],
            [1.15616345e-07, 9.41830673e-08, 7.67231497e-08],
            (29, 6, 29),
        ),
    ],
)
def test_rope_frequencies_of_the_presets(
    config: LlamaConfig, first: list[float], last: list[float], bands: tuple[int, int, int]
) -> None:
    frequencies = rope_frequencies(config)
    np.testing.assert_allclose(frequencies[:3], first, rtol=1e-8)
    np.testing.assert_allclose(frequencies[-3:], last, rtol=1e-8)
    ratio = rope_frequencies(replace(config, rope_scaling=None)) / frequencies
    kept, divided = int(np.isclose(ratio, 1).sum()), int(np.isclose(ratio, 32).sum())
    assert (kept, len(ratio) - kept - divided, divided) == bands


@pytest.mark.parametrize(("config", "changed"), [(LLAMA_3_2_1B, 17), (LLAMA_3_2_3B, 35)])
def test_factor_8_by_mistake_shows_in_the_table(config: LlamaConfig, changed: int) -> None:
    """A greedy test over a few tokens would miss 3.1's factor; the table does not."""
    wrong = replace(config, rope_scaling=RopeScaling(8.0))
    differs = ~np.isclose(rope_frequencies(config), rope_frequencies(wrong), rtol=1e-12)
    assert int(differs.sum()) == changed
    cosines = [rope_table(c, 2048)[..., 0] for c in (config, wrong)]
    assert np.abs(cosines[0][:512] - cosines[1][:512]).max() == pytest.approx(0.026, abs=0.002)
    assert 0.15 < np.abs(cosines[0] - cosines[1]).max() < 0.2


def test_rope_table_holds_rounded_cosines_and_sines() -> None:
    table = rope_table(LLAMA_3_2_1B, 8192)
    assert table.shape == (8192, 32, 2)
    assert table.dtype == np.float32
    assert (table[0] == [1, 0]).all()
    angle = 8191 * float(rope_frequencies(LLAMA_3_2_1B)[1])
    assert table[8191, 1, 0] == np.float32(np.cos(angle))
    assert table[8191, 1, 1] == np.float32(np.sin(angle))


@given(
    st.floats(1, 64), st.floats(0.25, 2), st.floats(2.5, 16), st.sampled_from([16, 64, 128, 256])
)
def test_scaled_frequencies_lie_between_plain_and_divided(
    factor: float, low: float, high: float, head_dim: int
) -> None:
    plain = replace(LLAMA_3_2_1B, head_dim=head_dim, rope_scaling=None)
    scaled = replace(plain, rope_scaling=RopeScaling(factor, low, high))
    ratio = rope_frequencies(scaled) / rope_frequencies(plain)
    assert (np.diff(ratio) <= 1e-12).all()
    assert ((ratio >= 1 / factor - 1e-12) & (ratio <= 1 + 1e-12)).all()


@pytest.mark.parametrize(
    ("field", "value"),
    [
        ("dim", 0),
        ("num_layers", -1),
        ("num_kv_heads", 5),
        ("head_dim", 63),
        ("ffn_dim", 1 << 40),
        ("vocab_size", 0),
        ("norm_eps", 0.0),
        ("norm_eps", float("nan")),
        ("rope_theta", float("inf")),
    ],
)
def test_an_impossible_size_is_refused_by_name(field: str, value: float) -> None:
    with pytest.raises(ParamsInvalid, match=field):
        replace(LLAMA_3_2_1B, **{field: value})  # type: ignore[arg-type]


@pytest.mark.parametrize(
    "arguments", [(0.5,), (float("nan"),), (32.0, 4.0, 1.0), (32.0, 0.0), (32.0, 1.0, 4.0, 0)]
)
def test_impossible_rope_scaling_is_refused(arguments: tuple[float, ...]) -> None:
    with pytest.raises(ParamsInvalid, match="rope_scaling"):
        RopeScaling(*arguments)  # type: ignore[arg-type]
