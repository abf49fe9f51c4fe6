"""The container of GGUF: what a right file holds, and every way in which one may be wrong."""

from __future__ import annotations

import struct
import tracemalloc
from collections.abc import Callable
from pathlib import Path
from types import ModuleType
from typing import Any

import numpy as np
import pytest

from llamac.compiler.frontends.gguf_file import StringArray, is_gguf, open_gguf
from llamac.runtime.errors import (
    CheckpointMissing,
    CheckpointUnreadable,
    LlamacError,
    ModelUnsupported,
)

NEEDS_GGUF = "optional extra: the package gguf is not installed"
HEADER = 24  # bytes before the metadata


@pytest.fixture
def layout(gguf_layout: ModuleType) -> Any:
    """A file with a field of every kind and three tensors."""
    g = gguf_layout
    fields = {
        "general.architecture": (g.STRING, "llama"),
        "answer": (g.U32, 42),
        "half": (g.FLOAT, 0.5),
        "yes": (7, True),
        "huge": (10, (1 << 64) - 1),
        "negative": (g.I32, -3),
        "words": (g.ARRAY, g.Strings([b"a", b"", "\u0120the".encode()])),
        "numbers": (g.ARRAY, np.array([1, -2, 3], np.int32)),
    }
    values = np.arange(64, dtype=np.float32)
    tensors = {
        "vector": g.Tensor(g.F32, (64,), values.tobytes()),
        "matrix": g.Tensor(g.Q8_0, (2, 64), g.quantize_q8_0(np.stack([values, -values]))),
        "unknown": g.Tensor(23, (2, 256), bytes(272)),
    }
    return g.Layout(fields, tensors)


@pytest.mark.parametrize("version", [2, 3])
@pytest.mark.parametrize("alignment", [8, 32, 256])
def test_everything_is_read(
    layout: Any, gguf_layout: ModuleType, tmp_path: Path, version: int, alignment: int
) -> None:
    layout.version, layout.alignment = version, alignment
    layout.metadata["general.alignment"] = (gguf_layout.U32, alignment)
    file = open_gguf(layout.write(tmp_path / "a.gguf"))
    words = file.metadata.pop("words")
    assert isinstance(words, StringArray)
    assert list(words) == [b"a", b"", "\u0120the".encode()]
    assert len(words) == 3
    assert file.metadata.pop("numbers").tolist() == [1, -2, 3]
    assert file.metadata == {
        "general.architecture": "llama",
        "answer": 42,
        "half": 0.5,
        "yes": True,
        "huge": (1 << 64) - 1,
        "negative": -3,
        "general.alignment": alignment,
    }
    assert list(file.tensors) == ["vector", "matrix", "unknown"]
    for name, tensor in file.tensors.items():
        stored = layout.tensors[name]
        assert (tensor.shape, tensor.type_id) == (stored.shape, stored.type_id)
        assert (tensor.data is None) == (name == "unknown")
        if tensor.data is not None:
            assert tensor.data.tobytes() == stored.data
            assert not tensor.data.flags.writeable
    assert file.tensors["unknown"].type == "IQ4_XS"


def test_our_files_are_what_the_gguf_package_reads(layout: Any, tmp_path: Path) -> None:
    """Otherwise writer and reader of these tests could share a mistake."""
    gguf = pytest.importorskip("gguf", reason=NEEDS_GGUF)
    reader = gguf.GGUFReader(layout.write(tmp_path / "a.gguf"))
    assert reader.fields["answer"].contents() == 42
    assert reader.fields["words"].contents() == ["a", "", "\u0120the"]
    for tensor in reader.tensors:
        stored = layout.tensors[tensor.name]
        assert tuple(tensor.shape.tolist()) == stored.shape[::-1]
        assert tensor.data.tobytes() == stored.data


def test_files_of_the_gguf_package_are_read(tmp_path: Path) -> None:
    gguf = pytest.importorskip("gguf", reason=NEEDS_GGUF)
    writer = gguf.GGUFWriter(tmp_path / "b.gguf", "llama")
    writer.add_block_count(7)
    writer.add_token_list(["x", "yz"])
    values = np.random.default_rng(0).normal(size=(4, 64)).astype(np.float32)
    packed = gguf.quants.quantize(values, gguf.GGMLQuantizationType.Q5_0)
    writer.add_tensor("w", packed, raw_dtype=gguf.GGMLQuantizationType.Q5_0)
    writer.add_tensor("v", values)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    file = open_gguf(tmp_path / "b.gguf")
    assert file.metadata["llama.block_count"] == 7
    assert list(file.metadata["tokenizer.ggml.tokens"]) == [b"x", b"yz"]
    assert (file.tensors["w"].type, file.tensors["w"].shape) == ("Q5_0", (4, 64))
    for name, data in (("w", packed), ("v", values)):
        found = file.tensors[name].data
        assert found is not None
        assert found.tobytes() == data.tobytes()


def spoil(offset: int, data: bytes) -> Callable[[bytes], bytes]:
    return lambda content: content[:offset] + data + content[offset + len(data) :]


def u64(value: int) -> bytes:
    return struct.pack("<Q", value)


