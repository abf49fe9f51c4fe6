"""The example model: its corpus, its tokenizer, its training, and the committed checkpoints."""

from __future__ import annotations

import base64
import math
import random
import re
from collections.abc import Iterator
from itertools import islice
from pathlib import Path

import pytest
import tiktoken
import torch

from llamac.compiler.checkpoint import Checkpoint
from llamac.compiler.config import LlamaConfig, RopeScaling
from llamac.compiler.frontends.meta import from_meta
from llamac.compiler.meta_writer import write_checkpoint
from llamac.compiler.quantize import quantize_model
from llamac.compiler.reference_model import ReferenceModel
from llamac.runtime.tokenizer import read_ranks
from llamac.tools import make_tiny_model, tiny_cast
from llamac.tools.make_tiny_model import CONFIG, NUM_RANKS, tokenizer_tokens
from llamac.tools.tiny_corpus import PLOTS, Plot, Turn, documents, parse_lines, tell
from llamac.tools.tiny_tokenizer import (
    encode_document,
    encode_prompt,
    make_encoding,
    special_tokens,
    train_ranks,
    write_ranks,
)
from llamac.tools.tiny_training import TinyLlama, batches, evaluate, train

FORMS = ("bf16", "spinquant", "qlora")
NAMES = {*tiny_cast.GIRLS, *tiny_cast.BOYS, *tiny_cast.PETS}


@pytest.fixture(scope="module")
def encoding() -> tiktoken.Encoding:
    return make_encoding(tokenizer_tokens(), CONFIG.vocab_size)


@pytest.fixture(scope="module")
def folder(checkout: Path) -> Path:
    return checkout / "examples" / "tiny-llama"


@pytest.fixture(scope="module", params=FORMS)
def checkpoint(request: pytest.FixtureRequest, folder: Path) -> Checkpoint:
    return from_meta(folder / request.param)


# The corpus


def test_equal_seeds_give_equal_documents() -> None:
    assert list(documents(200, 7)) == list(documents(200, 7))
    assert list(documents(20, 7)) != list(documents(20, 8))


def test_the_corpus_is_varied() -> None:
    stories = [d[0].text for d in documents(3000, 0) if not d[0].role]
    assert len(set(stories)) > 0.999 * len(stories)
    words = set(re.findall(r"[a-z]+", " ".join(stories)))
    assert len(words) > 400 and len(PLOTS) >= 16 and len(NAMES) >= 50


@pytest.mark.parametrize("plot", PLOTS, ids=lambda plot: plot.topic.replace(" ", "-"))
def test_every_sentence_of_a_plot_can_be_filled(plot: Plot) -> None:
    rng = random.Random(0)
    for line in plot.lines:
        for way in line.ways:
            text = tiny_cast.deal_scene(rng).fill(way)
            assert text and not set("{}|") & set(text)
            assert text.count('"') % 2 == 0


def test_a_story_names_only_its_hero_and_its_friend() -> None:
    rng = random.Random(3)
    for plot in PLOTS:
        scene = tiny_cast.deal_scene(rng)
        named = set(re.findall(r"[A-Z][a-z]+", tell(rng, scene, plot))) & NAMES
        assert named == {scene.hero.name, scene.friend.name}


def test_pronouns_follow_the_cast() -> None:
    fox, ian = tiny_cast.Being("Pip", "fox", True), tiny_cast.Being("Ian", "boy", False)
    assert (fox.who, fox.He, fox.him, fox.His) == ("Pip the fox", "She", "her", "Her")
    assert (ian.who, ian.he, ian.him, ian.his) == ("Ian", "he", "him", "his")
    assert tiny_cast.Thing("old", "kite").a_full == "an old kite"


def test_the_notation_of_plots() -> None:
    lines = parse_lines("- One.\n| Another.\n\n? Perhaps.\n")
    assert [(line.mark, line.ways) for line in lines] == [
        ("-", ["One.", "Another."]),
        ("?", ["Perhaps."]),
    ]


# The tokenizer


def test_merges_take_the_most_frequent_pair_first() -> None:
    ranks = train_ranks(["ab ab ab abc abc xy"], 259)
    assert ranks[:256] == [bytes([value]) for value in range(256)]
    assert ranks[256:] == [b"ab", b" ab", b" abc"]


