"""runtime/c/neuron: what it asks of the adapter, in which order, and what it keeps.

The adapter is a recording test double, which computes nothing: what a phone's adapter accepts, and
what its APU computes, is not tested here.
"""

from __future__ import annotations

import hashlib
import re
import subprocess
import zlib
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from types import ModuleType
from typing import Any

import numpy as np
import pytest

from llamac.targets.bionic import NDK_VARIABLE, link_for_bionic
from llamac.targets.toolchain import find_toolchain

FULLY_CONNECTED = 9
INT32, INT8_PER_CHANNEL, INT4_PER_CHANNEL, INT32_PER_CHANNEL = 4, 11, 9011, 9014
BUILD = ["NeuronModel_create", "NeuronModel_addOperand"]
COMPILE = [
    "NeuronModel_identifyInputsAndOutputs",
    "NeuronModel_relaxComputationFloat32toFloat16",
    "NeuronModel_finish",
    "NeuronModel_getSupportedOperations",
    "NeuronCompilation_create",
    "NeuronCompilation_setPriority",
    "NeuronCompilation_setPreference",
    "NeuronCompilation_finish",
]
STORE = ["NeuronCompilation_getCompiledNetworkSize", "NeuronCompilation_storeCompiledNetwork"]
CALL = ["NeuronExecution_setInput", "NeuronExecution_setOutput", "NeuronExecution_compute"]
CLOSE = ["NeuronExecution_free", "NeuronCompilation_free", "NeuronModel_free"]
Run = Callable[..., Any]


def expected_outputs(graph: Any) -> bytes:
    """What the double leaves in the outputs, so that each is seen to be in its place."""
    return b"".join(bytes([0xA0 + i]) * tensor.bytes for i, tensor in enumerate(graph.outputs))


def test_the_order_of_calls(run: Run, graphs: dict[str, Any], tmp_path: Path) -> None:
    """Operands before operations, scales and values with their operands, everything freed."""
    outcome = run([graphs["INT8"]], cache=tmp_path)
    assert outcome.text == "compiled\nok\n"
    functions = outcome.functions()
    assert functions[:3] == ["Neuron_getVersion", *BUILD]
    model = {"NeuronModel_setOperandValue", "NeuronModel_setOperandSymmPerChannelQuantParams"}
    operations = functions.index("NeuronModel_addOperation")
    assert set(functions[2:operations]) == {"NeuronModel_addOperand", *model}
    rest = functions[operations + 1 :]
    assert rest == [*COMPILE, *STORE, "NeuronExecution_create", *CALL, *CLOSE]
    assert {call.code for call in outcome.calls} == {0}


def test_settings_of_the_compilation(
    run: Run, graphs: dict[str, Any], write_graph: Callable[..., Any], tmp_path: Path
) -> None:
    """High priority, sustained speed, and the compiler's options if the network has any."""
    outcome = run([graphs["INT8"]])
    values = {call.function: call.values.get("value") for call in outcome.calls}
    assert values["NeuronCompilation_setPriority"] == "110"
    assert values["NeuronCompilation_setPreference"] == "2"
    assert "NeuronCompilation_setOptimizationString" not in values
    outcome = run([write_graph(tmp_path, options="--opt 3 --relax-fp32")])
    [given] = [c for c in outcome.calls if c.function == "NeuronCompilation_setOptimizationString"]
    assert given.values["value"] == "--opt 3 --relax-fp32"


def test_buffers_go_where_their_names_are(run: Run, graphs: dict[str, Any]) -> None:
    """The table's order is the caller's; the network's is another."""
    graph = graphs["INT8"]
    swapped = replace(graph, inputs=graph.inputs[::-1], outputs=graph.outputs[::-1])
    outcome = run([swapped], calls=3)
    assert outcome.outputs == b"".join(
        bytes([0xA2 - i]) * tensor.bytes for i, tensor in enumerate(swapped.outputs)
    )
    given = [call for call in outcome.calls if call.function == "NeuronExecution_setInput"]
    crcs = [f"{zlib.crc32(feed):08x}" for feed in swapped.feeds()]
    assert [(c.values["index"], c.values["crc"]) for c in given] == [
        *zip("10", crcs, strict=True)
    ] * 3
    assert {call.values["type"] for call in given} == {"NULL"}


def test_several_graphs_and_threads(run: Run, graphs: dict[str, Any], tmp_path: Path) -> None:
    both = [replace(graph, name=name) for name, graph in graphs.items()]
    outcome = run(both, calls=3, threads=3, cache=tmp_path)
    assert outcome.text == "compiled\ncompiled\nok\n"
    assert outcome.outputs == b"".join(expected_outputs(graph) for graph in both)
    assert len([c for c in outcome.calls if c.function == "NeuronExecution_compute"]) == 18


