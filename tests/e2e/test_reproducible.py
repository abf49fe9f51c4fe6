"""The same model gives the same bundle, byte for byte, wherever and whenever it is compiled."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest

COMPILE = """
import sys
from pathlib import Path
from llamac.compiler.compile_config import CompileConfig
from llamac.compiler.pipeline import compile_bundle
from llamac.compiler.progress import SilentProgress

model, target, out = sys.argv[1:]
config = CompileConfig(Path(model), target, Path(out), chunks=(8,), context_length=64, verify=False)
compile_bundle(config, SilentProgress())
"""


def contents(folder: Path) -> dict[str, bytes]:
    """All files of a bundle."""
    files = (path for path in folder.rglob("*") if path.is_file())
    return {str(path.relative_to(folder)): path.read_bytes() for path in files}


@pytest.mark.slow
def test_two_compilations_give_equal_files(tiny: Path, one_level: str, tmp_path: Path) -> None:
    """Other process, other order of sets, other folders, and no kernel taken from a cache."""
    bundles = []
    for seed in ("1", "2"):
        place = tmp_path / f"place-{seed}"
        (place / "model").mkdir(parents=True)
        for file in (tiny / "qlora").iterdir():
            (place / "model" / file.name).write_bytes(file.read_bytes())
        environment = os.environ | {"PYTHONHASHSEED": seed, "LLAMAC_KERNEL_CACHE": "0"}
        command = [sys.executable, "-c", COMPILE, str(place / "model"), one_level]
        subprocess.run([*command, str(place / f"out-{seed}")], check=True, env=environment)
        bundles.append(contents(place / f"out-{seed}"))
    first, second = bundles
    assert set(first) == set(second) >= {"manifest.json", "weights.bin", "lib/libmodel.so"}
    assert [name for name in first if first[name] != second[name]] == []