def test_the_tokenizer_gives_text_back_and_cuts_it_short(encoding: tiktoken.Encoding) -> None:
    for document in documents(50, 11):
        for turn in document:
            assert encoding.decode(encoding.encode_ordinary(turn.text)) == turn.text
    text = "Zwölf Boxkämpfer, 3.14 — 你好\n\n\t"
    assert encoding.decode(encoding.encode_ordinary(text)) == text
    story = next(d for d in documents(10, 12) if not d[0].role)[0].text
    assert len(encoding.encode_ordinary(story)) < len(story) / 3


def test_special_tokens_stand_in_the_order_of_llama_3() -> None:
    specials = special_tokens(128_000, 128_256)
    assert len(specials) == 256
    expected = {
        "<|begin_of_text|>": 128000,
        "<|end_of_text|>": 128001,
        "<|finetune_right_pad_id|>": 128004,
        "<|start_header_id|>": 128006,
        "<|end_header_id|>": 128007,
        "<|eom_id|>": 128008,
        "<|eot_id|>": 128009,
        "<|python_tag|>": 128010,
        "<|reserved_special_token_3|>": 128011,
        "<|reserved_special_token_247|>": 128255,
    }
    assert expected.items() <= specials.items()


def test_chats_follow_the_template_and_only_answers_are_learnt(
    encoding: tiktoken.Encoding,
) -> None:
    ids, learnt = encode_document(encoding, [Turn("user", "Hello!"), Turn("assistant", "Hi!")])
    assert encoding.decode(ids) == (
        "<|begin_of_text|><|start_header_id|>user<|end_header_id|>\n\nHello!<|eot_id|>"
        "<|start_header_id|>assistant<|end_header_id|>\n\nHi!<|eot_id|>"
    )
    said = [token for token, is_learnt in zip(ids, learnt, strict=True) if is_learnt]
    assert encoding.decode(said) == "Hi!<|eot_id|>"
    prompt = encode_prompt(encoding, [Turn("user", "Hello!")])
    assert ids[: len(prompt)] == prompt
    assert encoding.decode(encode_prompt(encoding, [Turn("", "One")])) == "<|begin_of_text|>One"


def test_the_tokenizer_file_reads_back(tmp_path: Path) -> None:
    tokens = train_ranks(["hello hello world"], 260)
    write_ranks(tmp_path / "ranks", tokens)
    assert read_ranks(tmp_path / "ranks") == {token: rank for rank, token in enumerate(tokens)}
    first = (tmp_path / "ranks").read_bytes().splitlines()[65]
    assert first == base64.b64encode(b"A") + b" 65"


# The training


@pytest.fixture(autouse=True)
def one_thread() -> Iterator[None]:
    """Tiny matrices gain nothing from threads, and lose much on a busy machine."""
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(before)


TOY = LlamaConfig(32, 2, 2, 1, 16, 64, 300, 1e-5, 5e5, RopeScaling(32.0))


def toy_model() -> TinyLlama:
    torch.manual_seed(0)
    return TinyLlama(TOY, 64)


def test_the_torch_model_equals_the_reference_arithmetic(tmp_path: Path) -> None:
    model = toy_model()
    with torch.no_grad():
        for weight in model.parameters():
            weight.copy_(weight.bfloat16().float() * (8 if weight.ndim == 2 else 1))
    tokens = [5, 200, 31, 7, 7, 150]
    write_ranks(tmp_path / "ranks", train_ranks(["hello hello world"], 260))
    quant, tensors = quantize_model(TOY, model.weights(), "float")
    write_checkpoint(tmp_path, TOY, quant, tensors, tmp_path / "ranks")
    reference = ReferenceModel(from_meta(tmp_path), kv_dtype="float32").logits(tokens)
    ours = model(torch.tensor([tokens]))[0].detach().double()
    assert (ours - torch.from_numpy(reference)).abs().max() < 1e-4 * ours.abs().max()


def test_training_learns_and_is_repeatable() -> None:
    samples = [([1, *([token, token + 1] * 8)], [False, *[True] * 16]) for token in range(2, 40)]
    weights = []
    for _ in range(2):
        model = toy_model()
        before = evaluate(model, samples)
        said: list[str] = []
        train(
            model,
            samples,
            num_steps=100,
            learning_rate=1e-2,
            tokens_per_batch=256,
            seed=0,
            report=said.append,
        )
        weights.append(model.weights())
        assert before > 0.9 * math.log(300) and evaluate(model, samples) < 0.5 * before
        assert len(said) == 1 and said[0].startswith("step 100: loss ")
    assert all((weights[0][name] == weights[1][name]).all() for name in weights[0])