def test_scales_of_channels(run: Run, graphs: dict[str, Any]) -> None:
    """One for each row of the weights, along dimension 0; codes as they are in the file."""
    [model] = run([graphs["INT8"]]).models
    weight = next(op for op in model.operations if op.code == FULLY_CONNECTED).inputs[1]
    assert (weight.type, weight.dims, weight.channel_dim) == (INT8_PER_CHANNEL, (8, 8), 0)
    assert weight.scales == pytest.approx([0.01 + 0.001 * i for i in range(8)], rel=1e-6)


@pytest.mark.parametrize(
    ("version", "type_", "bias"),
    [
        ("8.2.0", INT8_PER_CHANNEL, INT32),
        ("8.255.255", INT8_PER_CHANNEL, INT32),
        ("9.0.0", INT4_PER_CHANNEL, INT32_PER_CHANNEL),
        ("10.1.0", INT4_PER_CHANNEL, INT32_PER_CHANNEL),
    ],
)
def test_int4_by_version(
    version: str, type_: int, bias: int, run: Run, graphs: dict[str, Any]
) -> None:
    """Older adapters get 8 bits with the same codes and scales, never int4 without its scales."""
    [model] = run([graphs["INT4"]], NEURON_DOUBLE_VERSION=version).models
    [first, _] = [op for op in model.operations if op.code == FULLY_CONNECTED]
    _, weight, offset, _ = first.inputs
    codes = np.random.default_rng(7).integers(-7, 8, (8, 8)).astype(np.int8)
    assert (weight.type, weight.dims, weight.hex) == (type_, (8, 8), codes.tobytes().hex())
    assert weight.scales == pytest.approx([0.01 + 0.001 * i for i in range(8)], rel=1e-6)
    assert (offset.type, len(offset.scales)) == (bias, 8 if bias == INT32_PER_CHANNEL else 0)


def _without_shapes(model: Any) -> list[tuple[Any, ...]]:
    """Operations with their operands, but for the values of shapes that a RESHAPE has."""
    found = []
    for op in model.operations:
        inputs = op.inputs
        if op.code == 22:
            inputs = (inputs[0], replace(inputs[1], crc="", hex=""))
        found.append((op.code, inputs, op.outputs))
    return found


@pytest.mark.parametrize(
    ("soc", "weights", "neuropilot"),
    [
        ("mt6989", "INT8", 8),
        ("mt6991", "INT8", 8),
        ("mt6993", "INT8", 9),
        ("mt6993", "INT4", 9),
    ],
)
def test_the_model_is_the_one_that_litert_builds(
    soc: str,
    weights: str,
    neuropilot: int,
    run: Run,
    write_graph: Callable[..., Any],
    official_plugin: ModuleType,
    adapter_double: Path,
    tmp_path: Path,
) -> None:
    """Every operation with type, shape, scales and values of every operand.

    Shapes of RESHAPE are left out: LiteRT's plug-in writes a wrong last value into those that it
    adds behind a FULLY_CONNECTED.
    """
    graph = write_graph(tmp_path, weights, neuropilot=neuropilot)
    version = official_plugin.ADAPTER_VERSIONS[soc]
    [ours] = run([graph], NEURON_DOUBLE_VERSION=version).models
    folder = tmp_path / "official"
    folder.mkdir()
    official = official_plugin.run_official_plugin(
        tmp_path / f"{weights}.tflite", soc, folder, double=adapter_double
    )
    theirs = official.models[-1]
    assert _without_shapes(ours) == _without_shapes(theirs)
    assert (ours.inputs, ours.outputs) == (theirs.inputs, theirs.outputs)
    reshapes = [op for op in ours.operations if op.code == 22]
    for op in reshapes:
        shape = np.frombuffer(bytes.fromhex(op.inputs[1].hex), "<i4")
        assert tuple(shape) == op.outputs[0].dims


@pytest.mark.parametrize("seed", range(4))
@pytest.mark.parametrize("weights", ["INT8", "INT4"])
def test_changed_bytes(
    seed: int, weights: str, harness: Path, adapter_double: Path, graphs: dict[str, Any]
) -> None:
    """The reader survives them, and so does who builds what it accepts."""
    text = _fuzz(harness, adapter_double, graphs[weights].path, seed, 400)
    accepted = int(text.split()[1])
    assert 20 < accepted < 200, "some changes do no harm, most do"


@pytest.mark.needs("gcc")
def test_changed_bytes_with_sanitizers(
    sanitized: tuple[Path, Path], graphs: dict[str, Any]
) -> None:
    for seed in range(2):
        _fuzz(*sanitized, graphs["INT4"].path, 100 + seed, 4000)


