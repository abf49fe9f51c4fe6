"""Files of safetensors: equal to what the format's own library writes, damaged ones refused."""

from __future__ import annotations

import json
import random
import struct
from collections.abc import Callable
from pathlib import Path
from types import ModuleType
from typing import Any

import numpy as np
import pytest

from llamac.compiler.frontends.safetensors_file import INDEX, open_safetensors
from llamac.runtime.errors import CheckpointMissing, CheckpointUnreadable, LlamacError

Change = Callable[[dict[str, Any]], object]


def tensors() -> dict[str, np.ndarray]:
    rng = np.random.default_rng(0)
    return {
        "a.weight": rng.standard_normal((3, 4)).astype(np.float32),
        "b.weight": rng.integers(-8, 8, (2, 8)).astype(np.int8),
        "c.weight": rng.standard_normal(5).astype(np.float16),
    }


@pytest.fixture
def folder(hf_layout: ModuleType, tmp_path: Path) -> Path:
    data = hf_layout.to_bytes({name: hf_layout.stored(a) for name, a in tensors().items()})
    (tmp_path / "model.safetensors").write_bytes(data)
    return tmp_path


def split(data: bytes) -> tuple[dict[str, Any], bytes]:
    (length,) = struct.unpack("<Q", data[:8])
    return json.loads(data[8 : 8 + length]), data[8 + length :]


def join(header: Any, data: bytes) -> bytes:
    text = header if isinstance(header, bytes) else json.dumps(header).encode()
    return struct.pack("<Q", len(text)) + text + data


def test_tensors_are_views_of_the_file(folder: Path) -> None:
    found = open_safetensors(folder).tensors
    for name, array in tensors().items():
        assert found[name].data.dtype == array.dtype
        assert not found[name].data.flags.owndata
        np.testing.assert_array_equal(found[name].data, array)


def test_files_of_the_library(tmp_path: Path) -> None:
    torch = pytest.importorskip("torch")
    library = pytest.importorskip("safetensors.torch")
    values = {
        "x": torch.randn(3, 5).to(torch.bfloat16),
        "y": torch.randint(-100, 100, (7,), dtype=torch.int32),
        "z": torch.randn(2, 2, dtype=torch.float64),
        "e": torch.empty(0),
    }
    library.save_file(values, tmp_path / "any-name.safetensors", metadata={"format": "pt"})
    found = open_safetensors(tmp_path)
    assert found.metadata == {"format": "pt"}
    for name, value in values.items():
        is_bits = value.dtype == torch.bfloat16
        expected = value.view(torch.uint16) if is_bits else value
        np.testing.assert_array_equal(found.tensors[name].data, expected.numpy())
    assert found.tensors["x"].dtype == "BF16"


def edit(change: Change) -> Callable[[bytes], bytes]:
    def run(data: bytes) -> bytes:
        header, rest = split(data)
        change(header)
        return join(header, rest)

    return run


def set_entry(**fields: Any) -> Callable[[bytes], bytes]:
    return edit(lambda header: header["b.weight"].update(fields))


def twice(data: bytes) -> bytes:
    header, rest = split(data)
    first = json.dumps(header["a.weight"])
    return join(b'{"a.weight": %s, "a.weight": %s}' % (first.encode(), first.encode()), rest)


DAMAGED: dict[str, tuple[str, Callable[[bytes], bytes]]] = {
    "empty": ("not readable", lambda data: b""),
    "shorter than a length": ("its header has", lambda data: data[:5]),
    "a header that is cut": ("its header has", lambda data: data[:50]),
    "a length that lies": ("its header has", lambda data: b"\xff" * 8 + data[8:]),
    "a length one too short": (
        "JSON is invalid",
        lambda data: struct.pack("<Q", len(json.dumps(split(data)[0])) - 9) + data[8:],
    ),
    "garbage": ("JSON is invalid", lambda data: join(b"\x00\xff{{", b"")),
    "deep": ("JSON is invalid", lambda data: join(b"[" * 100_000, b"")),
    "no object": ("header is no object", lambda data: join([1], b"")),
    "metadata": ("metadata are no", edit(lambda header: header.update(__metadata__={"a": 1}))),
    "a name twice": ("a name appears twice", twice),
    "data that are cut": ("ends 3 bytes behind", lambda data: data[:-3]),
    "data that are longer": ("3 bytes at its end", lambda data: data + b"abc"),
    "a dtype": ("has the dtype 'Q9'", set_entry(dtype="Q9")),
    "a dtype of another size": ("takes 64 bytes", set_entry(dtype="F32")),
    "a dtype that is none": ("has the dtype", set_entry(dtype=["F32"])),
    "a shape": ("takes 24 bytes", set_entry(shape=[3, 8])),
    "a shape that is none": ("an impossible shape", set_entry(shape="2")),
    "a negative shape": ("an impossible shape", set_entry(shape=[-2, -8])),
    "a shape of truth": ("an impossible shape", set_entry(shape=[True, 16])),
    "a huge shape": ("takes", set_entry(shape=[1 << 39] * 4)),
    "offsets behind it": ("bytes behind it", set_entry(data_offsets=[1 << 30, (1 << 30) + 16])),
    "offsets in reverse": ("its offsets are", set_entry(data_offsets=[64, 48])),
    "one offset": ("its offsets are", set_entry(data_offsets=[48])),
    "overlapping": ("overlap", set_entry(data_offsets=[40, 56])),
    "the same place": (
        "overlap",
        edit(lambda h: h.update(d=h["b.weight"])),
    ),
    "a gap": ("are 16 bytes apart", edit(lambda header: header.pop("b.weight"))),
    "an entry that is none": ("has the dtype missing", edit(lambda h: h.update(d=None))),
}


