"""The file that says which layers stay bfloat16."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import pytest

from llamac.compiler.checkpoint import Checkpoint
from llamac.compiler.precision import read_precision
from llamac.runtime.errors import CoverageError, LlamacError, UsageError

Read = Callable[..., frozenset[str]]


@pytest.fixture
def read(tiny_float: Checkpoint, tmp_path: Path) -> Read:
    """read(text, rotate=False): the layers that stay bfloat16 in the example model."""

    def read(text: str, *, rotate: bool = False) -> frozenset[str]:
        path = tmp_path / "layers.toml"
        path.write_text(text, "utf-8")
        return read_precision(path, tiny_float.config, rotate=rotate)

    return read


def test_globs_name_layers_and_the_last_match_counts(read: Read) -> None:
    text = '"layers.0.*" = "bfloat16"\n"layers.?.feed_forward.w2" = "int4"\n"output" = "bfloat16"\n'
    found = read(text)
    attention = {f"layers.0.attention.{w}" for w in ("wq", "wk", "wv", "wo")}
    assert found == attention | {
        "layers.0.feed_forward.w1",
        "layers.0.feed_forward.w3",
        "output",
    }


def test_an_empty_file_changes_nothing(read: Read) -> None:
    assert read("") == frozenset()


@pytest.mark.parametrize(
    ("text", "match"),
    [
        ('"layers.9.*" = "bfloat16"', "matches no layer"),
        ('"layers.0.*" = "int2"', "not one of int4, int8, bfloat16"),
        ('layers.0.attention.wq = "bfloat16"', "is {'0'"),
        ("layers.0.* = ", "cannot be read"),
    ],
)
def test_what_is_no_rule_is_refused(
    read: Read, text: str, match: str, check_advice: Callable[[LlamacError], None]
) -> None:
    with pytest.raises(UsageError, match=match) as caught:
        read(text)
    check_advice(caught.value)


@pytest.mark.parametrize(
    ("text", "rotate", "match"),
    [
        ('"layers.*" = "int8"', False, "layers.0.attention.wq cannot be int8"),
        ('"output" = "int4"', False, "output cannot be int4"),
        ('"layers.1.attention.wq" = "bfloat16"', False, "of different forms"),
        ('"layers.1.feed_forward.w3" = "bfloat16"', False, "of different forms"),
        ('"*.w2" = "bfloat16"', True, "w2 cannot be bfloat16 in a rotated model"),
    ],
)
def test_forms_without_a_kernel_are_refused(
    read: Read, text: str, rotate: bool, match: str, check_advice: Callable[[LlamacError], None]
) -> None:
    with pytest.raises(CoverageError, match=match) as caught:
        read(text, rotate=rotate)
    check_advice(caught.value)


def test_a_missing_file_is_refused(tiny_float: Checkpoint, tmp_path: Path) -> None:
    with pytest.raises(UsageError, match="cannot be read"):
        read_precision(tmp_path / "none.toml", tiny_float.config, rotate=False)
