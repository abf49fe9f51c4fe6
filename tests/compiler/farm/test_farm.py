"""Measuring on a farm is measuring here, and no fault of a farm is charged to a candidate."""

from __future__ import annotations

import os
import re
import signal
import threading
import time
from collections.abc import Callable
from concurrent.futures import CancelledError
from dataclasses import replace
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest

from llamac.compiler.farm import measurer as measurer_module
from llamac.compiler.farm.canary import _macs
from llamac.compiler.farm.client import Lease
from llamac.compiler.farm.keys import target_of
from llamac.compiler.farm.measurer import FarmMeasurer, FarmOptions
from llamac.compiler.farm.tracker import request
from llamac.compiler.farm.trial import Trial, make_trial
from llamac.compiler.tuning.kernels import ModelOptions, model_kernels
from llamac.compiler.tuning.problems import make_problem
from llamac.runtime.errors import FarmUnreachable
from llamac.targets.tuning.emulated import AarchCounter, PacketCounter
from llamac.targets.tuning.measure import Candidate, Measurer, Problem

ARM, DSP, HOST = "sm8650-cortex-x4", "sm8650-v75", "host-x86-64"
CLIENT = """
import sys
from pathlib import Path
from llamac.compiler.farm.client import Lease
from llamac.compiler.farm.tracker import Address, request
port, key, path = sys.argv[1:]
with Lease(request(Address("127.0.0.1", int(port)), key, 30)) as lease:
    lease.measure(Path(path).read_bytes(), b"", 1, 60, 60)
"""
pytestmark = pytest.mark.needs("qemu-aarch64", "qemu-hexagon")


def problem_of(key: str) -> Problem:
    """The smallest product of a model, for the devices of a key."""
    target = target_of(key)
    processor = "hvx" if key == DSP else "cpu"
    kernels = model_kernels("llama-3.2-1b", target.soc.name, processor, ModelOptions())
    level = kernels.level(None)
    specs = [spec for spec in kernels.tunable(level) if _macs(spec)]
    return make_problem(min(specs, key=_macs), level)


def points(problem: Problem, count: int) -> list[Candidate]:
    """Some candidates."""
    return [Candidate(knobs, "") for knobs in problem.spec.points(problem.isa)[:count]]


def open_farm(farm: Any, key: str, **options: Any) -> FarmMeasurer:
    """Measure with the devices of a key."""
    target = target_of(key)
    waits = {"wait": 120.0, "seconds": 20.0, "grace": 20.0} | options
    chosen = FarmOptions(farm.tracker, key, **waits)
    return FarmMeasurer(chosen, target.arch, target.isas()[0].name, target.tuned_core)


@pytest.fixture
def replaced(monkeypatch: pytest.MonkeyPatch) -> Callable[..., None]:
    """Let candidates be other programs, or other calls, than those of their kernel."""

    def replace_with(**fields: Any) -> None:
        def make(*arguments: Any) -> Trial:
            trial = make_trial(*arguments)
            if "call" in fields:
                return replace(trial, call=replace(trial.call, **fields["call"]))
            return replace(trial, **fields)

        monkeypatch.setattr(measurer_module, "make_trial", make)

    return replace_with


def in_background(work: Callable[[], Any]) -> Callable[[], Any]:
    """Start something; what is returned waits for its result."""
    results: list[Any] = []
    thread = threading.Thread(target=lambda: results.append(work()), daemon=True)
    thread.start()

    def result() -> Any:
        thread.join(180)
        assert results, "it has not ended"
        return results[0]

    return result


def slow_call() -> dict[str, Any]:
    """A measurement of about four seconds, in the middle of which something may happen."""
    return {"rounds": 7, "sample_us": 300_000}


def _count_arm() -> AarchCounter:
    return AarchCounter(target_of(ARM).isas()[0], "cortex-x4")