DAMAGES: dict[str, tuple[type[LlamacError], str, Callable[[bytes], bytes]]] = {
    "empty": (CheckpointUnreadable, "cannot be read", lambda c: b""),
    "another format": (CheckpointUnreadable, "does not begin", spoil(0, b"GGML")),
    "magic alone": (CheckpointUnreadable, "version at byte 4", lambda c: c[:4]),
    "version 1": (ModelUnsupported, "version 1", spoil(4, b"\1\0\0\0")),
    "version 4": (ModelUnsupported, "version 4", spoil(4, b"\4\0\0\0")),
    "big-endian": (ModelUnsupported, "big-endian", spoil(4, b"\0\0\0\3")),
    "tensors without end": (CheckpointUnreadable, "number of tensors", spoil(8, u64(1 << 63))),
    "fields without end": (CheckpointUnreadable, "number of metadata", spoil(16, u64(1 << 63))),
    "a key without end": (CheckpointUnreadable, "length of a key", spoil(HEADER, u64(1 << 60))),
    "a long key": (CheckpointUnreadable, "300 bytes long", spoil(HEADER, u64(300))),
    "a key of no text": (CheckpointUnreadable, "not UTF-8", spoil(HEADER + 8, b"\xff")),
    "a key with an escape": (CheckpointUnreadable, "printed", spoil(HEADER + 8, b"\x1b")),
    "an unknown type": (CheckpointUnreadable, "of type 99", spoil(HEADER + 28, b"\x63")),
    "an array of arrays": (
        CheckpointUnreadable,
        "elements of general.architecture",
        spoil(HEADER + 28, struct.pack("<II", 9, 9)),
    ),
    "cut in the metadata": (CheckpointUnreadable, "needs", lambda c: c[:150]),
    "cut in the data": (CheckpointUnreadable, "outside the file", lambda c: c[:-330]),
}


@pytest.mark.parametrize("name", DAMAGES)
def test_damage_is_refused(
    name: str, layout: Any, tmp_path: Path, check_advice: Callable[[LlamacError], None]
) -> None:
    kind, match, damage = DAMAGES[name]
    path = tmp_path / "a.gguf"
    path.write_bytes(damage(layout.to_bytes()))
    with pytest.raises(kind, match=match) as caught:
        open_gguf(path)
    assert type(caught.value) is kind
    check_advice(caught.value)


def entry(name: str, shape: list[int], type_id: int, offset: int) -> bytes:
    dimensions = struct.pack(f"<I{len(shape)}Q", len(shape), *shape)
    return u64(len(name)) + name.encode() + dimensions + struct.pack("<IQ", type_id, offset)


ENTRIES = {
    "no dimension": (r"a has 0 dimensions", [entry("a", [], 0, 0)]),
    "five dimensions": (r"a has 5 dimensions", [entry("a", [1] * 5, 0, 0)]),
    "an empty dimension": (r"dimensions \[4, 0\]", [entry("a", [4, 0], 0, 0)]),
    "a product without end": ("outside", [entry("a", [1 << 62] * 4, 0, 0)]),
    "half a block": ("48 columns", [entry("a", [48, 2], 2, 0)]),
    "a crooked offset": ("not aligned", [entry("a", [8], 0, 4)]),
    "an offset without end": ("outside", [entry("a", [8], 0, (1 << 64) - 32)]),
    "two of one name": ("appears twice", [entry("a", [8], 0, 0), entry("a", [8], 0, 32)]),
    "two in one place": ("a and b overlap", [entry("b", [8], 0, 32), entry("a", [16], 0, 0)]),
}


@pytest.mark.parametrize("name", ENTRIES)
def test_wrong_tensors_are_refused(name: str, tmp_path: Path) -> None:
    match, entries = ENTRIES[name]
    header = b"GGUF" + struct.pack("<IQQ", 3, len(entries), 0) + b"".join(entries)
    path = tmp_path / "a.gguf"
    path.write_bytes(header + bytes(-len(header) % 32) + bytes(64))
    with pytest.raises(CheckpointUnreadable, match=match):
        open_gguf(path)


@pytest.mark.parametrize("value", [(4, 0), (4, 24), (4, 1 << 20), (7, True), (8, "32")])
def test_a_wrong_alignment_is_refused(layout: Any, tmp_path: Path, value: Any) -> None:
    layout.metadata["general.alignment"] = value
    with pytest.raises(CheckpointUnreadable, match=r"general\.alignment"):
        open_gguf(layout.write(tmp_path / "a.gguf"))


def test_a_key_that_appears_twice_is_refused(layout: Any, tmp_path: Path) -> None:
    path = tmp_path / "a.gguf"
    layout.metadata["a"] = layout.metadata["b"] = (4, 1)
    path.write_bytes(layout.to_bytes().replace(u64(1) + b"b", u64(1) + b"a"))
    with pytest.raises(CheckpointUnreadable, match="the key a appears twice"):
        open_gguf(path)


@pytest.mark.parametrize("kind", ["strings", "numbers"])
def test_an_array_costs_no_more_than_its_file(
    layout: Any, gguf_layout: ModuleType, tmp_path: Path, kind: str
) -> None:
    """A hundred thousand empty strings, or a million numbers: views, and 8 bytes a string."""
    g = gguf_layout
    strings, numbers = g.Strings([b""] * 100_000), np.zeros(1_000_000, np.int32)
    layout.metadata["many"] = (g.ARRAY, strings if kind == "strings" else numbers)
    path = layout.write(tmp_path / "a.gguf")
    tracemalloc.start()
    try:
        file = open_gguf(path)
        _, peak = tracemalloc.get_traced_memory()
    finally:
        tracemalloc.stop()
    assert len(file.metadata["many"]) in (100_000, 1_000_000)
    assert peak < 1.5 * path.stat().st_size


def test_what_is_no_file_is_missing(tmp_path: Path) -> None:
    for path in (tmp_path, tmp_path / "nowhere.gguf"):
        assert not is_gguf(path)
        with pytest.raises(CheckpointMissing):
            open_gguf(path)


def test_a_file_is_told_by_its_content(layout: Any, tmp_path: Path) -> None:
    assert is_gguf(layout.write(tmp_path / "no-suffix"))
    (tmp_path / "b.gguf").write_bytes(b"something else")
    assert not is_gguf(tmp_path / "b.gguf")
