"""Verification of a library in another process: memory goes over the pipe, results are the same."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from functools import partial
from pathlib import Path
from typing import Any

import pytest

from llamac.compiler.compile_config import CompileConfig
from llamac.compiler.pipeline import compile_bundle
from llamac.compiler.progress import SilentProgress
from llamac.compiler.verify import verify_bundle, verify_library
from llamac.runtime.library import open_library
from llamac.runtime.manifest import Manifest, read_manifest
from llamac.runtime.remote import RemoteModel
from llamac.targets.base import Artifact
from llamac.targets.cpu.target import CpuTarget
from llamac.targets.program import Program
from llamac.targets.runner_program import RUNNER, RUNNER_ROLE, link_runner
from llamac.targets.toolchain import find_toolchain

Built = Any  # conftest.py


@pytest.fixture
def with_runner(
    spinquant: Built,
    configure: Callable[..., CompileConfig],
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> Path:
    """The bundle of the host, with a runner as bundles of other processors have one."""
    link = CpuTarget.link

    def link_both(
        self: CpuTarget, program: Program, entry: Path, objects: Sequence[Path], out: Path
    ) -> list[Artifact]:
        (out / RUNNER).parent.mkdir()
        link_runner(
            find_toolchain(),
            entry=entry,
            objects=objects,
            arch=self.soc.arch,
            out=out / RUNNER,
        )
        return [*link(self, program, entry, objects, out), Artifact(RUNNER, RUNNER_ROLE)]

    monkeypatch.setattr(CpuTarget, "link", link_both)
    out = tmp_path / "bundle"
    compile_bundle(configure(spinquant.model, out, verify=False), SilentProgress())
    return out


class Process:
    """Runs bundles of this machine in a process of their own."""

    def check(self, bundle: Path, manifest: Manifest) -> None:
        assert (bundle / RUNNER).exists()

    def open(self, bundle: Path, manifest: Manifest, level: str | None) -> RemoteModel:
        command = [str(bundle / manifest.file(RUNNER_ROLE)), "--serve"]
        return RemoteModel(command, str(bundle / manifest.file("weights")), level)


def test_every_step_is_compared_as_in_this_process(spinquant: Built, with_runner: Path) -> None:
    """The same kernels on the same inputs: equal to the last bit, whoever holds the memory."""
    manifest = read_manifest(with_runner)
    here = partial(
        open_library,
        with_runner / manifest.file("library"),
        with_runner / manifest.file("weights"),
    )
    reports = [
        verify_library(
            spinquant.program,
            opener,
            spinquant.checkpoint,
            scale_dtype="float16",
            kv_dtype="float16",
            tokens=spinquant.tokens,
            all_functions=True,
        )
        for opener in (here, partial(Process().open, with_runner, manifest))
    ]
    assert reports[1].passed
    assert reports[0].operations == reports[1].operations
    # libm of musl and of glibc may differ in a last bit.
    assert reports[0].nll_library == pytest.approx(reports[1].nll_library, abs=1e-6)


def test_a_bundle_is_verified_on_the_machine_that_is_given(
    spinquant: Built, with_runner: Path
) -> None:
    report = verify_bundle(with_runner, spinquant.model, machine=Process())
    assert report.passed
