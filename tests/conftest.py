"""Fixtures and rules that all tests share.

Skips: a test that needs a program says so with `@pytest.mark.needs("readelf")`. On a developer's
machine it is skipped without it; with LLAMAC_REQUIRE_ALL=1, as CI runs, every skip is a failure
except for kinds that no installation cures, told by how their reason begins: "shared data" (files
that the repository may not carry), "this CPU" (lacks an instruction set), "outside a checkout",
"optional extra" (under a licence that whoever runs the tests has to accept first).
"""

from __future__ import annotations

import importlib.util
import os
import shutil
import signal
import subprocess
import sys
from collections.abc import Callable, Generator, Iterator, Sequence
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest

ROOT = Path(__file__).resolve().parents[1]
LAYERS = ("runtime", "schedules", "targets", "compiler", "tools")
BUILD = "import sys, setuptools.build_meta as b; getattr(b, 'build_' + sys.argv[1])(sys.argv[2])"
ALLOWED_SKIPS = ("shared data", "this CPU", "outside a checkout", "optional extra")


def shared_data_dir() -> Path | None:
    """Return the folder of test data beside the checkout, or None."""
    given = os.environ.get("LLAMAC_SHARED_DATA")
    folder = Path(given) if given else ROOT.parent / "shared" / "data"
    return folder if folder.is_dir() else None


@pytest.fixture(scope="session", autouse=True)
def interrupts_arrive() -> Iterator[None]:
    """A shell that starts tests in the background makes them, and all they start, ignore Ctrl-C."""
    before = signal.signal(signal.SIGINT, signal.default_int_handler)
    yield
    signal.signal(signal.SIGINT, before)


@pytest.fixture(scope="session", autouse=True)
def no_records_of_the_user(tmp_path_factory: pytest.TempPathFactory) -> Iterator[None]:
    """What a developer has tuned must not change what is compiled here."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("XDG_DATA_HOME", str(tmp_path_factory.mktemp("data")))
        yield


@pytest.fixture(scope="session")
def shared_data() -> Path:
    """The folder of shared test data; skips the test without it."""
    folder = shared_data_dir()
    if folder is None:
        pytest.skip("shared data: set LLAMAC_SHARED_DATA")
    return folder


@pytest.fixture(scope="session")
def checkout() -> Path:
    """The root of the source checkout; skips when the tests run beside an installed wheel."""
    if not (ROOT / "src" / "llamac").is_dir():
        pytest.skip("outside a checkout: the tests run beside an installed wheel")
    return ROOT


@pytest.fixture(scope="session")
def python() -> Callable[..., str]:
    """Run Python outside the checkout; returns what it wrote. `path` comes first in its search."""

    def run(*arguments: str, cwd: Path, path: Sequence[Path] = ()) -> str:
        done = subprocess.run(
            [sys.executable, *arguments],
            cwd=cwd,
            env=dict(os.environ) | {"PYTHONPATH": os.pathsep.join(map(str, path))},
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            text=True,
            check=False,
        )
        assert done.returncode == 0, done.stdout
        return done.stdout

    return run


@pytest.fixture(scope="session")
def sources(checkout: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A copy of what a clone has: builds must neither use nor leave anything in the checkout."""
    copy = tmp_path_factory.mktemp("clone") / "llamac"
    copy.mkdir()
    for name in ("src", *LAYERS):
        shutil.copytree(
            checkout / name,
            copy / name,
            symlinks=True,
            ignore=shutil.ignore_patterns("__pycache__", "*.egg-info"),
        )
    for name in ("pyproject.toml", "README.md", "LICENSE"):
        shutil.copy(checkout / name, copy)
    return copy


@pytest.fixture(scope="session")
def build(python: Callable[..., str]) -> Callable[[str, Path, Path], Path]:
    """Build "wheel" or "sdist" from a folder into a new one, without network; gives the file."""

    def run(kind: str, sources: Path, out: Path) -> Path:
        out.mkdir()
        python("-c", BUILD, kind, str(out), cwd=sources)
        [file] = out.iterdir()
        return file

    return run


