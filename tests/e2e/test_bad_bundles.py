"""Bundles that are not what they should be, and prompts that do not fit, through the commands."""

from __future__ import annotations

import json
import shutil
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from llamac.runtime import BundleError, load

Copy = Callable[[Path], Path]
Refused = Callable[..., str]


@pytest.fixture(scope="module")
def bundle(tiny: Path, compiled: Callable[..., Path]) -> Path:
    return compiled(tiny / "spinquant")


def edit_manifest(bundle: Path, edit: Callable[[dict[str, Any]], object]) -> None:
    path = bundle / "manifest.json"
    manifest = json.loads(path.read_text("utf-8"))
    edit(manifest)
    path.write_text(json.dumps(manifest), "utf-8")


def flip_byte(path: Path, offset: int) -> None:
    with path.open("r+b") as file:
        file.seek(offset)
        [value] = file.read(1)
        file.seek(offset)
        file.write(bytes([value ^ 1]))


def for_an_arm_phone(manifest: dict[str, Any]) -> None:
    """What the manifest of a bundle for a phone says, from the first field to the last."""
    manifest["target"] |= {"soc": "sm8650", "plugin": "arm-cpu", "arch": "aarch64", "os": "android"}
    manifest["target"]["levels"] = [{"name": "dotprod", "features": ["fp16", "dotprod"]}]


def wrong_hash(manifest: dict[str, Any]) -> None:
    manifest["files"]["tokenizer.model"]["sha256"] = "0" * 64


SPOILED: dict[str, tuple[str, Callable[[Path], object], str]] = {
    "no manifest": ("bundle-missing", lambda b: (b / "manifest.json").unlink(), "manifest.json"),
    "manifest cut off": (
        "bundle-invalid",
        lambda b: (b / "manifest.json").write_text('{"format": "llamac-bundle"'),
        "not JSON",
    ),
    "wrong hash": ("bundle-corrupt", lambda b: edit_manifest(b, wrong_hash), "0000"),
    "another CPU": ("cpu-unsupported", lambda b: edit_manifest(b, for_an_arm_phone), "aarch64"),
    "newer format": (
        "bundle-invalid",
        lambda b: edit_manifest(b, lambda m: m.update(format_version=2)),
        "2",
    ),
    "no tokenizer": ("bundle-corrupt", lambda b: (b / "tokenizer.model").unlink(), "missing"),
    "library cut off": (
        "bundle-corrupt",
        lambda b: (b / "lib/libmodel.so").write_bytes(b"\x7fELF"),
        "lib/libmodel.so has 4 bytes",
    ),
    "a byte of the library": (
        "bundle-corrupt",
        lambda b: flip_byte(b / "lib/libmodel.so", 5000),
        "lib/libmodel.so has sha256",
    ),
    "weights of nothing": (
        "bundle-corrupt",
        lambda b: (b / "weights.bin").write_bytes(bytes((b / "weights.bin").stat().st_size)),
        "does not start with the header",
    ),
}


@pytest.mark.parametrize("case", SPOILED)
def test_a_bad_bundle_has_its_own_error(
    case: str, bundle: Path, copied: Copy, refused: Refused
) -> None:
    error, spoil, words = SPOILED[case]
    spoiled = copied(bundle)
    spoil(spoiled)
    assert words in refused("run", spoiled, "Once upon a time", error=error)
    with pytest.raises(Exception) as raised:
        load(spoiled)
    assert getattr(raised.value, "code", None) == error


def test_a_folder_of_other_things_is_no_bundle(tmp_path: Path, refused: Refused) -> None:
    refused("run", tmp_path, "Hello", error="bundle-missing")
    refused("bench", tmp_path / "nowhere", error="bundle-missing")
    refused("inspect", tmp_path, error="bundle-missing")


