"""Error compensation: never worse than the nearest codes, equal to GPTQ as it was published."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from numpy.typing import NDArray

from llamac.compiler.frontends.meta import from_meta
from llamac.compiler.gptq import (
    HessianSum,
    compensate_int4,
    compensate_lpbq,
    compensate_per_channel,
)
from llamac.compiler.llama import ModelOptions, build_llama
from llamac.compiler.offload import linear_inputs
from llamac.compiler.quantize import Codes, linear_names, quantize_int4
from llamac.compiler.reference import sqnr_db
from llamac.compiler.reference_model import ReferenceModel
from llamac.compiler.requantize import (
    Lpbq,
    PerChannel,
    quantize_lpbq,
    quantize_per_channel,
    weights_of,
)
from llamac.runtime.errors import CoverageError, LlamacError, ValuesInvalid

Float64 = NDArray[np.float64]
Weight = NDArray[Any] | Codes
DAMPING = 0.01

COMPENSATE: dict[str, Callable[..., PerChannel | Lpbq]] = {
    "int8": lambda w, h, **more: compensate_per_channel(w, h, 8, **more),
    "int4": lambda w, h, **more: compensate_per_channel(w, h, 4, **more),
    "lpbq": compensate_lpbq,
}
NEAREST: dict[str, Callable[..., PerChannel | Lpbq]] = {
    "int8": lambda w, importance: quantize_per_channel(w, 8, importance),
    "int4": lambda w, importance: quantize_per_channel(w, 4, importance),
    "lpbq": quantize_lpbq,
}
SCHEMES = list(COMPENSATE)
TEXT = [1, 40, 300, 77, 512, 9, 200, 640, 33, 800, 5, 150, 901, 62, 420, 18]


def dependent_inputs(tokens: int, columns: int, seed: int = 0) -> Float64:
    """Inputs whose features depend on each other, of very different sizes."""
    rng = np.random.default_rng(seed)
    mix = np.random.default_rng(99).standard_normal((columns // 4, columns))
    x = rng.standard_normal((tokens, columns // 4)) @ mix + rng.standard_normal((tokens, columns))
    return np.asarray(x * np.exp(np.random.default_rng(98).standard_normal(columns) / 2))


def sum_of(*inputs: Float64) -> Float64:
    total = HessianSum(inputs[0].shape[1])
    for x in inputs:
        total.add(x)
    return total.matrix()


def normal(*shape: int, seed: int = 0) -> Float64:
    return np.random.default_rng(seed).standard_normal(shape)


def output_errors(weight: Weight, found: PerChannel | Lpbq, hessian: Float64) -> Float64:
    """D H D^T of every row."""
    error = weights_of(weight) - found.dequantize()
    return np.asarray(((error @ hessian) * error).sum(-1))


def damped_diagonal(hessian: Float64) -> Float64:
    diagonal = np.diagonal(hessian)
    return np.asarray(diagonal + DAMPING * diagonal.mean())


def check_never_worse(scheme: str, weight: Weight, hessian: Float64, **options: Any) -> float:
    """Check every row; return the sum of errors as a share of that of the nearest codes."""
    found = output_errors(weight, COMPENSATE[scheme](weight, hessian, **options), hessian)
    nearest = NEAREST[scheme](weight, damped_diagonal(hessian))
    bound = output_errors(weight, nearest, hessian)
    # The errors are differences of damped sums, which are about as large as themselves.
    assert (found <= bound * (1 + 1e-9) + 1e-12 * bound.max()).all()
    return float(found.sum() / bound.sum())


def published_gptq(weight: Float64, hessian: Float64, start: PerChannel) -> NDArray[np.int8]:
    """The algorithm as in its paper: the inverse's Cholesky factor, errors spread to the right."""
    low, high = -127, 127
    damped = hessian + np.eye(len(hessian)) * DAMPING * np.diagonal(hessian).mean()
    spread = np.linalg.cholesky(np.linalg.inv(damped)).T
    left, scales = weight.copy(), start.scales.astype(np.float64)
    codes = np.empty(weight.shape, np.int8)
    for k in range(weight.shape[1]):
        codes[:, k] = np.clip(np.rint(left[:, k] / scales), low, high)
        error = (left[:, k] - codes[:, k] * scales) / spread[k, k]
        left[:, k:] -= error[:, None] * spread[k, k:]
    return codes


