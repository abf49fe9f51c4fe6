"""A bundle with a real library and a fake model: a chain of hashes, see chain_model.c."""

from __future__ import annotations

import base64
import json
import shutil
from collections.abc import Callable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from numpy.typing import NDArray

import llamac.runtime
from llamac.runtime import Model, load, system
from llamac.runtime.checks import WeightsHeader
from llamac.runtime.digest import file_sha256, sample_sha256
from llamac.runtime.manifest import (
    FileEntry,
    FunctionEntry,
    LevelEntry,
    Manifest,
    MemoryPlan,
    ModelEntry,
    QuantizationEntry,
    TargetEntry,
    TokenizerEntry,
    Verification,
)
from llamac.targets.runner_program import RUNNER, link_runner
from llamac.targets.toolchain import find_toolchain, link_shared

VOCAB, CONTEXT, MAX_CHUNK, SCRIPT_ENTRIES = 288, 96, 16, 1024
BUILD_ID = b"chain-of-hashes: thirty-two byte"
MERGES = (b"th", b"the", b" t", b" the", b"in", b"ing", b"us", b"er", b"user")
SPECIAL_TOKENS = {
    name: 270 + i
    for i, name in enumerate(
        (
            "<|begin_of_text|>",
            "<|end_of_text|>",
            "<|start_header_id|>",
            "<|end_header_id|>",
            "<|eot_id|>",
            "<|eom_id|>",
        )
    )
}

Change = Callable[[dict[str, Any]], object]


def chain_logits(tokens: Sequence[int]) -> NDArray[np.float32]:
    """Logits of the chain model after `tokens`, with an empty script."""
    mask, state = (1 << 64) - 1, 0x243F6A8885A308D3
    for token in tokens:
        state = (state ^ (token + 1)) * 0x9E3779B97F4A7C15 & mask
        state ^= state >> 29
    x = np.uint64(state) + np.arange(VOCAB, dtype=np.uint64) * np.uint64(0xBF58476D1CE4E5B9)
    x = (x ^ x >> np.uint64(31)) * np.uint64(0x94D049BB133111EB)
    logits = (x >> np.uint64(40)).astype(np.float32) / np.float32(1 << 20) - np.float32(8)
    logits[255] = -100
    return logits


def chain_greedy(tokens: Sequence[int], count: int) -> list[int]:
    """The next `count` tokens of greedy generation, evaluated from scratch each time."""
    context = list(tokens)
    for _ in range(count):
        context.append(int(chain_logits(context).argmax()))
    return context[len(tokens) :]


def tiktoken_lines(tokens: Sequence[bytes]) -> bytes:
    """A tokenizer file with these tokens."""
    return b"".join(base64.b64encode(t) + b" %d\n" % i for i, t in enumerate(tokens))


def make_manifest(files: Mapping[str, FileEntry]) -> Manifest:
    """The manifest of the chain model."""
    text = "none"
    return Manifest(
        build_id=BUILD_ID.hex(),
        created_with={"llamac": "0.1.0"},
        model=ModelEntry("chain", "llama", 64, 1, 2, 1, 32, 64, VOCAB, 1e-5, 5e5, None, CONTEXT),
        quantization=QuantizationEntry(
            "float", text, text, text, text, text, text, False, False, None, text
        ),
        tokenizer=TokenizerEntry(
            file="tokenizer.model",
            format="tiktoken",
            pattern="llama3",
            special_tokens=SPECIAL_TOKENS,
            bos_id=SPECIAL_TOKENS["<|begin_of_text|>"],
            stop_ids=(SPECIAL_TOKENS["<|end_of_text|>"], SPECIAL_TOKENS["<|eot_id|>"]),
            chat_template="llama3",
        ),
        target=TargetEntry(
            "host",
            "x86-cpu",
            ("cpu",),
            system.machine(),
            system.operating_system(),
            (LevelEntry("foreign", ("sme",)), LevelEntry("portable", ())),
        ),
        memory=MemoryPlan(4096, (CONTEXT + MAX_CHUNK) * 8, 4096, 4096),
        functions=(FunctionEntry("prefill_16", 16), FunctionEntry("decode", 1)),
        files=files,
        verification=Verification("passed"),
    )


