"""manifest.json: what is read, what is refused, and that it comes back as it was written."""

from __future__ import annotations

import hashlib
import json
import re
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from llamac.runtime.digest import file_sha256, sample_sha256
from llamac.runtime.errors import BundleInvalid, BundleMissing, LlamacError
from llamac.runtime.manifest import (
    Manifest,
    parse_manifest,
    read_manifest,
)

SHA = "ab" * 32

DOCUMENT: dict[str, Any] = {
    "format": "llamac-bundle",
    "format_version": 1,
    "abi_version": 1,
    "build_id": SHA,
    "created_with": {"llamac": "0.1.0", "numpy": "2.4.6"},
    "model": {
        "name": "Llama-3.2-1B",
        "family": "llama",
        "dim": 2048,
        "num_layers": 16,
        "num_heads": 32,
        "num_kv_heads": 8,
        "head_dim": 64,
        "ffn_dim": 8192,
        "vocab_size": 128256,
        "norm_eps": 1e-5,
        "rope_theta": 500000.0,
        "rope_scaling": {
            "factor": 32.0,
            "low_freq_factor": 1.0,
            "high_freq_factor": 4.0,
            "original_context": 8192,
        },
        "context_length": 8192,
    },
    "quantization": {
        "form": "qlora",
        "weights": "int4 group-32",
        "scale_dtype": "float16",
        "activations": "int8 per token, asymmetric",
        "activation_rule": "torchao",
        "embedding": "int8 per channel",
        "output": "int8 per channel",
        "shared_embedding": False,
        "hadamard_r4": False,
        "lora": {"rank": 16, "scale": 2.0},
        "kv_cache": "float16",
        "notes": ["RoPE factor 32 was assumed"],
    },
    "tokenizer": {
        "file": "tokenizer.model",
        "format": "tiktoken",
        "pattern": "llama3",
        "special_tokens": {"<|begin_of_text|>": 128000, "<|eot_id|>": 128009},
        "bos_id": 128000,
        "stop_ids": [128001, 128008, 128009],
        "chat_template": "llama3",
    },
    "target": {
        "soc": "host",
        "plugin": "x86-cpu",
        "processors": ["cpu"],
        "arch": "x86_64",
        "os": "linux",
        "levels": [{"name": "avx512vnni", "features": ["avx512f", "avx512vnni"]}],
    },
    "memory": {
        "weights_bytes": 10,
        "kv_cache_bytes": 20,
        "arena_bytes": 30,
        "weight_bytes_per_token": 40,
    },
    "functions": [{"name": "prefill_128", "num_tokens": 128}, {"name": "decode", "num_tokens": 1}],
    "files": {
        "lib/libmodel.so": {"role": "library", "bytes": 1, "sha256": SHA},
        "weights.bin": {"role": "weights", "bytes": 10, "sha256": SHA, "sample_sha256": SHA},
        "tokenizer.model": {"role": "tokenizer", "bytes": 3, "sha256": SHA},
        "program.json": {"role": "program", "bytes": 0, "sha256": SHA},
    },
    "verification": {
        "status": "passed",
        "probe_tokens": 8,
        "operations": [{"name": "layers.0.wq", "sqnr_db": 41.5}],
        "nll": {"bundle": 2.5, "reference": 2.5},
        "where": "this machine",
    },
}


def changed(path: str, value: object) -> dict[str, Any]:
    """The document with one value replaced; parts of the path are separated by "/"."""
    document = json.loads(json.dumps(DOCUMENT))
    *parents, last = path.split("/")
    place = document
    for key in parents:
        place = place[int(key)] if isinstance(place, list) else place[key]
    place[last] = value
    return document


def without(path: str) -> dict[str, Any]:
    """The document without one key."""
    document = changed(path, None)
    *parents, last = path.split("/")
    place = document
    for key in parents:
        place = place[key]
    del place[last]
    return document


def parse(document: object) -> Manifest:
    return parse_manifest(json.dumps(document).encode())


