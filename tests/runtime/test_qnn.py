"""runtime/c/qnn: context binaries executed by Qualcomm's libraries for x86-64, and refusals.

Everything runs in child processes: the libraries print, and may die on a damaged file.
"""

from __future__ import annotations

import importlib.util
import os
import resource
import shutil
import subprocess
import sys
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path

import numpy as np
import pytest
from numpy.typing import NDArray

import llamac.runtime
from llamac.compiler.frontends.meta import from_meta
from llamac.compiler.llama import ModelOptions, build_llama
from llamac.runtime.errors import BundleCorrupt
from llamac.targets.toolchain import find_toolchain, link_executable

if importlib.util.find_spec("onnxruntime_qnn") is None:
    pytest.skip("optional extra: pip install 'llamac[qnn]'", allow_module_level=True)

from llamac.targets.chunk import cut_chunks
from llamac.targets.qnn_htp.context import SOC_MODELS, ContextBinary, HtpTarget, compile_chunks
from llamac.targets.qnn_htp.emitter import float16_writer
from llamac.targets.qnn_htp.metadata import check_sha256
from llamac.targets.qnn_htp.simulator import run_binary
from llamac.targets.qnn_htp.toolchain import find_qnn

ROOT = Path(__file__).parents[2]
SUPPORT = Path(llamac.runtime.__file__).parent / "c"
QNN_C = sorted((SUPPORT / "qnn").glob("*.c"))
SOURCES = [Path(__file__).with_name("qnn_harness.c"), *QNN_C, SUPPORT / "error.c"]
WARNINGS = ("-Wall", "-Wextra", "-Werror")
CAPACITY, QNN = 32, find_qnn()
MISSING = "LLAMAC_QNN_LIBRARIES"
Float16 = NDArray[np.float16]


@dataclass(frozen=True)
class Graph:
    """One graph of a table, with its inputs and the expected outputs."""

    name: str
    path: Path
    inputs: Mapping[str, Float16]
    outputs: Mapping[str, Float16]
    soc_model: int = SOC_MODELS["sm8650"]
    build_id: str = ""
    file: str = ""
    file_bytes: int = 0
    dtype: str = "2 16"

    def lines(self) -> list[str]:
        """The graph in the harness's text form."""
        file_bytes = self.file_bytes or self.path.stat().st_size
        head = (self.name, self.file or self.path.name, file_bytes, self.soc_model, self.build_id)
        counts = (len(self.inputs), len(self.outputs))
        tensors = {**self.inputs, **self.outputs}
        rows = [f"{name} {value.nbytes} {self.dtype}" for name, value in tensors.items()]
        return [" ".join(map(str, (*head, *counts))), *rows]


@dataclass(frozen=True)
class Outcome:
    """What the harness said and wrote."""

    returncode: int
    text: str
    outputs: bytes


Run = Callable[..., Outcome]