def _fuzz(program: Path, library: Path, network: Path, seed: int, num: int) -> str:
    done = subprocess.run(
        [program, "fuzz", network, str(seed), str(num)],
        env={"LLAMAC_NEURON_LIBRARIES": str(library.parent)},
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.returncode == 0, done.stdout + done.stderr
    return done.stdout


@pytest.mark.needs("gcc")
def test_nothing_is_leaked_or_overrun(
    sanitized: tuple[Path, Path], run: Run, graphs: dict[str, Any], tmp_path: Path
) -> None:
    """By AddressSanitizer: compiled, restored, and after failures of every kind."""
    program, library = sanitized
    both = list(graphs.values())
    options: dict[str, Any] = {"libraries": library.parent, "command": [program]}
    for origin in ("compiled", "restored"):
        outcome = run(both, cache=tmp_path, threads=2, **options)
        assert outcome.text == f"{origin}\n{origin}\nok\n"
    failures = [
        "NeuronModel_addOperand=4@40",
        "NeuronCompilation_finish=6",
        "NeuronModel_create=1@2",
    ]
    failures += ["NeuronExecution_create=5@2", "NeuronExecution_compute=5"]
    for failure in failures:
        assert run(both, NEURON_DOUBLE_FAIL=failure, **options).returncode == 1
    outcome = run([replace(both[0], file="none.neuron")], **options)
    assert "network-missing" in outcome.text


@pytest.mark.parametrize("num_bytes", [0, 1, 55, 56, 63, 64, 65, 119, 120, 128, 5000])
def test_hashes(num_bytes: int, harness: Path, tmp_path: Path) -> None:
    assert _hash_of([harness], tmp_path, num_bytes)


@pytest.mark.needs("qemu-aarch64")
def test_hashes_by_instructions_of_arm(link: Callable[..., None], tmp_path: Path) -> None:
    """They are in the program, and right."""
    link(tmp_path / "harness", "aarch64-linux-musl", "-static")
    for num_bytes in (0, 63, 64, 119, 120, 5000):
        assert _hash_of(["qemu-aarch64", tmp_path / "harness"], tmp_path, num_bytes)
    trace = tmp_path / "trace"
    assert _hash_of(
        ["qemu-aarch64", "-d", "in_asm", "-D", trace, tmp_path / "harness"], tmp_path, 64
    )
    assert re.search(r"\bsha256h2?\b", trace.read_text("utf-8", "replace"))


def _hash_of(command: list[Path | str], folder: Path, num_bytes: int) -> bool:
    data = np.random.default_rng(num_bytes).bytes(num_bytes)
    (folder / "data").write_bytes(data)
    done = subprocess.run(
        [*command, "hash", folder / "data"], capture_output=True, text=True, check=True
    )
    return done.stdout == hashlib.sha256(data).hexdigest() + "\n"


# ---- Arm ----


@pytest.mark.needs("qemu-aarch64")
def test_arm64_compiles_and_restores(
    arm64: tuple[list[Path | str], Path], run: Run, graphs: dict[str, Any], tmp_path: Path
) -> None:
    """The same calls as here, on the processor that phones have."""
    cache = tmp_path / "cache"
    cache.mkdir()
    command, double = arm64
    options: dict[str, Any] = {"command": command, "libraries": double.parent, "cache": cache}
    here = run([graphs["INT4"]], NEURON_DOUBLE_VERSION="9.0.0")
    there = run([graphs["INT4"]], NEURON_DOUBLE_VERSION="9.0.0", **options)
    assert there.text == "compiled\nok\n"
    assert there.models == here.models
    assert there.outputs == expected_outputs(graphs["INT4"])
    again = run([graphs["INT4"]], NEURON_DOUBLE_VERSION="9.0.0", **options)
    assert again.text == "restored\nok\n"
    assert again.outputs == there.outputs


@pytest.mark.needs("qemu-aarch64")
def test_arm64_says_what_is_missing(
    link: Callable[..., None],
    run: Run,
    refused: Callable[..., None],
    graphs: dict[str, Any],
    tmp_path: Path,
) -> None:
    """With musl, linked statically, it comes as far as to the message."""
    link(tmp_path / "musl", "aarch64-linux-musl", "-static")
    command = ["qemu-aarch64", tmp_path / "musl"]
    outcome = run([graphs["INT8"]], libraries=tmp_path, command=command)
    refused(outcome, "library-missing", "LLAMAC_NEURON_LIBRARIES")


def test_it_links_for_android(
    neuron_sources: list[Path], monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    """With the names that bionic has, and no others."""
    monkeypatch.delenv(NDK_VARIABLE, raising=False)
    toolchain = find_toolchain()
    if not toolchain.is_zig:
        pytest.skip("missing program: ziglang")
    functions = (
        "llamac_neuron_open_beside, llamac_neuron_call, llamac_neuron_close, llamac_neuron_origin"
    )
    (tmp_path / "entry.c").write_text(
        f'#include "neuron/neuron.h"\nLLAMAC_API const void *const functions[] = {{{functions}}};\n'
    )
    link_for_bionic(
        toolchain,
        sources=[tmp_path / "entry.c", *neuron_sources],
        objects=[],
        include_dirs=[neuron_sources[0].parents[1]],
        out=tmp_path / "libneuron.so",
        soname="libneuron.so",
        exports=["functions"],
    )
    data = (tmp_path / "libneuron.so").read_bytes()
    assert all(name in data for name in (b"\0libdl.so\0", b"\0dlopen\0", b"\0mkstemp\0"))