def test_every_field_comes_back_as_it_was_written() -> None:
    """Reading and writing lose nothing, and the order of the fields is the documented one."""
    written = parse(DOCUMENT).to_json()
    assert json.loads(written) == DOCUMENT
    assert list(json.loads(written)) == list(DOCUMENT)


def test_reading_what_was_written_gives_an_equal_manifest() -> None:
    manifest = parse(DOCUMENT)
    assert parse_manifest(manifest.to_json().encode()) == manifest


def test_files_are_found_by_role() -> None:
    manifest = parse(DOCUMENT)
    assert manifest.file("library") == "lib/libmodel.so"
    assert manifest.libraries() == {None: "lib/libmodel.so"}
    assert manifest.file("weights") == "weights.bin"


def with_libraries(*flavours: str | None, **more: str) -> dict[str, Any]:
    """The document with one library for each flavour; None: without one."""
    document = json.loads(json.dumps(DOCUMENT))
    del document["files"]["lib/libmodel.so"]
    for index, flavour in enumerate(flavours):
        entry = DOCUMENT["files"]["lib/libmodel.so"] | more
        named = entry if flavour is None else {**entry, "flavour": flavour}
        document["files"][f"lib/{index}.so"] = named
    return document


def test_there_may_be_a_library_for_each_c_library() -> None:
    """Written as they were read, with what there is to know of them."""
    document = with_libraries("glibc", "musl", note="not loaded anywhere")
    manifest = parse(document)
    assert manifest.libraries() == {"glibc": "lib/0.so", "musl": "lib/1.so"}
    assert json.loads(manifest.to_json()) == document


def test_a_runner_may_stand_for_a_library() -> None:
    """A DSP's code is loaded by no process of this machine."""
    document = with_libraries()
    document["files"]["bin/llamac-runner"] = {"role": "runner", "bytes": 1, "sha256": "0" * 64}
    assert parse(document).libraries() == {}


@pytest.mark.parametrize(
    ("flavours", "problem"),
    [
        ((), "files has 0 files of role 'library'"),
        ((None, None), "files has 2 files of role 'library', not one of each flavour"),
        (("musl", "musl"), "not one of each flavour"),
        (("musl", "glibc", None), "files has 3 files of role 'library', not one of each flavour"),
        (("Musl 1",), "flavour is 'Musl 1'"),
        (("",), "flavour is ''"),
    ],
)
def test_two_libraries_must_not_be_for_the_same(
    flavours: tuple[str | None, ...], problem: str
) -> None:
    with pytest.raises(BundleInvalid, match=re.escape(problem)):
        parse(with_libraries(*flavours))


def test_only_libraries_have_flavours() -> None:
    with pytest.raises(BundleInvalid, match=r"weights\.bin'\]\.flavour is for libraries only"):
        parse(changed("files/weights.bin/flavour", "glibc"))


@pytest.mark.parametrize(
    "path",
    ["model/rope_scaling", "quantization/lora", "tokenizer/bos_id", "tokenizer/chat_template"],
)
def test_optional_values_may_be_null_but_not_absent(path: str) -> None:
    """A writer must say that a model has no chat template; forgetting it is an error."""
    parse(changed(path, None))
    with pytest.raises(BundleInvalid, match=f"{path.replace('/', '.')} is missing"):
        parse(without(path))


def test_unknown_fields_are_ignored() -> None:
    """So that a later version can add information without locking out this runtime."""
    parse(changed("model/nickname", "llama"))
    parse(changed("variants", []))


