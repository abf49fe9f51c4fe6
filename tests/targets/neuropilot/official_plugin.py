"""LiteRT's compiler plug-in for MediaTek, run on a .tflite with the recording test double.

The plug-in (in the package ai-edge-litert) has no MediaTek software in it: it partitions a model,
and translates it into calls of the Neuron Adapter. Our double records those calls. What this shows
is what MediaTek's open source would ask of an adapter; whether a real one accepts it, and what it
would compute, is not shown by anything here.
"""

from __future__ import annotations

import importlib.util
import os
import re
import subprocess
from collections.abc import Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path

import llamac.runtime
from llamac.targets.toolchain import find_toolchain, link_shared

HOST = "x86_64-linux-gnu.2.28"
NEURON_C = Path(llamac.runtime.__file__).parent / "c" / "neuron"
DOUBLE_SOURCES = sorted(
    (Path(__file__).parents[2] / "runtime" / "neuron").glob("adapter_double*.c")
)
ADAPTER_VERSIONS = {"mt6989": "8.2.0", "mt6991": "8.2.0", "mt6993": "9.0.0"}
"""What the double reports for a SoC; real versions are unknown, the first number decides."""

_STATISTICS = re.compile(
    r"Partitioned subgraph<\d+>, selected (\d+) ops, from a total of (\d+) ops\. "
    r"resulted in (\d+) partitions"
)


@dataclass(frozen=True)
class Call:
    """One line of the double's log: a function, its values by name, and what it returned."""

    function: str
    values: dict[str, str]
    code: int

    def numbers(self, name: str) -> list[int]:
        """A list of integers."""
        return [int(text) for text in self.values[name].split(",") if text]


@dataclass(frozen=True)
class Operand:
    """An operand as it was recorded; `crc` and `bytes` are of a constant's value."""

    type: int
    dims: tuple[int, ...]
    scale: float
    zero_point: int
    scales: tuple[float, ...] = ()
    channel_dim: int | None = None
    bytes: int = 0
    crc: str = ""
    hex: str = ""


@dataclass(frozen=True)
class Operation:
    """An operation with what its operands are."""

    code: int
    inputs: tuple[Operand, ...]
    outputs: tuple[Operand, ...]


@dataclass
class Model:
    """A model as it was recorded."""

    operands: list[Operand] = field(default_factory=list)
    operations: list[Operation] = field(default_factory=list)
    inputs: tuple[Operand, ...] = ()
    outputs: tuple[Operand, ...] = ()
    is_finished: bool = False


@dataclass(frozen=True)
class PluginRun:
    """What the plug-in did: counts of its partitioning, the models that it built, its output.

    Attributes:
        selected_ops, total_ops, partitions: 0 if it failed before it could say.
        models: in the order of creation; those that were compiled come last.
        calls: all calls of the adapter.
        returncode, text: of the plug-in's program.
    """

    selected_ops: int
    total_ops: int
    partitions: int
    models: list[Model]
    calls: list[Call]
    returncode: int
    text: str


def build_double(folder: Path, *, target: str = HOST, exports: Sequence[str] = ()) -> Path:
    """Build the double under the name of an adapter; `exports`: only these functions."""
    library = folder / "libneuron_adapter.so"
    link_shared(
        find_toolchain(),
        sources=DOUBLE_SOURCES,
        objects=(),
        include_dirs=[NEURON_C],
        out=library,
        target=target,
        soname=library.name,
        cflags=("-Wall", "-Wextra", "-Werror"),
        exports=exports,
    )
    return library


def read_log(path: Path) -> list[Call]:
    """Read what the double wrote."""
    calls = []
    for line in path.read_text("utf-8").splitlines() if path.is_file() else ():
        text, _, code = line.rpartition(" -> ")
        function, _, rest = text.partition(" ")
        pairs = re.findall(r"(\S+?)=(\[[^\]]*\]|\S*)", rest)
        calls.append(Call(function, {k: v.strip("[]") for k, v in pairs}, int(code)))
    return calls


