"""runtime/c/neuron: adapters and network files that cannot be used, and what the message says."""

from __future__ import annotations

import re
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest

ALL = ["Neuron_*", "NeuronModel_*", "NeuronCompilation_*", "NeuronExecution_*"]
Run = Callable[..., Any]
Refused = Callable[..., None]


# ---- The adapter ----


def test_no_library(run: Run, refused: Refused, graphs: dict[str, Any], tmp_path: Path) -> None:
    """The message names a library, the folder and the variable."""
    shown = str(tmp_path)[:60]
    outcome = run([graphs["INT8"]], libraries=tmp_path)
    refused(outcome, "library-missing", "libneuronusdk_adapter.mtk.so", shown, "none of its names")
    outcome = run([graphs["INT8"]], libraries=None)
    refused(outcome, "library-missing", "the loader's folders", "set LLAMAC_NEURON_LIBRARIES")


def test_a_library_that_cannot_be_loaded(
    run: Run, refused: Refused, graphs: dict[str, Any], tmp_path: Path
) -> None:
    """Its own reason, not that the others are not there."""
    (tmp_path / "libneuronusdk_adapter.9.mtk.so").write_bytes(b"no library")
    refused(run([graphs["INT8"]], libraries=tmp_path), "library-missing", ".9.mtk.so: file too")


@pytest.mark.parametrize(
    "name",
    [
        "libneuronusdk_adapter.mtk.so",
        "libneuronusdk_adapter.10.mtk.so",
        "libneuronusdk_adapter.9.mtk.so",
        "libneuronusdk_adapter.so",
        "libneuron_adapter_mgvi.so",
    ],
)
def test_every_name_is_found(
    name: str, run: Run, graphs: dict[str, Any], adapter_double: Path, tmp_path: Path
) -> None:
    (tmp_path / name).symlink_to(adapter_double)
    assert run([graphs["INT8"]], libraries=tmp_path).returncode == 0


def test_a_library_without_a_function(
    run: Run,
    refused: Refused,
    graphs: dict[str, Any],
    official_plugin: ModuleType,
    tmp_path: Path,
) -> None:
    official_plugin.build_double(
        tmp_path, exports=[name for name in ALL if "Execution" not in name]
    )
    outcome = run([graphs["INT8"]], libraries=tmp_path)
    missing = "libneuron_adapter.so has no NeuronExecution_create"
    refused(outcome, "adapter-too-old", missing, "use a bundle for the CPU")


def test_an_adapter_that_cannot_say_what_it_supports(
    run: Run, graphs: dict[str, Any], official_plugin: ModuleType, tmp_path: Path
) -> None:
    """These functions are younger than others: without them its compiler decides."""
    wanted = ["Neuron_*", "NeuronModel_[a-fi-s]*", "NeuronCompilation_[cfs]*", "NeuronExecution_*"]
    wanted += ["NeuronCompilation_getCompiledNetworkSize", "NeuronModel_relax*"]
    official_plugin.build_double(tmp_path, exports=wanted)
    outcome = run([graphs["INT8"]], libraries=tmp_path, NEURON_DOUBLE_UNSUPPORTED="25")
    assert outcome.returncode == 0
    assert not [name for name in outcome.functions() if "Supported" in name]


def test_versions(
    run: Run,
    refused: Refused,
    graphs: dict[str, Any],
    write_graph: Callable[..., Any],
    tmp_path: Path,
) -> None:
    """The adapter's, what is needed, and nothing was built."""
    outcome = run([graphs["INT8"]], NEURON_DOUBLE_VERSION="7.9.1")
    refused(outcome, "adapter-too-old", "version 7.9.1", "INT8.neuron needs 8")
    assert outcome.functions() == ["Neuron_getVersion"]
    outcome = run([write_graph(tmp_path, neuropilot=9)], NEURON_DOUBLE_VERSION="8.200.0")
    refused(outcome, "adapter-too-old", "version 8.200.0", "needs 9")
    outcome = run([graphs["INT8"]], NEURON_DOUBLE_FAIL="Neuron_getVersion=8")
    refused(outcome, "adapter-too-old", "does not tell its version: code 8")


