"""Models with an adapter of the user, compiled and compared with the adapted reference."""

from __future__ import annotations

import importlib.util
import sys
from collections.abc import Callable, Sequence
from pathlib import Path
from types import ModuleType

import pytest

from llamac.compiler.frontends.meta import from_meta
from llamac.compiler.lora_adapter import apply_adapter, read_adapter
from llamac.compiler.progress import SilentProgress
from llamac.compiler.quantize_request import QuantizeRequest, quantize
from llamac.compiler.reference_model import ReferenceModel
from llamac.runtime import Session, load
from llamac.runtime.manifest import read_manifest
from llamac.tools.cli import main

RANK = 4
PARTS = ["self_attn.q_proj", "self_attn.v_proj", "mlp.gate_proj"]
TOKENS = [1, 40, 300, 77, 512, 9, 200, 640]


@pytest.fixture(scope="module")
def layout() -> ModuleType:
    """The module `peft_layout.py` of the compiler's tests."""
    path = Path(__file__).parents[1] / "compiler" / "peft_layout.py"
    spec = importlib.util.spec_from_file_location("llamac_e2e_peft_layout", path)
    assert spec is not None and spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    sys.modules[spec.name] = module
    spec.loader.exec_module(module)
    return module


@pytest.fixture(scope="module")
def adapter(layout: ModuleType, tiny: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Trained by nobody, large enough to change what the model says."""
    tensors = layout.matrices(from_meta(tiny / "bf16").config, PARTS, RANK, 0.2)
    folder: Path = layout.write_adapter(tmp_path_factory.mktemp("peft") / "own", tensors, RANK)
    return folder


@pytest.mark.parametrize("form", ["bf16", "int4"])
def test_the_bundle_says_what_the_adapted_model_says(
    form: str,
    tiny: Path,
    adapter: Path,
    compiled: Callable[..., Path],
    nll_of: Callable[[Session, Sequence[int]], float],
    tmp_path: Path,
) -> None:
    """Merged and as a branch: verified step by step, and not what it says without."""
    model = tiny / "bf16"
    if form == "int4":
        model = tmp_path / "int4"
        quantize(tiny / "bf16", model, QuantizeRequest(), SilentProgress())
    bundle = compiled(model, lora=adapter, chunks=(8,))
    manifest = read_manifest(bundle)
    assert manifest.verification.status == "passed"
    assert (manifest.quantization.lora is not None) == (form == "int4")
    assert any("adapter own (rank 4, scale 2)" in note for note in manifest.quantization.notes)
    plain = from_meta(model)
    adapted = ReferenceModel(apply_adapter(plain, read_adapter(adapter, plain.config)))
    wanted, without = adapted.nll(TOKENS), ReferenceModel(plain).nll(TOKENS)
    assert abs(wanted - without) > 0.1
    with load(bundle, threads=2) as opened, opened.session() as session:
        assert nll_of(session, TOKENS) == pytest.approx(wanted, abs=0.02)


def test_a_float_model_takes_it_in_before_it_is_quantized(
    tiny: Path, adapter: Path, one_level: str, tmp_path: Path
) -> None:
    out = tmp_path / "bundle"
    options = ["--quantize", "int4", "--rotate", "--lora", str(adapter), "--chunks", "8", "--quiet"]
    arguments = ["compile", str(tiny / "bf16"), "--target", one_level, "-o", str(out), *options]
    assert main(arguments) == 0
    manifest = read_manifest(out)
    assert manifest.quantization.form == "spinquant" and manifest.quantization.lora is None
    assert any("merged into 12 float layers" in note for note in manifest.quantization.notes)


def test_a_refusal_leaves_nothing(
    tiny: Path, adapter: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    arguments = ["--target", "host", "-o", str(tmp_path / "out"), "--lora", str(adapter)]
    assert main(["compile", str(tiny / "spinquant"), *arguments]) == 1
    assert "error[model-unsupported]: spinquant is rotated" in capsys.readouterr().err
    assert list(tmp_path.iterdir()) == []
