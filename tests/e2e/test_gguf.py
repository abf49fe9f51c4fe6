"""GGUF files all the way: compiled by the command line, verified, and talking."""

from __future__ import annotations

import importlib.util
import json
import re
import subprocess
from collections.abc import Callable, Sequence
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest

from llamac.compiler.frontends.gguf import from_gguf
from llamac.compiler.frontends.meta import from_meta
from llamac.compiler.reference_model import ReferenceModel
from llamac.compiler.verify import verify_bundle
from llamac.runtime import Session, load
from llamac.runtime.manifest import read_manifest
from llamac.targets.emulator import find_emulator
from llamac.tools.tiny_corpus import documents

Llamac = Callable[..., subprocess.CompletedProcess[str]]
Q4_0, Q4_1, Q8_0, BF16 = 2, 3, 8, 30


@pytest.fixture(scope="module")
def write(
    helper: Callable[[str], ModuleType], tiny: Path, tmp_path_factory: pytest.TempPathFactory
) -> Callable[..., Path]:
    """write(name, types, table): the float model of the repository as a GGUF file."""
    folder = tmp_path_factory.mktemp("gguf")

    layout = helper("compiler/gguf_layout")

    def make(name: str, types: Any, table: int) -> Path:
        made = layout.make_layout(from_meta(tiny / "bf16"), types, table)
        written: Path = made.write(folder / f"{name}.gguf")
        return written

    return make


@pytest.fixture(scope="module")
def q4_0(write: Callable[..., Path]) -> Path:
    """What most people have: Q4_0, the embedding in a larger type."""
    return write("tiny-Q4_0", Q4_0, Q8_0)


def story() -> str:
    return " ".join(d[0].text for d in documents(50, 77) if not d[0].role)[:900]


def test_a_q4_0_file_becomes_a_bundle_that_talks(
    q4_0: Path, tiny: Path, llamac: Llamac, one_level: str, tmp_path: Path
) -> None:
    out = tmp_path / "bundle"
    options = ("--target", one_level, "--chunks", "8", "--context", "512", "-o", out)
    printed = llamac("compile", q4_0, *options).stderr
    assert "note: 28 linear layers of type Q4_0: int4 group-32, without loss" in printed
    manifest = read_manifest(out)
    assert manifest.model.name == "tiny-Q4_0"
    assert manifest.verification.status == "passed"
    assert manifest.quantization.weights == "int4 group-32"
    kernels = {
        kernel["name"] for kernel in json.loads((out / "program.json").read_text())["kernels"]
    }
    assert any("_signed_" in name for name in kernels)
    text = llamac("run", out, "Tell me a story about a fox.", "--max-tokens", "60").stdout
    known = {w for d in documents(2000, 0) for turn in d for w in re.findall(r"\w+", turn.text)}
    words = re.findall(r"\w+", text)
    assert "fox" in words
    assert len(words) > 25 and sum(word in known for word in words) > 0.95 * len(words), text
    llamac("verify", out, q4_0)
    other = llamac("verify", out, tiny / "bf16", code=2).stderr
    assert "is not that of the bundle" in other


MIXED = {
    "as with importance weights": (
        lambda name: Q4_1 if name == "blk.0.ffn_down.weight" else Q4_0,
        "int4 group-32 and bfloat16",
    ),
    "one v that is larger": (
        lambda name: Q8_0 if name == "blk.1.attn_v.weight" else Q4_0,
        "int4 group-32 and bfloat16",
    ),
    "a gate that is larger": (
        lambda name: Q8_0 if name == "blk.2.ffn_gate.weight" else Q4_0,
        "int4 group-32 and bfloat16",
    ),
    "Q8_0": (Q8_0, "bfloat16"),
}


@pytest.mark.parametrize("name", MIXED)
@pytest.mark.parametrize("requantize", [False, True])
def test_files_of_several_types(
    name: str,
    requantize: bool,
    write: Callable[..., Path],
    compiled: Callable[..., Path],
    nll_of: Callable[[Session, Sequence[int]], float],
) -> None:
    """Compiled (and so verified), verified again by the bundle's manifest, and as likely."""
    types, weights = MIXED[name]
    path = write(name.replace(" ", "-"), types, Q8_0)
    bundle = compiled(path, requantize=requantize, chunks=(8,))
    entry = read_manifest(bundle).quantization
    assert entry.weights == ("int4 group-32" if requantize else weights)
    assert verify_bundle(bundle, path).passed
    with load(bundle, threads=2) as model, model.session() as session:
        ids = model.tokenizer.encode(story(), bos=True)[:120]
        found = nll_of(session, ids)
    reference = ReferenceModel(from_gguf(path, requantize=requantize))
    assert found == pytest.approx(reference.nll(ids), abs=0.01)
    assert found < 1.6


@pytest.mark.needs("qemu-aarch64")
@pytest.mark.parametrize("cpu", ["cortex-a57", "cortex-a76", "max,sme=off,sve=off"])
def test_arm_kernels_take_negative_scales(
    cpu: str,
    q4_0: Path,
    compiled: Callable[..., Path],
    board_with: Callable[[tuple[str, ...]], str],
) -> None:
    """Every step of every level, beside the reference."""
    bundle = compiled(q4_0, target=board_with(("i8mm", "dotprod", "neon")), chunks=(8,))
    report = verify_bundle(bundle, q4_0, max_tokens=16, machine=find_emulator(cpu))
    assert report.passed
    expected = {"cortex-a57": "neon", "cortex-a76": "dotprod"}.get(cpu, "i8mm")
    assert report.level == expected


@pytest.mark.slow
@pytest.mark.skipif(
    importlib.util.find_spec("onnxruntime_qnn") is None,
    reason="optional extra: pip install 'llamac[qnn]' (Qualcomm's licence)",
)
def test_graphs_of_the_htp_take_negative_scales(q4_0: Path, compiled: Callable[..., Path]) -> None:
    """On Qualcomm's library for x86-64, beside the same layers in float64."""
    bundle = compiled(q4_0, target="sm8650", processors=("cpu", "htp"), chunks=(8,))
    verification = read_manifest(bundle).verification
    assert verification.status == "passed"
    assert any(o.name == "decode: decode_layers_0_3" for o in verification.operations)