def test_the_sum_is_that_of_all_inputs() -> None:
    parts = [dependent_inputs(count, 288, seed) for seed, count in enumerate((40, 1, 300))]
    total = HessianSum(288)
    total.add(parts[0])
    first = total.matrix().copy()
    np.testing.assert_allclose(first, parts[0].T @ parts[0], rtol=1e-12, atol=1e-9)
    for part in parts[1:]:
        total.add(part.astype(np.float32))
    whole = np.concatenate([parts[0], *(part.astype(np.float32) for part in parts[1:])])
    matrix = total.matrix()
    np.testing.assert_allclose(matrix, whole.T @ whole, rtol=1e-12, atol=1e-9)
    np.testing.assert_array_equal(matrix, matrix.T)
    assert matrix.dtype == np.float64 and total.num_inputs == 341


def test_the_sum_refuses_what_is_no_input(check_advice: Callable[[LlamacError], None]) -> None:
    total = HessianSum(32)
    for bad in (np.nan, np.inf):
        x = normal(3, 32)
        x[1, 2] = bad
        with pytest.raises(ValuesInvalid, match="infinite or NaN") as caught:
            total.add(x)
        check_advice(caught.value)
    for shape in ((3, 31), (32,), (1, 3, 32)):
        with pytest.raises(ValueError, match="32"):
            total.add(np.zeros(shape))
    assert total.num_inputs == 0 and not total.matrix().any()


def test_int8_codes_are_those_of_the_published_algorithm() -> None:
    # 300 columns: two blocks of the factorization, and a last block of 12 columns.
    weight, hessian = normal(24, 300), sum_of(dependent_inputs(1200, 300))
    start = quantize_per_channel(weight, 8, damped_diagonal(hessian))
    expected = published_gptq(weight, hessian, start)
    found = compensate_per_channel(weight, hessian, 8)
    np.testing.assert_array_equal(found.scales, start.scales)
    assert (found.codes == expected).mean() > 0.9999  # a tie may go the other way
    assert (found.codes != start.codes).mean() > 0.1


def test_columns_by_activation_are_the_published_order() -> None:
    weight, hessian = normal(16, 96), sum_of(dependent_inputs(400, 96))
    start = quantize_per_channel(weight, 8, damped_diagonal(hessian))
    order = np.argsort(-np.diagonal(hessian))
    expected = np.empty(weight.shape, np.int8)
    expected[:, order] = published_gptq(weight[:, order], hessian[np.ix_(order, order)], start)
    found = compensate_per_channel(weight, hessian, 8, by_activation=True)
    assert (found.codes == expected).mean() > 0.9999


@pytest.mark.parametrize("by_activation", [False, True])
@pytest.mark.parametrize("scheme", SCHEMES)
@pytest.mark.parametrize("seed", range(3))
def test_outputs_of_random_layers_err_less_in_every_row(
    scheme: str, by_activation: bool, seed: int
) -> None:
    weight, hessian = normal(600, 160, seed=seed), sum_of(dependent_inputs(500, 160, seed))
    share = check_never_worse(scheme, weight, hessian, by_activation=by_activation)
    assert share < 0.5


@pytest.mark.parametrize("scheme", SCHEMES)
def test_few_inputs_and_columns_never_seen_do_no_harm(scheme: str) -> None:
    x = dependent_inputs(10, 96)
    x[:, 40:50] = 0
    weight = normal(64, 96)
    check_never_worse(scheme, weight, sum_of(x))
    found = COMPENSATE[scheme](weight, sum_of(x)).dequantize()
    # Nobody knows what those columns will be used for, so they stay what they are.
    plain = NEAREST[scheme](weight, np.ones(96)).dequantize()
    assert sqnr_db(weight[:, 40:50], found[:, 40:50]) > sqnr_db(weight, plain) - 4