def test_batches_pad_and_mask() -> None:
    samples = [([1, 2, 3], [False, True, True]), ([1, 4], [False, True]), ([1, 5], [False, False])]
    tokens, wanted = next(batches(samples, 9, random.Random(0)))
    rows = {
        tuple(row): tuple(want) for row, want in zip(tokens.tolist(), wanted.tolist(), strict=True)
    }
    assert rows == {(1, 2): (2, 3), (1, 4): (4, -100), (1, 5): (-100, -100)}
    sizes = [len(batch) for batch, _ in islice(batches(samples, 3, random.Random(0)), 6)]
    assert sizes == [1] * 6


# The committed checkpoints


def test_the_three_folders_together_have_at_most_4_mb(folder: Path) -> None:
    assert sum(path.stat().st_size for path in folder.rglob("*") if path.is_file()) <= 4_000_000


def test_the_checkpoints_load_without_running_code(folder: Path) -> None:
    for form in FORMS:
        loaded = torch.load(folder / form / "consolidated.00.pth", weights_only=True)
        assert loaded["tok_embeddings.weight"].shape == (CONFIG.vocab_size, CONFIG.dim)
        assert ("layers.3.attention.wq.adaptor.A.weight" in loaded) == (form == "qlora")


def test_the_checkpoints_are_of_the_architecture_of_llama_3_2(checkpoint: Checkpoint) -> None:
    assert checkpoint.config == CONFIG
    assert CONFIG.rope_scaling == RopeScaling(32.0) and CONFIG.num_kv_heads < CONFIG.num_heads


def test_the_committed_tokenizer_is_the_one_the_script_trains(checkpoint: Checkpoint) -> None:
    ranks = read_ranks(checkpoint.tokenizer)
    assert list(ranks) == tokenizer_tokens() and len(ranks) == NUM_RANKS


def test_greedy_text_reads_as_language(checkpoint: Checkpoint, encoding: tiktoken.Encoding) -> None:
    known = {word for d in documents(3000, 0) for t in d for word in re.findall(r"\w+", t.text)}
    chat = encode_prompt(encoding, [Turn("user", "Tell me a story about a fox.")])
    eot = encoding.encode_single_token("<|eot_id|>")
    ids = ReferenceModel(checkpoint).greedy(chat, 180)
    assert eot in ids
    text = encoding.decode(ids[: ids.index(eot)])
    assert "fox named" in text and text.endswith((".", '"', "!"))
    words = re.findall(r"\w+", text)
    assert len(words) > 40 and sum(word in known for word in words) > 0.97 * len(words)
    named = [name for name in re.findall(r"[A-Z][a-z]+", text) if name in NAMES]
    assert 1 <= len(set(named)) <= 3 and len(named) >= 5


def test_a_story_is_about_whom_the_user_asked_for(
    checkpoint: Checkpoint, encoding: tiktoken.Encoding
) -> None:
    asked = Turn("user", "Tell me a story about a girl named Mia.")
    ids = ReferenceModel(checkpoint).greedy(encode_prompt(encoding, [asked]), 60)
    text = encoding.decode(ids)
    assert "girl named Mia" in text and text.count("Mia") >= 2


def test_the_text_is_expected_by_every_form(
    checkpoint: Checkpoint, encoding: tiktoken.Encoding
) -> None:
    stories = [d for d in documents(100, make_tiny_model.HELD_OUT_SEED) if not d[0].role][:4]
    model = ReferenceModel(checkpoint)
    mean = sum(model.nll(encode_document(encoding, story)[0]) for story in stories) / len(stories)
    assert mean < 0.4


def test_a_missing_r4_is_noticed(folder: Path, encoding: tiktoken.Encoding) -> None:
    ids, _ = next(
        encode_document(encoding, d)
        for d in documents(100, make_tiny_model.HELD_OUT_SEED)
        if not d[0].role
    )
    model = ReferenceModel(from_meta(folder / "spinquant"), apply_r4=False)
    assert model.nll(ids) > 3


@pytest.mark.slow
def test_the_script_writes_what_it_should(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Two steps of training on few documents, so that the way through is run."""
    monkeypatch.setattr(make_tiny_model, "NUM_DOCUMENTS", 100)
    monkeypatch.setattr(make_tiny_model, "NUM_HELD_OUT", 4)
    monkeypatch.setattr(make_tiny_model, "print_samples", lambda model, encoding: None)
    assert make_tiny_model.main(["-o", str(tmp_path), "--steps", "2"]) == 0
    for form in FORMS:
        assert from_meta(tmp_path / form).config == CONFIG
