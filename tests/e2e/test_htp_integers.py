"""Bundles whose layers the HTP computes in integers, on Qualcomm's library for x86-64."""

from __future__ import annotations

import importlib.util
from collections.abc import Callable
from pathlib import Path

import pytest

from llamac.compiler.verify import verify_bundle
from llamac.runtime import load
from llamac.runtime.manifest import read_manifest
from llamac.targets.stand_in import find_stand_in

PROMPT = "Tell me a story about a fox."
NUM_TOKENS = 24

pytestmark = pytest.mark.skipif(
    importlib.util.find_spec("onnxruntime_qnn") is None,
    reason="optional extra: pip install 'llamac[qnn]' (Qualcomm's licence)",
)


@pytest.fixture(scope="module")
def stories(
    compiled: Callable[..., Path], tiny: Path, tmp_path_factory: pytest.TempPathFactory
) -> Path:
    """A text that the float model tells, to calibrate with."""
    path = tmp_path_factory.mktemp("text") / "stories.txt"
    with load(compiled(tiny / "bf16"), threads=1) as model:
        parts = []
        for animal in ("fox", "dog", "bird"):
            with model.session() as session:
                prompt = f"Tell me a story about a {animal}."
                parts.append(prompt + "".join(session.generate(prompt, max_tokens=120)))
    path.write_text("\n".join(parts), "utf-8")
    return path


def bundle_of(compiled: Callable[..., Path], model: Path, soc: str, text: Path) -> Path:
    """Decode and one prefill length on the HTP in integers."""
    return compiled(
        model,
        target=soc,
        processors=("cpu", "htp"),
        chunks=(8,),
        context_length=256,
        scheme="a16w4",
        calibration=text,
    )


@pytest.mark.parametrize(
    ("soc", "form"), [("sm8350", "spinquant"), ("sm8650", "qlora"), ("sm8650", "bf16")]
)
def test_every_step_and_a_text_equal_the_reference(
    soc: str, form: str, compiled: Callable[..., Path], tiny: Path, stories: Path
) -> None:
    """v68 has this scheme alone; a float model becomes int4 in it."""
    bundle = bundle_of(compiled, tiny / form, soc, stories)
    manifest = read_manifest(bundle)
    assert manifest.scheme is not None
    assert (manifest.scheme.name, manifest.scheme.weights) == ("a16w4", "lpbq")
    dtypes = {t.name.split(".")[-1]: t.dtype for t in manifest.graphs[0].inputs}
    assert (dtypes["hidden"], dtypes["k_cache"]) == ("uint16", "int8")
    assert all(t.scale for graph in manifest.graphs for t in (*graph.inputs, *graph.outputs))
    report = verify_bundle(
        bundle,
        tiny / form,
        max_tokens=24,
        calibration=stories.read_text("utf-8"),
        machine=find_stand_in(manifest.graphs),
    )
    assert report.passed, report.failures
    graphs = [o for o in report.operations if o.family == "graph"]
    assert {o.function for o in graphs} == {"decode", "prefill_8"}


def test_it_tells_a_story(compiled: Callable[..., Path], tiny: Path, stories: Path) -> None:
    """Words of the model's world, and not of noise."""
    bundle = bundle_of(compiled, tiny / "spinquant", "sm8350", stories)
    with (
        load(bundle, threads=1, machine=find_stand_in(read_manifest(bundle).graphs)) as model,
        model.session() as session,
    ):
        text = "".join(session.generate(PROMPT, max_tokens=NUM_TOKENS))
    assert "fox named" in text, text