@pytest.mark.parametrize(
    ("path", "value", "problem"),
    [
        ("model", [], r"model is \[\], not an object"),
        ("model/dim", "2048", "model.dim is '2048', not a whole number"),
        ("model/dim", True, "model.dim is True, not a whole number"),
        ("model/dim", 2048.0, "model.dim is 2048.0, not a whole number"),
        ("model/dim", 0, "model.dim is 0, less than 1"),
        ("model/dim", 2**63, "model.dim does not fit into 64 bits"),
        ("model/norm_eps", "x" * 99, "model.norm_eps is 'xxx.*, not a finite number"),
        ("model/rope_theta", 2**2000, "model.rope_theta does not fit into 64 bits"),
        ("model/rope_scaling/factor", -1, "model.rope_scaling.factor is -1"),
        ("model/name", "", "model.name is ''"),
        ("model/name", "a\0", "model.name holds a character that is not text"),
        ("model/name", "\ud800", "model.name holds a character that is not text"),
        ("quantization/shared_embedding", 1, "shared_embedding is 1, not true or false"),
        ("quantization/notes/0", 1, r"quantization.notes\[0\] is 1, not a string"),
        ("tokenizer/stop_ids", {}, "tokenizer.stop_ids is {}, not a list"),
        ("tokenizer/stop_ids", [128256], r"tokenizer.stop_ids\[0\] is 128256, beyond the 128256"),
        ("tokenizer/bos_id", 999999, "tokenizer.bos_id is 999999, beyond"),
        ("tokenizer/special_tokens/<|eot_id|>", 200000, "eot_id.* is 200000, beyond"),
        ("tokenizer/special_tokens/<|eot_id|>", -1, "eot_id.* is -1, less than 0"),
        ("tokenizer/file", "weights.bin", "tokenizer.file is not the file of role 'tokenizer'"),
        ("build_id", SHA.upper(), "build_id is .*, which is not of the form"),
        ("memory/arena_bytes", -1, "memory.arena_bytes is -1, less than 0"),
        ("functions", [{"name": "p", "num_tokens": 8}], "functions has none that evaluates one"),
        ("files/weights.bin/sha256", "ab", "sha256 is 'ab', which is not of the form"),
        ("files/weights.bin/sample_sha256", None, "sample_sha256 is missing"),
        ("files/program.json/role", "weights", "files has 2 files of role 'weights'"),
        ("files/weights.bin/role", "library", "files has 2 files of role 'library'"),
        ("abi_version", None, "abi_version is None, not a whole number"),
    ],
)
def test_wrong_values_are_named(path: str, value: object, problem: str) -> None:
    """The message has the place and the value."""
    with pytest.raises(BundleInvalid, match=problem):
        parse(changed(path.replace("notes/0", "notes"), [value] if "notes/0" in path else value))


@pytest.mark.parametrize(
    "name",
    ["../x", "/etc/passwd", "a/../../x", "", ".", "a//b", "a/", "./a", "a\\..\\b", "C:x", ".."],
)
def test_file_names_cannot_leave_the_bundle(name: str) -> None:
    document = changed("files/program.json", DOCUMENT["files"]["program.json"])
    document["files"][name] = document["files"].pop("program.json")
    with pytest.raises(BundleInvalid, match="is not a plain path inside the bundle"):
        parse(document)


@pytest.mark.parametrize(
    ("version", "fix"), [(2, "update llamac"), (0, "compile the model again"), ("1", "compile")]
)
def test_other_format_versions_say_which_side_to_update(version: object, fix: str) -> None:
    """The version is looked at first: a later one may have none of the fields of today."""
    document = {"format": "llamac-bundle", "format_version": version}
    with pytest.raises(BundleInvalid, match="this runtime reads 1") as info:
        parse(document)
    assert fix in info.value.fix


@pytest.mark.parametrize(
    "data",
    [
        b"",
        b"{",
        b"\xff\xfe",
        b"[" * 100_000,
        b"[]",
        b"null",
        b'{"format": "zip"}',
        b'{"format": "llamac-bundle", "format_version": true}',
        b'{"format": "llamac-bundle", "format_version": ' + b"9" * 5000 + b"}",
    ],
)
def test_what_is_no_manifest_is_refused(data: bytes) -> None:
    with pytest.raises(BundleInvalid):
        parse_manifest(data)


def test_not_a_number_is_refused() -> None:
    """Python's JSON reader accepts NaN."""
    with pytest.raises(BundleInvalid, match="norm_eps is nan"):
        parse(changed("model/norm_eps", float("nan")))


