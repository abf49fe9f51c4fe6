"""The runner for MediaTek's adapter in a program of its own, with the recording test double."""

from __future__ import annotations

import os
import subprocess
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from types import ModuleType
from typing import Any

import numpy as np
import pytest

import llamac.runtime
from llamac.targets.toolchain import find_toolchain, link_executable

SUPPORT = Path(llamac.runtime.__file__).parent / "c"
HARNESS_SOURCES = [
    Path(__file__).with_name("neuron_harness.c"),
    *sorted((SUPPORT / "neuron").glob("*.c")),
    SUPPORT / "error.c",
]
WARNINGS = ("-Wall", "-Wextra", "-Werror")
NEEDED = "optional extra: pip install 'llamac[apu]'"
VARIABLE = "LLAMAC_NEURON_LIBRARIES"
DTYPES = {"int16": "0 16", "float32": "2 32"}


@dataclass(frozen=True)
class Tensor:
    """A tensor of a table."""

    name: str
    bytes: int
    dtype: str = "0 16"


@dataclass(frozen=True)
class Graph:
    """A graph of a table; `path` is the network file."""

    path: Path
    sha256: str
    inputs: tuple[Tensor, ...]
    outputs: tuple[Tensor, ...]
    name: str = "layers"
    soc: str = "mt6991"
    file: str = ""
    file_bytes: int = 0
    dla: str = "-"
    dla_bytes: int = 0

    def lines(self) -> list[str]:
        """The graph in the harness's text form."""
        file_bytes = self.file_bytes or self.path.stat().st_size
        file = (self.file or self.path.name, file_bytes, self.sha256, self.soc)
        head = (self.name, *file, self.dla, self.dla_bytes)
        rows = [f"{t.name} {t.bytes} {t.dtype}" for t in (*self.inputs, *self.outputs)]
        return [" ".join(map(str, (*head, len(self.inputs), len(self.outputs)))), *rows]

    def feeds(self) -> list[bytes]:
        """Bytes for the inputs, different for each."""
        return [
            np.random.default_rng(i).bytes(tensor.bytes) for i, tensor in enumerate(self.inputs)
        ]


@dataclass(frozen=True)
class Outcome:
    """What the harness said and wrote, and what the double recorded."""

    returncode: int
    text: str
    outputs: bytes
    calls: list[Any]
    models: list[Any]

    def functions(self) -> list[str]:
        """The functions that were called, repetitions left out."""
        names = [call.function for call in self.calls]
        return [name for i, name in enumerate(names) if i == 0 or names[i - 1] != name]


Run = Callable[..., Outcome]


@pytest.fixture(scope="session")
def small_tflite(helper: Callable[[str], ModuleType]) -> ModuleType:
    """The module `small_tflite.py`."""
    pytest.importorskip("ai_edge_litert", reason=NEEDED)
    return helper("targets/neuropilot/small_tflite")


@pytest.fixture(scope="session")
def official_plugin(helper: Callable[[str], ModuleType]) -> ModuleType:
    """The module `official_plugin.py`, which also reads what the double wrote."""
    return helper("targets/neuropilot/official_plugin")