@pytest.mark.parametrize("scheme", SCHEMES)
def test_independent_inputs_leave_the_nearest_codes(scheme: str) -> None:
    weight = normal(16, 64)
    for hessian in (np.eye(64) * 3, np.zeros((64, 64))):
        found, nearest = COMPENSATE[scheme](weight, hessian), NEAREST[scheme](weight, np.ones(64))
        np.testing.assert_array_equal(found.codes, nearest.codes)
        np.testing.assert_array_equal(found.dequantize(), nearest.dequantize())


@pytest.mark.parametrize("by_activation", [False, True])
def test_weights_that_are_in_the_scheme_already_are_kept(by_activation: bool) -> None:
    hessian = sum_of(dependent_inputs(300, 96))
    rng = np.random.default_rng(5)
    codes = rng.integers(-8, 8, (8, 96)).astype(np.int8)
    codes[:, ::32] = -8
    row_scales = rng.uniform(1e-3, 1e-2, 8).astype(np.float32)
    lpbq = Lpbq(codes, rng.integers(1, 17, (8, 3)).astype(np.uint8), row_scales).dequantize()
    found = compensate_lpbq(lpbq, hessian, by_activation=by_activation)
    np.testing.assert_array_equal(found.dequantize(), lpbq)
    per_row = PerChannel(codes, row_scales).dequantize()
    kept = compensate_per_channel(per_row, hessian, 4, by_activation=by_activation)
    np.testing.assert_array_equal(kept.codes, codes)


@pytest.mark.parametrize("scheme", SCHEMES)
def test_rows_of_zeros_and_one_huge_value(scheme: str) -> None:
    weight, hessian = normal(6, 64), sum_of(dependent_inputs(200, 64))
    weight[1] = 0
    weight[2, 40] = 3e38
    found = COMPENSATE[scheme](weight, hessian)
    values = found.dequantize()
    assert not values[1].any() and np.isfinite(values).all()
    assert values[2, 40] == pytest.approx(3e38, rel=1e-2)
    scales = found.row_scales if isinstance(found, Lpbq) else found.scales
    assert scales[1] == 1
    low, high = (-127, 127) if scheme == "int8" else (-8, 7)
    assert low <= found.codes.min() and found.codes.max() <= high
    check_never_worse(scheme, np.delete(weight, 2, axis=0), hessian)


@pytest.mark.parametrize("scheme", SCHEMES)
def test_blocks_of_rows_are_independent(scheme: str) -> None:
    weight, hessian = normal(520, 64), sum_of(dependent_inputs(200, 64))
    whole, part = COMPENSATE[scheme](weight, hessian), COMPENSATE[scheme](weight[509:], hessian)
    assert (whole.codes[509:] == part.codes).mean() > 0.999  # sums may be added in another order
    assert whole.codes.dtype == np.int8 and whole.codes.shape == weight.shape
    if isinstance(whole, Lpbq):
        assert whole.multipliers.dtype == np.uint8
        assert whole.multipliers.min() >= 1 and whole.multipliers.max() <= 16


@pytest.mark.parametrize("scheme", SCHEMES)
@pytest.mark.parametrize("folder", ["bf16", "qlora", "spinquant"])
def test_layers_of_the_example_model(checkout: Path, folder: str, scheme: str) -> None:
    checkpoint = from_meta(checkout / "examples" / "tiny-llama" / folder)
    sums: dict[str, HessianSum] = {}

    def observe(label: str, x: Float64) -> None:
        if label in labels.values():
            sums.setdefault(label, HessianSum(x.shape[1])).add(x)

    labels = linear_inputs(build_llama(checkpoint, ModelOptions(64, ())), "decode")
    ReferenceModel(checkpoint, observe=observe).logits(TEXT * 6)
    shares = []
    for name in [
        name for name in linear_names(checkpoint.config) if "layers.1" in name or "layers.3" in name
    ]:
        stored = checkpoint.weights.read(f"{name}.weight")
        weight: Weight = stored
        if folder != "bf16":
            weight = Codes(stored, checkpoint.weights.read(f"{name}.scales"))
        shares.append(check_never_worse(scheme, weight, sums[labels[name]].matrix()))
    assert len(shares) == 14
    # int4 weights become LPBQ almost unchanged, which leaves little to compensate.
    assert np.mean(shares) < (1.0 if scheme == "lpbq" and folder != "bf16" else 0.75)


