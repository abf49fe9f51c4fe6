"""Builds the model of one engine, in the Python that has it.

    python build.py ENGINE SIZE CONTEXT FOLDER

All have the shapes of Llama 3.2 1B or 3B and random weights in the same form, as far as an engine
has it: int4 with a scale for 32 columns, an output layer and an embedding of int8. Speed does not
depend on values. What is there already is not built again; the last line printed is the path.
"""

from __future__ import annotations

import json
import shutil
import subprocess
import sys
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

Bytes = NDArray[np.uint8]
VOCAB, SPECIAL = 128256, 256
WEIGHT_STD = 0.02


@dataclass(frozen=True)
class Shape:
    """Sizes of a Llama 3.2."""

    dim: int
    layers: int
    heads: int
    head_dim: int
    kv_heads: int = 8
    hidden: int = 8192


SHAPES = {"1b": Shape(2048, 16, 32, 64), "3b": Shape(3072, 28, 24, 128)}


def matrices(shape: Shape) -> dict[str, tuple[int, int]]:
    """Rows and columns of a layer's matrices by GGUF's names."""
    queries, keys = shape.heads * shape.head_dim, shape.kv_heads * shape.head_dim
    return {
        "attn_q": (queries, shape.dim),
        "attn_k": (keys, shape.dim),
        "attn_v": (keys, shape.dim),
        "attn_output": (shape.dim, queries),
        "ffn_gate": (shape.hidden, shape.dim),
        "ffn_up": (shape.hidden, shape.dim),
        "ffn_down": (shape.dim, shape.hidden),
    }


# -- llamac ----------------------------------------------------------------------------------------


def build_llamac(size: str, context: int, folder: Path) -> Path:
    """A checkpoint as Meta publishes it, compiled for this machine."""
    checkpoint, bundle = folder / "meta", folder / f"bundle-{context}"
    if not checkpoint.exists():
        command = ["-m", "llamac.tools.make_synthetic", "--model", size, "--form", "spinquant"]
        run(*command, "-o", str(checkpoint))
    if not bundle.exists():
        command = ["-m", "llamac.tools.cli", "compile", str(checkpoint), "--target", "host"]
        run(*command, "--context", str(context), "-o", str(bundle))
    return bundle


# -- GGUF: llama.cpp and OpenVINO ------------------------------------------------------------------