@pytest.mark.parametrize(
    ("key", "here", "count"),
    [
        (ARM, lambda: AarchCounter(target_of(ARM).isas()[0], "cortex-x4"), 6),
        (DSP, PacketCounter, 1),
    ],
    ids=["arm", "hexagon"],
)
def test_counts_of_a_farm_are_those_of_this_machine(
    farm: Any, key: str, here: Callable[[], Measurer], count: int
) -> None:
    """Exactly, in the same unit; and all devices of the key have worked."""
    problem = problem_of(key)
    with here() as local, open_farm(farm, key) as remote:
        wanted = local.measure(problem, points(problem, count))
        found = remote.measure(problem, points(problem, count))
        assert remote.device == local.device
        assert remote.parallel == (2 if key == ARM else 1)
        devices = remote.devices()
    assert [device.is_busy for device in devices] == [False] * remote.parallel
    assert sum(device.trials for device in devices) == count
    assert found == wanted
    assert {measurement.status for measurement in found} == {"ok"}
    assert all(info["trials"] for info in farm.agents(key))


def test_time_of_a_device(farm: Any) -> None:
    """The program measures a kernel beside the default, which is as fast as itself."""
    problem = problem_of(HOST)
    with open_farm(farm, HOST) as remote:
        [default, other] = remote.measure(problem, points(problem, 2))
    assert default.kind == "time_us"
    assert 5 < default.cost < 1e5
    assert (default.status, other.status) == ("ok", "ok")