@pytest.fixture(scope="session")
def chain_library(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The library of the chain model, built from the support library as every bundle's is."""
    support = Path(llamac.runtime.__file__).parent / "c"
    out = tmp_path_factory.mktemp("chain") / "libmodel.so"
    link_shared(
        find_toolchain(),
        sources=[Path(__file__).with_name("chain_model.c"), *sorted(support.glob("*.c"))],
        objects=[],
        include_dirs=[support],
        out=out,
    )
    return out


@pytest.fixture(scope="session")
def chain_runner(tmp_path_factory: pytest.TempPathFactory) -> Callable[[str], Path]:
    """Build the chain model's llamac-runner for an architecture, as bundles of Arm have one."""
    folder = tmp_path_factory.mktemp("runner")

    def build(arch: str) -> Path:
        out = folder / f"llamac-runner-{arch}"
        if not out.exists():
            source = Path(__file__).with_name("chain_model.c")
            link_runner(find_toolchain(), entry=source, objects=[], arch=arch, out=out)
        return out

    return build


@pytest.fixture
def runner(chain_runner: Callable[[str], Path]) -> Path:
    """The chain model's llamac-runner for this machine."""
    return chain_runner(system.machine())


class BundleMaker:
    """Writes bundles of the chain model into new folders."""

    def __init__(self, folder: Path, library: Path) -> None:
        self.folder = folder
        self.library = library
        self.count = 0

    def __call__(
        self,
        script: Mapping[int, int] | None = None,
        change: Change | None = None,
        runner: Path | None = None,
    ) -> Path:
        """Write a bundle.

        Args:
            script: the certain token after a context of so many tokens.
            change: edits the manifest's JSON.
            runner: its llamac-runner, if it gets one.
        """
        self.count += 1
        bundle = self.folder / f"bundle{self.count}"
        (bundle / "lib").mkdir(parents=True)
        (bundle / "lib" / "libmodel.so").write_bytes(self.library.read_bytes())
        if runner is not None:
            (bundle / "bin").mkdir()
            shutil.copy(runner, bundle / RUNNER)
        singles = [bytes([value]) for value in range(256)]
        (bundle / "tokenizer.model").write_bytes(tiktoken_lines([*singles, *MERGES]))
        entries = np.zeros(SCRIPT_ENTRIES, "<i4")
        for position, token in (script or {}).items():
            entries[position] = token + 1
        header = WeightsHeader(BUILD_ID.hex(), WeightsHeader.BYTES + entries.nbytes)
        (bundle / "weights.bin").write_bytes(header.pack() + entries.tobytes())
        self.write_manifest(bundle, change)
        return bundle

    def write_manifest(self, bundle: Path, change: Change | None = None) -> None:
        """Write manifest.json for the files as they are now."""
        roles = {"lib/libmodel.so": "library", "weights.bin": "weights"}
        roles["tokenizer.model"] = "tokenizer"
        if (bundle / RUNNER).exists():
            roles[str(RUNNER)] = "runner"
        files = {}
        for name, role in roles.items():
            path = bundle / name
            sample = sample_sha256(path) if role == "weights" else None
            files[name] = FileEntry(role, path.stat().st_size, file_sha256(path), sample)
        document = json.loads(make_manifest(files).to_json())
        if change is not None:
            change(document)
        (bundle / "manifest.json").write_text(json.dumps(document), "utf-8")


@pytest.fixture
def make_bundle(tmp_path: Path, chain_library: Path) -> BundleMaker:
    """A function that writes a bundle of the chain model."""
    return BundleMaker(tmp_path, chain_library)


@pytest.fixture(scope="session")
def bundle(tmp_path_factory: pytest.TempPathFactory, chain_library: Path) -> Path:
    """A bundle that no test changes."""
    return BundleMaker(tmp_path_factory.mktemp("shared_bundle"), chain_library)()


@pytest.fixture(scope="session")
def arm_bundle(
    tmp_path_factory: pytest.TempPathFactory,
    chain_library: Path,
    chain_runner: Callable[[str], Path],
) -> Path:
    """The chain model as a bundle for AArch64, whose runner QEMU executes."""
    make = BundleMaker(tmp_path_factory.mktemp("arm_bundle"), chain_library)

    def change(document: dict[str, Any]) -> None:
        document["target"] |= {"arch": "aarch64", "soc": "armv8", "plugin": "arm-cpu"}
        document["target"]["levels"][0] = {"name": "foreign", "features": ["avx512vnni"]}

    return make(change=change, runner=chain_runner("aarch64"))


@pytest.fixture
def model(bundle: Path) -> Iterator[Model]:
    """The chain model, loaded, with two threads."""
    with load(bundle, threads=2) as loaded:
        yield loaded


@pytest.fixture(scope="session")
def logits_after() -> Callable[[Sequence[int]], NDArray[np.float32]]:
    """What the chain model must compute."""
    return chain_logits


@pytest.fixture(scope="session")
def greedy_after() -> Callable[[Sequence[int], int], list[int]]:
    """What greedy generation must give."""
    return chain_greedy


@pytest.fixture(scope="session")
def tiktoken_file() -> Callable[[Sequence[bytes]], bytes]:
    """Writes tokens in tiktoken form."""
    return tiktoken_lines