def quantized(rows: int, columns: int, codes_bytes: int, scale: float) -> Bytes:
    """Random blocks of 32 columns: a float16 scale and codes, as GGUF's Q4_0 and Q8_0 have them."""
    rng = np.random.default_rng(rows + columns)
    blocks = rng.integers(1, 256, (rows, columns // 32, 2 + codes_bytes), np.uint8)
    blocks[..., :2] = np.frombuffer(np.float16(scale).tobytes(), np.uint8)
    return blocks.reshape(rows, -1)


def build_gguf(size: str, context: int, folder: Path) -> Path:
    """Q4_0 with Q8_0 embedding and output."""
    import gguf  # noqa: PLC0415

    path, partial = folder / "model.gguf", folder / "model.gguf.partial"
    if path.exists():
        return path
    shape, types = SHAPES[size], gguf.GGMLQuantizationType
    writer = gguf.GGUFWriter(partial, "llama")
    _add_sizes(writer, shape)
    _add_tokenizer(writer)
    ones = np.ones(shape.dim, np.float32)
    for name in ("token_embd", "output"):
        table = quantized(VOCAB, shape.dim, 32, WEIGHT_STD / 74)
        writer.add_tensor(f"{name}.weight", table, raw_dtype=types.Q8_0)
    writer.add_tensor("output_norm.weight", ones)
    writer.add_tensor("rope_freqs.weight", rope_factors(shape.head_dim))
    for layer in range(shape.layers):
        writer.add_tensor(f"blk.{layer}.attn_norm.weight", ones)
        writer.add_tensor(f"blk.{layer}.ffn_norm.weight", ones)
        for name, (rows, columns) in matrices(shape).items():
            codes = quantized(rows, columns, 16, WEIGHT_STD / 4.6)
            writer.add_tensor(f"blk.{layer}.{name}.weight", codes, raw_dtype=types.Q4_0)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    partial.rename(path)
    return path


def _add_sizes(writer: Any, shape: Shape) -> None:
    writer.add_context_length(131072)
    writer.add_embedding_length(shape.dim)
    writer.add_block_count(shape.layers)
    writer.add_feed_forward_length(shape.hidden)
    writer.add_head_count(shape.heads)
    writer.add_head_count_kv(shape.kv_heads)
    writer.add_key_length(shape.head_dim)
    writer.add_value_length(shape.head_dim)
    writer.add_rope_dimension_count(shape.head_dim)
    writer.add_rope_freq_base(500000.0)
    writer.add_layer_norm_rms_eps(1e-5)
    writer.add_vocab_size(VOCAB)
    writer.add_file_type(2)


def _add_tokenizer(writer: Any) -> None:
    """Made-up tokens, pairs and triples of byte characters; nothing is ever encoded with them."""
    letters = [chr(0x100 + i) for i in range(256)]
    pairs = [(a, b) for a in letters for b in letters]
    pairs += [(a + b, letters[0]) for a, b in pairs]
    count = VOCAB - SPECIAL - len(letters)
    tokens = letters + [a + b for a, b in pairs[:count]]
    special = [f"<|special_{i}|>" for i in range(SPECIAL)]
    writer.add_tokenizer_model("gpt2")
    writer.add_tokenizer_pre("llama-bpe")
    writer.add_token_list(tokens + special)
    writer.add_token_types([1] * len(tokens) + [3] * SPECIAL)
    writer.add_token_merges([f"{a} {b}" for a, b in pairs[:count]])
    writer.add_bos_token_id(len(tokens))
    writer.add_eos_token_id(len(tokens) + 1)


def rope_factors(head_dim: int) -> NDArray[np.float32]:
    """Divisors of the frequencies: llama3 scaling with factor 32, from 8192 positions."""
    wavelength = 2 * np.pi * 500000.0 ** (np.arange(0, head_dim, 2) / head_dim)
    smooth = np.clip((8192 / wavelength - 1) / 3, 0, 1)
    return (1 / ((1 - smooth) / 32 + smooth)).astype(np.float32)


def build_openvino(size: str, context: int, folder: Path) -> Path:
    """What OpenVINO GenAI makes of the GGUF file, saved as its own format."""
    import openvino_genai as genai  # noqa: PLC0415

    target = folder / "openvino"
    if not target.exists():
        work = folder / "openvino.partial"
        shutil.rmtree(work, ignore_errors=True)
        work.mkdir()
        link = work / "model.gguf"
        link.hardlink_to(build_gguf(size, context, folder))
        genai.LLMPipeline(str(link), "CPU", enable_save_ov_model=True)
        link.unlink()
        work.rename(target)
    return target


# -- Hugging Face: ONNX Runtime --------------------------------------------------------------------


def build_onnx(size: str, context: int, folder: Path) -> Path:
    """What onnxruntime-genai's model builder makes of a bfloat16 checkpoint."""
    target, source = folder / "onnx", folder / "hugging-face"
    if target.exists():
        return target
    write_hugging_face(SHAPES[size], source)
    work = folder / "onnx.partial"
    shutil.rmtree(work, ignore_errors=True)
    options = ("int4_block_size=32", "int4_accuracy_level=4", "int4_algo_config=rtn_last")
    command = ["-m", "onnxruntime_genai.models.builder", "-i", str(source), "-o", str(work)]
    command += ["-p", "int4", "-e", "cpu", "-c", str(folder / "cache"), "--extra_options"]
    run(*command, *options)
    shutil.rmtree(source)
    work.rename(target)
    return target


def write_hugging_face(shape: Shape, folder: Path) -> None:
    """A checkpoint of random weights with a tokenizer of one word."""
    import torch  # noqa: PLC0415
    import transformers  # noqa: PLC0415
    from tokenizers import Tokenizer, models  # noqa: PLC0415

    config = transformers.LlamaConfig(
        vocab_size=VOCAB,
        hidden_size=shape.dim,
        intermediate_size=shape.hidden,
        num_hidden_layers=shape.layers,
        num_attention_heads=shape.heads,
        num_key_value_heads=shape.kv_heads,
        head_dim=shape.head_dim,
        max_position_embeddings=131072,
        rms_norm_eps=1e-5,
        rope_parameters={"rope_type": "default", "rope_theta": 500000.0},
        bos_token_id=VOCAB - SPECIAL,
        eos_token_id=VOCAB - SPECIAL + 1,
        tie_word_embeddings=False,
    )
    torch.set_default_dtype(torch.bfloat16)
    model = transformers.LlamaForCausalLM(config)
    model.save_pretrained(folder)
    words = Tokenizer(models.WordLevel({"word": 0}, unk_token="word"))
    transformers.PreTrainedTokenizerFast(tokenizer_object=words).save_pretrained(folder)


# -- ExecuTorch ------------------------------------------------------------------------------------


def build_executorch(size: str, context: int, folder: Path) -> Path:
    """ExecuTorch's own export of the checkpoint in Meta's layout, for XNNPACK."""
    import torch  # noqa: PLC0415

    target = folder / f"executorch-{context}.pte"
    if target.exists():
        return target
    meta, work = folder / "meta", folder / "executorch.partial"
    work.mkdir(exist_ok=True)
    state = torch.load(meta / "consolidated.00.pth", weights_only=True, mmap=True)
    # The exporter takes the dtype of the first tensor for that of the whole model.
    torch.save({"norm.weight": state["norm.weight"], **state}, work / "checkpoint.pth")
    config = work / "config.yaml"
    config.write_text(json.dumps(executorch_config(meta, work, context)))  # JSON is YAML
    run("-m", "executorch.examples.models.llama.export_llama", "--hydra", "--config", str(config))
    (work / "model.pte").rename(target)
    shutil.rmtree(work)
    return target


def executorch_config(meta: Path, work: Path, context: int) -> dict[str, Any]:
    """The settings of its llama_xnnpack_spinquant.yaml, with a longer context."""
    return {
        "base": {
            "model_class": "llama3_2",
            "checkpoint": str(work / "checkpoint.pth"),
            "params": str(meta / "params.json"),
            "preq_mode": "preq_8da4w_out_8da8w",
            "preq_group_size": 32,
            "preq_embedding_quantize": "8,0",
            "metadata": '{"get_bos_id":128000, "get_eos_ids":[128009, 128001]}',
        },
        "model": {
            "use_kv_cache": True,
            "use_sdpa_with_kv_cache": True,
            "dtype_override": "fp32",
        },
        "export": {
            "max_seq_length": context,
            "max_context_length": context,
            "output_dir": str(work),
            "output_name": "model.pte",
        },
        "quantization": {"use_spin_quant": "native"},
        "backend": {"xnnpack": {"enabled": True, "extended_ops": True}},
    }


def run(*arguments: str) -> None:
    """Run this Python with arguments; what it prints goes to standard error."""
    subprocess.run([sys.executable, *arguments], check=True, stdout=sys.stderr)


BUILDERS: dict[str, Callable[[str, int, Path], Path]] = {
    "llamac": build_llamac,
    "llama.cpp": build_gguf,
    "OpenVINO GenAI": build_openvino,
    "ONNX Runtime GenAI": build_onnx,
    "ExecuTorch": build_executorch,
}

if __name__ == "__main__":
    print(BUILDERS[sys.argv[1]](sys.argv[2], int(sys.argv[3]), Path(sys.argv[4])))
