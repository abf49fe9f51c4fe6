"""The libraries for phones: everything up to the phone, which is not here.

The library for the CPU is linked for this machine, and libcdsprpc.so is a stand-in that writes down
the calls and forwards them to a process under qemu-hexagon, which loads the bundle's DSP library
with a loader of its own (`fastrpc/`).
"""

from __future__ import annotations

import json
import os
import re
import subprocess
import sys
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import pytest

from llamac.runtime import load
from llamac.runtime.manifest import read_manifest
from llamac.targets.emulator import find_emulator
from llamac.targets.fastrpc.elf import read_library
from llamac.targets.fastrpc.link import DSP_SOURCES, IMPORTS, SKEL
from llamac.targets.fastrpc.stub import link_stub
from llamac.targets.runner_program import ARCH_FLAGS
from llamac.targets.toolchain import find_toolchain, link_executable, link_shared

pytestmark = pytest.mark.needs("qemu-hexagon")

SOURCES = Path(__file__).parent / "fastrpc"
HOST = "x86_64-linux-gnu.2.34"
SOC, VERSION = "sm8650", "75"
DSP_LIBRARY = f"dsp/v{VERSION}/libllamac-v{VERSION}.so"
PROMPT = [1, 5, 9, 200, 7, 33, 12, 90, 4, 77]
COUNT = 12
CONTEXT = 512
# A process that waits for a DSP that has died would wait for ever.
TIMEOUT_S = 120

Answer = dict[str, object]


@dataclass(frozen=True)
class Phone:
    """A folder with the stub, the stand-in for FastRPC and the process for the DSP."""

    folder: Path
    log: Path

    def run(
        self,
        weights: Path,
        *,
        fail: str = "",
        version: str = VERSION,
        has_fastrpc: bool = True,
        **wanted: object,
    ) -> Answer:
        """What client.py prints."""
        self.log.unlink(missing_ok=True)
        env = dict(os.environ) | {
            "PYTHONPATH": os.pathsep.join(filter(None, sys.path)),
            "CDSPRPC_LOG": str(self.log),
            "CDSPRPC_DSP": str(self.folder / "dsp_process"),
            "CDSPRPC_VERSION": version,
            "CDSPRPC_FAIL": fail,
            "LD_LIBRARY_PATH": str(self.folder) if has_fastrpc else "",
        }
        # A level that QEMU executes, whatever better ones the bundle has.
        level = f"v{version}-hvx-simulated"
        wanted = {"prompt": PROMPT, "count": COUNT, "level": level} | wanted
        command = [
            *(sys.executable, str(SOURCES / "client.py"), str(self.folder / "libmodel.so")),
            *(str(weights), json.dumps(wanted)),
        ]
        done = subprocess.run(
            command, env=env, capture_output=True, text=True, check=False, timeout=TIMEOUT_S
        )
        assert done.returncode == 0, done.stderr
        answer: Answer = json.loads(done.stdout)
        return answer

    def calls(self, name: str) -> list[str]:
        """The logged calls of a function, without its name."""
        lines = self.log.read_text().splitlines() if self.log.exists() else []
        return [line.partition(" ")[2] for line in lines if line.split()[0] == name]


@pytest.fixture(scope="module")
def phone(tmp_path_factory: pytest.TempPathFactory) -> Phone:
    """Everything that stands for a phone, compiled."""
    folder, zig = tmp_path_factory.mktemp("phone"), find_toolchain()
    if not zig.is_zig:
        pytest.skip("missing program: ziglang")
    link_stub(zig, target=HOST, out=folder / "libmodel.so")
    link_shared(
        zig,
        sources=[SOURCES / "cdsprpc_double.c"],
        objects=[],
        include_dirs=[DSP_SOURCES],
        out=folder / "libcdsprpc.so",
        target=HOST,
    )
    link_executable(
        zig,
        sources=[SOURCES / "dsp_process.c"],
        include_dirs=[DSP_SOURCES],
        out=folder / "dsp_process",
        target="hexagon-linux-musl",
        cflags=["-static", *ARCH_FLAGS["hexagon"]],
    )
    return Phone(folder, folder / "calls.log")


@pytest.fixture(scope="module")
def bundle(compiled: Callable[..., Path], tiny: Path) -> Path:
    """The tiny model for the DSP."""
    return compiled(tiny / "spinquant", target=SOC, processors=("hvx",))


# -- it computes ---------------------------------------------------------------------------------