@pytest.mark.slow
@pytest.mark.parametrize("scheme", ["int4", "lpbq"])
def test_a_layer_of_the_1b_model(scheme: str) -> None:
    stored = quantize_int4(normal(2048, 2048))
    hessian = sum_of(dependent_inputs(1024, 2048))
    assert check_never_worse(scheme, stored, hessian) < 1


def test_a_width_without_whole_groups_is_refused() -> None:
    with pytest.raises(CoverageError, match="40 columns"):
        compensate_lpbq(normal(4, 40), np.eye(40))
    assert compensate_per_channel(normal(4, 40), np.eye(40)).codes.shape == (4, 40)


@pytest.mark.parametrize("scheme", SCHEMES)
def test_weights_that_are_not_finite_are_refused(scheme: str) -> None:
    weight = normal(4, 32)
    weight[1, 1] = np.nan
    with pytest.raises(ValuesInvalid, match="nan"):
        COMPENSATE[scheme](weight, np.eye(32))


def not_definite() -> Float64:
    matrix = np.eye(32)
    matrix[3, 4] = matrix[4, 3] = 5
    return matrix


def with_entry(row: int, column: int, value: float) -> Float64:
    matrix = np.eye(32)
    matrix[row, column] = matrix[column, row] = value
    return matrix


@pytest.mark.parametrize("scheme", SCHEMES)
@pytest.mark.parametrize(
    "hessian",
    [
        not_definite(),
        -np.eye(32),
        with_entry(5, 5, -1),
        with_entry(5, 5, np.nan),
        with_entry(5, 5, np.inf),
        with_entry(5, 7, np.nan),
        with_entry(5, 7, np.inf),
    ],
)
def test_a_matrix_that_is_no_sum_of_squares_is_refused(
    scheme: str, hessian: Float64, check_advice: Callable[[LlamacError], None]
) -> None:
    with pytest.raises(ValuesInvalid, match="no sum X") as caught:
        COMPENSATE[scheme](normal(4, 32), hessian)
    check_advice(caught.value)


@pytest.mark.parametrize("scheme", SCHEMES)
def test_wrong_arguments_are_refused(scheme: str) -> None:
    for size in (31, 64):
        with pytest.raises(ValueError, match=r"H must be \[32, 32\]"):
            COMPENSATE[scheme](normal(4, 32), np.eye(size))
    for damping in (0.0, -1.0, np.inf, np.nan):
        with pytest.raises(ValueError, match="damping"):
            COMPENSATE[scheme](normal(4, 32), np.eye(32), damping=damping)
    with pytest.raises(ValueError, match="not 5"):
        compensate_per_channel(normal(4, 32), np.eye(32), 5)


def test_groups_of_int4_err_less_than_the_plain_rule() -> None:
    """On inputs that were seen and on new ones, with scales that float16 holds."""
    weight = np.random.default_rng(3).standard_normal((48, 128)).astype(np.float32)
    found = compensate_int4(weight, sum_of(dependent_inputs(600, 128, 1)))
    plain = quantize_int4(weight)
    for seed in (1, 2):
        x = dependent_inputs(600, 128, seed)
        errors = [np.square(x @ (weight - c.dequantize()).T).sum(0) for c in (found, plain)]
        assert errors[0].sum() < 0.6 * errors[1].sum()
    assert found.codes.min() >= -8 and found.codes.max() <= 7
    np.testing.assert_array_equal(found.scales, found.scales.astype(np.float16))


def test_groups_of_int4_without_inputs_are_those_of_the_plain_rule() -> None:
    """With H = 0 no error can be made good by another column."""
    weight = np.random.default_rng(4).standard_normal((8, 64)).astype(np.float32)
    found, plain = compensate_int4(weight, np.zeros((64, 64))), quantize_int4(weight)
    assert np.abs(found.codes - plain.codes).max() <= 1
