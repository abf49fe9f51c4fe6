"""The wheel in an arm64 Python under QEMU, with numpy, tiktoken and rich beside it and no more."""

from __future__ import annotations

import json
import os
import subprocess
from collections.abc import Callable, Sequence
from pathlib import Path

import pytest

from llamac.runtime import load
from llamac.tools.device_roots import RECIPE_FILE, python_command

pytestmark = pytest.mark.needs("qemu-aarch64")

PROMPT = "Tell me a story about a fox."
NUM_TOKENS = 48

# Names that must be neither imported nor there.
COMPILER = ("tvm", "tvm_ffi", "torch", "onnx", "ziglang")

PROGRAM = """
import importlib.util, json, platform, sys
from llamac.runtime import load, system
import llamac
bundle, prompt, count, compiler = json.loads(sys.argv[1])
with load(bundle) as model:
    generation = model.generate(prompt, max_tokens=count)
    text = "".join(generation)
    print(json.dumps({
        "machine": platform.machine(),
        "manifest's machine": [system.machine(), system.operating_system()],
        "level": model.info.level,
        "tokens": generation.tokens,
        "text": text,
        "threads": system.default_threads(),
        "cpus": system.usable_cpus(),
        "memory": system.available_memory(),
        "package": llamac.__file__,
        "modules": sorted(sys.modules),
        "compiler": [name for name in compiler if importlib.util.find_spec(name)],
    }))
"""

Python = Callable[..., subprocess.CompletedProcess[str]]


@pytest.fixture(scope="module")
def arm64_python(
    devices: Path, installed_wheel: Path, tmp_path_factory: pytest.TempPathFactory
) -> Python:
    """Run the arm64 Python on an emulated CPU, outside the checkout."""
    root, folder = devices / "arm64-python", tmp_path_factory.mktemp("arm64")
    if not (root / RECIPE_FILE).is_file():
        pytest.skip("no arm64 Python: make devices")

    def run(cpu: str, arguments: Sequence[str]) -> subprocess.CompletedProcess[str]:
        path = os.pathsep.join(map(str, (installed_wheel, root / "site")))
        environment = {"PATH": os.environ["PATH"], "HOME": str(folder), "PYTHONPATH": path}
        command = [*python_command(root, cpu), *arguments]
        return subprocess.run(
            command, cwd=folder, env=environment, capture_output=True, text=True, check=False
        )

    return run


def test_it_generates_the_host_s_tokens(
    arm64_python: Python,
    installed_wheel: Path,
    arm_bundle: Callable[[str], Path],
    compiled: Callable[..., Path],
    tiny: Path,
) -> None:
    """With the kernels of the emulated CPU, and without any part of the compiler."""
    with load(compiled(tiny / "spinquant")) as model:
        generation = model.generate(PROMPT, max_tokens=NUM_TOKENS)
        text = "".join(generation)
    given = json.dumps([str(arm_bundle("spinquant")), PROMPT, NUM_TOKENS, COMPILER])
    done = arm64_python("cortex-a76", ["-c", PROGRAM, given])
    assert done.returncode == 0, done.stderr
    found = json.loads(done.stdout)
    assert found["machine"] == "aarch64"
    assert found["manifest's machine"] == ["aarch64", "linux"]
    assert found["level"] == "dotprod"
    assert (found["tokens"], found["text"]) == (generation.tokens, text)
    assert len(found["tokens"]) == NUM_TOKENS

    assert 1 <= found["threads"] <= len(found["cpus"])
    assert found["memory"] > 1 << 20
    assert found["package"].startswith(str(installed_wheel))
    assert not {*COMPILER, "llamac.compiler", "llamac.targets"} & set(found["modules"])
    assert {"numpy", "tiktoken"} <= set(found["modules"])
    assert found["compiler"] == []


def test_the_command_prints_the_same_text(
    arm64_python: Python,
    llamac: Callable[..., subprocess.CompletedProcess[str]],
    arm_bundle: Callable[[str], Path],
    compiled: Callable[..., Path],
    tiny: Path,
) -> None:
    """`llamac run`, on a CPU with more than the one above."""
    options = (PROMPT, "--max-tokens", str(NUM_TOKENS), "--stats")
    bundle = str(arm_bundle("spinquant"))
    done = arm64_python("max,sme=off", ["-m", "llamac.tools.cli", "run", bundle, *options])
    assert done.returncode == 0, done.stderr
    assert "kernels sve" in done.stderr
    assert done.stdout == llamac("run", compiled(tiny / "spinquant"), *options).stdout
    assert len(done.stdout) > NUM_TOKENS


def test_a_bundle_of_the_host_is_refused(
    arm64_python: Python, compiled: Callable[..., Path], tiny: Path
) -> None:
    """Before its library is opened, which the system would refuse less clearly."""
    bundle = str(compiled(tiny / "spinquant"))
    done = arm64_python("cortex-a76", ["-m", "llamac.tools.cli", "run", bundle, PROMPT])
    assert done.returncode == 1
    assert done.stdout == ""
    assert "error[cpu-unsupported]: the bundle is for x86_64 linux" in done.stderr
    assert "this machine is aarch64 linux" in done.stderr
