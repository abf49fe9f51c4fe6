"""Files that are no checkpoint, or that attack the reader."""

from __future__ import annotations

import io
import os
import pickle
import zipfile
from collections.abc import Callable
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest
import torch

from llamac.compiler.frontends.meta import from_meta
from llamac.runtime.errors import (
    CheckpointMissing,
    CheckpointUnreadable,
    CheckpointUnsafe,
    LlamacError,
    ModelUnsupported,
    TokenizerError,
)

Refused = Callable[..., LlamacError]


def test_missing_files_are_named(
    write_meta: Callable[..., Path], tmp_path: Path, refused: Refused
) -> None:
    refused(CheckpointMissing, "no checkpoint at", tmp_path / "nowhere")
    refused(CheckpointMissing, "no checkpoint at", tmp_path / "nowhere.pth")
    refused(CheckpointMissing, "no checkpoint at", tmp_path)
    folder = write_meta("float")
    (folder / "tokenizer.model").rename(tmp_path / "elsewhere")
    refused(TokenizerError, "no tokenizer at", folder)
    given_by_name = from_meta(folder, tokenizer=tmp_path / "elsewhere")
    assert given_by_name.tokenizer == tmp_path / "elsewhere"
    (folder / "params.json").unlink()
    refused(CheckpointMissing, "no params.json", folder)


def test_two_shards_are_unsupported(write_meta: Callable[..., Path], refused: Refused) -> None:
    folder = write_meta("float")
    (folder / "consolidated.01.pth").write_bytes(b"")
    refused(ModelUnsupported, r"2 \.pth files", folder)
    refused(ModelUnsupported, r"2 \.pth files", folder / "consolidated.00.pth")
    for old, new in (("00", "a"), ("01", "b")):
        (folder / f"consolidated.{old}.pth").rename(folder / f"{new}.pth")
    refused(ModelUnsupported, r"a\.pth, b\.pth", folder)
    assert from_meta(folder / "a.pth")


class _Attack:
    """Pickles into a call of os.system."""

    def __init__(self, target: Path) -> None:
        self.target = target

    def __reduce__(self) -> tuple[Any, ...]:
        return os.system, (f"touch {self.target}",)


class _Allocation:
    """Pickles into a call that torch's safe reader allows, and that fills the memory."""

    def __reduce__(self) -> tuple[Any, ...]:
        return bytearray, (1 << 50,)


def test_a_pickle_that_runs_code_is_refused_and_not_run(
    write_meta: Callable[..., Path], refused: Refused, meta_layout: ModuleType
) -> None:
    folder = write_meta("float")
    pth, mark = folder / "consolidated.00.pth", folder / "attacked"
    torch.save({"norm.weight": torch.zeros(3), "x": _Attack(mark)}, pth)
    refused(CheckpointUnsafe, r"system", folder)
    for protocol in range(pickle.HIGHEST_PROTOCOL + 1):
        meta_layout.replace_pickle(pth, pickle.dumps(_Attack(mark), protocol))
        refused(CheckpointUnsafe, r"asks Python to call", folder)
    torch.save({"x": _Allocation()}, pth)
    refused(CheckpointUnsafe, r"bytearray", folder)
    assert not mark.exists()


def test_an_attack_in_an_old_or_bare_pickle_is_not_run(
    write_meta: Callable[..., Path], refused: Refused
) -> None:
    folder = write_meta("float")
    pth, mark = folder / "consolidated.00.pth", folder / "attacked"
    torch.save({"x": _Attack(mark)}, pth, _use_new_zipfile_serialization=False)
    refused(CheckpointUnreadable, "not a torch zip archive", folder)
    pth.write_bytes(pickle.dumps({"x": _Attack(mark)}))
    refused(CheckpointUnreadable, "not a torch zip archive", folder)
    assert not mark.exists()


def other_zip() -> bytes:
    buffer = io.BytesIO()
    with zipfile.ZipFile(buffer, "w") as archive:
        archive.writestr("hello.txt", "hello")
    return buffer.getvalue()


def saved(content: Any, **options: Any) -> bytes:
    buffer = io.BytesIO()
    torch.save(content, buffer, **options)
    return buffer.getvalue()


@pytest.mark.parametrize(
    ("content", "message"),
    [
        (b"", "is empty"),
        (b"version https://git-lfs.github.com/spec/v1\n", "not a torch zip archive"),
        (bytes(100_000), "not a torch zip archive"),
        (other_zip(), "cannot be read as a torch checkpoint"),
        (saved({"a": torch.zeros(3)}, _use_new_zipfile_serialization=False), "not a torch zip"),
        (saved([torch.zeros(3)]), "holds a list"),
        (saved({"model": {"a": torch.zeros(3)}}), "not a flat dictionary"),
        (saved({3: torch.zeros(3)}), "not a flat dictionary"),
        (saved({"norm.weight": torch.zeros(1).expand(1 << 40)}), "lacks the data"),
    ],
)
def test_files_that_are_no_checkpoint_are_unreadable(
    content: bytes, message: str, write_meta: Callable[..., Path], refused: Refused
) -> None:
    folder = write_meta("float")
    (folder / "consolidated.00.pth").write_bytes(content)
    refused(CheckpointUnreadable, message, folder)


def test_compressed_records_are_refused(write_meta: Callable[..., Path], refused: Refused) -> None:
    """Their bytes in the map would be taken for weights."""
    folder = write_meta("float")
    pth = folder / "consolidated.00.pth"
    with zipfile.ZipFile(pth) as old:
        records = {entry.filename: old.read(entry) for entry in old.infolist()}
    with zipfile.ZipFile(pth, "w", zipfile.ZIP_DEFLATED) as new:
        for name, data in records.items():
            new.writestr(name, data)
    assert "compressed" in refused(CheckpointUnreadable, "cannot be read", folder).cause


def test_a_folder_in_place_of_the_file(write_meta: Callable[..., Path], refused: Refused) -> None:
    folder = write_meta("float")
    (folder / "consolidated.00.pth").unlink()
    (folder / "consolidated.00.pth").mkdir()
    refused(CheckpointUnreadable, "is a folder", folder)


def test_every_truncation_is_unreadable(write_meta: Callable[..., Path], refused: Refused) -> None:
    folder = write_meta("spinquant")
    pth = folder / "consolidated.00.pth"
    size = pth.stat().st_size
    for length in (size - 1, size - 22, size - 500, size // 2, 100, 4, 1):
        os.truncate(pth, length)
        refused(CheckpointUnreadable, "consolidated.00.pth", folder)
