"""A rotated float checkpoint: the same function, without features that stand out."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from numpy.typing import NDArray

from llamac.compiler.checkpoint import Checkpoint, TensorInfo
from llamac.compiler.floats import from_bfloat16
from llamac.compiler.frontends.meta import from_meta
from llamac.compiler.quantize import EMBEDDING, OUTPUT, linear_names, norm_names
from llamac.compiler.reference_model import KvCache, ReferenceModel
from llamac.compiler.walsh_rotation import RotatedWeights, rotate_checkpoint
from llamac.runtime.errors import LlamacError, ModelUnsupported

TOKENS = [1, 40, 300, 77, 512, 9, 200, 640, 33, 800, 5, 150]
Float64 = NDArray[np.float64]


class ExactCache(KvCache):
    """Keys and values as they are: turned values round differently in any stored type."""

    def _stored(self, side: int, rows: Float64) -> Float64:
        return rows


class ExactModel(ReferenceModel):
    def _empty_cache(self) -> list[KvCache]:
        return [ExactCache("float32") for _ in range(self.checkpoint.config.num_layers)]


@dataclass(frozen=True)
class Changed:
    """A weight source with some other tensors."""

    source: Any
    arrays: dict[str, NDArray[Any]]

    def names(self) -> list[str]:
        return [*self.source.names(), *(set(self.arrays) - set(self.source.names()))]

    def info(self, name: str) -> TensorInfo:
        if name in self.arrays:
            return TensorInfo(self.arrays[name].shape, "float32")
        return self.source.info(name)  # type: ignore[no-any-return]

    def read(self, name: str) -> NDArray[Any]:
        return self.arrays[name] if name in self.arrays else self.source.read(name)


@pytest.fixture(scope="module")
def tiny(checkout: Path) -> Checkpoint:
    """The float example model with norms that are far from 1 and one feature that stands out."""
    plain = from_meta(checkout / "examples" / "tiny-llama" / "bf16")
    rng = np.random.default_rng(0)
    changed = {
        name: rng.uniform(0.5, 1.5, plain.config.dim).astype(np.float32)
        for name in norm_names(plain.config)
    }
    changed[EMBEDDING] = from_bfloat16(plain.weights.read(EMBEDDING)).copy()
    changed[EMBEDDING][:, 7] *= 10
    return replace(plain, weights=Changed(plain.weights, changed))


@pytest.mark.parametrize("seed", [0, 1])
@pytest.mark.parametrize("tied", [True, False])
def test_the_rotated_model_computes_the_same(tiny: Checkpoint, tied: bool, seed: int) -> None:
    if not tied:
        table = tiny.weights.read(EMBEDDING)[::-1].copy()
        tiny = replace(tiny, weights=Changed(tiny.weights, {OUTPUT: table}))
    rotated = rotate_checkpoint(tiny, seed=seed, dtype="float64")
    before = ExactModel(tiny).logits(TOKENS)
    after = ExactModel(rotated).logits(TOKENS)
    assert np.abs(after - before).max() < 1e-9 * np.abs(before).max()


def test_all_tensors_change_but_keep_their_form(tiny: Checkpoint) -> None:
    rotated = rotate_checkpoint(tiny)
    names = list(rotated.weights.names())
    assert set(names) == {*tiny.weights.names(), OUTPUT} and len(names) == len(set(names))
    for name in names:
        info, array = rotated.weights.info(name), rotated.weights.read(name)
        assert info.shape == array.shape
        if name in norm_names(tiny.config):
            assert info.dtype == "float32" and (array == 1).all()
        else:
            assert info.dtype == "bfloat16" and array.dtype == np.uint16
    for name in [f"{part}.weight" for part in linear_names(tiny.config)]:
        assert not np.array_equal(rotated.weights.read(name), tiny.weights.read(name))
    assert not rotated.shared_embedding and "R1" in rotated.notes[-1]


def test_bfloat16_weights_are_the_rounded_ones(tiny: Checkpoint) -> None:
    exact, stored = (rotate_checkpoint(tiny, dtype=d).weights for d in ("float64", "bfloat16"))
    for name in (EMBEDDING, OUTPUT, "layers.1.attention.wv.weight", "layers.2.attention.wo.weight"):
        wide = exact.read(name)
        assert wide.dtype == np.float64
        np.testing.assert_allclose(from_bfloat16(stored.read(name)), wide, rtol=2**-8, atol=1e-30)


def test_the_feature_that_stood_out_is_spread(tiny: Checkpoint) -> None:
    def peak(table: NDArray[Any]) -> float:
        power = np.square(table.astype(np.float64)).mean(0)
        return float(power.max() / power.mean())

    rotated = rotate_checkpoint(tiny, dtype="float64")
    before, after = (peak(source.weights.read(EMBEDDING)) for source in (tiny, rotated))
    assert before > 20 and after < before / 5


def test_rotations_follow_the_seed(tiny: Checkpoint) -> None:
    name = "layers.0.feed_forward.w2.weight"
    first, same, other = (rotate_checkpoint(tiny, seed=s).weights.read(name) for s in (3, 3, 4))
    np.testing.assert_array_equal(first, same)
    assert not np.array_equal(first, other)


def test_unknown_tensors_are_no_tensors(tiny: Checkpoint) -> None:
    weights = rotate_checkpoint(tiny).weights
    for look in (weights.info, weights.read):
        with pytest.raises(KeyError):
            look("layers.0.attention.wx.weight")


def test_quantized_checkpoints_are_refused(
    checkout: Path, check_advice: Callable[[LlamacError], None]
) -> None:
    for form in ("spinquant", "qlora"):
        with pytest.raises(ModelUnsupported, match=form) as caught:
            rotate_checkpoint(from_meta(checkout / "examples" / "tiny-llama" / form))
        check_advice(caught.value)


def test_other_dtypes_are_refused(tiny: Checkpoint) -> None:
    with pytest.raises(ValueError, match="float16"):
        rotate_checkpoint(tiny, dtype="float16")


def test_w2_takes_in_r4_which_the_model_then_computes(tiny: Checkpoint) -> None:
    """The same function with the transform, another one without it."""
    turned = rotate_checkpoint(tiny, dtype="float64", r4=True)
    assert turned.quant.hadamard_r4
    wanted = ExactModel(tiny).logits(TOKENS)
    np.testing.assert_allclose(ExactModel(turned).logits(TOKENS), wanted, atol=1e-8)
    without = ExactModel(turned, apply_r4=False).logits(TOKENS)
    assert np.abs(without - wanted).max() > 1


def test_r4_needs_a_width_with_a_hadamard_matrix(tiny: Checkpoint) -> None:
    odd = replace(tiny, config=replace(tiny.config, ffn_dim=192))
    with pytest.raises(ModelUnsupported, match="192 is no power of two"):
        rotate_checkpoint(odd, r4=True)


def test_rows_are_those_of_the_whole_table(tiny: Checkpoint) -> None:
    weights = rotate_checkpoint(tiny, dtype="float64").weights
    assert isinstance(weights, RotatedWeights)
    for name in (EMBEDDING, OUTPUT):
        np.testing.assert_allclose(
            weights.read_rows(name, slice(10, 20)), weights.read(name)[10:20], atol=1e-12
        )