def test_the_dsp_library_says_what_the_same_kernels_say_elsewhere(
    phone: Phone, bundle: Path, compiled: Callable[..., Path], tiny: Path
) -> None:
    """The logits of the emulated program bit for bit, and the tokens of the CPU's bundle."""
    answer = phone.run(bundle / "weights.bin", rewind=True)
    assert answer["level"] == f"v{VERSION}-hvx-simulated"
    assert answer["position"] == len(PROMPT) + COUNT
    (tokens,) = answer["tokens"]  # type: ignore[misc]
    assert answer["again"] == tokens
    machine = find_emulator(arch="hexagon")
    logits = np.frombuffer(bytes.fromhex(str(answer["logits"])), np.float32)
    with load(bundle, threads=1, machine=machine) as model, model.session() as session:
        session.append(PROMPT)
        for token in tokens:
            session.append([token])
        assert np.array_equal(session.logits, logits)
    with load(compiled(tiny / "spinquant")) as model, model.session() as session:
        session.append(PROMPT)
        for token in tokens:
            assert session.argmax() == token
            session.append([token])


@pytest.mark.slow
@pytest.mark.parametrize(("soc", "version"), [("sm8350", "68"), ("sm8850", "81")])
def test_the_oldest_and_the_newest_dsp(
    soc: str, version: str, phone: Phone, bundle: Path, compiled: Callable[..., Path], tiny: Path
) -> None:
    """The library says its version, and computes the same: kernels differ in scheduling."""
    other = compiled(tiny / "spinquant", target=soc, processors=("hvx",))
    library = other / f"dsp/v{version}/libllamac-v{version}.so"
    assert read_library(library.read_bytes()).version == int(version, 16)
    answer = phone.run(other / "weights.bin", version=version)
    assert answer["level"] == f"v{version}-hvx-simulated"
    assert answer["tokens"] == phone.run(bundle / "weights.bin")["tokens"]


def test_sessions_are_independent(phone: Phone, bundle: Path) -> None:
    """Each has an arena and a cache of its own; a fifth one is refused."""
    answer = phone.run(bundle / "weights.bin", sessions=4, count=3)
    first, *others = answer["tokens"]  # type: ignore[misc]
    assert all(tokens == first for tokens in others)
    refused = phone.run(bundle / "weights.bin", sessions=5)
    assert refused["error"] == "out-of-memory"
    assert "4 sessions" in str(refused["message"])


# -- calls of FastRPC ----------------------------------------------------------------------------


def test_the_sequence_of_calls(phone: Phone, bundle: Path) -> None:
    """Unsigned before open, our folder first in the path, weights shared and checked once."""
    phone.run(bundle / "weights.bin", count=2)
    assert phone.calls("session_control") == [
        "request=2 bytes=8 domain=3 enable=1",
        "request=1 bytes=12 domain=3 priority=-1 stack=262144",
    ]
    (opened,) = phone.calls("open")
    uri = f"file:///libllamac-v{VERSION}.so?{SKEL}&_modver=1.0&_dom=cdsp"
    assert opened == f"unsigned=1 uri={uri} path={bundle / 'dsp' / f'v{VERSION}'}"
    methods = [int(re.findall(r"method=(\d+)", call)[0]) for call in phone.calls("invoke")]
    assert methods == [2, 3, 4, 3, 3, 5, 6, 6, 6, 8, 9]
    assert len(phone.calls("close")) == 1


def test_all_memory_is_given_back(phone: Phone, bundle: Path) -> None:
    """Every buffer is cached, shared by its descriptor, unmapped and freed."""
    phone.run(bundle / "weights.bin", count=1, sessions=2)
    allocated = phone.calls("alloc")
    assert len(allocated) == 1 + 2 * 2
    assert all(call.startswith("heap=25 flags=1 ") for call in allocated)
    sizes = sorted(call.split()[-1] for call in allocated)
    assert sorted(phone.calls("free")) == sizes
    assert len(phone.calls("mmap")) == len(phone.calls("munmap")) == len(sizes)
    assert all("flags=2 known=1" in call for call in phone.calls("mmap"))
    assert all("known=1" in call for call in phone.calls("munmap"))


