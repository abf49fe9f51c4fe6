"""`llamac inspect`: the manifest for people and for programs, and the hashes of all files."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from llamac.tools.cli import main


def test_inspect_shows_everything(bundle: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """All sections of the manifest are there, in words."""
    assert main(["inspect", str(bundle)]) == 0
    text = " ".join(capsys.readouterr().out.split())
    for part in (
        "hadamard r4 yes",
        "assumed a RoPE factor of 32",
        "weights bytes 3.0 MiB",
        "level avx2 avx2 fma",
        "level x86-64 any CPU",
        "worst operation layers.1.w2, SQNR 95.5 dB",
        "prefill_24 24 tokens a call",
        "decode 1 token a call",
        "special tokens 1 ",
    ):
        assert part in text


def test_inspect_tells_libraries_apart(bundle: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """By C library, and with what was not tried."""
    document = json.loads((bundle / "manifest.json").read_text("utf-8"))
    document["files"]["lib/libmodel.so"] |= {"flavour": "android", "note": "not loaded anywhere"}
    document["verification"]["where"] = "qemu-aarch64 7.2.22, CPU model max"
    (bundle / "manifest.json").write_text(json.dumps(document), "utf-8")
    assert main(["inspect", str(bundle)]) == 0
    text = " ".join(capsys.readouterr().out.split())
    assert "lib/libmodel.so library for android 13 B sha256" in text
    assert "lib/libmodel.so not loaded anywhere" in text
    assert "where qemu-aarch64 7.2.22, CPU model max" in text


QNN = {
    "soc_model": 57,
    "arch": 75,
    "vtcm_bytes": 8 << 20,
    "optimization": 3,
    "build_id": "v2.51.0.1",
    "core_api": "2.40.0",
    "backend_api": "5.51.0",
    "blob_version": "3.2.3",
}
NEURON = {
    "soc": "mt6991",
    "neuropilot": 8,
    "network_sha256": "0123456789abcdef" * 4,
    "tflite": "tokenizer.model",
}
HIDDEN = {"name": "hidden", "shape": [1, 8, 64], "dtype": "int16", "scale": 0.0125, "zero_point": 0}


def with_graph(bundle: Path, form: str, **vendor: object) -> None:
    """Write a graph into the manifest."""
    document = json.loads((bundle / "manifest.json").read_text("utf-8"))
    tensors = {"inputs": [HIDDEN], "outputs": [{**HIDDEN, "name": "hidden_out"}]}
    where = {"name": "g", "graph": "g", "function": "decode", "layers": [0, 1]}
    graph = {**where, "file": "lib/libmodel.so", "form": form, "scheme": "a16w8", **tensors}
    document["graphs"] = [{**graph, **vendor}]
    (bundle / "manifest.json").write_text(json.dumps(document), "utf-8")


@pytest.mark.parametrize(
    ("form", "vendor", "words"),
    [
        ("qnn-context", {"qnn": QNN}, ["SoC number 57, v75", "VTCM 8.0 MiB", "QNN v2.51.0.1"]),
        (
            "neuron-network",
            {"neuron": NEURON},
            [
                "mt6991, NeuroPilot 8 or newer",
                "by the adapter of the phone",
                "sha256 0123456789abcdef…",
                "as .tflite tokenizer.model",
            ],
        ),
    ],
)
def test_inspect_shows_graphs_of_both_vendors(
    form: str,
    vendor: dict[str, object],
    words: list[str],
    bundle: Path,
    capsys: pytest.CaptureFixture[str],
) -> None:
    """What the file is for, and how its edges are quantized."""
    with_graph(bundle, form, **vendor)
    assert main(["inspect", str(bundle)]) == 0
    text = " ".join(capsys.readouterr().out.split())
    for part in (*words, f"form {form}", "scheme a16w8", "layers 0 to 1 of decode"):
        assert part in text
    assert "hidden int16 [1, 8, 64], scale 0.0125, zero point 0" in text
    assert main(["inspect", str(bundle), "--json"]) == 0
    printed = json.loads(capsys.readouterr().out)
    assert printed == json.loads((bundle / "manifest.json").read_text("utf-8"))


@pytest.mark.parametrize(
    ("form", "vendor"),
    [
        ("qnn-context", {"neuron": NEURON}),
        ("neuron-network", {"neuron": NEURON, "qnn": QNN}),
        ("neuron-network", {}),
        ("other", {"qnn": QNN}),
        ("other", {}),
    ],
)
def test_a_graph_has_the_entry_of_its_form(
    form: str, vendor: dict[str, object], bundle: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    with_graph(bundle, form, **vendor)
    assert main(["inspect", str(bundle)]) == 1
    assert f"form is '{form}'" in capsys.readouterr().err


def test_the_tflite_of_a_network_is_in_the_bundle(
    bundle: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    with_graph(bundle, "neuron-network", neuron=NEURON | {"tflite": "apu/none.tflite"})
    assert main(["inspect", str(bundle)]) == 1
    assert "'apu/none.tflite', no file of the bundle" in capsys.readouterr().err


def test_inspect_json_is_the_manifest(bundle: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """--json prints what the file says, field for field."""
    assert main(["inspect", str(bundle), "--json"]) == 0
    printed = json.loads(capsys.readouterr().out)
    assert printed == json.loads((bundle / "manifest.json").read_text("utf-8"))


def test_inspect_check_finds_a_flipped_byte(
    bundle: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """--check hashes every byte, also those of the weights that loading does not look at."""
    assert main(["inspect", str(bundle), "--check"]) == 0
    assert "all 4 files" in capsys.readouterr().out
    weights = bundle / "weights.bin"
    data = bytearray(weights.read_bytes())
    data[(1 << 20) + 5000] ^= 1
    weights.write_bytes(data)
    assert main(["inspect", str(bundle), "--check"]) == 1
    out, err = capsys.readouterr()
    assert out == ""
    assert err.startswith("error[bundle-corrupt]: weights.bin has sha256 ")


def test_inspect_of_nothing(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """A path without bundle is named in the error."""
    assert main(["inspect", str(tmp_path / "none")]) == 1
    assert f"error[bundle-missing]: there is no bundle at {tmp_path}" in capsys.readouterr().err
