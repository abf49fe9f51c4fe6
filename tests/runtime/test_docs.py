"""The examples of the pages about the runtime run."""

from __future__ import annotations

import re
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from llamac.runtime.manifest import Manifest, ModelEntry, QuantizationEntry, parse_manifest


@pytest.mark.parametrize("page", ["runtime.md", "errors.md"])
def test_examples_run(
    page: str,
    checkout: Path,
    make_bundle: Callable[..., Path],
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    """In order, in one namespace, on a small model under the name that the pages use."""
    bundle = make_bundle()
    bundle.rename(bundle.with_name("llama-1b-host"))
    monkeypatch.chdir(bundle.parent)
    text = (checkout / "docs" / page).read_text("utf-8")
    examples = re.findall(r"```python\n(.*?)```", text, re.DOTALL)
    assert examples
    names: dict[str, Any] = {}
    for example in examples:
        exec(compile(example, page, "exec"), names)
    if page == "runtime.md":
        assert "[context-full]" in capsys.readouterr().out
    if "model" in names:
        names["model"].close()


def test_every_field_of_the_manifest_is_described(checkout: Path, bundle: Path) -> None:
    """Names of all fields stand in the page about the format."""
    page = (checkout / "docs" / "bundle-format.md").read_text("utf-8")
    manifest = parse_manifest((bundle / "manifest.json").read_bytes())
    assert isinstance(manifest, Manifest)
    fields = set(Manifest.__dataclass_fields__)
    for kind in (ModelEntry, QuantizationEntry):
        fields |= set(kind.__dataclass_fields__)
    for part in (manifest.tokenizer, manifest.memory, manifest.target, manifest.verification):
        fields |= set(type(part).__dataclass_fields__)
    missing = {name for name in fields if not re.search(rf"\b{name}\b", page)}
    assert not missing
