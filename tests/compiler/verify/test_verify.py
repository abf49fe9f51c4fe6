"""Verification: right libraries pass, wrong ones are not written, bundles are told from others."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from llamac.compiler.blas import _find_controls, single_threaded_blas
from llamac.compiler.pipeline import compile_bundle
from llamac.compiler.progress import SilentProgress
from llamac.compiler.verify import probe_tokens, verify_bundle
from llamac.compiler.verify_text import WINDOW
from llamac.runtime.errors import BundleCorrupt, NumericsError, UsageError
from llamac.runtime.manifest import read_manifest
from llamac.targets.cpu import packing

Built = Any  # conftest.py

FAMILIES = {
    "spinquant": "embedding norm qmatmul rope attention quantize hadamard select "
    "qmatmul_int8 sampling",
    "qlora": "embedding norm lora qmatmul rope attention quantize select qmatmul_int8 sampling",
    "float": "embedding norm matmul rope attention select sampling",
}


@pytest.mark.parametrize("form", FAMILIES)
def test_a_right_library_passes_in_every_step(
    form: str, build: Callable[..., Built], qlora: Built
) -> None:
    built = qlora if form == "qlora" else build(form)
    report = built.verify(all_functions=True)
    assert report.failures == ()
    assert report.passed
    assert {o.family for o in report.operations} == set(FAMILIES[form].split())
    steps = {f.name: len(f.steps) for f in built.program.functions}
    assert len(report.operations) == sum(steps.values())
    assert {o.function for o in report.operations} == {"prefill_8", "prefill_16", "decode"}
    # Cache rows in float16 have 74 dB, and codes near ties may be one off.
    floats = [o for o in report.operations if o.family not in ("norm", "rope")]
    assert min(o.sqnr_db for o in floats) > 120
    assert max(o.max_error for o in report.operations) < 2e-6
    assert abs(report.nll_library - report.nll_reference) < 0.05
    assert report.agreement > 0.9


def test_by_default_the_smallest_chunk_and_decode_are_compared(spinquant: Built) -> None:
    report = spinquant.verify()
    assert [*dict.fromkeys(o.function for o in report.operations)] == ["prefill_8", "decode"]


def test_every_thread_count_passes(spinquant: Built) -> None:
    assert spinquant.verify(threads=3).failures == ()


def test_the_report_and_the_manifest_entry_are_plain_json(spinquant: Built) -> None:
    report = spinquant.verify()
    data = json.loads(json.dumps(report.to_json(), allow_nan=False))
    assert data["status"] == "passed"
    assert {"name", "function", "family", "sqnr_db", "max_error", "mismatched_codes"} <= set(
        data["operations"][0]
    )
    entry = report.to_manifest()
    assert (entry.status, entry.probe_tokens) == ("passed", len(spinquant.tokens))
    kernels = {(o.function, o.kernel) for o in report.operations}
    assert len(entry.operations) == len(kernels)
    worst = min(o.sqnr_db for o in report.operations)
    assert min(o.sqnr_db for o in entry.operations) == pytest.approx(worst, abs=0.1)
    assert entry.nll["agreement"] == report.agreement


def test_progress_rises_to_the_total(spinquant: Built) -> None:
    calls: list[tuple[str, int, int]] = []
    spinquant.verify(progress=lambda *call: calls.append(call))
    done = [call[1] for call in calls]
    assert done == sorted(done)
    assert done[-1] == calls[-1][2]
    assert any("layers.1.attention.wo" in call[0] for call in calls)


# -- compiling and bundles -----------------------------------------------------------------------


def test_compiling_refuses_to_write_a_bundle_that_is_wrong(
    spinquant: Built, configure: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    honest = packing.int4_ksum
    monkeypatch.setattr(packing, "int4_ksum", lambda codes, scales: honest(codes, scales) * 0.99)
    out = tmp_path / "out"
    with pytest.raises(NumericsError, match=r"layers\.0\.attention\.wq.*result\["):
        compile_bundle(configure(spinquant.model, out), SilentProgress())
    assert list(tmp_path.iterdir()) == []


def test_a_bundle_is_verified_with_its_own_tokenizer(spinquant: Built) -> None:
    report = verify_bundle(spinquant.bundle, spinquant.model, max_tokens=20)
    assert report.failures == ()
    assert report.text.num_tokens == 20
    stored = read_manifest(spinquant.bundle).verification
    assert stored.status == "passed"
    assert stored.nll["reference"] > 0


def test_a_text_of_several_windows_is_compared(spinquant: Built) -> None:
    report = verify_bundle(spinquant.bundle, spinquant.model, "The sea is wide. " * 9, 100)
    assert report.text.num_tokens == 100 > WINDOW
    assert report.passed


def test_a_text_is_cut_where_the_context_ends(spinquant: Built) -> None:
    report = verify_bundle(spinquant.bundle, spinquant.model, "The sea is wide. " * 99, 400)
    assert report.text.num_tokens == 160


def test_another_model_is_refused(spinquant: Built, without_r4: Built) -> None:
    with pytest.raises(UsageError, match="quantization"):
        verify_bundle(spinquant.bundle, without_r4.model)


def test_a_damaged_bundle_is_refused(spinquant: Built, tmp_path: Path) -> None:
    bundle = tmp_path / "bundle"
    shutil.copytree(spinquant.bundle, bundle)
    with (bundle / "weights.bin").open("r+b") as file:
        file.seek(5000)
        file.write(b"x")
    with pytest.raises(BundleCorrupt):
        verify_bundle(bundle, spinquant.model)


def test_a_text_without_two_tokens_is_refused(spinquant: Built) -> None:
    entry = read_manifest(spinquant.bundle).tokenizer
    assert len(probe_tokens(entry, spinquant.checkpoint, None, 16)) == 16
    with pytest.raises(UsageError, match="1 tokens"):
        probe_tokens(entry, spinquant.checkpoint, "", 16)


def test_products_run_on_one_thread_for_a_while() -> None:
    before = [get() for get, _ in _find_controls()]
    with single_threaded_blas():
        assert all(get() == 1 for get, _ in _find_controls())
    assert [get() for get, _ in _find_controls()] == before