def test_missing_bundles_say_what_is_missing(tmp_path: Path) -> None:
    with pytest.raises(BundleMissing) as info:
        read_manifest(tmp_path / "nothing")
    assert "is not a folder" in info.value.cause
    with pytest.raises(BundleMissing) as info:
        read_manifest(tmp_path)
    assert "manifest.json does not exist" in info.value.cause
    (tmp_path / "file").touch()
    with pytest.raises(BundleMissing):
        read_manifest(tmp_path / "file")


def test_unreadable_manifest_is_invalid(tmp_path: Path) -> None:
    (tmp_path / "manifest.json").mkdir()
    with pytest.raises(BundleInvalid, match="cannot be read"):
        read_manifest(tmp_path)


def test_huge_manifest_is_refused_before_it_is_read(tmp_path: Path) -> None:
    with (tmp_path / "manifest.json").open("wb") as file:
        file.truncate(1 << 40)
    with pytest.raises(BundleInvalid, match="larger than 16 MiB"):
        read_manifest(tmp_path)


JSON = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats() | st.text(),
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.text(), inner, max_size=3),
    max_leaves=8,
)


def places(value: object, path: tuple[str | int, ...] = ()) -> list[tuple[str | int, ...]]:
    """Paths of all values inside a JSON value."""
    found = [path]
    if isinstance(value, dict):
        found += [p for key, inner in value.items() for p in places(inner, (*path, key))]
    if isinstance(value, list):
        found += [p for i, inner in enumerate(value) for p in places(inner, (*path, i))]
    return found


def is_read_or_refused(read: Callable[[], object]) -> None:
    """Anything but success or one of our own errors is a bug."""
    try:
        read()
    except LlamacError as error:
        assert error.cause and error.fix


@settings(max_examples=300, deadline=None)
@given(place=st.sampled_from(places(DOCUMENT)[1:]), value=JSON)
def test_any_mutated_value_is_read_or_refused(place: tuple[Any, ...], value: object) -> None:
    document = json.loads(json.dumps(DOCUMENT))
    parent = document
    for key in place[:-1]:
        parent = parent[key]
    parent[place[-1]] = value
    is_read_or_refused(lambda: parse_manifest(json.dumps(document).encode()))


@settings(max_examples=200, deadline=None)
@given(st.data())
def test_any_damaged_text_is_read_or_refused(data: st.DataObject) -> None:
    text = bytearray(json.dumps(DOCUMENT).encode())
    start = data.draw(st.integers(0, len(text)))
    end = data.draw(st.integers(start, min(len(text), start + 40)))
    text[start:end] = data.draw(st.binary(max_size=8))
    is_read_or_refused(lambda: parse_manifest(bytes(text)))


@settings(max_examples=100, deadline=None)
@given(JSON)
def test_any_json_is_read_or_refused(value: object) -> None:
    is_read_or_refused(lambda: parse_manifest(json.dumps(value).encode()))


def test_file_sha256_hashes_the_whole_file(tmp_path: Path) -> None:
    data = bytes(range(256)) * 10_000
    (tmp_path / "f").write_bytes(data)
    assert file_sha256(tmp_path / "f") == hashlib.sha256(data).hexdigest()


@pytest.mark.parametrize("num_bytes", [0, 1, 4096, 1 << 20, 5_000_000])
def test_sample_sha256_is_the_documented_sample(tmp_path: Path, num_bytes: int) -> None:
    """Defined by slices here, by seeking there; short files overlap and are still defined."""
    data = bytes(i * 31 % 251 for i in range(num_bytes))
    (tmp_path / "f").write_bytes(data)
    blocks = [data[: 1 << 20], data[max(0, num_bytes - (1 << 20)) :]]
    starts = [i * (num_bytes // 64) // 4096 * 4096 for i in range(64)]
    blocks += [data[start : start + 4096] for start in starts]
    assert sample_sha256(tmp_path / "f") == hashlib.sha256(b"".join(blocks)).hexdigest()