@pytest.mark.parametrize(
    ("failure", "name", "parts"),
    [
        ("NeuronModel_create=7", "model-refused", ["NeuronModel_create: code 7, calls in a wrong"]),
        ("NeuronModel_addOperand=4@1", "model-refused", ["operand 0 'x' of layers: code 4"]),
        ("NeuronModel_addOperand=4@17", "model-refused", ["operand 16 'weight' of layers"]),
        ("NeuronModel_setOperandValue=3@1", "model-refused", ["values of operand", "code 3"]),
        (
            "NeuronModel_setOperandSymmPerChannelQuantParams=4",
            "model-refused",
            ["scales of operand", "'weight' of layers"],
        ),
        ("NeuronModel_addOperation=4@4", "operation-refused", ["RSQRT 'root' (83) of layers"]),
        ("NeuronModel_identifyInputsAndOutputs=4", "model-refused", ["inputs and outputs: 2"]),
        ("NeuronModel_relaxComputationFloat32toFloat16=99", "model-refused", ["does not know"]),
        ("NeuronModel_finish=2", "model-refused", ["operations: 19", "something was not set"]),
        (
            "NeuronCompilation_create=10",
            "compilation-failed",
            ["code 10, the APU is not available"],
        ),
        ("NeuronCompilation_setPriority=4", "compilation-failed", ["setPriority of layers"]),
        ("NeuronCompilation_setPreference=4", "compilation-failed", ["setPreference of layers"]),
        (
            "NeuronCompilation_finish=6",
            "compilation-failed",
            ["NeuronCompilation_finish of layers: code 6", "too large"],
        ),
        ("NeuronExecution_create=5", "execution-failed", ["NeuronExecution_create of layers"]),
    ],
)
def test_every_call_may_fail(
    failure: str, name: str, parts: list[str], run: Run, refused: Refused, graphs: dict[str, Any]
) -> None:
    """The reason has a name, the place and the adapter's code; nothing stays behind."""
    refused(run([graphs["INT8"]], NEURON_DOUBLE_FAIL=failure), name, *parts)
    outcome = run([graphs["INT8"]], NEURON_DOUBLE_FAIL=re.sub("=[0-9]+", "=1", failure))
    refused(outcome, "out-of-memory", "code 1, out of memory", status=5)


@pytest.mark.parametrize(
    ("code", "operation"),
    [
        (9, "FULLY_CONNECTED 'query'"),
        (25, "SOFTMAX 'probabilities'"),
        (102, "BATCH_MATMUL 'scores'"),
        (6, "DEQUANTIZE 'real'"),
    ],
)
def test_operations_that_are_refused(
    code: int, operation: str, run: Run, refused: Refused, graphs: dict[str, Any]
) -> None:
    """By addOperation, or when the adapter is asked: the first one is named."""
    outcome = run([graphs["INT8"]], NEURON_DOUBLE_REFUSE=str(code))
    refused(outcome, "operation-refused", f"{operation} ({code}) of layers", "does not accept")
    assert "NeuronModel_finish" not in outcome.functions()
    outcome = run([graphs["INT8"]], NEURON_DOUBLE_UNSUPPORTED=f"{code},6")
    refused(outcome, "operation-refused", f"{operation} ({code}) of layers", "does not support it")
    assert "NeuronCompilation_create" not in outcome.functions()


def test_asked_another_way(run: Run, refused: Refused, graphs: dict[str, Any]) -> None:
    """Where the model cannot be asked, a compilation is, which is then thrown away."""
    unable = "NeuronModel_getSupportedOperations=7"
    outcome = run([graphs["INT8"]], NEURON_DOUBLE_FAIL=unable, NEURON_DOUBLE_UNSUPPORTED="25")
    refused(outcome, "operation-refused", "SOFTMAX 'probabilities' (25) of layers")
    outcome = run([graphs["INT8"]], NEURON_DOUBLE_FAIL=unable)
    assert outcome.returncode == 0
    created = [c for c in outcome.calls if c.function == "NeuronCompilation_create"]
    assert len(created) == 2


@pytest.mark.parametrize(
    ("failure", "message"),
    [
        ("NeuronExecution_setInput=4", "x: code 4, the adapter does not accept this"),
        ("NeuronExecution_setOutput=9@2", "both: code 9, an output is too small"),
        ("NeuronExecution_compute=5", "compute: code 5, the APU or its driver failed"),
    ],
)
def test_calls_that_fail(failure: str, message: str, run: Run, graphs: dict[str, Any]) -> None:
    outcome = run([graphs["INT8"]], NEURON_DOUBLE_FAIL=failure)
    assert outcome.returncode == 1
    expected = f"call failed: neuron: execution-failed: layers: {message}\n"
    assert outcome.text.endswith(expected)


