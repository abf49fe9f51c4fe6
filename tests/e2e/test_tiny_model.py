"""The tiny Llama of the repository: what its bundles say, in every form and with every option."""

from __future__ import annotations

import re
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from numpy.typing import NDArray

from llamac.compiler.frontends.meta import from_meta
from llamac.compiler.reference_model import ReferenceModel
from llamac.runtime import ContextFull, Model, Session, load
from llamac.tools.tiny_corpus import documents

FORMS = ("spinquant", "bf16", pytest.param("qlora", marks=pytest.mark.slow))
HELD_OUT_SEED = 77

Compile = Callable[..., Path]
Nll = Callable[[Session, Sequence[int]], float]


@contextmanager
def opened(bundle: Path, threads: int = 2) -> Iterator[tuple[Model, Session]]:
    with load(bundle, threads=threads) as model, model.session() as session:
        yield model, session


def story(model: Model, num_tokens: int) -> list[int]:
    """A text of the kind that the model was trained on."""
    texts = [d[0].text for d in documents(50, HELD_OUT_SEED) if not d[0].role]
    ids = [token for text in texts[:9] for token in model.tokenizer.encode(text, bos=True)]
    assert len(ids) >= num_tokens
    return ids[:num_tokens]


def logits_after(session: Session, *chunks: Sequence[int]) -> NDArray[np.float32]:
    session.rewind(0)
    for chunk in chunks:
        session.append(chunk)
    return session.logits


@pytest.mark.parametrize("form", FORMS)
def test_it_tells_a_story(form: str, tiny: Path, compiled: Compile) -> None:
    """Asked for a story about a fox, it writes sentences of words that it has seen."""
    with load(compiled(tiny / form), threads=2) as model, model.chat() as chat:
        text = "".join(chat.send("Tell me a story about a fox.", max_tokens=120))
    known = {w for d in documents(2000, 0) for turn in d for w in re.findall(r"\w+", turn.text)}
    words = re.findall(r"\w+", text)
    assert len(words) > 40 and sum(word in known for word in words) > 0.95 * len(words), text
    assert "fox" in words and len(set(words)) > 25, text
    assert len(re.findall(r"[.!?]", text)) >= 4, text


@pytest.mark.parametrize("form", FORMS)
def test_how_a_prompt_is_cut_does_not_matter(form: str, tiny: Path, compiled: Compile) -> None:
    """Long prompts go through several chunks, padded or not: the same logits to float rounding."""
    with opened(compiled(tiny / form)) as (model, session):
        ids = story(model, 297)
        one_by_one = logits_after(session, *([token] for token in ids))
        scale = float(np.abs(one_by_one).max())
        for cut in (1, 31, 32, 39, 150, 296):
            whole = logits_after(session, ids[:cut], ids[cut:])
            np.testing.assert_allclose(whole, one_by_one, rtol=0, atol=1e-4 * scale)
        wrong = logits_after(session, ids[1:])
        assert np.abs(wrong - one_by_one).max() > 1e-2 * scale  # the first token matters


@pytest.mark.parametrize("form", FORMS)
def test_it_expects_what_the_reference_expects(
    form: str, tiny: Path, compiled: Compile, nll_of: Nll
) -> None:
    """The likelihood of a story through the library and through the reference arithmetic."""
    with opened(compiled(tiny / form)) as (model, session):
        ids = story(model, 200)
        found = nll_of(session, ids)
    assert found == pytest.approx(ReferenceModel(from_meta(tiny / form)).nll(ids), abs=0.005)
    assert found < 1.5


def test_turns_of_a_conversation_evaluate_only_themselves(tiny: Path, compiled: Compile) -> None:
    """After three turns the session is where evaluating all their tokens at once leads."""
    with load(compiled(tiny / "spinquant"), threads=2) as model:
        with model.chat(system="Be kind.") as chat:
            for message in ("Hello!", "Tell me a story about a girl named Mia.", "Thank you!"):
                answer = chat.send(message, max_tokens=40)
                assert "".join(answer)
            tokens, logits = chat.session.tokens, chat.session.logits
        with model.session() as session:
            again = logits_after(session, tokens)
    assert tokens.count(model.tokenizer.special_tokens["<|start_header_id|>"]) == 7
    np.testing.assert_allclose(again, logits, rtol=0, atol=1e-4 * float(np.abs(logits).max()))


