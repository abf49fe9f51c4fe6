"""What `load` accepts and refuses, and that its errors say what to do."""

from __future__ import annotations

import os
import shutil
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from numpy.testing import assert_array_equal

from llamac.runtime import (
    AbiMismatch,
    BundleCorrupt,
    BundleInvalid,
    BundleMissing,
    CpuUnsupported,
    LlamacError,
    OutOfMemory,
    TokenizerError,
    UsageError,
    checks,
    load,
    system,
)
from llamac.runtime.checks import WeightsHeader, verify_files
from llamac.runtime.library import Library
from llamac.runtime.manifest import read_manifest
from llamac.targets.toolchain import find_toolchain, link_shared

Maker = Callable[..., Path]


def flip(path: Path, offset: int) -> None:
    """Change one byte of a file."""
    data = bytearray(path.read_bytes())
    data[offset] ^= 1
    path.write_bytes(bytes(data))


def test_loaded_model_tells_what_it_is(bundle: Path) -> None:
    with load(bundle, threads=1) as model:
        assert model.info.model_name == "chain"
        assert model.info.level == "portable"
        assert (model.info.vocab_size, model.info.context_length) == (288, 96)
        assert model.info.max_chunk == 16
        assert model.info.kv_bytes == model.manifest.memory.kv_cache_bytes
        assert model.bundle == bundle


@pytest.mark.parametrize("check", ["quick", "full", "none"])
def test_good_bundles_pass_every_check(bundle: Path, check: Any) -> None:
    load(bundle, threads=1, check=check).close()