@pytest.fixture(scope="session")
def adapter_double(official_plugin: ModuleType, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The recording test double, as the library libneuron_adapter.so."""
    library: Path = official_plugin.build_double(tmp_path_factory.mktemp("double"))
    return library


@pytest.fixture(scope="session")
def harness(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The program, for this machine."""
    out = tmp_path_factory.mktemp("neuron") / "harness"
    link_harness(out, "x86_64-linux-gnu.2.28")
    return out


def link_harness(out: Path, target: str, *cflags: str) -> None:
    link_executable(
        find_toolchain(),
        sources=HARNESS_SOURCES,
        include_dirs=[SUPPORT, SUPPORT / "neuron"],
        out=out,
        target=target,
        cflags=(*WARNINGS, *cflags),
    )


@pytest.fixture(scope="session")
def neuron_sources() -> list[Path]:
    """The C files of the runner."""
    return HARNESS_SOURCES[1:]


@pytest.fixture(scope="session")
def link() -> Callable[..., None]:
    """Link the harness: link(out, target, *flags)."""
    return link_harness


@pytest.fixture(scope="session")
def arm64(
    devices: Path, official_plugin: ModuleType, tmp_path_factory: pytest.TempPathFactory
) -> tuple[list[Path | str], Path]:
    """The command that runs the harness as a phone's CPU would, and the double for it."""
    sysroot = devices / "arm64-python" / "sysroot"
    if not sysroot.is_dir():
        pytest.skip("no arm64 system with glibc: make devices")
    folder, target = tmp_path_factory.mktemp("arm64"), "aarch64-linux-gnu.2.28"
    link_harness(folder / "harness", target)
    double = official_plugin.build_double(folder, target=target)
    return ["qemu-aarch64", "-L", sysroot, folder / "harness"], double


@pytest.fixture(scope="session")
def sanitized(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, Path]:
    """Harness and double with gcc's sanitizers, which zig does not have whole."""
    folder = tmp_path_factory.mktemp("sanitized")
    flags = ["-std=c11", "-g", "-O1", "-fsanitize=address,undefined", "-fno-sanitize-recover=all"]
    include = [f"-I{SUPPORT}", f"-I{SUPPORT / 'neuron'}"]
    program, library = folder / "harness", folder / "libneuron_adapter.so"
    double = sorted(Path(__file__).parent.glob("adapter_double*.c"))
    shared = ["-shared", "-fPIC", "-fvisibility=hidden"]
    for sources, out, extra in ((HARNESS_SOURCES, program, []), (double, library, shared)):
        command = ["gcc", *flags, *WARNINGS, *include, *extra, *map(str, sources), "-o", str(out)]
        built = subprocess.run(
            [*command, "-ldl", "-lpthread"], capture_output=True, text=True, check=False
        )
        if built.returncode:
            pytest.skip(f"gcc without its sanitizers: {built.stderr.splitlines()[-1]}")
    return program, library


@pytest.fixture(scope="session")
def write_graph(small_tflite: ModuleType) -> Callable[..., Graph]:
    """Write a network: write(folder, weights="INT8", **options of write_network) -> Graph."""
    from llamac.targets.neuropilot.network import write_network  # noqa: PLC0415

    def write(folder: Path, weights: str = "INT8", **options: Any) -> Graph:
        tflite = small_tflite.write_every_op(folder / f"{weights}.tflite", weights)
        network = write_network(tflite, folder / f"{weights}.neuron", **options)
        sides = (
            tuple(
                Tensor(t.name, int(np.prod(t.shape)) * np.dtype(t.dtype).itemsize, DTYPES[t.dtype])
                for t in side
            )
            for side in (network.inputs, network.outputs)
        )
        return Graph(network.file.path, network.file.sha256, *sides)

    return write


@pytest.fixture(scope="session")
def graphs(
    write_graph: Callable[..., Graph], tmp_path_factory: pytest.TempPathFactory
) -> dict[str, Graph]:
    """The model with every operation, with weights of 8 and of 4 bits."""
    folder = tmp_path_factory.mktemp("networks")
    return {weights: write_graph(folder, weights) for weights in ("INT8", "INT4")}


@pytest.fixture
def run(harness: Path, adapter_double: Path, official_plugin: ModuleType, tmp_path: Path) -> Run:
    """Open and call graphs; `libraries` None: the variable is not set."""

    def call(
        graphs: Sequence[Graph],
        *,
        libraries: Path | None = adapter_double.parent,
        cache: Path | str = "-",
        calls: int = 1,
        threads: int = 1,
        command: Sequence[Path | str] = (harness,),
        **variables: str,
    ) -> Outcome:
        names = ("table", "inputs", "outputs", "calls.log")
        table, inputs, outputs, log = (tmp_path / name for name in names)
        table.write_text("\n".join(line for graph in graphs for line in graph.lines()) + "\n")
        inputs.write_bytes(b"".join(feed for graph in graphs for feed in graph.feeds()))
        for path in (outputs, log):
            path.unlink(missing_ok=True)
        clean = {k: v for k, v in os.environ.items() if k != VARIABLE}
        where = {VARIABLE: str(libraries)} if libraries is not None else {}
        arguments = (table, graphs[0].path.parent, cache, inputs, outputs, calls, threads)
        done = subprocess.run(
            [*map(str, command), *map(str, arguments)],
            env=clean | where | {"NEURON_DOUBLE_LOG": str(log)} | variables,
            capture_output=True,
            text=True,
            check=False,
        )
        assert "Sanitizer" not in done.stderr, done.stderr
        assert done.returncode in (0, 1), done
        written = outputs.read_bytes() if outputs.is_file() else b""
        recorded = official_plugin.read_log(log)
        models = official_plugin.read_models(recorded)
        outcome = Outcome(done.returncode, done.stdout, written, recorded, models)
        check_balance(outcome)
        return outcome

    return call


def check_balance(outcome: Outcome) -> None:
    """What was made was freed, each once, and the latest first; constants stayed as they were."""
    alive: list[tuple[str, str]] = []
    for call in outcome.calls:
        assert "VALUE-CHANGED" not in call.values
        kind, _, verb = call.function.partition("_")
        own = {"NeuronModel": "model", "NeuronCompilation": "compilation"}.get(kind, "execution")
        if verb in ("create", "restoreFromCompiledNetwork") and call.code == 0:
            alive.append((own, call.values[own]))
            if verb.startswith("restore"):
                alive.append(("compilation", call.values["compilation"]))
        elif verb == "free":
            assert alive.pop() == (own, call.values[own]), "not in reverse order"
    assert not alive, f"not freed: {alive}"


@pytest.fixture
def refused() -> Callable[..., None]:
    """Check that nothing was opened, with a whole message: refused(outcome, name, *parts)."""

    def check(outcome: Outcome, name: str, *parts: str, status: int = 9) -> None:
        assert outcome.returncode == 1, outcome
        start = f"open failed {status}: neuron {name}: "
        assert outcome.text.startswith(start), outcome.text
        message = outcome.text.partition(": ")[2]
        assert all(part in message for part in parts), message
        assert len(message) < 255, "llamac_error.message would be cut off"

    return check


@pytest.fixture
def change() -> Callable[..., Graph]:
    """Give a graph other bytes: change(graph, folder, data) -> Graph with a file of its own."""

    def make(graph: Graph, folder: Path, data: bytes, **fields: Any) -> Graph:
        path = folder / "changed.neuron"
        path.write_bytes(data)
        return replace(graph, path=path, **fields)

    return make
