"""runtime/c/neuron: compiled networks that are kept, restored, refused and replaced."""

from __future__ import annotations

import hashlib
import os
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

HEADER_BYTES = 96
Run = Callable[..., Any]


def _kept(folder: Path) -> Path:
    [file] = folder.iterdir()
    return file


def _was_built(outcome: Any) -> bool:
    return "NeuronModel_addOperand" in outcome.functions()


def test_the_second_time_nothing_is_compiled(
    run: Run, graphs: dict[str, Any], tmp_path: Path
) -> None:
    """The same outputs, from what the adapter itself gave; the file is not touched."""
    cache = tmp_path / "cache"
    cache.mkdir()
    first = run([graphs["INT8"]], cache=cache)
    data = _kept(cache).read_bytes()
    second = run([graphs["INT8"]], cache=cache, calls=2)
    assert (first.text, second.text) == ("compiled\nok\n", "restored\nok\n")
    assert second.outputs == first.outputs
    assert second.functions()[:3] == [
        "Neuron_getVersion",
        "NeuronModel_restoreFromCompiledNetwork",
        "NeuronExecution_create",
    ]
    assert not _was_built(second)
    assert _kept(cache).read_bytes() == data


def test_what_the_file_says(run: Run, graphs: dict[str, Any], tmp_path: Path) -> None:
    """SoC and version in the name; version, length and hash in the header; then the network."""
    cache = tmp_path / "cache"
    cache.mkdir()
    run([graphs["INT8"]], cache=cache, NEURON_DOUBLE_VERSION="8.12.3")
    file = _kept(cache)
    assert file.name.startswith("mt6991-8.12.3-")
    assert len(file.name.removesuffix(".neuron-cache").rpartition("-")[2]) == 16
    data = file.read_bytes()
    header, compiled = data[:HEADER_BYTES], data[HEADER_BYTES:]
    assert header[:16] == b"LLAMACNC" + bytes([1, 0, 0, 0, 8, 12, 3, 0])
    assert header[48:80] == hashlib.sha256(compiled).digest()
    assert int.from_bytes(header[80:88], "little") == len(compiled)
    assert compiled.startswith(b"NOT A COMPILED NETWORK")
    assert header[16:24].hex() in file.name


def test_another_version_never_loads_it(run: Run, graphs: dict[str, Any], tmp_path: Path) -> None:
    """Neither under its own name, nor under that of the other version."""
    cache = tmp_path / "cache"
    cache.mkdir()
    run([graphs["INT8"]], cache=cache, NEURON_DOUBLE_VERSION="8.2.0")
    old = _kept(cache)
    for version in ("8.2.1", "8.3.0", "9.2.0"):
        outcome = run([graphs["INT8"]], cache=cache, NEURON_DOUBLE_VERSION=version)
        assert outcome.text == "compiled\nok\n"
    new = old.with_name(old.name.replace("8.2.0", "8.2.1"))
    new.write_bytes(old.read_bytes())
    outcome = run([graphs["INT8"]], cache=cache, NEURON_DOUBLE_VERSION="8.2.1")
    assert outcome.text == "compiled\nok\n"
    assert "NeuronModel_restoreFromCompiledNetwork" not in outcome.functions()
    assert new.read_bytes() != old.read_bytes()
    assert len(list(cache.iterdir())) == 4


def test_another_network_or_soc_never_loads_it(
    run: Run, graphs: dict[str, Any], write_graph: Callable[..., Any], tmp_path: Path
) -> None:
    """Other weights, other options for the compiler, another SoC."""
    cache = tmp_path / "cache"
    cache.mkdir()
    others = [
        graphs["INT8"],
        graphs["INT4"],
        replace(graphs["INT8"], soc="mt6989"),
        write_graph(tmp_path, options="--opt 3"),
    ]
    for graph in others:
        assert run([graph], cache=cache).text == "compiled\nok\n"
    for graph in others:
        assert run([graph], cache=cache).text == "restored\nok\n"
    files = sorted(cache.iterdir())
    assert len(files) == 4
    data = {file: file.read_bytes() for file in files}
    for file, other in zip(files, files[1:] + files[:1], strict=True):
        file.write_bytes(data[other])
    for graph in others:
        assert run([graph], cache=cache).text == "compiled\nok\n"
    assert {file: file.read_bytes() for file in files} == data