@pytest.mark.parametrize("name", DAMAGED)
def test_damaged_files(
    name: str, folder: Path, check_advice: Callable[[LlamacError], None]
) -> None:
    match, change = DAMAGED[name]
    path = folder / "model.safetensors"
    path.write_bytes(change(path.read_bytes()))
    with pytest.raises(CheckpointUnreadable, match=match) as caught:
        open_safetensors(folder)
    check_advice(caught.value)


def test_random_damage_is_refused_or_harmless(folder: Path) -> None:
    path, rng = folder / "model.safetensors", random.Random(0)
    whole = path.read_bytes()
    refused = 0
    for _ in range(500):
        data = bytearray(whole)
        for _ in range(rng.randint(1, 4)):
            data[rng.randrange(len(data) - 70)] = rng.randrange(256)
        path.write_bytes(data)
        try:
            found = open_safetensors(folder)
            assert sum(t.data.nbytes for t in found.tensors.values()) <= len(whole)
        except CheckpointUnreadable:
            refused += 1
    assert refused > 300


@pytest.fixture
def sharded(hf_layout: ModuleType, tmp_path: Path) -> Path:
    layout = hf_layout.Layout({}, {}, {})
    layout.tensors = {name: hf_layout.stored(a) for name, a in tensors().items()}
    written: Path = layout.write(tmp_path, shards=2)
    return written


def test_several_files(sharded: Path) -> None:
    found = open_safetensors(sharded).tensors
    assert found.keys() == tensors().keys()


def test_a_missing_file(sharded: Path, check_advice: Callable[[LlamacError], None]) -> None:
    (sharded / "model-00002-of-00002.safetensors").unlink()
    with pytest.raises(CheckpointMissing, match="model-00002-of-00002") as caught:
        open_safetensors(sharded)
    check_advice(caught.value)


def test_a_missing_index(sharded: Path) -> None:
    (sharded / INDEX).unlink()
    with pytest.raises(CheckpointMissing, match="2 files but no model"):
        open_safetensors(sharded)


def test_no_weights(tmp_path: Path) -> None:
    with pytest.raises(CheckpointMissing, match=r"no \*.safetensors"):
        open_safetensors(tmp_path)


HOSTILE = [
    "../model.safetensors",
    "/etc/passwd",
    "a/b.safetensors",
    "..\\b.safetensors",
    "model.pth",
    ".safetensors",
    "model-\n.safetensors",
    5,
    None,
    ["model.safetensors"],
]


@pytest.mark.parametrize("file", HOSTILE)
def test_hostile_indices(
    file: object, sharded: Path, check_advice: Callable[[LlamacError], None]
) -> None:
    index = json.loads((sharded / INDEX).read_text())
    index["weight_map"]["a.weight"] = file
    (sharded / INDEX).write_text(json.dumps(index))
    with pytest.raises(CheckpointUnreadable, match="which is no file beside it") as caught:
        open_safetensors(sharded)
    check_advice(caught.value)


@pytest.mark.parametrize("content", [b"", b"{", b"[]", b"{}", b'{"weight_map": 5}', b"\xff"])
def test_an_index_of_garbage(content: bytes, sharded: Path) -> None:
    (sharded / INDEX).write_bytes(content)
    with pytest.raises(CheckpointUnreadable, match="json is not readable"):
        open_safetensors(sharded)


def test_an_index_that_does_not_fit(sharded: Path) -> None:
    index = json.loads((sharded / INDEX).read_text())
    index["weight_map"]["d"] = "model-00001-of-00002.safetensors"
    (sharded / INDEX).write_text(json.dumps(index))
    with pytest.raises(CheckpointUnreadable, match="it lacks 'd'"):
        open_safetensors(sharded)


def test_a_tensor_in_two_files(sharded: Path, hf_layout: ModuleType) -> None:
    double = hf_layout.to_bytes({n: hf_layout.stored(a) for n, a in tensors().items()})
    (sharded / "model-00002-of-00002.safetensors").write_bytes(double)
    with pytest.raises(CheckpointUnreadable, match="is also in another file"):
        open_safetensors(sharded)
