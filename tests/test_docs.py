"""The documentation is true: links lead somewhere, commands parse, options are described."""

from __future__ import annotations

import argparse
import re
import shlex
from collections.abc import Iterator
from pathlib import Path

import pytest

import llamac
from llamac.tools.cli import COMMANDS, build_parser

COMMON = {"--help", "--debug", "--plain", "--quiet", "--json"}


def pages(checkout: Path) -> list[Path]:
    """Return all pages in Markdown."""
    found = [
        *checkout.glob("*.md"),
        *checkout.glob("docs/**/*.md"),
        *checkout.glob("examples/**/*.md"),
    ]
    assert len(found) >= 5
    return found


def command_lines(page: Path) -> Iterator[str]:
    """Yield the lines of a page that call llamac, without comments, pipes and prompts."""
    for line in page.read_text("utf-8").splitlines():
        found = re.match(r"    (?:.*\| )?llamac\s+([^#|<>]+)", line)
        if found:
            yield found.group(1)


def subparsers(parser: argparse.ArgumentParser) -> dict[str, argparse.ArgumentParser]:
    """Return the parsers of the commands."""
    for action in parser._actions:
        if isinstance(action, argparse._SubParsersAction):
            return dict(action.choices)
    raise AssertionError("no commands")


def test_links_lead_to_files(checkout: Path) -> None:
    """A relative link names something that is in the repository."""
    broken = []
    for page in pages(checkout):
        for target in re.findall(r"\]\(([^)#]+)[^)]*\)", page.read_text("utf-8")):
            if not target.startswith("http") and not (page.parent / target).exists():
                broken.append(f"{page.relative_to(checkout)}: {target}")
    assert not broken


def test_command_lines_parse(checkout: Path) -> None:
    """Every line that a reader may copy is accepted by the parser."""
    lines = [line for page in pages(checkout) for line in command_lines(page)]
    assert len(lines) >= 10
    for line in lines:
        build_parser().parse_args(shlex.split(line))


@pytest.mark.parametrize("command", COMMANDS)
def test_every_option_is_described(command: str, checkout: Path) -> None:
    """docs/cli.md has a section per command that names each of its options."""
    text = (checkout / "docs" / "cli.md").read_text("utf-8")
    [section] = re.findall(rf"^## llamac {command}\b.*?(?=^## |\Z)", text, re.MULTILINE | re.DOTALL)
    actions = subparsers(build_parser())[command]._actions
    options = {max(action.option_strings, key=len) for action in actions if action.option_strings}
    missing = {option for option in options - COMMON if option not in section}
    assert missing <= {"--output"}  # -o, in the heading


def test_the_changelog_knows_the_version(checkout: Path) -> None:
    """A version that was released has an entry; until then there is the unreleased one."""
    text = (checkout / "CHANGELOG.md").read_text("utf-8")
    assert f"## [{llamac.__version__}]" in text or "## [Unreleased]" in text
