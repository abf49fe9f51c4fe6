"""runtime/c/neuron: graphs that MediaTek's compiler has compiled: taken, refused, damaged.

What stands for a DLA here is a text that says that it is none; only the double of the adapter
takes it.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

HEAD = "NOT A REAL DLA: a test double made this."
EXTENSION = "com.mediatek.compiled_network"
Run = Callable[..., Any]


@pytest.fixture
def with_dla(graphs: dict[str, Any], tmp_path: Path) -> Callable[..., Any]:
    """A graph with a DLA: with_dla(data=None, bytes=None) -> Graph."""

    def make(data: bytes | None = None, size: int | None = None) -> Any:
        graph = graphs["INT8"]
        folder = tmp_path / "bundle"
        folder.mkdir(exist_ok=True)
        path = folder / graph.path.name
        path.write_bytes(graph.path.read_bytes())
        if data is None:
            data = dla_of(graph)
        (folder / "layers.dla").write_bytes(data)
        return replace(graph, path=path, dla="layers.dla", dla_bytes=size or len(data))

    return make


def dla_of(graph: Any) -> bytes:
    """What the double takes for a DLA of the graph; long enough not to be copied as a value."""
    sizes = [tensor.bytes for tensor in (*graph.inputs, *graph.outputs)]
    numbers = " ".join(map(str, (len(graph.inputs), len(graph.outputs), *sizes)))
    return f"{HEAD} {numbers}".ljust(256).encode() + b"\0"


@pytest.mark.parametrize("version", ["8.2.0", "9.1.0"])
def test_the_extension_takes_a_dla(
    version: str, run: Run, with_dla: Callable[..., Any], tmp_path: Path
) -> None:
    """A model of one operation; nothing is cached."""
    cache = tmp_path / "cache"
    cache.mkdir()
    outcome = run([with_dla()], cache=cache, calls=2, NEURON_DOUBLE_VERSION=version)
    assert outcome.text == "the bundle's DLA\nok\n"
    assert not list(cache.iterdir())
    asked = {c.function: c.values for c in outcome.calls if "Extension" in c.function}
    assert {values["extension"] for values in asked.values()} == {EXTENSION}
    assert asked["NeuronModel_getExtensionOperandType"]["code"] == "512"
    assert outcome.functions().count("NeuronModel_addOperation") == 1
    [finish] = [c for c in outcome.calls if c.function == "NeuronModel_finish"]
    assert finish.values["operations"] == "1"


def test_the_outputs_are_those_of_the_network(
    run: Run, with_dla: Callable[..., Any], graphs: dict[str, Any]
) -> None:
    """The double marks each output by its number: the same buffers, in the same order."""
    assert run([with_dla()]).outputs == run([graphs["INT8"]]).outputs


def test_what_the_adapter_can_restore_needs_no_model(
    run: Run, with_dla: Callable[..., Any]
) -> None:
    """The first way, if the adapter takes the file as what it would have stored."""
    data = dla_of(with_dla()).replace(
        HEAD.encode(), b"NOT A COMPILED NETWORK: a recording test double made this."
    )
    outcome = run([with_dla(data)])
    assert outcome.text == "the bundle's DLA\nok\n"
    assert "NeuronModel_addOperand" not in outcome.functions()


@pytest.mark.parametrize(
    ("failure", "code"),
    [
        ("NeuronModel_getExtensionOperandType=4", 4),
        ("NeuronModel_getExtensionOperationType=8", 8),
        ("NeuronModel_create=1@1", 1),
        ("NeuronModel_addOperand=4@1", 4),
        ("NeuronModel_finish=6@1", 6),
        ("NeuronCompilation_create=5@1", 5),
        ("NeuronCompilation_finish=6@1", 6),
    ],
)
def test_a_refused_dla_falls_back_to_the_network(
    failure: str, code: int, run: Run, with_dla: Callable[..., Any], tmp_path: Path
) -> None:
    """The reason is told; the second opening restores what the first compiled."""
    cache = tmp_path / "cache"
    cache.mkdir()
    for origin in ("compiled", "restored"):
        outcome = run([with_dla()], cache=cache, NEURON_DOUBLE_FAIL=failure)
        assert outcome.text.startswith(f"{origin}; the DLA was refused: code {code}, ")
        assert outcome.text.endswith("\nok\n")


def test_a_dla_of_something_else_is_refused_by_the_adapter(
    run: Run, with_dla: Callable[..., Any]
) -> None:
    outcome = run([with_dla(b"of another SoC")])
    assert outcome.text.startswith("compiled, not kept: no cache folder; the DLA was refused: ")


def test_an_adapter_without_extensions(
    run: Run, with_dla: Callable[..., Any], official_plugin: Any, tmp_path: Path
) -> None:
    """The two functions are optional."""
    folder = tmp_path / "older"
    folder.mkdir()
    wanted = ["Neuron_*", "NeuronModel_[acfirs]*", "NeuronCompilation_*", "NeuronExecution_*"]
    official_plugin.build_double(folder, exports=wanted)
    outcome = run([with_dla()], libraries=folder)
    assert "the DLA was refused: code 8, of another version" in outcome.text


def test_a_damaged_bundle_is_no_refusal(
    run: Run, with_dla: Callable[..., Any], refused: Callable[..., None]
) -> None:
    """A DLA that is cut off or missing is an error, as any file of a bundle."""
    good = dla_of(with_dla())
    outcome = run([with_dla(good[:-1], size=len(good))])
    refused(outcome, "network-truncated", "layers.dla", str(len(good) - 1), str(len(good)))
    graph = with_dla()
    (graph.path.parent / "layers.dla").unlink()
    refused(run([graph]), "network-missing", "layers.dla", "No such file or directory")


def test_with_sanitizers(
    run: Run, with_dla: Callable[..., Any], sanitized: tuple[Path, Path]
) -> None:
    """Neither a taken nor a refused DLA leaves memory behind or reads outside."""
    program, library = sanitized
    for data in (None, b"of another SoC"):
        outcome = run([with_dla(data)], command=(program,), libraries=library.parent)
        assert outcome.text.endswith("\nok\n")
