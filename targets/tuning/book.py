"""Look-up of records: which knobs a kernel gets, and how well they fit it.

    exact   a record of the same SoC, core, level, kernel family and shape
    near    of the nearest shape of the same SoC, core and level
    core    of the same core in another SoC: the same shape, else the nearest one
    default no record; the generator decides

At each step records of the user come before those that are shipped. Knobs are taken only if the
generator says that they are valid for the kernel.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from llamac.targets.tuning.records import (
    KINDS,
    SHIPPED,
    KnobValues,
    Place,
    Record,
    RecordFile,
    read_folder,
    read_records,
    same,
    user_folder,
)

# Sum over all sizes of |log2 of their ratio|; beyond it a shape says nothing of another one.
FARTHEST = 5.0
# A kernel for one token is bound by memory and has other knobs than one for many.
TOKEN_FIELDS = ("m", "tokens")

EXACT, NEAR, SAME_CORE, DEFAULT = "tuned", "near", "same core", "default"
ORIGINS = (EXACT, NEAR, SAME_CORE, DEFAULT)


@dataclass(frozen=True)
class Query:
    """The kernel that knobs are wanted for.

    Attributes:
        place: SoC, core and level.
        family: of the kernel.
        shape: its fields.
        version: VERSION of the family; records of another one are no better than near ones.
        is_valid: whether knobs fit the kernel.
    """

    place: Place
    family: str
    shape: Mapping[str, Any]
    version: int
    is_valid: Callable[[KnobValues], bool]


@dataclass(frozen=True)
class Found:
    """Knobs from a record, and how it was found: one of ORIGINS but for "default"."""

    origin: str
    record: Record


class RecordBook:
    """The records that a compilation may use.

    Args:
        user: files of the user.
        shipped: files that came with llamac.
    """

    def __init__(self, user: Sequence[RecordFile] = (), shipped: Sequence[RecordFile] = ()) -> None:
        self.files = (*user, *shipped)
        self._layers = [_by_family(user), _by_family(shipped)]

    @property
    def torn(self) -> Mapping[Path, int]:
        """Files with damaged lines, and how many were skipped."""
        return {file.path: file.torn for file in self.files if file.torn}

    def notes(self) -> tuple[str, ...]:
        """What the user should know of the files, a line each."""
        return tuple(
            f"records of {path.name}: {count} damaged lines were skipped"
            for path, count in self.torn.items()
        )

    def find(self, query: Query) -> Found | None:
        """The best record for a kernel; None if none fits."""
        layers = [layer.get((query.place.level, query.family), ()) for layer in self._layers]
        here = [[r for r in layer if r.place == query.place] for layer in layers]
        alike = [[r for r in layer if r.place.core == query.place.core] for layer in layers]
        for origin, groups, farthest in (
            (EXACT, here, 0.0),
            (NEAR, here, FARTHEST),
            (SAME_CORE, alike, FARTHEST),
        ):
            for records in groups:
                record = _best(query, records, farthest, is_exact=origin == EXACT)
                if record is not None:
                    return Found(origin, record)
        return None


def open_book(file: Path | None = None) -> RecordBook:
    """The shipped records, and above them the user's.

    Args:
        file: the user's records, instead of those in `user_folder()`.

    Raises:
        RecordsInvalid: a file cannot be read.
    """
    user = read_folder(user_folder()) if file is None else (read_records(file),)
    return RecordBook(user, read_folder(SHIPPED))


def _by_family(files: Iterable[RecordFile]) -> dict[tuple[str, str], list[Record]]:
    """Records that can be used, by level and family; the newest of each point."""
    newest = {
        (r.place, r.family, same(r.shape), r.kind, same(r.knobs)): r
        for file in files
        for r in file.records
    }
    found: dict[tuple[str, str], list[Record]] = {}
    for record in newest.values():
        if record.status == "ok":
            found.setdefault((record.place.level, record.family), []).append(record)
    return found


def _best(
    query: Query, records: Sequence[Record], farthest: float, *, is_exact: bool
) -> Record | None:
    """The cheapest valid record of the nearest shape, by the most trusted kind of cost."""
    by_shape: dict[tuple[float, str], list[Record]] = {}
    for record in records:
        if is_exact and record.version != query.version:
            continue
        distance = shape_distance(query.shape, record.shape)
        if distance <= farthest and query.is_valid(record.knobs):
            by_shape.setdefault((distance, same(record.shape)), []).append(record)
    if not by_shape:
        return None
    return min(by_shape[min(by_shape)], key=lambda r: (list(KINDS).index(r.kind), r.cost))


def shape_distance(one: Mapping[str, Any], other: Mapping[str, Any]) -> float:
    """How far two shapes of a family are apart: 0 if equal, infinite if they cannot be compared.

    Sizes count by the logarithm of their ratio, all else must be equal; so must be whether there is
    one token or many.
    """
    mine, others = _flat(one), _flat(other)
    if mine.keys() != others.keys():
        return math.inf
    total = 0.0
    for name, value in mine.items():
        if value == others[name]:
            continue
        if not _is_size(value) or not _is_size(others[name]):
            return math.inf
        if name in TOKEN_FIELDS and 1 in (value, others[name]):
            return math.inf
        total += abs(math.log2(value / others[name]))
    return total


def _is_size(value: Any) -> bool:
    return isinstance(value, int) and not isinstance(value, bool) and value > 0


def _flat(shape: Mapping[str, Any], prefix: str = "") -> dict[str, Any]:
    """Fields of nested shapes and lists side by side."""
    fields: dict[str, Any] = {}
    for name, value in shape.items():
        if isinstance(value, Mapping):
            fields |= _flat(value, f"{prefix}{name}.")
        elif isinstance(value, list | tuple):
            fields |= {f"{prefix}{name}.{i}": item for i, item in enumerate(value)}
        else:
            fields[prefix + name] = value
    return fields
