"""`llamac bench`: from times to speeds, one process per thread count, errors of that process."""

from __future__ import annotations

import json
import sys
from pathlib import Path

import pytest

from llamac.runtime.errors import BundleMissing, DeviceError
from llamac.runtime.manifest import Manifest
from llamac.tools import bench
from llamac.tools.cli import main
from llamac.tools.measure import Measurement, Request

REQUEST = Request(bundle="out", threads=2, prompt_tokens=100, decode_tokens=50, rounds=3)
MEASURED = Measurement(
    threads=2,
    level="avx2",
    load_s=0.01,
    prefill_s=[0.5, 0.4, 1.0],
    first_token_s=[0.6, 0.5, 1.1],
    decode_s=[2.0, 2.5, 1.0],
    bandwidth_gb_s=[0.05, 0.04, 0.06, 0.05],
    peak_resident_bytes=5 << 20,
    peak_anonymous_bytes=1 << 20,
    profile_ms={"gemv": 3.0, "rms_norm": 1.0},
)


def test_bench_turns_times_into_speeds_and_a_share(manifest: Manifest) -> None:
    """Speeds are medians; the share counts weights and the KV cache at the mean position."""
    result = bench.summarize(MEASURED, REQUEST, manifest)
    assert result["prefill_tokens_per_s"] == {"median": 200.0, "min": 100.0, "max": 250.0}
    assert result["decode_tokens_per_s"] == {"median": 25.0, "min": 20.0, "max": 50.0}
    # 128 bytes a position (1024 of them), at position 125.
    assert result["kv_bytes_per_token"] == 128 * 125
    assert result["decode_gb_s"] == pytest.approx(25 * (1_000_000 + 16_000) / 1e9)
    assert result["bandwidth_share"] == pytest.approx(25 * 1_016_000 / 1e9 / 0.05)


def test_bench_without_a_known_bandwidth_claims_no_share(manifest: Manifest) -> None:
    """A probe that the machine refused reads 0, and is not divided by."""
    measured = Measurement(**{**vars(MEASURED), "bandwidth_gb_s": [0.0]})
    assert bench.summarize(measured, REQUEST, manifest)["bandwidth_share"] is None


def test_bench_measures_each_thread_count_in_its_own_process(
    bundle: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """One request per thread count; --json is complete; the table shows the same."""
    requests: list[Request] = []

    def measure(request: Request) -> Measurement:
        requests.append(request)
        return Measurement(**{**vars(MEASURED), "threads": request.threads})

    monkeypatch.setattr(bench, "measure_in_child", measure)
    arguments = ["bench", str(bundle), "--threads", "1,2", "--rounds", "3", "--profile"]
    assert main([*arguments, "--json"]) == 0
    out, err = capsys.readouterr()
    document = json.loads(out)
    assert [request.threads for request in requests] == [1, 2]
    assert all(request.profile and request.rounds == 3 for request in requests)
    assert [run["threads"] for run in document["runs"]] == [1, 2]
    assert "2 threads" in err
    assert main(arguments) == 0
    table = capsys.readouterr().out
    assert "prefill, 128 tokens" in table
    assert "gemv      3.000 ms  75.0 %" in table


def test_bench_refuses_more_tokens_than_the_context(
    bundle: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """Said before anything runs."""
    assert main(["bench", str(bundle), "--prompt-tokens", "990"]) == 2
    assert "990 + 64 tokens do not fit" in capsys.readouterr().err


def test_bench_cannot_profile_without_names(
    bundle: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """A bundle without program.json can be measured, but not by operation."""
    path = bundle / "manifest.json"
    document = json.loads(path.read_text("utf-8"))
    del document["files"]["program.json"]
    path.write_text(json.dumps(document), "utf-8")
    assert main(["bench", str(bundle), "--profile"]) == 2
    assert "the bundle has no program.json" in capsys.readouterr().err


def test_an_error_in_the_measuring_process_keeps_its_code(tmp_path: Path) -> None:
    """The real child process meets a missing bundle and says so."""
    request = Request(**{**vars(REQUEST), "bundle": str(tmp_path / "none")})
    with pytest.raises(Exception, match="there is no bundle at") as caught:
        bench.measure_in_child(request)
    assert caught.value.code == BundleMissing.code  # type: ignore[attr-defined]
    assert caught.value.fix  # type: ignore[attr-defined]


def test_a_measuring_process_that_dies_is_an_error(monkeypatch: pytest.MonkeyPatch) -> None:
    """A crash in the library kills the child, not the command."""
    monkeypatch.setattr(sys, "executable", "false")
    with pytest.raises(DeviceError, match="ended with code 1"):
        bench.measure_in_child(REQUEST)
