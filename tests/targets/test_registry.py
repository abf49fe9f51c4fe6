"""Plug-ins are found by entry point; broken ones are named and stop nobody else."""

from __future__ import annotations

import os
import shutil
import subprocess
import sys
from importlib.util import find_spec
from pathlib import Path

import pytest

from llamac.runtime.errors import TargetUnknown
from llamac.targets.registry import distribution_of, load_target, target_names

EXAMPLE = Path(__file__).parent / "example"

TARGET = """
from llamac.targets.base import Target
class Mine(Target):
    name = {name!r}
    processor = "cpu"
    api_version = {version}
    def lower(self, mod, options): ...
    def build(self, lowered, out, progress): ...
"""


def install(site: Path, distribution: str, name: str, source: str, attribute: str = "Mine") -> None:
    """Put a distribution with one module and one entry point on disk, as an installer would."""
    module = distribution.replace("-", "_")
    info = site / f"{module}-1.0.dist-info"
    info.mkdir(parents=True)
    (info / "METADATA").write_text(f"Metadata-Version: 2.1\nName: {distribution}\nVersion: 1.0\n")
    (info / "entry_points.txt").write_text(f"[llamac.targets]\n{name} = {module}:{attribute}\n")
    (site / f"{module}.py").write_text(source)


@pytest.fixture
def site(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A folder of installed packages that Python looks into."""
    monkeypatch.syspath_prepend(tmp_path)
    return tmp_path


def test_a_plugin_of_another_package_is_found(site: Path) -> None:
    install(site, "good-plugin", "good-cpu", TARGET.format(name="good-cpu", version=1))
    assert "good-cpu" in target_names()
    assert distribution_of("good-cpu") == "good-plugin 1.0"
    assert load_target("good-cpu").processor == "cpu"


def test_two_plugins_of_one_name_are_both_named(site: Path) -> None:
    for distribution in ("first-twin", "second-twin"):
        install(site, distribution, "twin-cpu", TARGET.format(name="twin-cpu", version=1))
    with pytest.raises(TargetUnknown, match="two plug-ins") as caught:
        load_target("twin-cpu")
    assert "first-twin 1.0" in caught.value.cause
    assert "second-twin 1.0" in caught.value.cause
    assert target_names().count("twin-cpu") == 1


BROKEN = {
    "raises": ("1 / 0", "Mine", ["ZeroDivisionError"]),
    "lacks a module": ("import no_such_module", "Mine", ["ModuleNotFoundError", "no_such_module"]),
    "lacks the class": ("", "Mine", ["AttributeError", "Mine"]),
    "is no target": ("Mine = 3", "Mine", ["no subclass"]),
    "is of the future": (TARGET.format(name="bad-cpu", version=99), "Mine", ["99", "has 1"]),
    "has another name": (TARGET.format(name="odd-cpu", version=1), "Mine", ["odd-cpu", "bad-cpu"]),
    "has no processor": (
        TARGET.format(name="bad-cpu", version=1).replace('processor = "cpu"', ""),
        "Mine",
        ["no processor"],
    ),
}


@pytest.mark.parametrize("case", BROKEN)
def test_a_broken_plugin_is_named_and_others_go_on(case: str, site: Path) -> None:
    source, attribute, words = BROKEN[case]
    # Modules stay in sys.modules between the cases, so each has a name of its own.
    distribution = f"bad-{list(BROKEN).index(case)}"
    install(site, distribution, "bad-cpu", source, attribute)
    install(site, f"fine-{distribution}", "fine-cpu", TARGET.format(name="fine-cpu", version=1))
    with pytest.raises(TargetUnknown) as caught:
        load_target("bad-cpu")
    assert f"{distribution} 1.0" in caught.value.message
    assert "bad-cpu" in caught.value.message
    for word in words:
        assert word in caught.value.cause
    assert load_target("fine-cpu").name == "fine-cpu"


def test_a_plugin_that_nobody_brings_is_named() -> None:
    """Some other package may bring it."""
    with pytest.raises(TargetUnknown) as foreign:
        load_target("their-cpu")
    assert "entry point" in foreign.value.cause


@pytest.fixture(scope="module")
def example_site(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The example package, built and installed without network into a folder of its own."""
    if find_spec("pip") is None or find_spec("setuptools") is None:
        pytest.skip("missing package: pip or setuptools")
    folder = tmp_path_factory.mktemp("example")
    source, site = folder / "source", folder / "site"
    shutil.copytree(EXAMPLE, source)  # building leaves files beside the source
    options = "--quiet --no-deps --no-build-isolation --no-index --disable-pip-version-check"
    subprocess.run(
        [sys.executable, "-m", "pip", "install", *options.split(), "--target", site, source],
        check=True,
    )
    return site


def run_with(site: Path, *arguments: str) -> subprocess.CompletedProcess[str]:
    """Run Python with one more folder of packages."""
    path = [str(site), *filter(None, sys.path)]
    return subprocess.run(
        [sys.executable, *arguments],
        env=os.environ | {"PYTHONPATH": os.pathsep.join(path)},
        capture_output=True,
        text=True,
        check=False,
    )


def test_the_example_is_listed_and_ready(example_site: Path) -> None:
    """`llamac targets` describes the example's board and finds its plug-in."""
    board = EXAMPLE / "soc" / "example-board.toml"
    program = "import sys; from llamac.tools.cli import main; sys.exit(main(sys.argv[1:]))"
    result = run_with(example_site, "-c", program, "targets", str(board))
    assert result.returncode == 0, result.stderr
    assert "example-cpu from llamac-example-target 0.1.0, ready" in result.stdout


EXAMPLE_PROGRAM = """
import sys
import numpy as np
from llamac.runtime.errors import TargetUnknown
from llamac.targets import load_soc, load_target

soc = load_soc(sys.argv[1])
target = load_target("example-cpu")(soc)
assert target.check() == ()
assert "tvm" not in sys.modules, "describing a target must not import TVM"

import tvm
from llamac.schedules.kernel import KernelBuilder, compile_kernels
from tvm.tirx.script.builder import ir as T

[isa] = target.isas()
assert [(isa.name, isa.features)] == [(level.name, level.features) for level in soc.levels]
assert tvm.target.Target(target.tvm_target()).attrs["num-cores"] == soc.num_cores
with KernelBuilder("dot_example", 1) as builder:
    lhs = builder.input("lhs", (16,), "uint8")
    rhs = builder.input("rhs", (16,), "int8")
    dst = builder.output("dst", (4,), "int32")
    with builder.items():
        bytes16 = (isa.load(lhs, 0, lanes=16), isa.load(rhs, 0, lanes=16))
        isa.store(dst, isa.dot_u8s8(T.broadcast(T.int32(0), 4), *bytes16), 0)
library = compile_kernels({"dot_example": builder.func}, isa)
products = [line for line in library.inspect_source("asm").splitlines() if "pmaddubsw" in line]
print("pmaddubsw", len(products), "of AVX2:", sum("ymm" in line for line in products))
if {"fma", "f16c"} <= set(open("/proc/cpuinfo").read().split()):
    lhs = np.array([255, 0, 255, 128] * 4, np.uint8)
    rhs = np.array([-128, 127, -128, 127] * 4, np.int8)
    dst = tvm.runtime.tensor(np.zeros(4, np.int32))
    library["dot_example"](tvm.runtime.tensor(lhs), tvm.runtime.tensor(rhs), dst, 0, 1)
    expected = (lhs.astype(np.int32) * rhs).reshape(4, 4).sum(1)
    np.testing.assert_array_equal(dst.numpy(), expected)
try:
    load_target("example-cpu")(load_soc("sm8650"))
except TargetUnknown as error:
    print(error.cause)
"""


def test_the_example_brings_an_instruction_set(example_site: Path) -> None:
    """Kernels compile for it, use its instructions and not AVX2's, and compute right."""
    board = EXAMPLE / "soc" / "example-board.toml"
    result = run_with(example_site, "-c", EXAMPLE_PROGRAM, str(board))
    assert result.returncode == 0, result.stderr
    assert result.stdout.splitlines() == [
        "pmaddubsw 2 of AVX2: 0",
        "the SoC file says: htp by qnn-htp, hvx by hexagon-hvx, cpu by arm-cpu",
    ]
