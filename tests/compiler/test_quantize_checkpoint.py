"""Float checkpoints quantized in a stream: equal to quantizing at once, better with a text."""

from __future__ import annotations

import tracemalloc
from collections.abc import Callable, Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from llamac.compiler.checkpoint import Checkpoint
from llamac.compiler.config import LlamaConfig, RopeScaling
from llamac.compiler.floats import from_bfloat16
from llamac.compiler.frontends.meta import from_meta
from llamac.compiler.meta_writer import write_checkpoint
from llamac.compiler.progress import SilentProgress, Stage
from llamac.compiler.quantize import linear_names, quantize_int4, quantize_model
from llamac.compiler.quantize_checkpoint import (
    Method,
    check_source,
    num_weights,
    quantize_checkpoint,
    windows_of,
)
from llamac.compiler.quantize_request import QuantizeRequest, quantize, read_texts
from llamac.compiler.reference_model import ReferenceModel
from llamac.compiler.walsh_rotation import rotate_checkpoint
from llamac.runtime.errors import LlamacError, ModelUnsupported, OutputError, UsageError
from llamac.tools import quantization_table as table
from llamac.tools.tiny_corpus import documents

ROOT = Path(__file__).resolve().parents[2]
BF16 = ROOT / "examples" / "tiny-llama" / "bf16"


def stories(seed: int, count: int = 120) -> str:
    return "\n".join(d[0].text for d in documents(count, seed) if not d[0].role)