@pytest.mark.parametrize(
    "damage",
    [
        lambda data: data[:-1] + bytes([data[-1] ^ 1]),  # the last byte
        lambda data: data[:100] + bytes([data[100] ^ 0x10]) + data[101:],
        lambda data: data[:60] + bytes([data[60] ^ 1]) + data[61:],  # the hash
        lambda data: data[:12] + bytes([9]) + data[13:],  # the version
        lambda data: data[:-20],
        lambda data: data + b"more",
        lambda data: data[:HEADER_BYTES],
        lambda data: data[:40],
        lambda data: b"",
        lambda data: bytes(len(data)),
    ],
)
def test_a_damaged_file_is_replaced(
    damage: Callable[[bytes], bytes], run: Run, graphs: dict[str, Any], tmp_path: Path
) -> None:
    """It never reaches the adapter."""
    cache = tmp_path / "cache"
    cache.mkdir()
    run([graphs["INT8"]], cache=cache)
    good = _kept(cache).read_bytes()
    _kept(cache).write_bytes(damage(good))
    outcome = run([graphs["INT8"]], cache=cache)
    assert outcome.text == "compiled\nok\n"
    assert "NeuronModel_restoreFromCompiledNetwork" not in outcome.functions()
    assert _kept(cache).read_bytes() == good
    assert run([graphs["INT8"]], cache=cache).text == "restored\nok\n"


def test_what_the_adapter_does_not_restore_is_compiled(
    run: Run, graphs: dict[str, Any], tmp_path: Path
) -> None:
    cache = tmp_path / "cache"
    cache.mkdir()
    run([graphs["INT8"]], cache=cache)
    failure = "NeuronModel_restoreFromCompiledNetwork=4"
    outcome = run([graphs["INT8"]], cache=cache, NEURON_DOUBLE_FAIL=failure)
    assert outcome.text == "compiled\nok\n"
    assert _was_built(outcome)


def test_the_network_file_is_not_read_when_it_is_restored(
    run: Run, graphs: dict[str, Any], change: Callable[..., Any], tmp_path: Path
) -> None:
    """Weights with a flipped bit are found when they are compiled, and not used otherwise."""
    cache = tmp_path / "cache"
    cache.mkdir()
    run([graphs["INT8"]], cache=cache)
    data = bytearray(graphs["INT8"].path.read_bytes())
    data[-200] ^= 1
    changed = change(graphs["INT8"], tmp_path, bytes(data))
    assert run([changed], cache=cache).text == "restored\nok\n"
    assert "network-invalid" in run([changed]).text


@pytest.mark.parametrize(
    ("failure", "reason"),
    [
        ("NeuronCompilation_getCompiledNetworkSize=5", "the adapter gives code 5"),
        ("NeuronCompilation_storeCompiledNetwork=7", "the adapter gives code 7"),
    ],
)
def test_an_adapter_that_gives_nothing_to_keep(
    failure: str, reason: str, run: Run, graphs: dict[str, Any], tmp_path: Path
) -> None:
    cache = tmp_path / "cache"
    cache.mkdir()
    outcome = run([graphs["INT8"]], cache=cache, NEURON_DOUBLE_FAIL=failure)
    assert outcome.text == f"compiled, not kept: {reason}\nok\n"
    assert not list(cache.iterdir())


def test_folders_that_cannot_be_written(run: Run, graphs: dict[str, Any], tmp_path: Path) -> None:
    """No error: the graph computes, and who asks hears the reason."""
    outcome = run([graphs["INT8"]], cache=tmp_path / "none")
    assert outcome.text == "compiled, not kept: No such file or directory\nok\n"
    (tmp_path / "file").write_text("")
    outcome = run([graphs["INT8"]], cache=tmp_path / "file")
    assert outcome.text == "compiled, not kept: Not a directory\nok\n"
    outcome = run([graphs["INT8"]], cache="-")
    assert outcome.text == "compiled, not kept: no cache folder\nok\n"
    outcome = run([graphs["INT8"]], cache="/" + "long/" * 900)
    assert outcome.text == "compiled, not kept: no cache folder\nok\n"


def test_a_folder_under_the_name(run: Run, graphs: dict[str, Any], tmp_path: Path) -> None:
    """The file that was written beside it is removed again."""
    cache = tmp_path / "cache"
    cache.mkdir()
    run([graphs["INT8"]], cache=cache)
    file = _kept(cache)
    file.unlink()
    file.mkdir()
    outcome = run([graphs["INT8"]], cache=cache)
    assert outcome.text == "compiled, not kept: Is a directory\nok\n"
    assert os.listdir(cache) == [file.name]
