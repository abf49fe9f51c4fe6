"""stories260K, trained by others and known by heart, through the whole pipeline in every form."""

from __future__ import annotations

import json
from collections.abc import Callable, Sequence
from pathlib import Path

import pytest

from llamac.compiler.frontends.meta import from_meta
from llamac.compiler.reference_model import ReferenceModel
from llamac.runtime import Session, load

# How the model's own text goes on after begin_of_text, by llama2.c's tests.
OPENING = "Once upon a time, there was a little girl named Lily."
STORY = OPENING + (
    " She loved to play outside in the park. One day, she saw a big, red ball. She wanted to play"
    " with it, but it was high.\nLily's mom said, \"Lily, let's go to the park.\" Lily was sad and"
    ' said, "I want to play with my toys!" Her mom smiled and said, "You can play with it, but be'
    ' careful." Lily was happy and hugged her mom.'
)

Nll = Callable[[Session, Sequence[int]], float]


@pytest.fixture(scope="module")
def bundle_of(
    stories: Callable[[str], Path], compiled: Callable[..., Path]
) -> Callable[[str], Path]:
    """The bundle of a form."""
    return lambda form: compiled(stories(form), chunks=(8,), context_length=256)


def tokens_of(bundle: Path, text: str) -> list[int]:
    with load(bundle) as model:
        return model.tokenizer.encode(" " + text, bos=True)  # sentencepiece puts a space in front


@pytest.mark.parametrize("form", ["float", "spinquant", "qlora"])
def test_it_tells_the_known_story(form: str, bundle_of: Callable[[str], Path]) -> None:
    """Nothing but the token that begins a text leads to the opening that everyone gets."""
    with load(bundle_of(form), threads=1) as model, model.session() as session:
        text = "".join(session.generate([model.tokenizer.bos_id or 0], max_tokens=60))
    assert text.startswith(" " + OPENING)


def test_likelihood_is_near_the_float_model_and_better_than_plain_quantization(
    bundle_of: Callable[[str], Path], stories: Callable[[str], Path], nll_of: Nll
) -> None:
    """What SpinQuant and QLoRA are for; without R4, SpinQuant's weights are useless."""
    tokens = tokens_of(bundle_of("float"), STORY)
    nll = {}
    for form in ("float", "ptq", "spinquant", "qlora"):
        with load(bundle_of(form), threads=1) as model, model.session() as session:
            nll[form] = nll_of(session, tokens)
    reference = ReferenceModel(from_meta(stories("float")), kv_dtype="float32").nll(tokens)
    print(f"{len(tokens)} tokens, reference fp32 {reference:.4f},", nll)
    assert nll["float"] == pytest.approx(reference, abs=0.001)
    for form in ("spinquant", "qlora"):
        assert nll["float"] - 0.02 < nll[form] < nll["ptq"], nll
        assert nll[form] < nll["float"] + 0.06, nll


def test_without_r4_spinquant_is_far_off(
    bundle_of: Callable[[str], Path],
    stories: Callable[[str], Path],
    compiled: Callable[..., Path],
    tmp_path: Path,
    nll_of: Nll,
) -> None:
    """The same weights under a params.json that does not ask for R4: the tests above can fail."""
    doctored = tmp_path / "without-r4"
    doctored.mkdir()
    for file in stories("spinquant").iterdir():
        (doctored / file.name).write_bytes(file.read_bytes())
    params = json.loads((doctored / "params.json").read_text("utf-8"))
    del params["quantization_args"]["spinquant"]
    (doctored / "params.json").write_text(json.dumps(params), "utf-8")
    bundle = compiled(doctored, chunks=(8,), context_length=256)
    tokens = tokens_of(bundle, STORY)
    with load(bundle, threads=1) as model, model.session() as session:
        assert not model.manifest.quantization.hadamard_r4
        without = nll_of(session, tokens)
    with load(bundle_of("spinquant"), threads=1) as model, model.session() as session:
        assert model.manifest.quantization.hadamard_r4
        with_r4 = nll_of(session, tokens)
    print(f"with R4 {with_r4:.4f}, without {without:.4f}")
    assert without > with_r4 + 3


@pytest.mark.parametrize("form", ["ptq", "spinquant", "qlora"])
def test_the_library_agrees_with_the_reference_arithmetic(
    form: str, bundle_of: Callable[[str], Path], stories: Callable[[str], Path], nll_of: Nll
) -> None:
    """Token by token the library predicts what the reference model of the same codes predicts."""
    tokens = tokens_of(bundle_of(form), STORY)
    with load(bundle_of(form), threads=2) as model, model.session() as session:
        assert nll_of(session, tokens) == pytest.approx(
            ReferenceModel(from_meta(stories(form))).nll(tokens), abs=0.01
        )