@pytest.fixture(scope="session")
def harness(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The program, for this machine."""
    out = tmp_path_factory.mktemp("qnn") / "harness"
    _link(out, "x86_64-linux-gnu.2.28")
    return out


def _link(out: Path, target: str, *cflags: str) -> None:
    link_executable(
        find_toolchain(),
        sources=SOURCES,
        include_dirs=[SUPPORT],
        out=out,
        target=target,
        cflags=(*WARNINGS, *cflags),
    )


@pytest.fixture
def run(harness: Path, tmp_path: Path) -> Run:
    """Open and call graphs; `libraries` None: the variable is not set."""

    def call(
        graphs: Sequence[Graph],
        *,
        libraries: Path | None = QNN.folder,
        calls: int = 1,
        threads: int = 1,
        command: Sequence[Path | str] = (harness,),
        memory: int = resource.RLIM_INFINITY,
        **variables: str,
    ) -> Outcome:
        table, inputs, outputs = (tmp_path / name for name in ("table", "inputs", "outputs"))
        table.write_text("\n".join(line for graph in graphs for line in graph.lines()) + "\n")
        values = [value for graph in graphs for value in graph.inputs.values()]
        inputs.write_bytes(b"".join(value.tobytes() for value in values))
        outputs.unlink(missing_ok=True)
        clean = {k: v for k, v in os.environ.items() if k not in (MISSING, "ADSP_LIBRARY_PATH")}
        where = {MISSING: str(libraries)} if libraries is not None else {}
        arguments = (table, graphs[0].path.parent, inputs, outputs, calls, threads)
        done = subprocess.run(
            [*map(str, command), *map(str, arguments)],
            env=clean | where | variables,
            capture_output=True,
            text=True,
            check=False,
            preexec_fn=lambda: resource.setrlimit(resource.RLIMIT_AS, (memory, memory)),
        )
        said = [line for line in done.stdout.splitlines() if line.startswith("result: ")]
        text = "\n".join(line.removeprefix("result: ") for line in said)
        assert all("LIBNATIVE" in line for line in done.stdout.splitlines() if line not in said)
        assert variables or done.stderr == "", done.stderr
        written = outputs.read_bytes() if outputs.is_file() else b""
        return Outcome(done.returncode, text + done.stderr, written)

    return call


@pytest.fixture(scope="session")
def binaries(tmp_path_factory: pytest.TempPathFactory) -> Callable[[str, int], list[ContextBinary]]:
    """Two layers of the tiny model, one binary each, for a SoC; made once per SoC."""
    checkpoint = from_meta(ROOT / "examples" / "tiny-llama" / "qlora")
    chunks = cut_chunks(build_llama(checkpoint, ModelOptions(CAPACITY, ())), "decode", 1)[:2]
    write, made = float16_writer(checkpoint.weights), dict[str, list[ContextBinary]]()

    def compiled(soc: str, arch: int) -> list[ContextBinary]:
        if soc not in made:
            target = HtpTarget(soc, SOC_MODELS[soc], arch, 8)
            out = tmp_path_factory.mktemp(soc)
            made[soc] = compile_chunks(chunks, write, target, out, lambda *_: None)
        return made[soc]

    return compiled


def _graph(binary: ContextBinary) -> Graph:
    """Random inputs, in another order than in the binary, and the simulator's outputs."""
    rng, metadata = np.random.default_rng(1), binary.metadata
    feeds = {
        tensor.name: rng.standard_normal(tensor.shape).astype(np.float16)
        for tensor in reversed(metadata.graph.inputs)
    }
    results = run_binary(binary.path, metadata, feeds)
    outputs = {name: results[name] for name in sorted(results, reverse=True)}
    made_for = (metadata.soc_model, metadata.build_id)
    return Graph(metadata.graph.name, binary.path, feeds, outputs, *made_for)


@pytest.fixture(scope="session")
def graphs(binaries: Callable[[str, int], list[ContextBinary]]) -> list[Graph]:
    """Both layers for SM8650, as tables that are right."""
    return [_graph(binary) for binary in binaries("sm8650", 75)]


@pytest.fixture
def library_folder(tmp_path: Path) -> Callable[..., Path]:
    """A folder with these of Qualcomm's libraries, by name, and beside it what they need."""

    def make(**names: str) -> Path:
        folder = tmp_path / QNN.folder.name
        folder.mkdir()
        for name, original in names.items():
            (folder / name).symlink_to(QNN.folder / original)
        needed = QNN.folder.with_name(QNN.folder.name + ".libs")
        folder.with_name(needed.name).symlink_to(needed)
        return folder

    return make


@pytest.fixture
def damaged(graphs: list[Graph], tmp_path: Path) -> Callable[[bytes], Graph]:
    """The first layer with another file."""

    def make(data: bytes) -> Graph:
        path = tmp_path / "damaged.bin"
        path.write_bytes(data)
        return replace(graphs[0], path=path)

    return make


def _expected(graphs: Sequence[Graph]) -> bytes:
    return b"".join(v.tobytes() for graph in graphs for v in graph.outputs.values())


def _refused(outcome: Outcome, *parts: str) -> None:
    """The graphs were not opened, with a message that has these parts and is not cut off."""
    assert outcome.returncode == 1, outcome
    assert f"open failed {9}: " in outcome.text
    message = outcome.text.partition(": ")[2]
    assert all(part in message for part in parts), message
    assert len(message) < 255, "llamac_error.message would be cut off"


def test_layers_compute_what_the_simulator_computes(run: Run, graphs: list[Graph]) -> None:
    """Bit for bit, two binaries, in every call and thread; nothing is printed."""
    outcome = run(graphs, calls=3, threads=2)
    assert "ok, fastest call" in outcome.text
    assert outcome.outputs == _expected(graphs)


@pytest.mark.parametrize(("soc", "arch"), [("sm8550", 73), ("sm8750", 79), ("sm8850", 81)])
def test_other_socs(
    run: Run, binaries: Callable[[str, int], list[ContextBinary]], soc: str, arch: int
) -> None:
    graph = _graph(binaries(soc, arch)[0])
    assert run([graph]).outputs == _expected([graph])


def test_two_graphs_of_one_file(run: Run, graphs: list[Graph], tmp_path: Path) -> None:
    script = Path(__file__).with_name("qnn_two_graphs.py")
    subprocess.run([sys.executable, str(script)], cwd=tmp_path, check=True, capture_output=True)
    values, binary = np.load(tmp_path / "two.npz"), tmp_path / "two_qnn.bin"
    first, second = (str(name) for name in values["names"])
    build = graphs[0].build_id
    one = Graph(first, binary, {"x": values["x"]}, {"a": values["a"]}, build_id=build)
    two = Graph(second, binary, {"b": values["b"]}, {"y": values["y"]}, build_id=build)
    for order in ([one, two], [two, one], [two]):
        outcome = run(order, calls=2)
        assert outcome.outputs == _expected(order), outcome


def test_the_dsp_finds_its_libraries(run: Run, graphs: list[Graph]) -> None:
    """Where ours are, unless the user said otherwise; nothing is set without our variable."""
    folder = str(QNN.folder)
    assert f"dsp {folder}\n" in run(graphs[:1]).text
    assert "dsp /mine\n" in run(graphs[:1], ADSP_LIBRARY_PATH="/mine").text
    assert "dsp -\n" in run(graphs[:1], libraries=None).text


def test_the_log_is_for_those_who_ask(run: Run, graphs: list[Graph]) -> None:
    assert "qnn 3: " in run(graphs[:1], LLAMAC_QNN_LOG="1").text
    assert "qnn " not in run(graphs[:1], LLAMAC_QNN_LOG="0").text


@pytest.mark.parametrize("present", ["libQnnHtp.so", "libQnnSystem.so", ""])
def test_missing_libraries(
    run: Run, graphs: list[Graph], library_folder: Callable[..., Path], present: str
) -> None:
    """The message names the one that is missing, the folder and the variable."""
    folder = library_folder(**({present: present} if present else {}))
    missing = "libQnnSystem.so" if present == "libQnnHtp.so" else "libQnnHtp.so"
    shown = str(folder)[:80]
    _refused(run(graphs, libraries=folder), f"cannot open {missing} in {shown}", MISSING)


def test_missing_libraries_without_the_variable(run: Run, graphs: list[Graph]) -> None:
    _refused(run(graphs, libraries=None), "libQnnHtp.so", f"set {MISSING} to its folder")


def test_another_library_under_the_name(
    run: Run, graphs: list[Graph], library_folder: Callable[..., Path]
) -> None:
    folder = library_folder(**{"libQnnHtp.so": "libQnnSystem.so"})
    _refused(run(graphs, libraries=folder), "libQnnHtp.so has no QnnInterface_getProviders")


def test_older_libraries(run: Run, graphs: list[Graph]) -> None:
    """Both versions and what to do; before any binary is read."""
    for newer in ("v3.0.0.260101", "v2.52.0.260101", "v2.51.1.260101"):
        graph = replace(graphs[1], build_id=newer, file="none.bin")
        fix = "use libraries of that version or newer"
        _refused(run([graphs[0], graph]), newer, graphs[0].build_id, fix)
    unknown = replace(graphs[0], build_id="unknown")
    _refused(run([unknown]), "cannot compare the versions", "'unknown'")


def test_files_that_are_not_there(run: Run, graphs: list[Graph], tmp_path: Path) -> None:
    missing = replace(graphs[0], file="none.bin")
    _refused(run([missing]), "cannot open", "none.bin", "No such file")
    (tmp_path / "folder.bin").mkdir()
    (tmp_path / "plain").write_bytes(b"")
    folder = replace(graphs[0], path=tmp_path / "plain", file="folder.bin", file_bytes=4096)
    _refused(run([folder]), "is not a regular file")


def test_wrong_sizes(run: Run, graphs: list[Graph], damaged: Callable[[bytes], Graph]) -> None:
    data = graphs[0].path.read_bytes()
    cut = replace(damaged(data[:-4096]), file_bytes=len(data))
    _refused(run([cut]), f"has {len(data) - 4096} bytes, not {len(data)}")
    _refused(run([damaged(data[:-200000])]), "damaged.bin")  # as if the table agreed
    _refused(run([damaged(data[:1000])]), "libQnnSystem.so does not know damaged.bin")


def test_damage_that_qnn_finds(
    run: Run, graphs: list[Graph], damaged: Callable[..., Graph]
) -> None:
    data = graphs[0].path.read_bytes()
    zeros = data[:8192] + bytes(len(data) - 8192)
    meaning = "0x138d, damaged, made for another SoC, or not enough memory"
    _refused(run([damaged(zeros)]), "contextCreateFromBinary refused damaged.bin", meaning)
    _refused(run([damaged(bytes(len(data)))]), "libQnnSystem.so does not know damaged.bin")


def test_a_flipped_bit_is_found_by_the_hash_only(
    run: Run, binaries: Callable[..., list[ContextBinary]], damaged: Callable[[bytes], Graph]
) -> None:
    """QNN executes it and computes something else: this is why bundles carry hashes."""
    binary = binaries("sm8650", 75)[0]
    data = bytearray(binary.path.read_bytes())
    data[150000] ^= 0x10
    graph = damaged(bytes(data))
    outcome = run([graph])
    assert "ok, fastest call" in outcome.text
    assert outcome.outputs != _expected([graph])
    with pytest.raises(BundleCorrupt):
        check_sha256(graph.path, binary.metadata.sha256)


def test_binaries_of_others(
    run: Run, graphs: list[Graph], binaries: Callable[..., list[ContextBinary]]
) -> None:
    """Another SoC's, another build's; the first one is not enough."""
    other = replace(graphs[0], path=binaries("sm8550", 73)[0].path)
    _refused(run([other]), "was made for SoC 43, the library for SoC 57")
    older = replace(graphs[1], build_id="v2.50.0.1")
    _refused(run([graphs[0], older]), f"was made with QNN {graphs[1].build_id}, not v2.50.0.1")


def test_graphs_that_differ_from_the_table(run: Run, graphs: list[Graph]) -> None:
    graph = graphs[0]
    _refused(run([replace(graph, name="other")]), "has no graph other")
    renamed = {("h" if name == "hidden" else name): v for name, v in graph.inputs.items()}
    _refused(run([replace(graph, inputs=renamed)]), "has hidden among its inputs")
    renamed = {name + "_": value for name, value in graph.outputs.items()}
    _refused(run([replace(graph, outputs=renamed)]), "among its outputs")
    fewer = {name: value for name, value in graph.inputs.items() if name != "mask"}
    _refused(run([replace(graph, inputs=fewer)]), "has 6 inputs, not 5")
    larger = {**graph.inputs, "mask": np.zeros((2, CAPACITY + 1), np.float16)}
    _refused(run([replace(graph, inputs=larger)]), "mask of graph", "66 bytes", "not 132")


def test_no_memory(run: Run, graphs: list[Graph]) -> None:
    """QNN says the same as of a damaged binary, so the message says so, too."""
    _refused(run(graphs, memory=300 << 20), "0x138d", "not enough memory")


def test_operands_of_another_dtype(run: Run, graphs: list[Graph]) -> None:
    """float16 as uint16, or half as many float32: the bytes agree, the call is refused."""
    for dtype in ("1 16", "2 32"):
        outcome = run([replace(graphs[0], dtype=dtype)])
        assert outcome.returncode == 1
        assert "call failed: QnnError: " in outcome.text
        assert "wrong size or dtype of " in outcome.text


@pytest.mark.needs("gcc")
def test_nothing_is_leaked_or_overrun(
    run: Run, graphs: list[Graph], tmp_path: Path, damaged: Callable[[bytes], Graph]
) -> None:
    """By AddressSanitizer; what Qualcomm's libraries keep is not counted."""
    program, known = tmp_path / "sanitized", tmp_path / "known"
    flags = ["-std=c11", "-g", "-O1", "-fsanitize=address,undefined", "-fno-sanitize-recover=all"]
    command = ["gcc", *flags, *WARNINGS, f"-I{SUPPORT}", *map(str, SOURCES), "-o", str(program)]
    command += ["-ldl", "-lpthread"]
    built = subprocess.run(command, capture_output=True, text=True, check=False)
    if built.returncode:
        pytest.skip(f"gcc without its sanitizers: {built.stderr.splitlines()[-1]}")
    known.write_text("leak:libQnn\nleak:libHtp\nleak:read_inputs\nleak:_dl_\nleak:dlopen\n")
    options = {"LSAN_OPTIONS": f"suppressions={known}:print_suppressions=0", "ASAN_OPTIONS": ""}
    bad = replace(graphs[1], name="other")
    zeros = damaged(graphs[0].path.read_bytes()[:8192] + bytes(258048))
    for tables, code in ((graphs, 0), ([graphs[0], bad], 1), ([zeros], 1)):
        outcome = run(tables, command=[program], **options)
        assert outcome.returncode == code, outcome.text
        assert "Sanitizer" not in outcome.text


@pytest.mark.needs("qemu-aarch64")
def test_aarch64_says_what_is_missing(run: Run, graphs: list[Graph], tmp_path: Path) -> None:
    """It links for both C libraries; the static one runs here as far as to the message."""
    _link(tmp_path / "gnu", "aarch64-linux-gnu.2.28")
    _link(tmp_path / "musl", "aarch64-linux-musl", "-static")
    command = [shutil.which("qemu-aarch64") or "", tmp_path / "musl"]
    _refused(run(graphs, libraries=tmp_path, command=command), "cannot open libQnnHtp.so", MISSING)
