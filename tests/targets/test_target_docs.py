"""The pages about targets say what the code does."""

from __future__ import annotations

import re
import tomllib
from dataclasses import fields, is_dataclass
from pathlib import Path

import pytest

from llamac.targets.soc import load_soc
from llamac.tools import soc_report


@pytest.fixture
def page(checkout: Path) -> str:
    """docs/adding-a-target.md."""
    return (checkout / "docs" / "adding-a-target.md").read_text("utf-8")


def test_the_toml_of_the_page_is_valid_and_has_every_key(page: str, tmp_path: Path) -> None:
    """Whoever copies it has a file that loads, and no key is a secret."""
    path = tmp_path / "xy1234.toml"
    path.write_text(re.findall(r"```toml\n(part = .*?)```", page, re.DOTALL)[0], "utf-8")
    soc = load_soc(path)
    tables = [soc, *(getattr(soc, field.name) for field in fields(soc))]
    tables += [row for rows in (soc.processors, soc.clusters, soc.levels) for row in rows]
    for table in tables:
        if is_dataclass(table):
            absent = [f.name for f in fields(table) if getattr(table, f.name) in (None, ())]
            assert not absent, f"{type(table).__name__} lacks {absent}"


def test_listings_are_the_files_of_the_example(page: str, checkout: Path) -> None:
    """Each listing under a `file:` mark stands in that file, word for word."""
    listings = re.findall(r"<!-- file: (\S+) -->\n```\w+\n(.*?)```", page, re.DOTALL)
    assert len(listings) == 3
    for name, code in listings:
        assert code in (checkout / name).read_text("utf-8"), name


def test_the_table_of_socs_is_what_the_command_prints(checkout: Path) -> None:
    """The stars of the command are left out: they depend on what is installed."""
    text = (checkout / "docs" / "targets" / "README.md").read_text("utf-8")
    socs, broken = soc_report.load_all()
    assert not broken
    rows = [" | ".join(soc_report.list_row(soc)).replace("*", "") for soc in socs]
    table = [line.strip("| ") for line in text.splitlines() if line.startswith("| ")]
    assert table[1 : 1 + len(rows)] == rows
    assert table[0] == " | ".join(soc_report.LIST_HEADER)


def test_every_plugin_of_ours_is_listed(checkout: Path) -> None:
    text = (checkout / "docs" / "targets" / "README.md").read_text("utf-8")
    listed = set(re.findall(r"\| \[?`([\w-]+)`", text)) - {"cpu", "hvx", "htp", "apu"}
    entries = tomllib.loads((checkout / "pyproject.toml").read_text("utf-8"))["project"]
    assert listed == set(entries["entry-points"]["llamac.targets"])