def test_an_int8_cache_and_bfloat16_scales(tiny: Path, compiled: Compile, nll_of: Nll) -> None:
    """Both options reach the kernels: the library follows the reference that rounds as it does."""
    plain = compiled(tiny / "spinquant")
    narrow = compiled(tiny / "spinquant", kv_dtype="int8", scale_dtype="bfloat16")
    with opened(plain) as (model, session):
        ids = story(model, 200)
        before, kv_before = nll_of(session, ids), model.info.kv_bytes
    with opened(narrow) as (model, session):
        found = nll_of(session, ids)
        stored = model.manifest.quantization
        assert (stored.kv_cache, stored.scale_dtype) == ("int8", "bfloat16")
        # A code for each value, and 8 bytes for each row of 32; every tensor begins on a page.
        assert 40 / 64 * kv_before <= model.info.kv_bytes < 44 / 64 * kv_before
        one_by_one = logits_after(session, *([token] for token in ids))
        whole = logits_after(session, ids)
    np.testing.assert_allclose(whole, one_by_one, rtol=0, atol=1e-3 * float(np.abs(whole).max()))
    checkpoint = from_meta(tiny / "spinquant")
    reference = ReferenceModel(checkpoint, kv_dtype="int8", scale_dtype="bfloat16").nll(ids)
    print(f"float16 {before:.4f}, int8 cache and bfloat16 scales {found:.4f} ({reference:.4f})")
    assert found == pytest.approx(reference, abs=0.01)
    assert found != before and found == pytest.approx(before, abs=0.05)


@pytest.mark.parametrize(
    ("chunks", "context"),
    [
        ((16,), 40),
        pytest.param((64,), 20, marks=pytest.mark.slow),
        pytest.param((5, 3, 2), 70, marks=pytest.mark.slow),
    ],
    ids=str,
)
def test_context_and_chunks_of_any_size(
    chunks: tuple[int, ...], context: int, tiny: Path, compiled: Compile
) -> None:
    """A context can be filled to its last token, whatever the chunks; then it is full."""
    bundle = compiled(tiny / "spinquant", chunks=chunks, context_length=context)
    with opened(compiled(tiny / "spinquant")) as (model, session):
        ids = story(model, context)
        expected = logits_after(session, ids)
    with opened(bundle) as (model, session):
        assert [f.num_tokens for f in model.manifest.functions] == [*chunks, 1]
        for cut in (1, context // 2, context - 1):
            found = logits_after(session, ids[:cut], ids[cut:])
            np.testing.assert_allclose(found, expected, rtol=0, atol=1e-3)
        assert session.remaining == 0
        with pytest.raises(ContextFull):
            session.append([1])
        session.rewind(0)
        generation = session.generate(ids[:10], max_tokens=None)
        list(generation)
        assert generation.finish_reason in ("context", "stop")
        with pytest.raises(ContextFull, match=f"the context holds {context}"):
            session.generate(story(model, context + 1))


def with_output_table(source: Path, folder: Path, *, is_equal: bool) -> Path:
    """The checkpoint with the embedding's table as its output table, but for one code."""
    folder.mkdir()
    for name in ("params.json", "tokenizer.model"):
        (folder / name).write_bytes((source / name).read_bytes())
    tensors: dict[str, Any] = torch.load(source / "consolidated.00.pth", weights_only=True)
    for part in ("weight", "scales"):
        tensors[f"output.{part}"] = tensors[f"tok_embeddings.{part}"].clone()
    if not is_equal:
        tensors["output.weight"][3, 0] ^= 1
    torch.save(tensors, folder / "consolidated.00.pth")
    return folder


@pytest.mark.slow
def test_equal_tables_are_stored_once(tiny: Path, compiled: Compile, tmp_path: Path) -> None:
    """The output layer's table serves the embedding; one other code, and there are two tables."""
    logits = {}
    weights_bytes = {}
    for is_equal in (True, False):
        folder = tmp_path / f"equal-{is_equal}"
        model_path = with_output_table(tiny / "spinquant", folder, is_equal=is_equal)
        with opened(compiled(model_path, chunks=(8,))) as (model, session):
            assert model.manifest.quantization.shared_embedding == is_equal
            logits[is_equal] = logits_after(session, story(model, 50))
            weights_bytes[is_equal] = model.info.weights_bytes
            size = model.manifest.model
    table = size.vocab_size * (size.dim + 4)
    assert weights_bytes[False] - weights_bytes[True] == pytest.approx(table, abs=3 * 4096)
    others = np.arange(size.vocab_size) != 3
    np.testing.assert_array_equal(logits[False][others], logits[True][others])
    assert logits[False][3] != logits[True][3]
