"""Chunks become binaries for the SoC that was asked for, or nothing."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

from llamac.runtime.errors import (
    BuildFailed,
    BundleCorrupt,
    BundleInvalid,
    SocUnknown,
    TargetUnknown,
    ToolchainMissing,
)
from llamac.targets.qnn_htp import toolchain
from llamac.targets.qnn_htp.context import (
    SOC_MODELS,
    check_target,
    compile_chunks,
    htp_of,
    layer_weight_bytes,
    layers_per_chunk,
)
from llamac.targets.qnn_htp.emitter import float16_writer
from llamac.targets.qnn_htp.metadata import read_metadata
from llamac.targets.registry import make_target
from llamac.targets.soc import load_soc

SOCS = {"sm8450": (36, 69), "sm8550": (43, 73), "sm8650": (57, 75), "sm8750": (69, 79)}
SOCS["sm8850"] = (87, 81)


@pytest.mark.parametrize("soc", SOCS)
def test_a_binary_says_what_it_is_for(soc: str, compiled: Any) -> None:
    """SoC, Hexagon version, VTCM, versions and the whole interface, read back from the file."""
    metadata = compiled(soc=soc).binary.metadata
    assert (metadata.soc_model, metadata.arch) == SOCS[soc]
    assert (metadata.graph.vtcm_bytes, metadata.graph.optimization) == (8 << 20, 3)
    assert metadata.build_id.startswith("v2.51.0")
    inputs = {t.name: t.shape for t in metadata.graph.inputs}
    assert {t.dtype for t in metadata.graph.inputs + metadata.graph.outputs} == {"float16"}
    assert inputs == {
        "hidden": (1, 1, 128),
        "rope_cos": (1, 1, 16, 1),
        "rope_sin": (1, 1, 16, 1),
        "mask": (1, 65),
        "layers.0.k_cache": (2, 4, 32, 16),
        "layers.0.v_cache": (2, 64, 32),
    }
    outputs = {t.name: t.shape for t in metadata.graph.outputs}
    assert outputs == {
        "hidden_out": (1, 1, 128),
        "layers.0.k_new": (2, 1, 32),
        "layers.0.v_new": (2, 1, 32),
    }


def test_a_folder_holds_binaries_only(compiled: Any) -> None:
    """What compiling leaves behind is one file for each chunk."""
    path = compiled().binary.path
    assert path.name == "decode_layers_0_0.bin"
    assert list(path.parent.iterdir()) == [path]


def test_two_processes_make_the_same_bytes(compiled: Any, tiny: Any, tmp_path: Path) -> None:
    """Each compilation runs in a process of its own."""
    chunk, binary = compiled()
    target = htp_of(load_soc("sm8650"))
    write = float16_writer(tiny("spinquant").weights)
    [again] = compile_chunks([chunk], write, target, tmp_path, lambda *_: None)
    assert again.metadata.sha256 == binary.metadata.sha256
    assert again.path.read_bytes() == binary.path.read_bytes()


def test_a_binary_for_another_soc_is_refused(compiled: Any) -> None:
    """The check that every compilation ends with finds a foreign one."""
    metadata = compiled(soc="sm8750").binary.metadata
    check_target("x.bin", metadata, htp_of(load_soc("sm8750")))
    with pytest.raises(BuildFailed, match=r"SoC number 69, not 57; Hexagon version 79, not 75"):
        check_target("x.bin", metadata, htp_of(load_soc("sm8650")))


def test_an_unknown_number_is_taken_for_another_soc_by_qnn(
    tiny: Any, qnn: None, tmp_path: Path, chunks_of: Any
) -> None:
    """QNN compiles for a default without a word; the check behind it says so."""
    checkpoint = tiny("spinquant")
    target = replace(htp_of(load_soc("sm8650")), soc_model=9999)
    with pytest.raises(BuildFailed):
        write = float16_writer(checkpoint.weights)
        compile_chunks(chunks_of(checkpoint, 1, 64)[:1], write, target, tmp_path, lambda *_: None)
    assert not [path for path in tmp_path.iterdir() if path.suffix == ".onnx"]


def test_all_our_socs_have_a_number_or_are_refused() -> None:
    """SoC files and the table of numbers agree."""
    for name, number in SOC_MODELS.items():
        assert htp_of(load_soc(name)).soc_model == number
        names = [scheme.name for scheme in make_target("qnn-htp", load_soc(name)).schemes()]
        expected = {"sm8350": ["a16w4"], "sm8450": ["float16"]}
        assert names == expected.get(name, ["float16", "a16w4"])


def test_socs_without_htp_are_refused() -> None:
    """Unknown names, other makers, and a SoC that QNN's number is not known of."""
    with pytest.raises(SocUnknown):
        load_soc("sm9999")
    with pytest.raises(TargetUnknown, match="mt6989 has no HTP"):
        htp_of(load_soc("mt6989"))
    with pytest.raises(TargetUnknown, match="Qualcomm's number for it"):
        htp_of(replace(load_soc("sm8650"), name="sm8635"))


@pytest.mark.parametrize(
    ("constant", "value", "message"),
    [
        ("PACKAGE", "onnxruntime-nobody-has", "is not installed"),
        ("VERSION", "0.1", "needed is 0.1"),
    ],
)
def test_a_missing_extra_is_named(
    constant: str,
    value: str,
    message: str,
    qnn: None,
    tiny: Any,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """Before anything is written."""
    monkeypatch.setattr(toolchain, constant, value)
    with pytest.raises(ToolchainMissing, match=message) as caught:
        compile_chunks([], lambda *_: None, htp_of(load_soc("sm8650")), tmp_path, print)
    assert "llamac[qnn]" in caught.value.fix


def test_damaged_binaries_are_refused(compiled: Any, tmp_path: Path) -> None:
    """By the hash always; without it as far as Qualcomm's library notices."""
    binary = compiled().binary
    data, copy = bytearray(binary.path.read_bytes()), tmp_path / "x.bin"
    copy.write_bytes(data[: len(data) // 2])
    with pytest.raises(BundleInvalid, match=r"x\.bin is no context binary"):
        read_metadata(copy)
    with pytest.raises(BundleCorrupt, match="recorded is"):
        read_metadata(copy, binary.metadata.sha256)
    data[len(data) // 2] ^= 1
    copy.write_bytes(data)
    with pytest.raises(BundleCorrupt, match="recorded is"):
        read_metadata(copy, binary.metadata.sha256)
    # The library does not notice: this is why the hash is there.
    assert read_metadata(copy).soc_model == 57
    with pytest.raises(BundleCorrupt, match="is missing"):
        read_metadata(tmp_path / "none.bin")


def test_chunks_are_equal_and_bounded() -> None:
    """Layers of a model are dealt evenly; the weights of a chunk stay below a limit."""
    assert layers_per_chunk(34 << 20, 16) == 16
    assert layers_per_chunk(60 << 20, 28) == 14
    assert layers_per_chunk(2 << 30, 4) == 1


def test_a_layers_weights_are_counted_as_they_will_be(tiny: Any) -> None:
    """Codes at half a byte, everything else at two."""
    codes = 2 * 128 * 128 + 2 * 64 * 128 + 3 * 256 * 128
    assert layer_weight_bytes(tiny("spinquant").weights) == codes // 2 + codes // 32 * 2 + 2 * 256