@pytest.fixture(scope="module")
def text(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Some pages that the example model was not trained on."""
    path = tmp_path_factory.mktemp("text") / "pages.txt"
    path.write_text(stories(5), "utf-8")
    return path


def files(folder: Path) -> dict[str, bytes]:
    return {path.name: path.read_bytes() for path in sorted(folder.iterdir())}


def make(out: Path, **options: Any) -> Checkpoint:
    quantize(BF16, out, QuantizeRequest(**options), SilentProgress())
    return from_meta(out)


def test_the_nearest_codes_are_those_of_the_whole_model_at_once(
    tiny_float: Checkpoint, tmp_path: Path, read_all: Callable[[Checkpoint], dict[str, Any]]
) -> None:
    """Every tensor equals what `quantize_model` makes of the same bfloat16 weights."""
    weights = {
        name: from_bfloat16(value) if value.dtype == np.uint16 else value
        for name, value in read_all(tiny_float).items()
    }
    quant, wanted = quantize_model(tiny_float.config, weights, "ptq")
    made = make(tmp_path / "out")
    assert made.quant == quant
    assert made.config == tiny_float.config
    assert made.shared_embedding
    stored = torch.load(tmp_path / "out" / "consolidated.00.pth", weights_only=True)
    assert list(stored) != [] and stored.keys() == wanted.keys()
    for name, value in wanted.items():
        bits = stored[name]
        found = bits.view(torch.uint16) if bits.dtype == torch.bfloat16 else bits
        np.testing.assert_array_equal(found.numpy(), value, err_msg=name)


def test_rotated_weights_are_those_of_the_rotated_checkpoint(
    tiny_float: Checkpoint, tmp_path: Path
) -> None:
    made = make(tmp_path / "out", rotate=True)
    assert made.quant.form == "spinquant" and made.quant.hadamard_r4
    turned = rotate_checkpoint(tiny_float, dtype="float64", r4=True).weights
    for name in linear_names(tiny_float.config):
        wanted = quantize_int4(turned.read(f"{name}.weight").astype(np.float32))
        codes = made.weights.read(f"{name}.weight")
        assert np.mean(codes != wanted.codes) < 1e-3, name
    assert all((made.weights.read(f"layers.{i}.ffn_norm.weight") == 1).all() for i in range(4))


def test_a_text_makes_it_better(tiny_float: Checkpoint, text: Path, tmp_path: Path) -> None:
    """What is said on other documents is nearer to the float model; R4 is needed for that."""
    texts = table.stories(tiny_float, 6, 77)
    wanted = table.log_likelihoods(tiny_float, texts)
    made = {name: make(tmp_path / name, method=name, calibrate=text) for name in ("rtn", "gptq")}
    made["rotated"] = make(tmp_path / "rotated", rotate=True, method="gptq", calibrate=text)
    found = {
        name: table.divergence(wanted, table.log_likelihoods(model, texts))
        for name, model in made.items()
    }
    assert found["gptq"] < 0.7 * found["rtn"] < 0.01
    assert found["rotated"] < 0.7 * found["rtn"]
    tokens = texts[0]
    with_r4, without = (
        ReferenceModel(made["rotated"], apply_r4=on).nll(tokens) for on in (True, False)
    )
    assert with_r4 + 1 < without


def test_likelihoods_are_those_of_the_end_of_the_text(
    tiny_float: Checkpoint, text: Path, tmp_path: Path
) -> None:
    request = QuantizeRequest(calibrate=text)
    found = quantize(BF16, tmp_path / "a", request, SilentProgress())
    assert found is not None and found.tokens == 512
    texts = read_texts(tiny_float, request)
    tokens = [texts.bos, *texts.evaluation]
    assert found.before == pytest.approx(ReferenceModel(tiny_float).nll(tokens), abs=1e-9)
    assert found.after == pytest.approx(
        ReferenceModel(from_meta(tmp_path / "a")).nll(tokens), abs=1e-9
    )
    assert f"{found.after:.4f} after" in str(found)
    all_tokens = read_texts(tiny_float, replace(request, evaluate=text, calibration_tokens=10**6))
    assert all_tokens.calibration[-512:] == texts.evaluation
    assert all_tokens.evaluation == all_tokens.calibration[:512]
    assert quantize(BF16, tmp_path / "b", QuantizeRequest(), SilentProgress()) is None


def test_equal_inputs_give_equal_bytes(text: Path, tmp_path: Path) -> None:
    options: dict[str, Any] = {"method": "gptq", "rotate": True, "calibrate": text}
    for name in ("a", "b"):
        make(tmp_path / name, **options)
    assert files(tmp_path / "a") == files(tmp_path / "b")
    assert list(files(tmp_path / "a")) == ["consolidated.00.pth", "params.json", "tokenizer.model"]


def test_layers_stay_bfloat16(tiny_float: Checkpoint, text: Path, tmp_path: Path) -> None:
    """Their weights are the float model's; the others are int4 and the loss is smaller."""
    rules = tmp_path / "layers.toml"
    rules.write_text('"layers.1.*" = "bfloat16"\n"tok_embeddings" = "bfloat16"\n', "utf-8")
    made = make(tmp_path / "mixed", method="gptq", calibrate=text, precision=rules)
    names = set(made.weights.names())
    assert not made.shared_embedding
    assert "tok_embeddings.scales" not in names and "output.scales" in names
    for name in linear_names(made.config):
        is_float = name.startswith("layers.1.")
        assert (f"{name}.scales" in names) != is_float
        if is_float:
            found, wanted = (c.weights.read(f"{name}.weight") for c in (made, tiny_float))
            np.testing.assert_array_equal(found, wanted)


@pytest.mark.parametrize("kind", [2, 30])
def test_gguf_is_quantized_if_it_holds_floats(
    kind: int, tiny_float: Checkpoint, write_gguf: Callable[..., Path], tmp_path: Path
) -> None:
    """BF16 gives the files that Meta's layout gives; Q4_0 is refused."""
    model, out = write_gguf(tiny_float, kind, None, 30), tmp_path / "out"
    if kind == 2:
        with pytest.raises(ModelUnsupported, match="quantized already"):
            quantize(model, out, QuantizeRequest(), SilentProgress())
        assert not out.exists()
        return
    quantize(model, out, QuantizeRequest(), SilentProgress())
    make(tmp_path / "meta")
    assert files(out)["consolidated.00.pth"] == files(tmp_path / "meta")["consolidated.00.pth"]


def test_gptq_needs_a_text(tmp_path: Path, check_advice: Callable[[LlamacError], None]) -> None:
    short = tmp_path / "short.txt"
    short.write_text("Once upon a time", "utf-8")
    for calibrate, match in ((None, "needs --calibrate"), (short, "tokens to calibrate with")):
        with pytest.raises(UsageError, match=match) as caught:
            make(tmp_path / "out", method="gptq", calibrate=calibrate)
        check_advice(caught.value)
    with pytest.raises(UsageError, match="no method 'awq'"):
        make(tmp_path / "out", method="awq")


def test_what_params_json_cannot_say_is_refused(tiny_float: Checkpoint) -> None:
    for config in (
        replace(tiny_float.config, head_dim=16),
        replace(tiny_float.config, rope_scaling=RopeScaling(32.0, 2.0)),
    ):
        with pytest.raises(ModelUnsupported, match="head size"):
            check_source(replace(tiny_float, config=config))


def test_another_rope_factor_is_kept(tiny_float: Checkpoint, tmp_path: Path) -> None:
    quantize(BF16, tmp_path / "out", QuantizeRequest(), SilentProgress(), rope_factor=8)
    scaling = from_meta(tmp_path / "out").config.rope_scaling
    assert scaling == RopeScaling(8.0) != tiny_float.config.rope_scaling


def test_nothing_is_left_when_it_is_interrupted(
    text: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Ctrl-C in the middle of a layer: no folder, and an older checkpoint stays as it was."""
    out = tmp_path / "out"
    make(out)
    before = files(out)
    advance = Stage.advance

    def interrupt(stage: Stage, n: int = 1, note: str = "") -> None:
        advance(stage, n, note)
        if note == "layers.2.attention.wo":
            raise KeyboardInterrupt

    monkeypatch.setattr(Stage, "advance", interrupt)
    request = QuantizeRequest("gptq", calibrate=text)
    for folder in (out, tmp_path / "new"):
        with pytest.raises(KeyboardInterrupt):
            quantize(BF16, folder, request, SilentProgress(), overwrite=True)
    assert [path.name for path in tmp_path.iterdir()] == ["out"]
    assert files(out) == before


def test_only_checkpoints_are_replaced(tmp_path: Path) -> None:
    out = tmp_path / "out"
    out.mkdir()
    (out / "letter.txt").write_text("dear", "utf-8")
    with pytest.raises(OutputError, match="is not a checkpoint"):
        quantize(BF16, out, QuantizeRequest(), SilentProgress(), overwrite=True)
    assert files(out) == {"letter.txt": b"dear"}


def test_windows_begin_with_the_token_of_a_beginning() -> None:
    windows = windows_of(range(1000), 7)
    assert [len(w) for w in windows] == [512, 490]
    assert all(w[0] == 7 for w in windows)
    assert [token for w in windows for token in w[1:]] == list(range(1000))


@pytest.fixture
def peak() -> Iterator[Callable[[], int]]:
    """Bytes that were in use at most since the last call."""
    tracemalloc.start()

    def read() -> int:
        found = tracemalloc.get_traced_memory()[1]
        tracemalloc.reset_peak()
        return found

    yield read
    tracemalloc.stop()


@pytest.mark.parametrize("rotate", [False, True])
def test_more_layers_need_no_more_memory(
    rotate: bool, tmp_path: Path, peak: Callable[[], int]
) -> None:
    """The peak with eight blocks is that with two; the model itself is twice as large as that."""
    found = {}
    for layers in (2, 8):
        config = LlamaConfig(256, layers, 4, 2, 64, 512, 1024, 1e-5, 1e4, None)
        checkpoint = random_checkpoint(config, tmp_path / f"float-{layers}")
        windows = [list(range(1, 65))] * 2
        stage = Stage("quantize", num_weights(config), 0)
        out, scratch = tmp_path / f"out-{layers}", tmp_path / f"scratch-{layers}"
        peak()
        quantize_checkpoint(checkpoint, Method("gptq", rotate), windows, out, scratch, stage)
        found[layers] = peak()
        assert stage.done == stage.total
    # Six blocks more are 14 MB more of weights.
    assert found[8] < found[2] + (6 << 20)


def random_checkpoint(config: LlamaConfig, folder: Path) -> Checkpoint:
    """A float model with weights of the usual size."""
    rng = np.random.default_rng(0)
    shapes = {
        f"layers.{i}.{part}.weight": shape
        for i in range(config.num_layers)
        for part, shape in config.linear_shapes().items()
    }
    shapes["tok_embeddings.weight"] = (config.vocab_size, config.dim)
    weights: dict[str, Any] = {
        name: rng.standard_normal(shape, np.float32) / np.sqrt(shape[1])
        for name, shape in shapes.items()
    }
    norms = [f"layers.{i}.{k}_norm" for i in range(config.num_layers) for k in ("attention", "ffn")]
    weights |= {f"{name}.weight": np.ones(config.dim, np.float32) for name in (*norms, "norm")}
    quant, tensors = quantize_model(config, weights, "float")
    write_checkpoint(folder, config, quant, tensors, BF16 / "tokenizer.model")
    return from_meta(folder)