def test_only_the_full_check_finds_one_bit(
    host_bundle: tuple[Path, object], copied: Copy, refused: Refused
) -> None:
    """A weight changed between two samples of the quick check."""
    spoiled = copied(host_bundle[0])
    weights = spoiled / "weights.bin"
    step = weights.stat().st_size // 64
    assert step * 64 > (2 << 20) + 2 * step and step > 3 * 4096
    load(spoiled, check="full").close()
    flip_byte(weights, step * 32 // 4096 * 4096 + 2 * 4096)
    load(spoiled).close()
    with pytest.raises(BundleError, match=r"weights\.bin has sha256"):
        load(spoiled, check="full")
    assert "weights.bin" in refused("inspect", spoiled, "--check", error="bundle-corrupt")


@pytest.mark.parametrize("file", ["lib/libmodel.so", "weights.bin"])
def test_files_of_two_bundles_do_not_mix(
    file: str, bundle: Path, tiny: Path, compiled: Callable[..., Path], copied: Copy
) -> None:
    """Even with hashes that fit: the library knows the build id of its weights."""
    other = compiled(tiny / "spinquant", chunks=(8,))
    mixed = copied(bundle)
    shutil.copy(other / file, mixed / file)
    entry = json.loads((other / "manifest.json").read_text("utf-8"))["files"][file]
    edit_manifest(mixed, lambda m: m["files"].update({file: entry}))
    for check in ("quick", "none"):
        with pytest.raises(BundleError) as raised:
            load(mixed, check=check)  # type: ignore[arg-type]
        assert raised.value.code == "bundle-corrupt"


def test_a_program_that_is_not_the_librarys(
    bundle: Path, tiny: Path, compiled: Callable[..., Path], copied: Copy, refused: Refused
) -> None:
    """program.json of another bundle is noticed by its hash when verifying."""
    mixed = copied(bundle)
    shutil.copy(compiled(tiny / "spinquant", chunks=(8,)) / "program.json", mixed / "program.json")
    printed = refused("verify", mixed, tiny / "spinquant", error="bundle-corrupt")
    assert "program.json" in printed


def test_verifying_against_another_model(bundle: Path, tiny: Path, refused: Refused) -> None:
    """The checkpoint must be the one that the bundle was compiled from."""
    assert "not that of the bundle" in refused("verify", bundle, tiny / "bf16", error="usage")


def test_prompts_that_do_not_fit(bundle: Path, refused: Refused) -> None:
    """Empty ones, and ones that are longer than the context: nothing is evaluated."""
    refused("run", bundle, "", error="usage")
    long = "Once upon a time there was a little fox. " * 100
    assert "512" in refused("run", bundle, long, "--no-chat", error="context-full")
    assert "512" in refused("run", bundle, long, error="context-full")


@pytest.mark.parametrize(
    ("arguments", "error"),
    [
        (("--threads", "0"), "usage"),
        (("--threads", "65"), "usage"),
        (("--level", "avx1024"), "usage"),
        (("--temperature", "-1"), "usage"),
        (("--max-tokens", "0"), "usage"),
    ],
)
def test_bad_options_of_run(
    arguments: tuple[str, ...], error: str, bundle: Path, refused: Refused
) -> None:
    refused("run", bundle, "Hello", *arguments, error=error)


def test_more_context_than_memory(
    bundle: Path, refused: Refused, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Before anything is mapped, the plan is compared with the free memory."""
    monkeypatch.setattr("llamac.runtime.system.available_memory", lambda: 50 << 20)
    assert "50 MiB are free" in refused("run", bundle, "Hello", error="out-of-memory")


def test_memory_that_the_system_refuses(bundle: Path) -> None:
    """The library asks for its KV cache at the limit of the process: an error, not a crash."""
    program = """
import resource, sys
from llamac.runtime import OutOfMemory, load
with load(sys.argv[1], check_memory=False) as model:
    used = int(open("/proc/self/statm").read().split()[0]) * resource.getpagesize()
    resource.setrlimit(resource.RLIMIT_AS, (used, used))
    try:
        model.session()
    except OutOfMemory as error:
        print(error.code)
"""
    done = subprocess.run(
        [sys.executable, "-c", program, str(bundle)], capture_output=True, text=True, check=False
    )
    assert done.stdout == "out-of-memory\n", done.stderr
