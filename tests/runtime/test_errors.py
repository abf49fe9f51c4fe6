"""The error tree: classes, the drawing in the module, and docs/errors.md agree."""

from __future__ import annotations

import re
from collections.abc import Iterator
from pathlib import Path

import pytest

from llamac.runtime import errors
from llamac.runtime.errors import LlamacError
from llamac.runtime.status import error_of_status


def classes(root: type[LlamacError] = LlamacError) -> Iterator[type[LlamacError]]:
    """All classes of the tree that are defined in the module."""
    yield root
    for child in root.__subclasses__():
        if child.__module__ == errors.__name__:
            yield from classes(child)


CODES = {kind.__name__: kind.code for kind in classes() if kind.code}


def test_codes_are_stable_words_and_differ() -> None:
    assert len(set(CODES.values())) == len(CODES)
    assert all(re.fullmatch(r"[a-z]+(-[a-z]+)*", code) for code in CODES.values())


def test_only_classes_with_children_have_no_code() -> None:
    """An error without a code cannot be looked up."""
    for kind in classes():
        assert bool(kind.__subclasses__()) != bool(kind.code), kind


def test_the_drawing_is_the_tree() -> None:
    """Every class is drawn under its parent, with its code."""
    assert errors.__doc__ is not None
    drawn, parents = {}, {0: "LlamacError"}
    for line in errors.__doc__.splitlines():
        if match := re.match(r"    ([│ ]*)[├└]── (\w+) +(\(abstract|[a-z-]+)", line):
            depth = len(match[1]) // 4 + 1
            parents[depth] = match[2]
            code = "" if match[3].startswith("(") else match[3]
            drawn[match[2]] = (parents[depth - 1], code)
    actual = {kind.__name__: (kind.__bases__[0].__name__, kind.code) for kind in classes()}
    del actual["LlamacError"]
    assert drawn == actual


def test_the_page_has_a_full_section_for_every_code(checkout: Path) -> None:
    """With the class, and meaning, cause and fix; and no section without a code."""
    page = (checkout / "docs" / "errors.md").read_text("utf-8")
    sections = re.split(r"^### ", page, flags=re.MULTILINE)[1:]
    described = {}
    for section in sections:
        code, name, *_ = section.replace("`", "").split()
        described[name] = code
        assert re.findall(r"^\* \*\*(\w+)\.\*\*", section, re.MULTILINE) == [
            "Meaning",
            "Cause",
            "Fix",
        ], code
    assert described == CODES


def test_errors_carry_what_a_user_needs() -> None:
    error = errors.ContextFull("9 tokens", cause="short", fix="less")
    assert (error.message, error.cause, error.fix) == ("9 tokens", "short", "less")
    assert str(error) == "[context-full] 9 tokens"
    with pytest.raises(TypeError):
        LlamacError("no cause")  # type: ignore[call-arg]


def test_every_status_of_the_c_interface_has_an_error(checkout: Path) -> None:
    """With the message of the library; one that nobody knows is an error of the device."""
    header = (checkout / "runtime" / "c" / "llamac.h").read_text("utf-8")
    numbers = [int(number) for number in re.findall(r"LLAMAC_ERROR_\w+ = (\d+)", header)]
    assert numbers == list(range(1, 10))
    for number in numbers:
        error = error_of_status(number, "what happened")
        assert error.message == "what happened"
        assert f"status {number}" not in error.cause
    assert isinstance(error_of_status(9, ""), errors.AcceleratorError)
    assert "status 10" in error_of_status(10, "").cause
