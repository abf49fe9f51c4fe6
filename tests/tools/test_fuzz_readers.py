"""The script that gives damaged models to the readers."""

from __future__ import annotations

import queue
from pathlib import Path

import pytest

from llamac.tools import fuzz_readers
from llamac.tools.fuzz_readers import Job, main, mutate, run_job


def test_copies_differ_and_come_again() -> None:
    data = bytes(range(256)) * 40
    copies = [mutate(data, seed) for seed in range(50)]
    assert copies == [mutate(data, seed) for seed in range(50)]
    assert len(set(copies)) > 45 and data not in copies[:5]
    assert {len(copy) == len(data) for copy in copies} == {True, False}


def test_a_folder_of_metas_is_refused_or_read(
    checkout: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """In children of its own; nothing is found."""
    model = checkout / "examples" / "tiny-llama" / "spinquant"
    assert main([str(model), "--files", "30"]) == 0
    out = capsys.readouterr().out
    assert out.startswith("spinquant: 30 copies, ") and "checkpoint-" in out
    assert out.endswith("nothing found\n")


@pytest.mark.parametrize("error", [IndexError("i"), MemoryError(), TimeoutError("5 s")])
def test_what_is_no_error_with_a_code_is_found(
    error: Exception, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    model = tmp_path / "model"
    model.write_bytes(bytes(100))
    calls = []

    def read(path: Path, tokenizer: Path | None) -> str:
        calls.append(path)
        if len(calls) == 3:
            raise error
        return "read"

    monkeypatch.setattr(fuzz_readers, "read_all", read)
    monkeypatch.setattr(fuzz_readers, "limit_memory", lambda _: None)
    results: queue.Queue[tuple[int, str]] = queue.Queue()
    run_job(Job(model, 5, 3, None), results)  # type: ignore[arg-type]
    found = [results.get() for _ in range(6)]
    assert [seed for seed, _ in found] == [5, 5, 6, 6, 7, 7]
    assert [what.partition(":")[0] for _, what in found[1::2]] == [
        "read",
        f"!{type(error).__name__}",
        "read",
    ]
