"""How near binaries come to float64 with the same weights, for all SoCs and for true shapes."""

from __future__ import annotations

import os
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from llamac.compiler.config import LLAMA_3_2_1B
from llamac.compiler.frontends.meta import from_meta
from llamac.targets.qnn_htp.context import compile_chunks, htp_of
from llamac.targets.qnn_htp.emitter import float16_writer
from llamac.targets.qnn_htp.simulator import run_binary
from llamac.targets.soc import load_soc
from llamac.tools import htp_chunks
from llamac.tools.make_synthetic import main as make_synthetic

CAPACITY_1B = 512


@pytest.fixture(scope="module")
def synthetic(tmp_path_factory: pytest.TempPathFactory) -> Callable[[int], Path]:
    """Make a checkpoint of the 1B model's shapes with that many layers."""

    def make(num_layers: int) -> Path:
        folder = tmp_path_factory.mktemp("synthetic")
        layers = ["--layers", str(num_layers)]
        assert make_synthetic(["--model", "1b", *layers, "-o", str(folder)]) == 0
        return folder

    return make


@pytest.mark.slow
@pytest.mark.parametrize(("form", "least_db"), [("spinquant", 60.0), ("qlora", 59.0)])
@pytest.mark.parametrize(("tokens", "starts"), [(1, range(20, 28)), (8, (20,)), (32, (20,))])
@pytest.mark.parametrize("soc", ["sm8450", "sm8550", "sm8650", "sm8750", "sm8850"])
def test_every_layer_on_every_soc(
    form: str,
    least_db: float,
    tokens: int,
    starts: tuple[int, ...],
    soc: str,
    qnn: None,
    tiny: Any,
    chunks_of: Any,
    make_case: Any,
    inputs_of: Any,
    decibels: Any,
    tmp_path: Path,
) -> None:
    """Each layer on what the float model gives it; decode with the errors of eight tokens."""
    checkpoint, capacity = tiny(form), 64
    ids = np.random.default_rng(0).integers(0, checkpoint.config.vocab_size, 60).tolist()
    chunks = chunks_of(checkpoint, tokens, capacity)
    write, target = float16_writer(checkpoint.weights), htp_of(load_soc(soc))
    binaries = compile_chunks(chunks, write, target, tmp_path, lambda *_: None)
    for chunk, binary in zip(chunks, binaries, strict=True):
        found, expected = [], []
        for start in starts:
            inputs, past = inputs_of(checkpoint, ids[: start + tokens], start)
            case = make_case(checkpoint, chunk, inputs[chunk.layers[0]], past, capacity)
            results = run_binary(binary.path, binary.metadata, case.feeds)
            found.append(results["hidden_out"])
            expected.append(case.expected["hidden_out"])
        level = decibels(np.concatenate(found), np.concatenate(expected))
        print(f"{soc} {form} {chunk.name}: {level:.1f} dB")
        assert level >= least_db


@pytest.mark.slow
@pytest.mark.parametrize(("tokens", "least_db"), [(1, 54.0), (128, 63.0)])
def test_a_layer_of_the_1b_model(
    tokens: int,
    least_db: float,
    qnn: None,
    synthetic: Any,
    chunks_of: Any,
    make_case: Any,
    decibels: Any,
    tmp_path: Path,
) -> None:
    """Heads of 64, a context of 512 of which 300 positions are used."""
    checkpoint = from_meta(synthetic(1))
    [chunk] = chunks_of(checkpoint, tokens, CAPACITY_1B)
    target = htp_of(load_soc("sm8650"))
    write = float16_writer(checkpoint.weights)
    [binary] = compile_chunks([chunk], write, target, tmp_path, lambda *_: None)
    rng, config = np.random.default_rng(0), LLAMA_3_2_1B
    shape = (300, config.num_kv_heads, config.head_dim)
    past = {0: (rng.standard_normal(shape), rng.standard_normal(shape))}
    x = rng.standard_normal((tokens, config.dim))
    case = make_case(checkpoint, chunk, x, past, CAPACITY_1B)
    results = run_binary(binary.path, binary.metadata, case.feeds)
    for name, expected in case.expected.items():
        print(f"{name}: {decibels(results[name], expected):.1f} dB")
        assert decibels(results[name], expected) >= least_db


@pytest.mark.slow
def test_sixteen_layers_of_the_1b_model(
    qnn: None, synthetic: Any, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """One graph for sm8650, and below 4 GB; the command prints time and memory."""
    folder = synthetic(16)
    assert htp_chunks.main([str(folder), "-o", str(tmp_path)]) == 0
    sys.stderr.write(printed := capsys.readouterr().out)
    [path] = tmp_path.iterdir()
    assert path.name == "decode_layers_0_15.bin"
    assert 500e6 < os.path.getsize(path) < 600e6
    compiler_mib = int(printed.split("compiler ")[1].split()[0])
    assert compiler_mib * 2**20 < 4e9


def test_the_command_compiles_all_layers(
    qnn: None, tmp_path: Path, capsys: pytest.CaptureFixture[str], checkout: Path
) -> None:
    """Two chunks of the tiny model, named with their hashes."""
    folder = str(checkout / "examples" / "tiny-llama" / "spinquant")
    shape = ["--context", "64", "--tokens", "8", "--layers-per-chunk", "2"]
    assert htp_chunks.main([folder, *shape, "-o", str(tmp_path / "out")]) == 0
    printed = capsys.readouterr().out
    names = [f"prefill_8_layers_{ends}.bin" for ends in ("0_1", "2_3")]
    assert sorted(path.name for path in (tmp_path / "out").iterdir()) == names
    assert all(f"{name}: " in printed for name in names)
    assert "2 binaries in" in printed


def test_the_command_says_why_it_refuses(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], checkout: Path
) -> None:
    """An HTP that is too old, with the cause and what can be done."""
    folder = str(checkout / "examples" / "tiny-llama" / "spinquant")
    assert htp_chunks.main([folder, "--target", "sm8350", "-o", str(tmp_path)]) == 1
    assert "the HTP of sm8350 has no scheme in float16" in (printed := capsys.readouterr().err)
    assert "--scheme a16w4" in printed
