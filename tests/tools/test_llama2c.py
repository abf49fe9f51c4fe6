"""stories260K, a trained model of others, through our reader and writer and back."""

from __future__ import annotations

import struct
from pathlib import Path

import numpy as np
import pytest
import tiktoken

from llamac.compiler.checkpoint import Checkpoint
from llamac.compiler.frontends.meta import from_meta
from llamac.compiler.reference_model import ReferenceModel
from llamac.runtime.errors import CheckpointUnreadable
from llamac.runtime.tokenizer import PATTERNS, read_ranks
from llamac.tools.llama2c import encode, read_llama2c, read_vocabulary, renumber, to_meta
from llamac.tools.tiny_tokenizer import special_tokens

# How the model's own text goes on after begin_of_text, by llama2.c's tests.
EXPECTED = (
    " Once upon a time, there was a little girl named Lily. She loved to play outside in the park."
    " One day, she saw a big, red ball."
)
TEXT = EXPECTED + (
    ' She wanted to play with it, but it was high.\nHer mom said, "Lily, let\'s go to the park!"'
    " Tim didn't like 3 dogs - or did he?"
)


@pytest.fixture(scope="module")
def model(shared_data: Path) -> Path:
    return shared_data / "stories260K" / "stories260K.bin"


@pytest.fixture(scope="module")
def vocabulary(shared_data: Path) -> Path:
    return shared_data / "stories260K" / "tok512.bin"


@pytest.fixture(scope="module")
def checkpoints(
    model: Path, vocabulary: Path, tmp_path_factory: pytest.TempPathFactory
) -> dict[str, Checkpoint]:
    folder = tmp_path_factory.mktemp("stories")
    forms = ("float", "ptq", "spinquant", "qlora")
    for form in forms:
        to_meta(form, folder / form, model, vocabulary)
    return {form: from_meta(folder / form) for form in forms}


def encoding_of(checkpoint: Checkpoint) -> tiktoken.Encoding:
    ranks = read_ranks(checkpoint.tokenizer)
    return tiktoken.Encoding(
        "stories",
        pat_str=PATTERNS["llama3"],
        mergeable_ranks=ranks,
        special_tokens=special_tokens(len(ranks), checkpoint.config.vocab_size),
    )


def prompt_of(checkpoint: Checkpoint, text: str) -> list[int]:
    return encoding_of(checkpoint).encode("<|begin_of_text|>" + text, allowed_special="all")


def test_the_reader_knows_the_sizes(model: Path) -> None:
    config, weights = read_llama2c(model)
    sizes = (config.dim, config.num_layers, config.num_heads, config.num_kv_heads, config.ffn_dim)
    assert sizes == (64, 5, 8, 4, 172)
    assert config.vocab_size == 512 and config.rope_scaling is None
    assert weights["layers.4.feed_forward.w2.weight"].shape == (64, 172)
    assert "output.weight" not in weights and len(weights) == 2 + 5 * 9


@pytest.mark.parametrize("form", ["float", "spinquant", "qlora"])
def test_every_form_tells_the_known_story(form: str, checkpoints: dict[str, Checkpoint]) -> None:
    checkpoint = checkpoints[form]
    encoding = encoding_of(checkpoint)
    text = encoding.decode(ReferenceModel(checkpoint).greedy(prompt_of(checkpoint, ""), 60))
    assert text.startswith(" Once upon a time, there was a little girl named Lily.")
    if form == "float":
        assert text.startswith(EXPECTED)


def test_the_converted_tokenizer_cuts_text_like_llama2c(
    model: Path, vocabulary: Path, checkpoints: dict[str, Checkpoint]
) -> None:
    config, weights = read_llama2c(model)
    original = read_vocabulary(vocabulary, config.vocab_size)
    _, old_ids = renumber(config, weights, original)
    ids = encoding_of(checkpoints["float"]).encode(TEXT)
    assert [old_ids[token] for token in ids] == encode(original, TEXT[1:])
    assert len(ids) < len(TEXT) / 2


def test_rotation_and_lora_beat_plain_quantization_and_a_missing_r4_is_seen(
    checkpoints: dict[str, Checkpoint],
) -> None:
    tokens = prompt_of(checkpoints["float"], "")
    tokens += ReferenceModel(checkpoints["float"]).greedy(tokens, 150)
    nll = {form: ReferenceModel(checkpoint).nll(tokens) for form, checkpoint in checkpoints.items()}
    assert nll["float"] < nll["spinquant"] < nll["ptq"]
    assert nll["float"] < nll["qlora"] < nll["ptq"]
    assert nll["ptq"] < nll["float"] + 0.2
    without_r4 = ReferenceModel(checkpoints["spinquant"], apply_r4=False).nll(tokens)
    assert without_r4 > nll["float"] + 3


def write_model(path: Path, *, vocab: int, extra: int = 0) -> None:
    """A model of one layer: dim 4, ffn 6, 2 heads, 1 KV head, context 3."""
    count = 8 * 4 + 2 * 4 + 4 * (4 + 2 + 2 + 4) + 3 * 24 + 4 + 2 * 3 * 1
    count += 8 * 4 if vocab < 0 else 0
    header = struct.pack("<7i", 4, 6, 1, 2, 1, vocab, 3)
    path.write_bytes(header + np.arange(count + extra, dtype=np.float32).tobytes())


@pytest.mark.parametrize(("vocab", "is_tied"), [(8, True), (-8, False)])
def test_a_negative_vocabulary_means_an_output_layer(
    vocab: int, is_tied: bool, tmp_path: Path
) -> None:
    write_model(tmp_path / "model.bin", vocab=vocab)
    config, weights = read_llama2c(tmp_path / "model.bin")
    assert config.vocab_size == 8 and config.head_dim == 2
    assert ("output.weight" in weights) != is_tied
    assert weights["layers.0.attention_norm.weight"].tolist() == [32, 33, 34, 35]


@pytest.mark.parametrize("extra", [-1, 1])
def test_a_model_of_the_wrong_size_is_refused(extra: int, tmp_path: Path) -> None:
    write_model(tmp_path / "model.bin", vocab=8, extra=extra)
    with pytest.raises(CheckpointUnreadable, match="numbers after the header"):
        read_llama2c(tmp_path / "model.bin")


def test_a_model_without_header_is_refused(tmp_path: Path) -> None:
    (tmp_path / "model.bin").write_bytes(b"1234")
    with pytest.raises(CheckpointUnreadable, match="4 bytes are too few"):
        read_llama2c(tmp_path / "model.bin")


def test_a_short_vocabulary_is_refused(tmp_path: Path) -> None:
    one_token = struct.pack("<ifi", 1, 0.0, 1) + b"a"
    (tmp_path / "tok.bin").write_bytes(one_token)
    assert read_vocabulary(tmp_path / "tok.bin", 1).pieces == [b"a"]
    with pytest.raises(CheckpointUnreadable, match="ends after 1 of 2 tokens"):
        read_vocabulary(tmp_path / "tok.bin", 2)