def test_a_wrong_result_is_wrong(farm: Any, replaced: Callable[..., None]) -> None:
    """A kernel that does only half of its items."""
    problem = problem_of(HOST)
    trial = make_trial(problem, problem.spec.points(problem.isa)[0], "time_us")
    replaced(call={"end": trial.call.end // 2})
    with open_farm(farm, HOST) as remote:
        [found] = remote.measure(problem, points(problem, 1))
    assert found.status == "wrong"
    assert found.note


@pytest.mark.parametrize("key", [ARM, HOST])
@pytest.mark.parametrize(
    ("name", "note"),
    [("crash", "SIG(ILL|TRAP)"), ("endless", "longer than 2 s"), ("large", "SIGXFSZ")],
)
def test_a_bad_kernel_costs_no_device(
    farm: Any, replaced: Any, bad_program: Any, key: str, name: str, note: str
) -> None:
    """It is tried twice and charged; its device's canary is right, and the device is free again."""
    before = {info["name"]: info["candidate_faults"] for info in farm.agents(key)}
    replaced(program=bad_program(name, key))
    problem = problem_of(key)
    with open_farm(farm, key, seconds=2.0) as remote:
        [found] = remote.measure(problem, points(problem, 1))
    assert found.status == "failed"
    assert re.search(note, found.note), found.note
    after = farm.wait_until_free(key, len(before))
    assert sum(info["candidate_faults"] - before[info["name"]] for info in after) == 2
    assert sum(info["device_faults"] for info in after) == 0


def test_an_agent_that_is_killed_comes_back(
    farm: Any, loopback: ModuleType, replaced: Callable[..., None]
) -> None:
    """In the middle of a measurement; its only device being gone, the trial waits for it."""
    replaced(call=slow_call())
    problem = problem_of(HOST)
    before = {info["name"] for info in farm.agents(HOST)}
    with open_farm(farm, HOST) as remote:
        result = in_background(lambda: remote.measure(problem, points(problem, 1)))
        program = loopback.eventually(lambda: farm.processes("program"))
        [parent] = {_parent(pid) for pid in program}
        os.kill(parent, signal.SIGKILL)
        assert loopback.eventually(lambda: not _is_alive(program[0])), "the program outlived it"
        [found] = result()
    assert found.status == "ok"
    assert {info["name"] for info in farm.wait_until_free(HOST)}.isdisjoint(before)


def test_an_agent_that_freezes_is_replaced(farm: Any, loopback: ModuleType) -> None:
    """One of two: what it was to measure is measured by the other."""
    problem = problem_of(ARM)
    names = {info["name"] for info in farm.wait_until_free(ARM, 2)}
    frozen = _parent_of_arm(farm, problem, loopback)
    with open_farm(farm, ARM, grace=3.0, seconds=2.0) as remote:
        os.kill(frozen, signal.SIGSTOP)
        found = remote.measure(problem, points(problem, 4))
    assert {measurement.status for measurement in found} == {"ok"}
    assert loopback.eventually(lambda: not _is_alive(frozen))
    now = {info["name"] for info in farm.wait_until_free(ARM, 2)}
    assert len(now & names) == 1


def test_a_device_that_freezes_is_not_the_candidates_fault(
    farm: Any, loopback: ModuleType, replaced: Callable[..., None]
) -> None:
    """Its program is stopped once: the second try is good."""
    replaced(call=slow_call())
    problem = problem_of(HOST)
    with open_farm(farm, HOST, seconds=8.0) as remote:
        result = in_background(lambda: remote.measure(problem, points(problem, 1)))
        [program] = loopback.eventually(lambda: farm.processes("program"))
        os.kill(program, signal.SIGSTOP)
        [found] = result()
    assert found.status == "ok"


@pytest.mark.parametrize("seconds", [3, pytest.param(90, marks=pytest.mark.slow)])
def test_a_tracker_that_goes_away_is_waited_for(farm: Any, seconds: int) -> None:
    """By agents and clients; what is being measured goes on."""
    problem = problem_of(ARM)
    with open_farm(farm, ARM) as remote:
        farm.stop_tracker()
        result = in_background(lambda: remote.measure(problem, points(problem, 4)))
        time.sleep(seconds)
        farm.start_tracker()
        found = result()
    assert {measurement.status for measurement in found} == {"ok"}
    for key, count in ((ARM, 2), (DSP, 1), (HOST, 1)):
        assert len(farm.wait_until_free(key, count)) == count


def test_a_client_that_is_killed_gives_its_device_back(
    farm: Any, loopback: ModuleType, bad_program: Any, tmp_path: Path
) -> None:
    """At once, although its program would never end."""
    path = tmp_path / "endless"
    path.write_bytes(bad_program("endless", HOST))
    arguments = (str(farm.tracker.port), HOST, str(path))
    client = loopback.start(CLIENT, *arguments, log=farm.folder / "client.log")
    [running] = loopback.eventually(lambda: farm.processes("program"))
    client.kill()
    client.wait()
    started = time.monotonic()
    assert loopback.eventually(lambda: not _is_alive(running), 10)
    farm.wait_until_free(HOST)
    assert time.monotonic() - started < 10


def test_a_tuner_that_is_interrupted_does_not_wait(
    farm: Any, loopback: ModuleType, replaced: Any, bad_program: Any
) -> None:
    """What it measured ends at once, and what waits for a device does not begin."""
    replaced(program=bad_program("endless", HOST))
    problem = problem_of(HOST)
    remote = open_farm(farm, HOST, seconds=60.0)
    errors: list[BaseException] = []

    def measure() -> None:
        try:
            remote.measure(problem, points(problem, 3))
        except (FarmUnreachable, CancelledError) as error:
            errors.append(error)

    thread = threading.Thread(target=measure)
    thread.start()
    loopback.eventually(lambda: farm.processes("program"))
    started = time.monotonic()
    remote.close()
    thread.join(20)
    assert time.monotonic() - started < 10
    assert len(errors) == 1
    farm.wait_until_free(HOST)


def test_a_client_that_never_comes_loses_its_lease(farm: Any) -> None:
    offer = request(farm.tracker, HOST, 30)
    assert offer is not None
    again = request(farm.tracker, HOST, 30)
    assert again is not None
    assert again.match != offer.match
    Lease(again).close()
    farm.wait_until_free(HOST)


def _parent(pid: int) -> int:
    with open(f"/proc/{pid}/stat", encoding="utf-8") as file:
        return int(file.read().rpartition(")")[2].split()[1])


def _is_alive(pid: int) -> bool:
    try:
        with open(f"/proc/{pid}/stat", encoding="utf-8") as file:
            return file.read().rpartition(")")[2].split()[0] != "Z"
    except OSError:
        return False


def _parent_of_arm(farm: Any, problem: Problem, loopback: ModuleType) -> int:
    """The process of an agent with an emulated Arm: the one whose port is offered there."""
    ports = {info["addr"][1] for info in farm.agents(ARM)}
    found = [pid for pid in farm.processes("agent") if _listens(pid) & ports]
    return found[0]


def _listens(pid: int) -> set[int]:
    """Ports that a process listens on."""
    inodes = set()
    for link in os.scandir(f"/proc/{pid}/fd"):
        target = os.readlink(link.path)
        if target.startswith("socket:["):
            inodes.add(target[8:-1])
    with open("/proc/net/tcp", encoding="ascii") as file:
        rows = [line.split() for line in file.readlines()[1:]]
    return {int(row[1].rpartition(":")[2], 16) for row in rows if row[9] in inodes}
