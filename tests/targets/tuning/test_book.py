"""Look-up of records: exact, near, same core, default; user before shipped; what never fits."""

from __future__ import annotations

import math
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

from llamac.targets.tuning.book import (
    EXACT,
    NEAR,
    SAME_CORE,
    Query,
    RecordBook,
    open_book,
    shape_distance,
)
from llamac.targets.tuning.records import (
    SHIPPED,
    Place,
    Record,
    RecordFile,
    read_folder,
    write_records,
)

PLACE = Place("sm8650", "cortex-x4", "i8mm")
SHAPE = {"m": 128, "n": 2048, "k": 2048, "epilogue": "none"}
RECORD = Record(PLACE, "qmatmul", SHAPE, {"mr": 4}, "ok", 10.0, "time_us", template={"version": 1})


def book(*user: Record, shipped: tuple[Record, ...] = ()) -> RecordBook:
    return RecordBook([RecordFile(Path("u"), user)], [RecordFile(Path("s"), shipped)])


def query(valid: tuple[int, ...] = (1, 2, 4, 8), **shape: Any) -> Query:
    return Query(PLACE, "qmatmul", SHAPE | shape, 1, lambda knobs: knobs["mr"] in valid)


def found(records: RecordBook, *args: Any, **shape: Any) -> tuple[str, Any] | None:
    result = records.find(query(*args, **shape))
    return (result.origin, result.record.knobs["mr"]) if result else None


def of(mr: int, **changes: Any) -> Record:
    return replace(RECORD, knobs={"mr": mr}, **changes)


def test_without_records_there_is_nothing() -> None:
    assert found(book()) is None


def test_the_cheapest_record_of_the_shape_wins() -> None:
    assert found(book(RECORD, of(8, cost=9.0), of(2, cost=11.0))) == (EXACT, 8)


def test_the_newest_measurement_of_a_point_counts() -> None:
    """A lucky first measurement is forgotten when the point is measured again."""
    assert found(book(of(8, cost=1.0), RECORD, of(8, cost=20.0))) == (EXACT, 4)


def test_time_is_trusted_more_than_a_model() -> None:
    """Costs of different kinds are not compared: the better kind decides alone."""
    assert found(book(RECORD, of(8, cost=1.0, kind="cycles"))) == (EXACT, 4)
    assert found(book(of(2, kind="instructions"), of(8, kind="cycles"))) == (EXACT, 8)


@pytest.mark.parametrize("status", ["wrong", "failed"])
def test_a_wrong_candidate_is_never_chosen(status: str) -> None:
    """Even if it was right before, and cheaper."""
    assert found(book(RECORD, of(8, cost=1.0), of(8, cost=1.0, status=status))) == (EXACT, 4)
    assert found(book(of(8, cost=1.0, status=status))) is None


def test_the_nearest_shape_of_the_soc_is_next() -> None:
    far = of(2, shape=SHAPE | {"n": 8192})
    assert found(book(RECORD, far), n=4096) == (NEAR, 4)
    assert found(book(RECORD, far), n=16384) == (NEAR, 2)


def test_a_user_comes_before_what_is_shipped() -> None:
    """At each step; but an exact record that is shipped comes before a near one of the user."""
    near = of(2, shape=SHAPE | {"n": 1024})
    assert found(book(RECORD, shipped=(of(8, cost=1.0),))) == (EXACT, 4)
    assert found(book(near, shipped=(of(8),))) == (EXACT, 8)
    assert found(book(near, shipped=(of(8),)), n=512) == (NEAR, 2)


def test_the_same_core_of_another_soc_is_last() -> None:
    other = of(8, place=replace(PLACE, soc="sm8550"))
    assert found(book(other)) == (SAME_CORE, 8)
    assert found(book(other), n=1024) == (SAME_CORE, 8)
    assert found(book(other, of(2, shape=SHAPE | {"n": 512}))) == (NEAR, 2)
    assert found(book(replace(other, place=Place("sm8550", "cortex-x3", "i8mm")))) is None


def test_levels_and_families_have_nothing_in_common() -> None:
    assert found(book(of(8, place=replace(PLACE, level="dotprod")))) is None
    assert found(book(of(8, family="matmul"))) is None


def test_knobs_that_do_not_fit_are_passed_over() -> None:
    """The second best, or that of another shape, is taken instead."""
    assert found(book(RECORD, of(8, cost=1.0)), (1, 2, 4)) == (EXACT, 4)
    assert found(book(of(8), of(4, shape=SHAPE | {"n": 512})), (1, 2, 4)) == (NEAR, 4)
    assert found(book(of(8)), (1,)) is None


def test_records_of_another_version_are_hints() -> None:
    """They are used like those of another shape, and said to be."""
    old = replace(of(8), template={"version": 0})
    assert found(book(old)) == (NEAR, 8)
    assert found(book(old, RECORD)) == (EXACT, 4)


@pytest.mark.parametrize(
    ("changes", "distance"),
    [
        ({}, 0),
        ({"n": 4096}, 1),
        ({"n": 1024, "k": 8192}, 3),
        ({"m": 32}, 2),
        ({"m": 1}, math.inf),
        ({"epilogue": "swiglu"}, math.inf),
        ({"extra": 1}, math.inf),
    ],
)
def test_distance(changes: dict[str, Any], distance: float) -> None:
    """Logarithms of sizes; one token is no number of tokens, and words are equal or not."""
    assert shape_distance(SHAPE, SHAPE | changes) == distance
    assert shape_distance(SHAPE | changes, SHAPE) == distance


def test_distance_looks_into_nested_shapes_and_lists() -> None:
    """A cache and the projections of a LoRA branch count like other sizes; records have lists."""
    one = {"heads": 32, "cache": {"capacity": 512, "hvx": False}, "splits": (64, 32)}
    assert shape_distance(one, one | {"splits": [64, 32]}) == 0
    assert shape_distance(one, one | {"cache": {"capacity": 256, "hvx": False}}) == 1
    assert shape_distance(one, one | {"cache": {"capacity": 512, "hvx": True}}) == math.inf
    assert shape_distance(one, one | {"splits": (64, 64)}) == 1
    assert shape_distance(one, one | {"splits": (64,)}) == math.inf


def test_a_shape_too_far_away_says_nothing() -> None:
    assert found(book(RECORD), n=2048 << 5) == (NEAR, 4)
    assert found(book(RECORD), n=2048 << 6) is None


def test_the_users_folder_and_a_file_of_their_choice(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    """A file that is named takes the place of the folder."""
    monkeypatch.setenv("XDG_DATA_HOME", str(tmp_path))
    folder = tmp_path / "llamac" / "records"
    folder.mkdir(parents=True)
    write_records([RECORD], folder / "sm8650.jsonl")
    write_records([of(2)], tmp_path / "mine.jsonl")
    assert found(open_book()) == (EXACT, 4)
    assert found(open_book(tmp_path / "mine.jsonl")) == (EXACT, 2)


def test_damage_is_reported(tmp_path: Path) -> None:
    path = tmp_path / "r.jsonl"
    path.write_text(f'{RECORD.to_json()}\n{{"format": 1, "so', "utf-8")
    assert open_book(path).torn == {path: 1}
    assert open_book(path).notes() == ("records of r.jsonl: 1 damaged lines were skipped",)


def test_shipped_records_can_be_read() -> None:
    """Whole, and each file holds the SoC that it is named after."""
    for file in read_folder(SHIPPED):
        assert file.torn == 0
        assert {record.place.soc for record in file.records} <= {file.path.stem}
