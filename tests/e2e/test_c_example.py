"""The C program of `examples/c` on a real bundle, built as its README says."""

from __future__ import annotations

import re
import shlex
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import pytest

from llamac.runtime import load

C_EXAMPLE = Path(__file__).resolve().parents[2] / "examples" / "c"


@pytest.fixture(scope="module")
def bundle(tiny: Path, compiled: Callable[..., Path]) -> Path:
    return compiled(tiny / "spinquant")


@pytest.fixture(scope="module")
def program(bundle: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Built with the command of the README, the bundle's own header and zig."""
    out = tmp_path_factory.mktemp("c") / "generate"
    readme = (C_EXAMPLE / "README.md").read_text("utf-8")
    [command] = re.findall(r"^    (python -m ziglang cc (?:.*\\\n)*.*)$", readme, re.MULTILINE)
    lib = str((bundle / "lib").resolve())
    command = command.replace("\\\n", " ").replace("$(realpath $BUNDLE/lib)", lib)
    words = shlex.split(command.replace("$BUNDLE", str(bundle)))
    assert words[0] == "python" and words[-2:] == ["-o", "generate"]
    words = [sys.executable, *words[1:-1], str(out)]
    words[words.index("examples/c/generate.c")] = str(C_EXAMPLE / "generate.c")
    subprocess.run(words, check=True, cwd=out.parent)
    return out


def test_c_and_python_generate_the_same(bundle: Path, program: Path) -> None:
    with load(bundle) as model, model.session() as session:
        prompt = model.tokenizer.encode("Once upon a time", bos=True)
        session.append(prompt)
        expected = []
        for _ in range(40):
            expected.append(session.argmax())
            session.append(expected[-1:])
    command = [str(program), str(bundle / "weights.bin"), "40", *map(str, prompt)]
    done = subprocess.run(command, capture_output=True, text=True, check=True)
    assert [int(line) for line in done.stdout.split()] == expected


def test_c_reports_the_librarys_errors(bundle: Path, program: Path, tmp_path: Path) -> None:
    """Weights that are not there, and a token beyond the vocabulary."""
    for arguments, words in (
        ((str(tmp_path / "weights.bin"), "1", "1"), "weights.bin"),
        ((str(bundle / "weights.bin"), "1", "99999"), "99999"),
    ):
        done = subprocess.run([program, *arguments], capture_output=True, text=True, check=False)
        assert done.returncode == 1
        assert "llamac error" in done.stderr and words in done.stderr