def test_what_was_in_the_path_stays_behind(
    phone: Phone, bundle: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("ADSP_LIBRARY_PATH", "/vendor/dsp")
    phone.run(bundle / "weights.bin", count=1)
    assert phone.calls("open")[0].endswith(f"/dsp/v{VERSION};/vendor/dsp")


# -- mistakes ------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("fail", "code", "words"),
    [
        ("no-answer", "cpu-unsupported", "does not tell its version (0x14)"),
        ("no-unsigned", "cpu-unsupported", "this DSP has no unsigned processes"),
        ("unsigned", "cpu-unsupported", "refused (0x15): the DSP loads signed libraries alone"),
        ("stack", "device", "262144 bytes of stack for the DSP's thread were refused (0x14)"),
        ("signature", "bundle-corrupt", "(0x80000481): the DSP loads signed libraries alone here"),
        ("memory", "out-of-memory", "no shared memory for"),
        ("map", "out-of-memory", "weights cannot be mapped to the DSP (0x66)"),
        ("stale", "bundle-corrupt", "the DSP sees other weights than the CPU at offset 0"),
        ("crash", "device", "(0x68): the process on the DSP has ended"),
    ],
)
def test_what_fastrpc_refuses(fail: str, code: str, words: str, phone: Phone, bundle: Path) -> None:
    """A sentence with cause and fix; nothing waits for a process that has died."""
    answer = phone.run(bundle / "weights.bin", fail=fail)
    assert words in str(answer.get("message"))
    assert answer["error"] == code


def test_no_fastrpc(phone: Phone, bundle: Path) -> None:
    answer = phone.run(bundle / "weights.bin", has_fastrpc=False)
    assert answer["error"] == "cpu-unsupported"
    assert "libcdsprpc.so cannot be loaded" in str(answer["message"])


def test_a_dsp_of_another_version(phone: Phone, bundle: Path) -> None:
    answer = phone.run(bundle / "weights.bin", version="79")
    assert answer["error"] == "cpu-unsupported"
    assert "the DSP is a v79, and dsp/v79/libllamac-v79.so" in str(answer["message"])
    assert phone.calls("open") == []


def test_weights_of_another_build(
    phone: Phone, bundle: Path, copied: Callable[[Path], Path]
) -> None:
    """Found before anything is shared; byte 20 is in the build id."""
    weights = copied(bundle) / "weights.bin"
    data = bytearray(weights.read_bytes())
    data[20] ^= 1
    weights.write_bytes(data)
    answer = phone.run(weights)
    assert "belongs to another build than the DSP library" in str(answer["message"])
    assert phone.calls("alloc") == []


def test_weights_that_are_cut_off(
    phone: Phone, bundle: Path, copied: Callable[[Path], Path]
) -> None:
    weights = copied(bundle) / "weights.bin"
    data = weights.read_bytes()
    weights.write_bytes(data[:-1])
    words = f"the weights file has {len(data) - 1} bytes, not {len(data)}"
    assert words in str(phone.run(weights)["message"])
    weights.write_bytes(data[:10])
    assert "it is cut off" in str(phone.run(weights)["message"])


def test_a_damaged_dsp_library(phone: Phone, bundle: Path, copied: Callable[[Path], Path]) -> None:
    """The process for the DSP ends while it loads it."""
    folder = copied(bundle)
    (folder / DSP_LIBRARY).write_bytes(b"not a library" * 100)
    answer = phone.run(folder / "weights.bin")
    assert "libllamac-v75.so was not opened (0x68)" in str(answer["message"])


@pytest.mark.parametrize(
    ("wanted", "code", "words"),
    [
        ({"prompt": [1] * (CONTEXT + 1)}, "context-full", "do not fit into a context of 512"),
        ({"prompt": [1, -7]}, "usage", "token 1 is -7, not 0 to 1023"),
        ({"level": "v99"}, "usage", "no level named 'v99'; the best one is v75-hvx-simulated"),
    ],
)
def test_what_the_dsp_refuses(
    wanted: Answer, code: str, words: str, phone: Phone, bundle: Path
) -> None:
    """The sentences of the support library come back through the call."""
    answer = phone.run(bundle / "weights.bin", **wanted)  # type: ignore[arg-type]
    assert words in str(answer.get("message"))
    assert answer["error"] == code


# -- what the bundle says ------------------------------------------------------------------------


def test_the_bundle_carries_the_libraries(bundle: Path) -> None:
    """And says of each that no phone has run it."""
    manifest = read_manifest(bundle)
    assert manifest.file("dsp") == DSP_LIBRARY
    assert manifest.libraries() == {
        "android": "lib/android/libmodel.so",
        "glibc": "lib/glibc/libmodel.so",
    }
    for name in (DSP_LIBRARY, *manifest.libraries().values()):
        assert "no phone has run it" in manifest.files[name].note
    library = read_library((bundle / DSP_LIBRARY).read_bytes())
    assert library.version == int(VERSION, 16)
    assert library.exported == (SKEL,)
    assert set(library.undefined) <= IMPORTS
