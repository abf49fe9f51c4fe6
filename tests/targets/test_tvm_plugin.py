"""Our target tags in TVM: there after `import tvm`, and never the reason why that import fails."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest

from llamac.targets.soc import soc_files

COUNT = "print(sum(tag.startswith('llamac/') for tag in tvm.target.list_tags()))"


@pytest.fixture(scope="module")
def site(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with an installed distribution that announces the hook to TVM."""
    folder = tmp_path_factory.mktemp("site")
    info = folder / "tvm_hook_of_llamac-1.0.dist-info"
    info.mkdir()
    (info / "METADATA").write_text(
        "Metadata-Version: 2.1\nName: tvm-hook-of-llamac\nVersion: 1.0\n"
    )
    entry = "llamac-test = llamac.targets.tvm_plugin:register"
    (info / "entry_points.txt").write_text(f"[tvm.backends]\n{entry}\n")
    return folder


def run(site: Path, program: str, **variables: str) -> str:
    """Run a program in which a warning of TVM's autoload is an error; return what it prints."""
    path = os.pathsep.join([str(site), *filter(None, sys.path)])
    result = subprocess.run(
        [sys.executable, "-W", "error::UserWarning", "-c", program],
        env=os.environ | {"PYTHONPATH": path} | variables,
        capture_output=True,
        text=True,
        check=False,
    )
    assert result.returncode == 0, result.stderr
    assert not result.stderr
    return result.stdout.strip()


def test_tags_are_there_after_import(site: Path) -> None:
    """The names of our SoCs work in TVM at once, with the features that the SoC file gives.

    The last line is the control: told only the core's name, LLVM takes SVE2, which phones hide.
    """
    program = f"""
import tvm
{COUNT}
names = ("sm8650", "rpi5", "mt6993", "host", "apple-m4", "armv8")
targets = {{name: tvm.target.Target(f"llamac/{{name}}-cpu") for name in names}}
targets["bare"] = tvm.target.Target(
    {{"kind": "llvm", "mtriple": "aarch64-linux-gnu", "mcpu": "cortex-x4"}})
for name, target in targets.items():
    assert ("apple" in str(target.attrs["mtriple"])) == ("apple" in name)
    words = ("has_dotprod", "has_matmul_i8", "has_sve", "has_sme")
    print(name, *(int(bool(target.attrs.get(f"feature.{{word}}"))) for word in words))
"""
    assert run(site, program).splitlines() == [
        str(len(soc_files())),
        "sm8650 1 1 0 0",
        "rpi5 1 0 0 0",
        "mt6993 1 1 1 1",
        "host 0 0 0 0",
        "apple-m4 1 1 0 1",
        "armv8 0 0 0 0",
        "bare 1 1 1 0",
    ]


@pytest.mark.parametrize(
    "program",
    [
        f"import llamac.targets.tvm_plugin\nimport tvm\n{COUNT}",
        f"from llamac.targets.tvm_plugin import register as f\nf()\nf()\nimport tvm\n{COUNT}",
    ],
    ids=["imported before TVM", "called before TVM"],
)
def test_it_may_come_before_tvm(site: Path, program: str) -> None:
    """Importing TVM from the hook calls the hook again, half way: tags are registered once."""
    assert run(site, program) == str(len(soc_files()))


def test_without_autoload_it_is_called_by_hand(site: Path) -> None:
    program = f"""
import tvm
from llamac.targets.tvm_plugin import register
{COUNT}
register()
{COUNT}
"""
    counts = run(site, program, TVM_DEVICE_BACKEND_AUTOLOAD="0").split()
    assert counts == ["0", str(len(soc_files()))]


def test_it_does_nothing_where_only_the_runtime_is(site: Path) -> None:
    program = "import tvm; print(tvm.base._RUNTIME_ONLY)"
    assert run(site, program, TVM_USE_RUNTIME_LIB="1") == "True"


def test_a_users_broken_file_does_not_break_the_import(site: Path, tmp_path: Path) -> None:
    (tmp_path / "broken.toml").write_text("part = 1\n")
    found = run(site, f"import tvm\n{COUNT}", LLAMAC_SOC_PATH=str(tmp_path))
    assert found == str(len(soc_files()))
