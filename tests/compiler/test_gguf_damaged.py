"""GGUF files damaged by chance or on purpose are read or refused with an error of ours."""

from __future__ import annotations

import random
import resource
import struct
import tracemalloc
from collections.abc import Callable
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest

from llamac.compiler.checkpoint import Checkpoint
from llamac.compiler.frontends.gguf import from_gguf
from llamac.compiler.frontends.meta import from_meta
from llamac.runtime.errors import LlamacError

NUMBERS = (0, 1, 2, 8, 9, 31, 32, 255, 1 << 16, (1 << 31) - 1, 1 << 31, (1 << 32) - 1)
LARGE = (*NUMBERS, 1 << 32, 1 << 40, (1 << 63) - 1, 1 << 63, (1 << 64) - 32, (1 << 64) - 1)
Q4_0, Q8_0, BF16 = 2, 8, 30
MIB = 1 << 20


@pytest.fixture(scope="module")
def files(
    gguf_layout: ModuleType, meta_layout: ModuleType, tmp_path_factory: pytest.TempPathFactory
) -> list[bytes]:
    """The smallest model in three types, with a tokenizer of 8 tokens."""
    folder = tmp_path_factory.mktemp("gguf")
    meta_layout.write_checkpoint(folder, "float", config=meta_layout.SMALLEST)
    checkpoint = from_meta(folder)
    return [
        gguf_layout.make_layout(checkpoint, types, table).to_bytes()
        for types, table in ((Q4_0, Q8_0), (BF16, BF16), (Q8_0, Q4_0))
    ]


def mutate(data: bytes, chance: random.Random) -> bytes:
    """One to four changes, most of them where the structure is."""
    spoiled = bytearray(data)
    for _ in range(chance.choice((1, 1, 1, 2, 4))):
        end = min(len(spoiled), 4096) if chance.random() < 0.8 else len(spoiled)
        place = chance.randrange(max(1, end))
        kind = chance.randrange(7)
        if kind == 0:
            spoiled[place : place + 1] = chance.randbytes(1)
        elif kind == 1:
            spoiled[place : place + 4] = struct.pack("<I", chance.choice(NUMBERS))
        elif kind == 2:
            spoiled[place : place + 8] = struct.pack("<Q", chance.choice(LARGE))
        elif kind == 3:
            spoiled[place : place + 1] = bytes([(spoiled[place] + chance.choice((1, -1))) & 255])
        elif kind == 4:
            del spoiled[place : place + chance.choice((1, 4, 8, 32))]
        elif kind == 5:
            spoiled[place:place] = chance.randbytes(chance.choice((1, 4, 8, 32)))
        elif chance.random() < 0.3:
            del spoiled[place:]
        if not spoiled:
            return b""
    return bytes(spoiled)


@pytest.fixture(scope="module")
def opens_or_refuses(
    check_advice: Callable[[LlamacError], None], read_all: Callable[[Checkpoint], object]
) -> Callable[[Path, bool], bool]:
    """Open a file and read all of it; only a proper error of ours may stop that."""

    def attempt(path: Path, requantize: bool) -> bool:
        try:
            read_all(from_gguf(path, requantize=requantize))
        except LlamacError as error:
            check_advice(error)
            return False
        return True

    return attempt


def run(
    files: list[bytes], folder: Path, attempt: Callable[[Path, bool], bool], seeds: range
) -> int:
    """Try a mutation for each seed; returns how many were accepted."""
    accepted = 0
    path = folder / "m.gguf"
    for seed in seeds:
        chance = random.Random(seed)
        path.unlink(missing_ok=True)  # earlier files may still be mapped
        path.write_bytes(mutate(chance.choice(files), chance))
        try:
            accepted += attempt(path, chance.random() < 0.3)
        except BaseException:
            print("seed", seed)
            raise
    return accepted


def test_the_files_themselves_are_read(
    files: list[bytes], tmp_path: Path, opens_or_refuses: Callable[[Path, bool], bool]
) -> None:
    for data in files:
        path = tmp_path / "a.gguf"
        path.write_bytes(data)
        assert opens_or_refuses(path, False)
        assert opens_or_refuses(path, True)


def test_mutated_files_never_give_another_exception(
    files: list[bytes], tmp_path: Path, opens_or_refuses: Callable[[Path, bool], bool]
) -> None:
    """3,000 of them, within memory that is small beside what they claim."""
    before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    accepted = run(files, tmp_path, opens_or_refuses, range(3000))
    assert 100 < accepted < 2000  # neither all refused at the door, nor all harmless
    assert resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before < 64 << 10  # KiB


@pytest.mark.slow
def test_a_hundred_thousand_mutated_files(
    files: list[bytes], tmp_path: Path, opens_or_refuses: Callable[[Path, bool], bool]
) -> None:
    assert run(files, tmp_path, opens_or_refuses, range(10_000, 110_000)) > 5000


def test_memory_stays_within_twice_the_file(
    gguf_layout: ModuleType, meta_layout: ModuleType, tmp_path: Path, read_all: Any
) -> None:
    """Each tensor by itself, and what is kept beside them; the file is 6 MB."""
    config = meta_layout.replace(
        meta_layout.SMALLEST, dim=512, num_heads=8, num_kv_heads=8, head_dim=64, ffn_dim=1536
    )
    meta_layout.write_checkpoint(tmp_path, "float", config=config)
    path = gguf_layout.make_layout(from_meta(tmp_path), BF16).write(tmp_path / "a.gguf")
    for requantize in (False, True):
        tracemalloc.start()
        try:
            checkpoint = from_gguf(path, requantize=requantize)
            for name in checkpoint.weights.names():
                checkpoint.weights.read(name)
            _, peak = tracemalloc.get_traced_memory()
        finally:
            tracemalloc.stop()
        assert peak < 2 * path.stat().st_size + 20 * MIB * requantize


@pytest.mark.parametrize("place", [8, 16])
def test_counts_that_the_file_could_hold_cost_little(place: int, tmp_path: Path) -> None:
    """A megabyte of zeros is 40,000 nameless tensors or fields: refused at the second."""
    data = bytearray(b"GGUF" + struct.pack("<IQQ", 3, 0, 0) + bytes(MIB))
    data[place : place + 8] = struct.pack("<Q", 40_000)
    path = tmp_path / "a.gguf"
    path.write_bytes(data)
    tracemalloc.start()
    try:
        with pytest.raises(LlamacError):
            from_gguf(path)
        assert tracemalloc.get_traced_memory()[1] < MIB
    finally:
        tracemalloc.stop()
