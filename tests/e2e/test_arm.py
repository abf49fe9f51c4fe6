"""Arm bundles of the tiny model under QEMU: every level, chosen by what the CPU model has."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest

from llamac.compiler.verify import verify_bundle
from llamac.runtime import load
from llamac.runtime.errors import CpuUnsupported
from llamac.runtime.manifest import read_manifest
from llamac.targets.emulator import PROGRAM_VARIABLE, find_emulator

pytestmark = pytest.mark.needs("qemu-aarch64")

NUM_TOKENS = 48
# Where the two best logits are this close, relative to their spread, a level may choose the other
# one: levels and processors add floats in different orders.
NEAR_TIE = 1e-3

# CPU model -> the level that the library must choose by itself.
CPUS = {
    "cortex-a57": "neon",
    "cortex-a76": "dotprod",
    "neoverse-n1": "dotprod",
    "max,sve=off,sme=off": "i8mm",
    "max,sme=off,sve-default-vector-length=16": "i8mm",  # no longer than NEON's
    "max,sme=off,sve-default-vector-length=32": "sve",
    "max,sme=off,sve-default-vector-length=64": "sve",
    "max,sme=off,sve-default-vector-length=128": "i8mm",  # longer than a block of rows
}
# The same of a QEMU that computes outer products rightly. NEON traps in streaming mode.
SME_CPUS = {
    "max,sme_fa64=off,sme-default-vector-length=64": "sme",
    "max,sme_fa64=off,sme-default-vector-length=32,sve-default-vector-length=16": "i8mm",
}


def greedy(bundle: Path, cpu: str | None) -> tuple[str, list[int], list[np.ndarray]]:
    """Level, chosen tokens and logits of a short story; here (None) or on an emulated CPU."""
    machine = None if cpu is None else find_emulator(cpu)
    with load(bundle, threads=2, machine=machine) as model, model.session() as session:
        tokens, logits = [], []
        session.append(model.tokenizer.encode("Tell me a story about a fox.", bos=True))
        for _ in range(NUM_TOKENS):
            tokens.append(session.argmax())
            logits.append(session.logits)
            session.append(tokens[-1:])
        return model.info.level, tokens, logits


def assert_same_story(
    got: tuple[str, list[int], list[np.ndarray]], expected: tuple[str, list[int], list[np.ndarray]]
) -> None:
    """Equal tokens up to a step, if any, where the two best ones were as good as equal."""
    for place, (token, best) in enumerate(zip(got[1], expected[1], strict=True)):
        logits = expected[2][place]
        if token != best:
            margin = float(logits[best] - logits[token]) / float(logits.std())
            assert margin <= NEAR_TIE, f"token {place}: {token} and not {best}, {margin:.2e} apart"
            return
        difference = float(np.abs(got[2][place] - logits).max() / logits.std())
        assert difference < 0.2, f"token {place}: logits differ by {difference:.2e}"


@pytest.mark.parametrize("cpu", CPUS)
def test_each_cpu_gets_its_level_and_tells_the_host_s_story(
    cpu: str, arm_bundle: Callable[[str], Path], compiled: Callable[..., Path], tiny: Path
) -> None:
    got = greedy(arm_bundle("spinquant"), cpu)
    assert got[0] == CPUS[cpu]
    assert_same_story(got, greedy(compiled(tiny / "spinquant"), None))


@pytest.mark.parametrize("cpu", SME_CPUS)
def test_a_cpu_with_sme_gets_its_level_and_tells_the_host_s_story(
    cpu: str,
    sme_emulator: Path,
    monkeypatch: pytest.MonkeyPatch,
    arm_bundle: Callable[[str], Path],
    compiled: Callable[..., Path],
    tiny: Path,
) -> None:
    monkeypatch.setenv(PROGRAM_VARIABLE, str(sme_emulator))
    got = greedy(arm_bundle("spinquant"), cpu)
    assert got[0] == SME_CPUS[cpu]
    assert_same_story(got, greedy(compiled(tiny / "spinquant"), None))


@pytest.mark.parametrize("form", ["qlora", "bf16"])
def test_other_forms(
    form: str, arm_bundle: Callable[[str], Path], compiled: Callable[..., Path], tiny: Path
) -> None:
    got = greedy(arm_bundle(form), "cortex-a76")
    assert_same_story(got, greedy(compiled(tiny / form), None))


@pytest.mark.parametrize(
    ("level", "cpu"), [("i8mm", "max,sme=off"), ("dotprod", "cortex-a76"), ("neon", "cortex-a57")]
)
def test_every_operation_equals_the_reference(
    level: str, cpu: str, arm_bundle: Callable[[str], Path], tiny: Path
) -> None:
    """The level that the default CPU gets was verified when the bundle was compiled."""
    bundle = arm_bundle("spinquant")
    checked = read_manifest(bundle).verification
    assert checked.status == "passed"
    assert "qemu" in checked.where and checked.where.endswith(", level sve")
    machine = find_emulator(cpu)
    report = verify_bundle(bundle, tiny / "spinquant", level=level, machine=machine)
    assert report.passed, report.failures
    assert report.level == level


@pytest.mark.parametrize("form", ["spinquant", "qlora"])
def test_every_operation_equals_the_reference_with_sme(
    form: str,
    sme_emulator: Path,
    monkeypatch: pytest.MonkeyPatch,
    arm_bundle: Callable[[str], Path],
    tiny: Path,
) -> None:
    monkeypatch.setenv(PROGRAM_VARIABLE, str(sme_emulator))
    machine = find_emulator("max,sme_fa64=off,sme-default-vector-length=64")
    report = verify_bundle(
        arm_bundle(form), tiny / form, level="sme", machine=machine, all_functions=True
    )
    assert report.passed, report.failures


def test_a_level_that_the_cpu_lacks_is_refused(arm_bundle: Callable[[str], Path]) -> None:
    """Before any of its instructions could end the process."""
    with pytest.raises(CpuUnsupported, match="dotprod"):
        load(arm_bundle("spinquant"), level="dotprod", machine=find_emulator("cortex-a57"))
