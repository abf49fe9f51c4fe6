"""Files of tuning records: what is written is read again, damage is skipped, others are refused."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest

from llamac.runtime.errors import OutputError, RecordsInvalid
from llamac.targets.tuning.records import (
    FORMAT,
    Place,
    Record,
    RecordWriter,
    read_folder,
    read_records,
    user_file,
    write_records,
)

RECORD = Record(
    place=Place("host", "x86-64", "avx2"),
    family="qmatmul",
    shape={"m": 8, "lora_splits": [16, 16]},
    knobs={"mr": 4, "mcpu": "generic"},
    status="ok",
    cost=12.5,
    kind="time_us",
    noise=0.01,
    code="ab",
    device="a CPU",
    template={"version": 1, "hash": "cd"},
    tools={"llamac": "0.1.0"},
    time="2026-01-01T00:00:00Z",
)


def write(path: Path, *records: Record) -> Path:
    writer = RecordWriter(path)
    writer.append(*records)
    writer.close()
    return path


def test_a_record_survives_the_file(tmp_path: Path) -> None:
    """Every field comes back, and the folder is made."""
    wrong = Record(**(vars(RECORD) | {"status": "wrong", "cost": 0.0, "note": "off by 3"}))
    path = write(tmp_path / "new" / "host.jsonl", RECORD, wrong)
    assert read_records(path).records == (RECORD, wrong)
    assert len(path.read_text("utf-8").splitlines()) == 2


def test_records_are_appended(tmp_path: Path) -> None:
    """A second run keeps what the first one wrote."""
    path = write(tmp_path / "r.jsonl", RECORD)
    before = path.read_bytes()
    write(path, RECORD)
    assert path.read_bytes() == 2 * before


@pytest.mark.parametrize("cut", [1, 20, 100])
def test_a_torn_line_is_skipped_and_counted(tmp_path: Path, cut: int) -> None:
    """Whatever half of the last line is there; what is appended later is whole."""
    path = write(tmp_path / "r.jsonl", RECORD, RECORD)
    path.write_bytes(path.read_bytes()[:-cut])
    torn = read_records(path)
    assert (len(torn.records), torn.torn) == ((2, 0) if cut == 1 else (1, 1))
    write(path, RECORD)
    assert len(read_records(path).records) == len(torn.records) + 1


def test_bytes_that_are_no_text_are_torn(tmp_path: Path) -> None:
    """A block that the disk lost is skipped too."""
    path = tmp_path / "r.jsonl"
    path.write_bytes(RECORD.to_json().encode() + b"\n" + b"\xff\0" * 40 + b"\n")
    assert read_records(path).torn == 1


@pytest.mark.parametrize(
    "text",
    [
        '{"format": 99}',
        '{"hello": 1}',
        "[1, 2]",
        "17",
        "not a record\n",
        RECORD.to_json().replace('"ok"', '"good"'),
        RECORD.to_json().replace('"time_us"', '"hours"'),
        RECORD.to_json().replace('"knobs":{', '"other":{'),
        RECORD.to_json().replace(f'"format":{FORMAT}', f'"format":{FORMAT + 1}'),
        RECORD.to_json().replace('"family"', '"new":1,"family"'),
    ],
)
def test_another_file_is_refused(tmp_path: Path, text: str) -> None:
    """Lines of JSON that are no records, and files without any record."""
    path = tmp_path / "r.jsonl"
    path.write_text(text, "utf-8")
    with pytest.raises(RecordsInvalid, match=r"r\.jsonl"):
        read_records(path)


def test_an_empty_file_has_no_records(tmp_path: Path) -> None:
    """It is what a run leaves that was stopped at once."""
    path = tmp_path / "r.jsonl"
    path.write_bytes(b"")
    assert read_records(path).records == ()
    assert read_folder(tmp_path / "none") == ()


def test_a_file_that_is_not_there(tmp_path: Path) -> None:
    """Reading names the path; so does writing where no folder can be."""
    with pytest.raises(RecordsInvalid, match="cannot be read"):
        read_records(tmp_path / "none.jsonl")
    (tmp_path / "file").write_text("")
    with pytest.raises(OutputError, match="cannot be written"):
        RecordWriter(tmp_path / "file" / "r.jsonl")


def test_a_whole_file_replaces_another(tmp_path: Path) -> None:
    """As the shipped records are written."""
    path = write(tmp_path / "r.jsonl", RECORD, RECORD)
    write_records([RECORD], path)
    assert read_records(path).records == (RECORD,)
    assert list(tmp_path.iterdir()) == [path]


def test_the_users_records_are_data(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    """They are where the system's rules say, and not in the cache."""
    monkeypatch.setenv("XDG_DATA_HOME", str(tmp_path))
    assert user_file("host") == tmp_path / "llamac" / "records" / "host.jsonl"
    monkeypatch.delenv("XDG_DATA_HOME")
    monkeypatch.setenv("HOME", str(tmp_path))
    found: Any = user_file("host").relative_to(tmp_path)
    assert str(found) == ".local/share/llamac/records/host.jsonl"