# ---- The network file ----


def test_files_that_are_not_there(
    run: Run, refused: Refused, graphs: dict[str, Any], tmp_path: Path
) -> None:
    missing = replace(graphs["INT8"], file="none.neuron")
    refused(run([missing]), "network-missing", "none.neuron", "No such file")
    (tmp_path / "folder.neuron").mkdir()
    (tmp_path / "plain").write_bytes(b"")
    folder = replace(graphs["INT8"], path=tmp_path / "plain", file="folder.neuron", file_bytes=9)
    refused(run([folder]), "network-missing", "is not a regular file")
    long = replace(graphs["INT8"], path=tmp_path / "plain", file="a" * 120, file_bytes=9)
    refused(run([long]), "network-missing", "aaa", "No such file")


def test_truncated_files(
    run: Run,
    refused: Refused,
    graphs: dict[str, Any],
    change: Callable[..., Any],
    tmp_path: Path,
) -> None:
    """By the table's size, or by the header's if the table was wrong as well."""
    data = graphs["INT8"].path.read_bytes()
    cut = change(graphs["INT8"], tmp_path, data[:-64], file_bytes=len(data))
    refused(run([cut]), "network-truncated", f"has {len(data) - 64} bytes, not {len(data)}")
    for length in (len(data) - 64, 4096, 104):
        outcome = run([change(graphs["INT8"], tmp_path, data[:length])])
        refused(outcome, "network-truncated", f"has {length} bytes, its header says {len(data)}")
    outcome = run([change(graphs["INT8"], tmp_path, data[:103])])
    refused(outcome, "network-invalid", "no network file; bytes: 103")
    empty = change(graphs["INT8"], tmp_path, b"")
    refused(run([replace(empty, file_bytes=0)]), "network-truncated", "has 0 bytes")


def test_damaged_files(
    run: Run,
    refused: Refused,
    graphs: dict[str, Any],
    change: Callable[..., Any],
    tmp_path: Path,
) -> None:
    """A flipped bit in any weight is found before anything is built."""
    graph = graphs["INT8"]
    data = bytearray(graph.path.read_bytes())
    data[-150] ^= 0x10
    outcome = run([change(graph, tmp_path, bytes(data))])
    refused(outcome, "network-invalid", "its hash differs", "copy the bundle again")
    assert outcome.functions() == ["Neuron_getVersion"]
    data = bytearray(graph.path.read_bytes())
    data[8] = 2
    refused(run([change(graph, tmp_path, bytes(data))]), "network-invalid", "unknown version 2")
    other = replace(graph, sha256="0" * 64)
    refused(run([other]), "network-invalid", "the library wants 0000000000000000", "another build")


def test_tables_that_differ(run: Run, refused: Refused, graphs: dict[str, Any]) -> None:
    graph = graphs["INT8"]
    x, past = graph.inputs
    probabilities, both, real = graph.outputs
    invalid = "network-invalid"
    renamed = replace(graph, inputs=(x, replace(past, name="other")))
    refused(run([renamed]), invalid, "has no other among its inputs")
    renamed = replace(graph, outputs=(probabilities, both, replace(real, name="x")))
    refused(run([renamed]), invalid, "has no x among its outputs")
    refused(run([replace(graph, inputs=(x,))]), invalid, "has 2 inputs, not 1")
    refused(run([replace(graph, outputs=(both,))]), invalid, "has 3 outputs, not 1")
    larger = replace(graph, inputs=(x, replace(past, bytes=past.bytes + 2)))
    refused(run([larger]), invalid, "past of INT8.neuron has 64 bytes, not 66")


@pytest.mark.parametrize(("place", "dtype"), [(0, "1 16"), (0, "2 16"), (1, "0 8"), (1, "2 32")])
def test_operands_of_another_dtype(
    place: int, dtype: str, run: Run, graphs: dict[str, Any]
) -> None:
    """The bytes agree, the call is refused and the adapter is not called."""
    inputs = list(graphs["INT8"].inputs)
    inputs[place] = replace(inputs[place], dtype=dtype)
    outcome = run([replace(graphs["INT8"], inputs=tuple(inputs))])
    assert outcome.returncode == 1
    assert f"wrong size or dtype of {inputs[place].name}" in outcome.text
    assert "NeuronExecution_compute" not in outcome.functions()
