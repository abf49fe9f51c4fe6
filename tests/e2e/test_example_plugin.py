"""A target plug-in from another package compiles a model for its own board."""

from __future__ import annotations

import json
import os
import shutil
import subprocess
import sys
from collections.abc import Callable
from importlib.util import find_spec
from pathlib import Path

import pytest

from llamac.runtime import load
from llamac.tools.doctor import CPUINFO, cpu_flags

EXAMPLE = Path(__file__).resolve().parents[1] / "targets" / "example"


@pytest.fixture(scope="module")
def bundle(tiny: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The tiny model for `example-board`, by a process that has the example's package."""
    if find_spec("pip") is None or find_spec("setuptools") is None:
        pytest.skip("missing package: pip or setuptools")
    folder = tmp_path_factory.mktemp("example")
    source, site, out = folder / "source", folder / "site", folder / "bundle"
    shutil.copytree(EXAMPLE, source)  # building leaves files beside the source
    options = "--quiet --no-deps --no-build-isolation --no-index --disable-pip-version-check"
    install = [sys.executable, "-m", "pip", "install", *options.split(), "--target", site, source]
    subprocess.run(install, check=True)
    command = [sys.executable, "-P", "-m", "llamac.tools.cli", "compile", tiny / "spinquant"]
    path = os.pathsep.join([str(site), *filter(None, sys.path)])
    done = subprocess.run(
        [*command, "--target", "example-board", "-o", out, "--context", "512", "--chunks", "8"],
        env=os.environ | {"PYTHONPATH": path, "LLAMAC_SOC_PATH": str(EXAMPLE / "soc")},
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.returncode == 0, done.stderr
    return out


def test_the_bundle_names_plugin_and_board(bundle: Path) -> None:
    target = json.loads((bundle / "manifest.json").read_text("utf-8"))["target"]
    assert (target["soc"], target["plugin"]) == ("example-board", "example-cpu")
    assert target["levels"] == [{"name": "fma-f16c", "features": ["fma", "f16c"]}]


def test_it_says_what_our_own_kernels_say(
    bundle: Path, tiny: Path, compiled: Callable[..., Path]
) -> None:
    """The runtime needs nothing of the plug-in; another instruction set gives the same tokens."""
    if not {"fma", "f16c"} <= cpu_flags(CPUINFO):
        pytest.skip("this CPU has no FMA or F16C")
    texts = []
    for path in (bundle, compiled(tiny / "spinquant")):
        with load(path) as model:
            texts.append("".join(model.generate("Once upon a time", max_tokens=48)))
    with load(bundle) as model:
        assert model.info.level == "fma-f16c"
    assert texts[0] == texts[1] and len(texts[0].split()) > 20
