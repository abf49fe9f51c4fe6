"""The page shows what the records say, and nothing that a record could smuggle in."""

from __future__ import annotations

from dataclasses import replace
from html.parser import HTMLParser
from pathlib import Path

import pytest

from llamac.targets.tuning.records import Place, Record, write_records
from llamac.tools.cli import main

KERNEL = Record(
    place=Place("host", "x86-64", "avx2"),
    family="qmatmul",
    shape={"m": 8, "n": 64, "k": 128, "epilogue": "residual", "signed_scales": False},
    knobs={"mr": 1},
    status="ok",
    cost=200.0,
    kind="time_us",
    noise=0.01,
    device="a <b>CPU</b>",
    template={"version": 1, "hash": "new"},
    time="2026-11-27T12:00:00Z",
)
RECORDS = (
    replace(KERNEL, cost=1.0, template={"version": 1, "hash": "old"}),
    KERNEL,
    replace(KERNEL, knobs={"mr": 2}, cost=150.0, predicted=180.0),
    replace(KERNEL, knobs={"mr": 4}, cost=120.0, predicted=120.0),
    replace(KERNEL, knobs={"mr": 8}, status="wrong", cost=0.0, note="<script>alert(1)</script>"),
    replace(KERNEL, knobs={"mr": 4}, cost=160.0),
    replace(KERNEL, shape={"m": 1, "n": 64, "k": 128}, cost=10.0),
)


class Page(HTMLParser):
    """Tags and text of a page.

    Attributes:
        tags: names, in their order.
        words: texts, in their order.
        links: what the page would fetch or open.
    """

    def __init__(self, text: str) -> None:
        super().__init__()
        self.tags: list[str] = []
        self.words: list[str] = []
        self.links: list[str] = []
        self.feed(text)

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.tags.append(tag)
        self.links += [value or "" for name, value in attrs if name in ("src", "href")]

    def handle_data(self, data: str) -> None:
        self.words.append(data)


def report(tmp_path: Path, *records: Record) -> Page:
    path, out = tmp_path / "records.jsonl", tmp_path / "page.html"
    write_records(records, path)
    assert main(["tune", "report", "--records", str(path), "-o", str(out)]) == 0
    return Page(out.read_text("utf-8"))


def test_the_page_has_each_kernel_with_its_best(tmp_path: Path) -> None:
    """By the newest measurement of each point, of the newest generators."""
    page = report(tmp_path, *RECORDS)
    text = " ".join(page.words)
    assert "6 measurements of 2 kernels, of them 1 wrong." in text
    assert page.words.count("qmatmul m 8, n 64, k 128, residual") == 2
    assert "200 us 150 us 25.0 %" in text
    assert "10 us 10 us 0.0 %" in text
    assert "median error 20 %" in text
    assert page.tags.count("svg") == 3


def test_the_page_needs_nothing_else(tmp_path: Path) -> None:
    """No script, and no link but into itself; texts of records are texts."""
    page = report(tmp_path, *RECORDS)
    assert "script" not in page.tags
    assert "b" not in page.tags
    assert all(link.startswith("#k") for link in page.links)
    assert any("<script>" in words for words in page.words)
    assert "link" not in page.tags


def test_all_records_of_the_user(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """Or those of one SoC."""
    monkeypatch.setenv("XDG_DATA_HOME", str(tmp_path))
    folder = tmp_path / "llamac" / "records"
    folder.mkdir(parents=True)
    write_records([KERNEL], folder / "host.jsonl")
    other = replace(KERNEL, place=Place("rpi5", "cortex-a76", "dotprod"))
    write_records([other], folder / "rpi5.jsonl")
    page = str(tmp_path / "page.html")
    assert main(["tune", "report", "-o", page]) == 0
    assert "page.html: 2 kernels\n" in capsys.readouterr().err
    assert main(["tune", "report", "-o", page, "--target", "rpi5"]) == 0
    assert "page.html: 1 kernel\n" in capsys.readouterr().err


def test_nothing_to_report(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """Or nowhere to: an error, and no half page."""
    path = tmp_path / "records.jsonl"
    write_records([replace(KERNEL, status="failed", cost=0.0)], path)
    out = tmp_path / "page.html"
    assert main(["tune", "report", "--records", str(path), "-o", str(out)]) == 1
    assert "tuning-missing" in capsys.readouterr().err
    write_records([KERNEL], path)
    nowhere = str(tmp_path / "nowhere" / "page.html")
    assert main(["tune", "report", "--records", str(path), "-o", nowhere]) == 1
    assert "error[output]" in capsys.readouterr().err
    assert [found.name for found in tmp_path.iterdir()] == ["records.jsonl"]