def read_models(calls: Sequence[Call]) -> list[Model]:
    """Put the models together that the calls built; failed calls add nothing.

    Numbers begin again when the plug-in loads the double a second time.
    """
    models: list[Model] = []
    numbers: dict[str, Model] = {}
    for call in calls:
        if call.code != 0 or "model" not in call.values:
            continue
        if call.function == "NeuronModel_create":
            models.append(numbers.setdefault(call.values["model"], Model()))
        elif call.function == "NeuronModel_free":
            numbers.pop(call.values["model"], None)
        elif call.values["model"] in numbers:
            _add_call(numbers[call.values["model"]], call)
    return models


def _add_call(model: Model, call: Call) -> None:
    operands, values = model.operands, call.values
    match call.function:
        case "NeuronModel_addOperand":
            dims = tuple(call.numbers("dims"))
            operands.append(
                Operand(int(values["type"]), dims, float(values["scale"]), int(values["zero"]))
            )
        case "NeuronModel_setOperandValue":
            index = int(values["index"])
            size, crc, hexadecimal = int(values["bytes"]), values["crc"], values.get("hex", "")
            operands[index] = replace(operands[index], bytes=size, crc=crc, hex=hexadecimal)
        case "NeuronModel_setOperandSymmPerChannelQuantParams":
            index = int(values["index"])
            scales = tuple(float(text) for text in values["scales"].split(","))
            dim = int(values["dim"])
            operands[index] = replace(operands[index], scales=scales, channel_dim=dim)
        case "NeuronModel_addOperation":
            sides = (tuple(operands[i] for i in call.numbers(s)) for s in ("inputs", "outputs"))
            model.operations.append(Operation(int(values["code"]), *sides))
        case "NeuronModel_identifyInputsAndOutputs":
            model.inputs = tuple(operands[i] for i in call.numbers("inputs"))
            model.outputs = tuple(operands[i] for i in call.numbers("outputs"))
        case "NeuronModel_finish":
            model.is_finished = True


def _package() -> Path:
    """The folder of ai-edge-litert."""
    spec = importlib.util.find_spec("ai_edge_litert")
    assert spec is not None
    assert spec.origin is not None
    return Path(spec.origin).parent


def run_official_plugin(
    tflite: Path, soc: str, folder: Path, *, double: Path | None = None, **variables: str
) -> PluginRun:
    """Let the plug-in partition and translate a .tflite for a SoC.

    Args:
        tflite: the model.
        soc: "mt6989".
        folder: an empty folder for what is written.
        double: from `build_double`; None builds one.
        variables: for the double, `NEURON_DOUBLE_...`; without a version, ADAPTER_VERSIONS'.
    """
    double = double or build_double(folder)
    package, log = _package(), folder / "calls.log"
    command = [
        str(package / "tools" / "apply_plugin_main"),
        "--cmd=apply",
        f"--model={tflite}",
        f"--o={folder / 'applied.tflite'}",
        "--soc_manufacturer=MediaTek",
        f"--soc_model={soc}",
        f"--libs={package / 'vendors' / 'mediatek' / 'compiler'}",
        "--err=--",
        f"--mediatek_sdk_version_type=version{ADAPTER_VERSIONS[soc][0]}",
    ]
    environment = {
        **os.environ,
        "LD_LIBRARY_PATH": os.pathsep.join(map(str, (double.parent, package))),
        "MTKNN_ADAPTER_DLA_DIR": str(folder / "dla"),
        "NEURON_DOUBLE_LOG": str(log),
        "NEURON_DOUBLE_VERSION": ADAPTER_VERSIONS[soc],
        **variables,
    }
    done = subprocess.run(
        command,
        env=environment,
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
        check=False,
    )
    counts = _STATISTICS.search(done.stdout)
    selected, total, partitions = map(int, counts.groups()) if counts else (0, 0, 0)
    calls = read_log(log)
    return PluginRun(
        selected, total, partitions, read_models(calls), calls, done.returncode, done.stdout
    )
