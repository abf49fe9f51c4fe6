"""A bundle folder whose manifest, hashes and sizes are true, though its library is not code."""

from __future__ import annotations

from pathlib import Path

import pytest

from llamac.runtime.checks import WeightsHeader
from llamac.runtime.digest import file_sha256, sample_sha256
from llamac.runtime.manifest import (
    FileEntry,
    FunctionEntry,
    LevelEntry,
    Manifest,
    MemoryPlan,
    ModelEntry,
    OperationCheck,
    QuantizationEntry,
    RopeScalingEntry,
    TargetEntry,
    TokenizerEntry,
    Verification,
)

BUILD_ID = "ab" * 32
WEIGHTS_BYTES = 3 << 20

MODEL = ModelEntry(
    name="tiny",
    family="llama",
    dim=64,
    num_layers=2,
    num_heads=4,
    num_kv_heads=2,
    head_dim=16,
    ffn_dim=128,
    vocab_size=512,
    norm_eps=1e-5,
    rope_theta=5e5,
    rope_scaling=RopeScalingEntry(32.0, 1.0, 4.0, 8192),
    context_length=1000,
)
QUANTIZATION = QuantizationEntry(
    form="spinquant",
    weights="int4 group-32",
    scale_dtype="float16",
    activations="int8 per token, asymmetric",
    activation_rule="torchao",
    embedding="int8 per channel",
    output="int8 per channel",
    shared_embedding=False,
    hadamard_r4=True,
    lora=None,
    kv_cache="float16",
    notes=("assumed a RoPE factor of 32",),
)
TOKENIZER = TokenizerEntry(
    file="tokenizer.model",
    format="tiktoken",
    pattern="llama3",
    special_tokens={"<|begin_of_text|>": 500},
    bos_id=500,
    stop_ids=(501,),
    chat_template=None,
)
TARGET = TargetEntry(
    soc="host",
    plugin="x86-cpu",
    processors=("cpu",),
    arch="x86_64",
    os="linux",
    levels=(LevelEntry("avx2", ("avx2", "fma")), LevelEntry("x86-64", ())),
)


@pytest.fixture
def manifest() -> Manifest:
    """The manifest of the folder; sizes of its parts are round numbers."""
    return Manifest(
        build_id=BUILD_ID,
        created_with={"llamac": "0.1.0"},
        model=MODEL,
        quantization=QUANTIZATION,
        tokenizer=TOKENIZER,
        target=TARGET,
        memory=MemoryPlan(WEIGHTS_BYTES, 1024 * 128, 4096, 1_000_000),
        functions=(FunctionEntry("prefill_24", 24), FunctionEntry("decode", 1)),
        files={},
        verification=Verification(
            "passed",
            8,
            (OperationCheck("layers.0.wq", 120.0), OperationCheck("layers.1.w2", 95.5)),
            {"nll_bundle": 1.25},
        ),
    )


@pytest.fixture
def bundle(tmp_path: Path, manifest: Manifest) -> Path:
    """The folder; `llamac inspect --check` finds nothing wrong with it."""
    folder = tmp_path / "tiny-host"
    (folder / "lib").mkdir(parents=True)
    header = WeightsHeader(BUILD_ID, WEIGHTS_BYTES).pack()
    contents = {
        "weights.bin": ("weights", header.ljust(WEIGHTS_BYTES, b"w")),
        "lib/libmodel.so": ("library", b"not a library"),
        "tokenizer.model": ("tokenizer", b"aGk= 0\n"),
        "program.json": ("program", b"{}"),
    }
    files = {}
    for name, (role, data) in contents.items():
        path = folder / name
        path.write_bytes(data)
        sample = sample_sha256(path) if role == "weights" else None
        files[name] = FileEntry(role, len(data), file_sha256(path), sample)
    whole = Manifest(**{**vars(manifest), "files": files})
    (folder / "manifest.json").write_text(whole.to_json(), "utf-8")
    return folder
