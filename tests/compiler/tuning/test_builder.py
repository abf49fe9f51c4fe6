"""Whoever compiles candidates, they are the same; a compiler that dies is a failed candidate."""

from __future__ import annotations

import signal
from collections.abc import Iterator
from concurrent.futures import Executor, ProcessPoolExecutor
from multiprocessing import get_context
from typing import Any

import pytest

from llamac.compiler import executors
from llamac.compiler.tuning.builder import CRASHED, Builder, open_builder
from llamac.compiler.tuning.candidates import find_candidates
from llamac.compiler.tuning.kernels import ModelOptions, model_kernels
from llamac.compiler.tuning.problems import make_problem
from llamac.runtime.errors import ToolchainMissing, UsageError
from llamac.targets.tuning.measure import Candidate, Problem


@pytest.fixture(scope="module")
def problem() -> Problem:
    """A kernel with some points."""
    kernels = model_kernels("llama-3.2-1b", "host", "cpu", ModelOptions())
    level = kernels.level("avx2")
    return make_problem(kernels.tunable(level, "residual_1x2048x2048")[0], level)


@pytest.fixture(autouse=True)
def no_cache(monkeypatch: pytest.MonkeyPatch) -> None:
    """Every point is compiled."""
    monkeypatch.setenv("LLAMAC_KERNEL_CACHE", "0")


@pytest.fixture
def cluster() -> Iterator[str]:
    """A Dask scheduler with one worker, each as on a machine of its own."""
    distributed = pytest.importorskip("distributed")
    options = {"n_workers": 1, "threads_per_worker": 1, "dashboard_address": None}
    with distributed.LocalCluster(host="127.0.0.1", processes=True, **options) as found:
        yield found.scheduler_address.removeprefix("tcp://")


@pytest.fixture
def here(problem: Problem) -> Any:
    """What this process makes of it."""
    return find_candidates(problem, lambda done, points: None)


def test_processes_make_the_same_candidates(problem: Problem, here: Any) -> None:
    """In the same order, which decides what equal code is merged into."""
    seen: list[int] = []
    with open_builder("local[2]") as builder:
        found = find_candidates(problem, lambda done, points: seen.append(done), builder)
    assert found == here
    assert len(found.candidates) > 5
    assert seen == sorted(seen)
    assert seen[-1] == len(problem.spec.points(problem.isa))


@pytest.mark.filterwarnings("ignore::ResourceWarning")
def test_a_cluster_makes_the_same_candidates(problem: Problem, here: Any, cluster: str) -> None:
    with open_builder(f"dask://{cluster}") as builder:
        assert find_candidates(problem, lambda done, points: None, builder) == here


@pytest.mark.filterwarnings("ignore::ResourceWarning")
def test_a_cluster_with_another_compiler_is_refused(
    problem: Problem, cluster: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    own = executors.versions
    client = executors._cluster(cluster)
    client.shutdown()
    monkeypatch.setattr(executors, "PACKAGES", ("llamac",))
    with open_builder(f"dask://{cluster}") as builder, pytest.raises(UsageError) as error:
        find_candidates(problem, lambda done, points: None, builder)
    assert "compiles something else" in error.value.message
    assert own() == {"llamac": own()["llamac"]}


class Crashing(Executor):
    """Processes that one point takes down."""

    def __init__(self, marked: dict[str, Any]) -> None:
        self._inner = ProcessPoolExecutor(2, get_context("spawn"))
        self._marked = marked

    def submit(self, function: Any, /, *args: Any, **kwargs: Any) -> Any:
        if self._marked in args[-1]:
            return self._inner.submit(signal.raise_signal, signal.SIGKILL)
        return self._inner.submit(function, *args)

    def shutdown(self, wait: bool = True, *, cancel_futures: bool = False) -> None:
        self._inner.shutdown(wait, cancel_futures=cancel_futures)


def test_a_compiler_that_crashes_is_one_failed_point(problem: Problem, here: Any) -> None:
    """All others are compiled, also those that were in the same process."""
    points = problem.spec.points(problem.isa)
    with Builder(lambda: Crashing(points[2])) as builder:
        built = dict(
            (tuple(knobs.items()), result)
            for knobs, result in builder.build(problem.spec, problem.isa, points)
        )
    assert built.pop(tuple(points[2].items())) == CRASHED
    assert len(built) == len(points) - 1
    assert all(isinstance(result, Candidate) for result in built.values())


@pytest.mark.parametrize("text", ["", "remote", "local[0]", "local[]", "local[x]", "dask:1.2.3.4"])
def test_words_that_are_no_builder(text: str) -> None:
    with pytest.raises(UsageError):
        open_builder(text)


def test_a_cluster_that_is_not_there(problem: Problem, monkeypatch: pytest.MonkeyPatch) -> None:
    pytest.importorskip("distributed")
    monkeypatch.setattr(executors, "_DASK_SECONDS", 1)
    with open_builder("dask://127.0.0.1:9") as builder, pytest.raises(UsageError) as error:
        find_candidates(problem, lambda done, points: None, builder)
    assert "cannot be used" in error.value.message


def test_dask_is_optional(problem: Problem, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(__import__("sys").modules, "distributed", None)
    with open_builder("dask://127.0.0.1:9") as builder, pytest.raises(ToolchainMissing):
        find_candidates(problem, lambda done, points: None, builder)