def test_bundle_may_be_given_as_text_and_relative(
    bundle: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The loader of libraries would search its own path for a name without a slash."""
    monkeypatch.chdir(bundle)
    load(".", threads=1).close()
    monkeypatch.chdir(bundle.parent)
    load(bundle.name, threads=1).close()


def test_missing_bundle(tmp_path: Path) -> None:
    with pytest.raises(BundleMissing, match="no bundle at"):
        load(tmp_path / "nothing")


@pytest.mark.parametrize("name", ["lib/libmodel.so", "tokenizer.model", "weights.bin"])
def test_missing_file(make_bundle: Maker, name: str) -> None:
    bundle = make_bundle()
    (bundle / name).unlink()
    with pytest.raises(BundleCorrupt, match=f"{name} is missing"):
        load(bundle)


@pytest.mark.parametrize("check", ["quick", "full", "none"])
@pytest.mark.parametrize("name", ["lib/libmodel.so", "tokenizer.model", "weights.bin"])
def test_truncated_file_is_found_by_every_check(make_bundle: Maker, name: str, check: Any) -> None:
    """Reading a mapped file behind its end would kill the process."""
    bundle = make_bundle()
    size = (bundle / name).stat().st_size
    os.truncate(bundle / name, size - 1)
    with pytest.raises(BundleCorrupt, match=f"{name} has {size - 1} bytes, .* says {size}"):
        load(bundle, check=check)


@pytest.mark.parametrize("name", ["lib/libmodel.so", "tokenizer.model", "weights.bin"])
def test_changed_file_is_found_by_its_hash(make_bundle: Maker, name: str) -> None:
    """The message has the hash that is and the one that should be."""
    bundle = make_bundle()
    expected = read_manifest(bundle).files[name]
    flip(bundle / name, -1)
    digest = expected.sample_sha256 or expected.sha256
    with pytest.raises(BundleCorrupt, match=f"{name} has sha256 .* says {digest}"):
        load(bundle)


def test_full_check_finds_what_the_sample_misses(make_bundle: Maker) -> None:
    """The sample covers all of a small file; its manifest is made to believe in the change."""
    bundle = make_bundle()
    old = read_manifest(bundle).files["weights.bin"].sha256
    flip(bundle / "weights.bin", 5000)
    make_bundle.write_manifest(bundle, lambda m: m["files"]["weights.bin"].update(sha256=old))
    verify_files(bundle, read_manifest(bundle))
    with pytest.raises(BundleCorrupt, match=r"weights\.bin has sha256"):
        verify_files(bundle, read_manifest(bundle), full=True)


def test_weights_of_another_build(make_bundle: Maker) -> None:
    bundle = make_bundle()
    flip(bundle / "weights.bin", 20)
    make_bundle.write_manifest(bundle)
    with pytest.raises(BundleCorrupt, match="belongs to build 636861696f"):
        load(bundle)
    with pytest.raises(BundleCorrupt, match="belongs to another build than the library"):
        load(bundle, check="none")


@pytest.mark.parametrize(
    ("content", "problem"),
    [(b"LLAMACWT", "cut off: it has 8 bytes"), (bytes(8192), "does not start with the header")],
)
def test_weights_without_header(make_bundle: Maker, content: bytes, problem: str) -> None:
    bundle = make_bundle()
    (bundle / "weights.bin").write_bytes(content)
    make_bundle.write_manifest(bundle)
    with pytest.raises(BundleCorrupt, match=problem):
        load(bundle)


def test_header_comes_back_as_it_was_written(tmp_path: Path) -> None:
    header = WeightsHeader("01" * 32, 12345)
    assert len(header.pack()) == 4096
    (tmp_path / "w").write_bytes(header.pack())
    assert WeightsHeader.read(tmp_path / "w") == header


def test_links_out_of_the_bundle_are_refused(make_bundle: Maker) -> None:
    """Of a file and of a folder on the way to it; links inside the bundle are fine."""
    bundle = make_bundle()
    outside = bundle.parent / "outside"
    shutil.copytree(bundle / "lib", outside)
    shutil.rmtree(bundle / "lib")
    (bundle / "lib").symlink_to(outside)
    with pytest.raises(BundleInvalid, match="leads out of the bundle"):
        load(bundle)
    (bundle / "lib").unlink()
    shutil.copytree(outside, bundle / "real")
    (bundle / "lib").symlink_to("real")
    load(bundle, threads=1).close()
    (bundle / "lib").unlink()
    (bundle / "lib").symlink_to("lib")
    with pytest.raises(BundleCorrupt):
        load(bundle)


def test_link_to_the_bundle_itself_is_fine(bundle: Path, tmp_path: Path) -> None:
    (tmp_path / "link").symlink_to(bundle)
    load(tmp_path / "link", threads=1).close()


def test_folder_in_place_of_a_file(make_bundle: Maker) -> None:
    bundle = make_bundle()
    (bundle / "tokenizer.model").unlink()
    (bundle / "tokenizer.model").mkdir()
    with pytest.raises(BundleCorrupt, match=r"tokenizer\.model is missing"):
        load(bundle)


def test_bundle_for_another_architecture_names_both(
    bundle: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(system, "machine", lambda: "riscv64")
    monkeypatch.setattr(system, "operating_system", lambda: "plan9")
    with pytest.raises(CpuUnsupported, match="this machine is riscv64 plan9") as info:
        load(bundle)
    assert read_manifest(bundle).target.arch in info.value.message
    assert "--emulate" in info.value.fix


def test_foreign_bundle_is_refused_before_its_library_is_loaded(make_bundle: Maker) -> None:
    foreign = make_bundle(change=lambda m: m["target"].update(arch="aarch64", os="android"))
    with pytest.raises(CpuUnsupported, match="for aarch64 android"):
        load(foreign)


@pytest.mark.parametrize(("version", "fix"), [(2, "update llamac"), (0, "compile the model")])
def test_other_abi_version_in_the_manifest(make_bundle: Maker, version: int, fix: str) -> None:
    with pytest.raises(AbiMismatch, match=f"ABI version {version}, this runtime 1") as info:
        load(make_bundle(change=lambda m: m.update(abi_version=version)))
    assert fix in info.value.fix


@pytest.mark.parametrize(
    ("source", "problem"),
    [
        ("unsigned llamac_abi_version(void) { return 7; }", "library has ABI version 7"),
        ("unsigned llamac_abi_version(void) { return 1; }", "lacks a function"),
        ("int nothing;", "lacks a function"),
    ],
)
def test_library_that_disagrees_with_the_manifest(
    tmp_path: Path, source: str, problem: str
) -> None:
    path, out = tmp_path / "old.c", tmp_path / "libmodel.so"
    path.write_text(f'__attribute__((visibility("default"))) {source}\n')
    link_shared(find_toolchain(), sources=[path], objects=[], include_dirs=[], out=out)
    with pytest.raises(AbiMismatch, match=problem):
        Library(out)


def test_library_that_is_no_library(make_bundle: Maker) -> None:
    bundle = make_bundle()
    (bundle / "lib" / "libmodel.so").write_bytes(b"not a library")
    make_bundle.write_manifest(bundle)
    with pytest.raises(BundleInvalid, match=r"libmodel\.so cannot be loaded"):
        load(bundle)


def test_manifest_that_disagrees_with_the_library(make_bundle: Maker) -> None:
    bundle = make_bundle(change=lambda m: m["model"].update(context_length=4096))
    with pytest.raises(BundleInvalid, match=r"\(288, 96\).*\(288, 4096\)"):
        load(bundle)


def test_level_is_chosen_by_the_cpu_or_by_name(bundle: Path) -> None:
    with load(bundle, threads=1, level="portable") as model:
        assert model.info.level == "portable"
    with pytest.raises(CpuUnsupported, match="this CPU lacks"):
        load(bundle, level="foreign")
    with pytest.raises(UsageError, match="no level 'mmx'") as info:
        load(bundle, level="mmx")
    assert "foreign, portable" in info.value.cause


def test_too_little_memory_is_refused_unless_overridden(
    bundle: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(system, "available_memory", lambda: 64 << 20)
    with pytest.raises(OutOfMemory, match="a session of chain needs 64 MiB, 64 MiB are free"):
        load(bundle)
    load(bundle, threads=1, check_memory=False).session().close()


def test_memory_is_checked_for_every_session(bundle: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    with load(bundle, threads=1) as model:
        monkeypatch.setattr(system, "available_memory", lambda: 0)
        with pytest.raises(OutOfMemory):
            model.session()


def test_unknown_free_memory_is_not_checked(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(system, "available_memory", lambda: None)
    checks.check_memory(1 << 60, "everything")


@pytest.mark.parametrize(
    ("arguments", "problem"),
    [
        ({"threads": 0}, "threads is 0"),
        ({"threads": 65}, "threads is 65"),
        ({"threads": 1.5}, "threads is 1.5"),
        ({"cpus": [9999]}, "cpus is"),
        ({"cpus": [0], "threads": 2}, "for 2 threads"),
        ({"check": "some"}, "check is 'some'"),
    ],
)
def test_wrong_arguments(bundle: Path, arguments: dict[str, Any], problem: str) -> None:
    with pytest.raises(UsageError, match=problem):
        load(bundle, **arguments)


@pytest.mark.parametrize("field", ["format", "pattern"])
def test_unknown_tokenizer_is_refused_at_load(make_bundle: Maker, field: str) -> None:
    bundle = make_bundle(change=lambda m: m["tokenizer"].update({field: "new"}))
    with pytest.raises(TokenizerError, match="unknown tokenizer format"):
        load(bundle)


def test_two_bundles_at_once(make_bundle: Maker, logits_after: Callable[..., Any]) -> None:
    """Libraries export the same names and must not get into each other's way."""
    with load(make_bundle(), threads=1) as one, load(make_bundle({2: 77}), threads=1) as two:
        first, second = one.session(), two.session()
        first.append([1, 2])
        second.append([1, 2])
        assert second.argmax() == 77
        assert_array_equal(first.logits, logits_after([1, 2]))


def test_load_of_a_full_size_bundle_is_fast(make_bundle: Maker, tmp_path: Path) -> None:
    """The quick check of a GB (a hole in the file here) reads a few MB of it."""
    big = tmp_path / "big"
    with big.open("wb") as file:
        file.truncate(1 << 30)
    start = time.process_time()
    checks.sample_sha256(big)
    with load(make_bundle(), threads=1):
        pass
    assert time.process_time() - start < 0.5


def test_errors_have_a_cause_and_a_fix(tmp_path: Path) -> None:
    with pytest.raises(LlamacError) as info:
        load(tmp_path)
    assert str(info.value).startswith("[bundle-missing] ")
    assert info.value.cause and info.value.fix


IMPORTS = """
import sys, time
start = time.process_time()
import llamac.runtime
took = time.process_time() - start
heavy = {"tvm", "tvm_ffi", "torch", "tiktoken", "llamac.compiler", "llamac.schedules",
         "llamac.targets", "llamac.tools", "rich"}
print(took, *sorted(heavy & set(sys.modules)))
"""


def test_import_is_fast_and_light() -> None:
    """Half a second of CPU time is the limit; the best of three counts."""
    times = []
    for _ in range(3):
        done = subprocess.run(
            [sys.executable, "-c", IMPORTS], capture_output=True, text=True, check=True
        )
        took, *heavy = done.stdout.split()
        assert not heavy
        times.append(float(took))
    assert min(times) < 0.5


def test_all_is_what_can_be_imported() -> None:
    """No name of __all__ is missing, and no public name is forgotten."""
    code = (
        "import types, llamac.runtime as r\n"
        "public = {n for n, v in vars(r).items() if n[0] != '_' and n != 'annotations'"
        " and not isinstance(v, types.ModuleType)}\n"
        "assert public == set(r.__all__), public ^ set(r.__all__)\n"
        "assert list(r.__all__) == sorted(r.__all__)\n"
    )
    subprocess.run([sys.executable, "-c", code], check=True)
