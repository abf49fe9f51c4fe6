"""ONNX files as tools of others write them: PyTorch's exporter, onnxruntime-genai, onnxruntime."""

from __future__ import annotations

import subprocess
import sys
from collections.abc import Callable
from functools import cache
from pathlib import Path
from types import ModuleType
from typing import Any

import numpy as np
import pytest

from llamac.compiler import from_meta, from_onnx
from llamac.compiler.checkpoint import Checkpoint
from llamac.compiler.config import RopeScaling
from llamac.compiler.frontends.recognize import open_checkpoint
from llamac.compiler.reference_model import ReferenceModel

TOKENS = [1008, 5, 77, 300, 12, 900, 4, 4]
EXAMPLES = Path(__file__).resolve().parents[2] / "examples" / "tiny-llama"
pytestmark = pytest.mark.filterwarnings("ignore::FutureWarning", "ignore::DeprecationWarning")


@pytest.fixture(scope="module")
def hf(helper: Callable[[str], ModuleType], tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The example model of bfloat16 as a folder of Hugging Face."""
    folder = tmp_path_factory.mktemp("hf") / "tiny"
    path: Path = (
        helper("compiler/hf_layout").make_layout(from_meta(EXAMPLES / "bf16")).write(folder)
    )
    return path


@pytest.fixture(scope="module")
def built(hf: Path, tmp_path_factory: pytest.TempPathFactory) -> Callable[[str], Path]:
    """What onnxruntime-genai's model builder makes of it, by precision."""
    pytest.importorskip("onnxruntime_genai")
    folder = tmp_path_factory.mktemp("genai")

    @cache
    def build(precision: str) -> Path:
        command = [sys.executable, "-m", "onnxruntime_genai.models.builder"]
        command += ["-i", str(hf), "-o", str(folder / precision), "-p", precision]
        command += ["-e", "cpu", "-c", str(folder / "cache")]
        done = subprocess.run(command, capture_output=True, text=True, check=False)
        assert done.returncode == 0, done.stderr
        return folder / precision

    return build


def logits_of(path: Path) -> np.ndarray:
    """What onnxruntime computes, without a past."""
    runtime = pytest.importorskip("onnxruntime")
    session = runtime.InferenceSession(str(path), providers=["CPUExecutionProvider"])
    tokens = np.array([TOKENS])
    feeds: dict[str, Any] = {}
    for value in session.get_inputs():
        if value.name.startswith("past"):
            shape = [size if isinstance(size, int) else 0 for size in value.shape]
            feeds[value.name] = np.zeros((1, *shape[1:3], 32), np.float32)
        else:
            feeds[value.name] = np.ones_like(tokens) if "mask" in value.name else tokens
    found: np.ndarray = session.run(None, feeds)[0][0]
    return found


def error_of(checkpoint: Checkpoint, expected: np.ndarray) -> float:
    """Largest difference of the reference's logits, beside the largest logit."""
    model = ReferenceModel(checkpoint, kv_dtype="float32", quantize_activations=False)
    found = model.logits(TOKENS)
    return float(np.abs(found - expected).max() / np.abs(expected).max())


def test_a_float_model_of_onnxruntime(built: Callable[[str], Path]) -> None:
    """Operators of com.microsoft, a cache, q, k and v in one matrix, one table for both ends."""
    folder = built("fp32")
    checkpoint = open_checkpoint(folder)
    ours = from_meta(EXAMPLES / "bf16")
    assert checkpoint.config == ours.config
    assert checkpoint.config.rope_scaling == RopeScaling(32.0, 1.0, 4.0, 8192)
    assert checkpoint.shared_embedding and checkpoint.quant.form == "float"
    assert checkpoint.weights.names() == ours.weights.names()
    for name in ours.weights.names():
        assert np.array_equal(checkpoint.weights.read(name), ours.weights.read(name)), name
    assert error_of(checkpoint, logits_of(folder / "model.onnx")) < 1e-5


def test_an_int4_model_of_onnxruntime(built: Callable[[str], Path]) -> None:
    """MatMulNBits keeps its codes; activations are quantized by blocks, so logits differ."""
    onnx = pytest.importorskip("onnx")
    folder = built("int4")
    checkpoint = from_onnx(folder)
    assert checkpoint.quant.form == "ptq" and checkpoint.shared_embedding
    assert any("28 linear layers" in n and "without loss" in n for n in checkpoint.notes)
    model = onnx.load(folder / "model.onnx")
    tensors = {t.name: onnx.numpy_helper.to_array(t) for t in model.graph.initializer}
    packed = tensors["model.layers.2.mlp.down_proj.MatMul.weight_Q4"]
    low, high = packed & 15, packed >> 4
    codes = np.stack([low, high], -1).reshape(len(packed), -1).astype(np.int8) - np.int8(8)
    assert np.array_equal(checkpoint.weights.read("layers.2.feed_forward.w2.weight"), codes)
    scales = tensors["model.layers.2.mlp.down_proj.MatMul.weight_scales"]
    assert np.array_equal(checkpoint.weights.read("layers.2.feed_forward.w2.scales"), scales)
    assert error_of(checkpoint, logits_of(folder / "model.onnx")) < 0.05


@pytest.mark.parametrize("is_symmetric", [True, False])
def test_codes_between_quantize_and_dequantize(
    is_symmetric: bool, built: Callable[[str], Path], tmp_path: Path
) -> None:
    """DequantizeLinear with blocks along the columns of a transposed matrix."""
    onnx = pytest.importorskip("onnx")
    tool = pytest.importorskip("onnxruntime.quantization.matmul_nbits_quantizer")
    folder = built("fp32")
    quantizer = tool.MatMulNBitsQuantizer(
        onnx.load(folder / "model.onnx"),
        block_size=32,
        is_symmetric=is_symmetric,
        quant_format=tool.QuantFormat.QDQ,
    )
    quantizer.process()
    path = tmp_path / "model.onnx"
    quantizer.model.save_model_to_file(str(path), use_external_data_format=False)
    checkpoint = from_onnx(path, tokenizer=folder / "tokenizer.json")
    kinds = [note for note in checkpoint.notes if "28 linear layers" in note]
    assert len(kinds) == 1 and ("without loss" in kinds[0]) == is_symmetric
    assert ("zero points" in kinds[0]) != is_symmetric
    # The last matrix becomes int8, those with zero points bfloat16.
    assert error_of(checkpoint, logits_of(path)) < 0.03


@pytest.mark.parametrize(("opset", "is_dynamic"), [(20, True), (18, False), (23, True)])
def test_models_of_pytorchs_exporter(
    opset: int,
    is_dynamic: bool,
    hf: Path,
    helper: Callable[[str], ModuleType],
    tmp_path: Path,
) -> None:
    """Plain operators, or those of opset 23: Attention, RotaryEmbedding, RMSNormalization."""
    pytest.importorskip("onnxscript")
    transformers = pytest.importorskip("transformers")
    torch = pytest.importorskip("torch")
    model = transformers.LlamaForCausalLM.from_pretrained(hf, dtype=torch.float32).eval()
    count = torch.export.Dim("count", min=2, max=512)
    path = tmp_path / "model.onnx"
    torch.onnx.export(
        helper("compiler/exported_llama").Logits(model).eval(),
        (torch.tensor([TOKENS]),),
        path,
        dynamo=True,
        opset_version=opset,
        dynamic_shapes=({1: count},) if is_dynamic else None,
        verbose=False,
    )
    checkpoint = from_onnx(path, tokenizer=hf / "tokenizer.json")
    assert checkpoint.config == from_meta(EXAMPLES / "bf16").config
    assert error_of(checkpoint, logits_of(path)) < 1e-5
