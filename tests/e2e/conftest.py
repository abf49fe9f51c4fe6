"""Bundles that the end-to-end tests share: each is compiled once in a session.

Most hold the kernels of one level: all four take several times as long to build.
"""

from __future__ import annotations

import shutil
import subprocess
import sys
from collections.abc import Callable, Sequence
from itertools import pairwise
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from llamac.compiler.compile_config import CompileConfig
from llamac.compiler.pipeline import compile_bundle
from llamac.compiler.progress import SilentProgress
from llamac.runtime import Session
from llamac.targets.soc import Level, load_soc, soc_files
from llamac.tools.cli import main
from llamac.tools.doctor import CPUINFO, cpu_flags
from llamac.tools.llama2c import to_meta

ARM_LEVELS = ("sme", "sve", "i8mm", "dotprod", "neon")
EXAMPLES = Path(__file__).resolve().parents[2] / "examples"


@pytest.fixture(scope="session")
def tiny() -> Path:
    """The checkpoints of the repository, a folder for each form."""
    return EXAMPLES / "tiny-llama"


@pytest.fixture(scope="session")
def llamac() -> Callable[..., subprocess.CompletedProcess[str]]:
    """Run a command as its own process and check its exit code."""

    def run(*arguments: object, code: int = 0) -> subprocess.CompletedProcess[str]:
        command = [sys.executable, "-P", "-m", "llamac.tools.cli", *map(str, arguments)]
        done = subprocess.run(command, capture_output=True, text=True, check=False)
        assert done.returncode == code, done.stderr
        return done

    return run


@pytest.fixture(scope="session")
def host_bundle(
    tiny: Path,
    llamac: Callable[..., subprocess.CompletedProcess[str]],
    tmp_path_factory: pytest.TempPathFactory,
) -> tuple[Path, subprocess.CompletedProcess[str]]:
    """The model of `make demo` with all levels, a report beside it, and what was printed."""
    out = tmp_path_factory.mktemp("host") / "tiny-host"
    report = out.with_suffix(".json")
    arguments = ("--target", "host", "--chunks", "8", "-o", out, "--report", report)
    return out, llamac("compile", tiny / "spinquant", *arguments)


@pytest.fixture(scope="session")
def levels() -> list[Level]:
    """Levels of the host that this CPU can run, best first."""
    flags = cpu_flags(CPUINFO)
    return [level for level in load_soc("host").levels if set(level.features) <= flags]


@pytest.fixture(scope="session")
def one_level(levels: list[Level], tmp_path_factory: pytest.TempPathFactory) -> str:
    """Path of a SoC file like the host's, with the best level alone."""
    path = tmp_path_factory.mktemp("soc") / "one-level.toml"
    head, *_ = soc_files()["host"].read_text("utf-8").partition("[[levels]]")
    features = ", ".join(f'"{name}"' for name in levels[0].features)
    path.write_text(f'{head}[[levels]]\nname = "{levels[0].name}"\nfeatures = [{features}]\n')
    assert load_soc(path).levels == (levels[0],)
    return str(path)


@pytest.fixture(scope="session")
def compiled(one_level: str, tmp_path_factory: pytest.TempPathFactory) -> Callable[..., Path]:
    """Compile a model, or give the bundle that was compiled before from the same arguments."""
    folder = tmp_path_factory.mktemp("shared-bundles")
    made: dict[tuple[Any, ...], Path] = {}

    def compile_once(model: Path, **options: Any) -> Path:
        key = (model, *sorted(options.items()))
        if key not in made:
            out = folder / f"{len(made)}-{model.name}"
            defaults = {"target": one_level, "chunks": (32, 8), "context_length": 512}
            config = CompileConfig(model=model, out=out, **(defaults | options))
            compile_bundle(config, SilentProgress())
            made[key] = out
        return made[key]

    return compile_once


@pytest.fixture(scope="session")
def board_with(tmp_path_factory: pytest.TempPathFactory) -> Callable[[tuple[str, ...]], str]:
    """Path of a SoC file with the given Arm levels."""
    folder = tmp_path_factory.mktemp("soc")

    def write(levels: tuple[str, ...]) -> str:
        path = folder / f"{'-'.join(levels)}.toml"
        text = soc_files()["rpi5"].read_text("utf-8")
        for name in levels:
            text += f'\n[[levels]]\nname = "{name}"\nfeatures = []\n'
        path.write_text(text)
        assert [level.name for level in load_soc(path).levels] == list(levels)
        return str(path)

    return write


@pytest.fixture(scope="session")
def arm_bundle(
    compiled: Callable[..., Path], board_with: Callable[[tuple[str, ...]], str], tiny: Path
) -> Callable[[str], Path]:
    """The Arm bundle of a form of the tiny model; compiling it verifies its best level.

    The SpinQuant form has all levels, others only those that tests run.
    """
    levels = {"spinquant": ARM_LEVELS}
    return lambda form: compiled(
        tiny / form, target=board_with(levels.get(form, ("sme", "dotprod")))
    )


@pytest.fixture
def copied(tmp_path: Path) -> Callable[[Path], Path]:
    """Copy a folder into the test's own, to spoil it."""

    def copy(source: Path) -> Path:
        return Path(shutil.copytree(source, tmp_path / f"copy-of-{source.name}"))

    return copy


@pytest.fixture
def refused(capsys: pytest.CaptureFixture[str]) -> Callable[..., str]:
    """Run a command that must fail; returns its message, cause and fix as printed."""

    def run(*arguments: object, error: str) -> str:
        status = main([*map(str, arguments)])
        out, err = capsys.readouterr()
        assert out == ""
        _, found, printed = err.partition(f"error[{error}]: ")
        assert found, err
        message, cause, *rest = printed.splitlines()
        assert message and len(cause) > len("  cause: ") and cause.startswith("  cause: "), err
        assert rest[-1].startswith("  fix: ") and len(rest[-1]) > len("  fix: "), err
        assert status == (2 if error == "usage" else 1)
        return printed

    return run


@pytest.fixture(scope="session")
def stories(shared_data: Path, tmp_path_factory: pytest.TempPathFactory) -> Callable[[str], Path]:
    """Write stories260K in Meta's layout: a form to its folder."""
    folder, source = tmp_path_factory.mktemp("stories"), shared_data / "stories260K"

    def write(form: str) -> Path:
        if not (folder / form).is_dir():
            to_meta(form, folder / form, source / "stories260K.bin", source / "tok512.bin")
        return folder / form

    return write


@pytest.fixture(scope="session")
def nll_of() -> Callable[[Session, Sequence[int]], float]:
    """Mean negative log likelihood in nats of each token after the first, one by one."""

    def evaluate(session: Session, tokens: Sequence[int]) -> float:
        total = 0.0
        session.rewind(0)
        for token, following in pairwise(tokens):
            session.append([token])
            logits = session.logits.astype(np.float64)
            total += float(np.logaddexp.reduce(logits) - logits[following])
        return total / (len(tokens) - 1)

    return evaluate