@pytest.fixture(scope="session")
def wheel(
    sources: Path,
    build: Callable[[str, Path, Path], Path],
    tmp_path_factory: pytest.TempPathFactory,
) -> Path:
    """The wheel of a fresh clone."""
    return build("wheel", sources, tmp_path_factory.mktemp("wheel") / "out")


@pytest.fixture(scope="session")
def installed_wheel(
    wheel: Path, python: Callable[..., str], tmp_path_factory: pytest.TempPathFactory
) -> Path:
    """The folder into which pip installed the wheel, alone."""
    site = tmp_path_factory.mktemp("installed") / "site"
    install = ("-m", "pip", "install", "--quiet", "--no-deps", "--no-index", "--target")
    python(*install, str(site), str(wheel), cwd=site.parent)
    return site


@pytest.fixture(scope="session")
def helper() -> Callable[[str], ModuleType]:
    """Load a module of helpers, which folders of tests, being no packages, cannot import.

    helper("compiler/hf_layout") is the module of that file in `tests`.
    """

    def load(place: str) -> ModuleType:
        name = f"llamac_tests_{place.replace('/', '_')}"
        if name not in sys.modules:
            path = Path(__file__).parent / f"{place}.py"
            spec = importlib.util.spec_from_file_location(name, path)
            assert spec is not None and spec.loader is not None
            sys.modules[name] = importlib.util.module_from_spec(spec)
            spec.loader.exec_module(sys.modules[name])
        return sys.modules[name]

    return load


@pytest.fixture(scope="session")
def devices() -> Path:
    """The folder in which `make devices` leaves what tests of other processors run on."""
    return Path(os.environ.get("LLAMAC_DEVICES") or ROOT / "build" / "devices")


@pytest.fixture(scope="session")
def sme_emulator(devices: Path) -> Path:
    """A qemu-aarch64 that computes SME rightly; skips the test without one.

    It loads no plug-ins: Debian links it statically.
    """
    from llamac.targets.emulator import FIRST_VERSION_WITH_SME, PROGRAMS  # noqa: PLC0415
    from llamac.tools.device_roots import QEMU_PROGRAM, qemu_version  # noqa: PLC0415

    given = os.environ.get("LLAMAC_QEMU_SME")
    for program in [given] if given else [devices / "qemu" / QEMU_PROGRAM, *PROGRAMS]:
        path = shutil.which(program)
        if path and qemu_version(path) >= FIRST_VERSION_WITH_SME:
            return Path(path)
    wanted = f"qemu-aarch64 of version {FIRST_VERSION_WITH_SME[0]} or newer"
    pytest.skip(f"no {wanted}: make devices, or set LLAMAC_QEMU_SME")


def pytest_runtest_setup(item: pytest.Item) -> None:
    """Skip a test whose programs are missing."""
    for mark in item.iter_markers("needs"):
        missing = [command for command in mark.args if shutil.which(command) is None]
        if missing:
            pytest.skip(f"missing program: {', '.join(missing)}")


def _forbid_skip(report: pytest.TestReport | pytest.CollectReport) -> None:
    """Turn a skip that an installation would cure into a failure."""
    if not report.skipped or os.environ.get("LLAMAC_REQUIRE_ALL") != "1":
        return
    if hasattr(report, "wasxfail"):
        return
    reason = str(report.longrepr[2] if isinstance(report.longrepr, tuple) else report.longrepr)
    reason = reason.removeprefix("Skipped: ")
    if not reason.startswith(ALLOWED_SKIPS):
        report.outcome = "failed"
        report.longrepr = f"LLAMAC_REQUIRE_ALL=1 forbids this skip: {reason}"


@pytest.hookimpl(wrapper=True)
def pytest_runtest_makereport() -> Generator[None, Any, pytest.TestReport]:
    """Apply the rule on skips to tests."""
    report: pytest.TestReport = yield
    _forbid_skip(report)
    return report


@pytest.hookimpl(wrapper=True)
def pytest_make_collect_report() -> Generator[None, Any, pytest.CollectReport]:
    """Apply the rule on skips to modules that skip as a whole."""
    report: pytest.CollectReport = yield
    _forbid_skip(report)
    return report
