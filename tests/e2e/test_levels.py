"""Every set of kernels that this CPU can run says the same."""

from __future__ import annotations

import subprocess
from collections.abc import Callable, Iterator
from pathlib import Path

import numpy as np
import pytest
from numpy.typing import NDArray

from llamac.compiler.verify import verify_bundle
from llamac.runtime import Session, load
from llamac.targets.soc import Level

NUM_TOKENS = 96
# A level may only choose another token where the best one's logits are this close, relative to
# their spread: levels add floats in different orders.
NEAR_TIE = 1e-3

HostBundle = tuple[Path, subprocess.CompletedProcess[str]]


@pytest.fixture(scope="module")
def prompt(host_bundle: HostBundle) -> list[int]:
    with load(host_bundle[0]) as model:
        return model.tokenizer.encode("Once upon a time", bos=True)


def greedy(session: Session, prompt: list[int]) -> Iterator[tuple[int, NDArray[np.float32]]]:
    """The chosen tokens with the logits that they were chosen from."""
    session.append(prompt)
    for _ in range(NUM_TOKENS):
        yield session.argmax(), session.logits
        session.append([session.argmax()])


def test_all_levels_choose_the_same_tokens(
    host_bundle: HostBundle, levels: list[Level], prompt: list[int]
) -> None:
    """With the first difference, its place and how near the two best tokens were."""
    bundle, _ = host_bundle
    with load(bundle) as model, model.session() as session:
        assert model.info.level == levels[0].name  # by itself it takes the best
        best = list(greedy(session, prompt))
    for level in levels[1:]:
        with load(bundle, level=level.name) as model, model.session() as session:
            assert model.info.level == level.name
            for place, (token, logits) in enumerate(greedy(session, prompt)):
                expected, of_best = best[place]
                margin = float(of_best[expected] - of_best[token]) / float(of_best.std())
                assert margin <= NEAR_TIE, (
                    f"{level.name} says {token} at token {place}, {levels[0].name} {expected}: "
                    f"{margin:.2e} standard deviations apart"
                )
                if token != expected:
                    break
                difference = float(np.abs(logits - of_best).max()) / float(of_best.std())
                assert difference < 0.2, f"{level.name} at token {place}"


def test_the_number_of_threads_changes_nothing(host_bundle: HostBundle, prompt: list[int]) -> None:
    """Work is cut between items and never inside one: the logits are equal to the last bit."""
    bundle, _ = host_bundle
    found = []
    for threads in (1, 2, 3):
        with load(bundle, threads=threads) as model, model.session() as session:
            session.append(prompt * 9)
            found.append(session.logits)
    np.testing.assert_array_equal(found[1], found[0])
    np.testing.assert_array_equal(found[2], found[0])


@pytest.mark.slow
@pytest.mark.parametrize("form", ["spinquant", "qlora", "bf16"])
def test_every_function_of_every_level_is_right(
    form: str, tiny: Path, levels: list[Level], compiled: Callable[..., Path]
) -> None:
    """All that a bundle for `host` holds, step by step beside the reference."""
    bundle = compiled(tiny / form, target="host", chunks=(128, 32, 8))
    for level in levels:
        report = verify_bundle(bundle, tiny / form, level=level.name, all_functions=True)
        assert report.passed, report.first_failure
        assert report.level == level.name
        functions = {operation.function for operation in report.operations}
        assert functions == {"prefill_128", "prefill_32", "prefill_8", "decode"}
