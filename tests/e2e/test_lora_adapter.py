"""Models with an adapter of the user, compiled and compared with the adapted reference."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from pathlib import Path
from types import ModuleType

import pytest

from llamac.compiler.adapter_file import write_adapter_file
from llamac.compiler.frontends.meta import from_meta
from llamac.compiler.lora_adapter import apply_adapter, read_adapter
from llamac.compiler.progress import SilentProgress
from llamac.compiler.quantize_request import QuantizeRequest, quantize
from llamac.compiler.reference_model import ReferenceModel
from llamac.runtime import Session, load
from llamac.runtime.errors import BundleCorrupt, UsageError
from llamac.runtime.manifest import read_manifest
from llamac.tools.cli import main

RANK = 4
PARTS = ["self_attn.q_proj", "self_attn.v_proj", "mlp.gate_proj"]
TOKENS = [1, 40, 300, 77, 512, 9, 200, 640]


@pytest.fixture(scope="module")
def layout(helper: Callable[[str], ModuleType]) -> ModuleType:
    """The module `peft_layout.py` of the compiler's tests."""
    return helper("compiler/peft_layout")


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


# -- Exchanged without compiling ------------------------------------------------------------------


@pytest.fixture(scope="module")
def int4(tiny: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The example model as int4 with neither rotation nor branch."""
    folder = tmp_path_factory.mktemp("int4") / "int4"
    quantize(tiny / "bf16", folder, QuantizeRequest(), SilentProgress())
    return folder


@pytest.fixture(scope="module")
def other(layout: ModuleType, tiny: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Of a smaller rank, with another scale, beside other layers."""
    parts = ["self_attn.k_proj", "mlp.down_proj"]
    tensors = layout.matrices(from_meta(tiny / "bf16").config, parts, 2, 0.3)
    folder: Path = layout.write_adapter(tmp_path_factory.mktemp("peft") / "other", tensors, 2)
    return folder


@pytest.mark.parametrize("form", ["int4", "qlora"])
def test_an_adapter_is_exchanged_for_another(
    form: str,
    int4: Path,
    tiny: Path,
    adapter: Path,
    other: Path,
    compiled: Callable[..., Path],
    nll_of: Callable[[Session, Sequence[int]], float],
    tmp_path: Path,
) -> None:
    """As if the model had been compiled with it; and back; and again."""
    model = int4 if form == "int4" else tiny / "qlora"
    bundle = compiled(model, lora=adapter, chunks=(8,))
    file = tmp_path / "other.adapter"
    size = write_adapter_file(bundle, model, other, file)
    assert size == file.stat().st_size
    plain = from_meta(model)
    wanted = {
        folder: ReferenceModel(apply_adapter(plain, read_adapter(folder, plain.config))).nll(TOKENS)
        for folder in (adapter, other)
    }
    assert abs(wanted[adapter] - wanted[other]) > 0.1
    with load(bundle, threads=2) as opened, opened.session() as session:
        first = nll_of(session, TOKENS)
        for _ in range(2):
            opened.adapt(file)
            assert session.position == 0
            assert nll_of(session, TOKENS) == pytest.approx(wanted[other], abs=0.02)
            opened.adapt(None)
            assert nll_of(session, TOKENS) == first
    assert first == pytest.approx(wanted[adapter], abs=0.02)


def test_the_commands(
    int4: Path, adapter: Path, other: Path, compiled: Callable[..., Path], tmp_path: Path
) -> None:
    """Verified with the adapter, and refused without; another one prepared and run."""
    bundle, file = compiled(int4, lora=adapter, chunks=(8,)), tmp_path / "other.adapter"
    assert main(["adapt", str(bundle), str(int4), str(other), "-o", str(file)]) == 0
    arguments = ["run", str(bundle), "Tell me", "--max-tokens", "8"]
    assert main([*arguments, "--adapter", str(file)]) == 0
    assert main([*arguments, "--adapter", str(tmp_path / "none")]) == 1
    verify = ["verify", str(bundle), str(int4), "--tokens", "8"]
    assert main([*verify, "--lora", str(adapter)]) == 0
    assert main(verify) == 2


def test_what_does_not_fit_is_refused(
    int4: Path,
    tiny: Path,
    adapter: Path,
    other: Path,
    layout: ModuleType,
    compiled: Callable[..., Path],
    tmp_path: Path,
) -> None:
    """A larger rank, a bundle without branches, a file for another bundle."""
    bundle = compiled(int4, lora=adapter, chunks=(8,))
    tensors = layout.matrices(from_meta(tiny / "bf16").config, PARTS, RANK + 1, 0.2)
    large = layout.write_adapter(tmp_path / "large", tensors, RANK + 1)
    with pytest.raises(UsageError, match="needs a rank of 5, the branches have 4"):
        write_adapter_file(bundle, int4, large, tmp_path / "file")
    with pytest.raises(UsageError, match="no branches"):
        write_adapter_file(compiled(int4, chunks=(8,)), int4, other, tmp_path / "file")
    assert not (tmp_path / "file").exists()
    file = tmp_path / "file"
    write_adapter_file(bundle, int4, other, file)
    with load(compiled(tiny / "qlora", lora=adapter, chunks=(8,))) as model:
        with pytest.raises(BundleCorrupt, match="for another bundle"):
            model.adapt(file)


@pytest.mark.parametrize(
    ("place", "value", "words"),
    [
        (0, b"X", "not an adapter file"),
        (8, b"\x02", "version 2"),
        (12, b"\xff\xff\xff\xff", "its entries"),
        (16, b"\x00\x01\x02", "for another bundle"),
        (48, b"\x01", "its size"),
        (56, bytes(8), "a place in the weights"),
        (56, b"\xff" * 8, "a place in the weights"),
        (64, b"\xff" * 8, "a place in the weights"),
        (72, b"\xff" * 8, "a place in the file"),
        (80, bytes(8), "a place in the weights"),
    ],
)
def test_damaged_adapter_files(
    place: int,
    value: bytes,
    words: str,
    int4: Path,
    adapter: Path,
    other: Path,
    compiled: Callable[..., Path],
    nll_of: Callable[[Session, Sequence[int]], float],
    tmp_path: Path,
) -> None:
    """Refused with the reason; the model is what it was."""
    bundle, file = compiled(int4, lora=adapter, chunks=(8,)), tmp_path / "file"
    write_adapter_file(bundle, int4, other, file)
    data = bytearray(file.read_bytes())
    data[place : place + len(value)] = value
    file.write_bytes(data)
    with load(bundle, threads=1) as model, model.session() as session:
        before = nll_of(session, TOKENS)
        with pytest.raises(BundleCorrupt, match=words):
            model.adapt(file)
        session.rewind(0)
        assert nll_of(session, TOKENS) == before
