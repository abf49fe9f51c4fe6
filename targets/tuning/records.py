"""Tuning records: one line of JSON for each point that was measured, only ever appended.

    {"format": 1, "soc": "host", "core": "x86-64", "level": "avx512vnni", "family": "qmatmul",
     "shape": {"m": 128, ...}, "knobs": {"mr": 8, ...}, "status": "ok", "cost": 812.4,
     "kind": "time_us", "noise": 0.008, "code": "9c1185a5c5e9fc54", "device": "AMD EPYC",
     "template": {"version": 1, "hash": "..."}, "tools": {"apache-tvm": "..."}, "time": "..."}

A process that is killed may leave half a line. Such lines are skipped and counted; a file whose
whole lines are something else is refused.
"""

from __future__ import annotations

import json
import os
from collections.abc import Iterable, Mapping
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

from llamac.runtime.errors import OutputError, RecordsInvalid

FORMAT = 1
SUFFIX = ".jsonl"
SHIPPED = Path(__file__).parents[1] / "records"

# Kinds of cost by the trust in them: what is first decides, if a kernel has several.
KINDS: Mapping[str, str] = {
    "time_us": "microseconds of a call with all work items",
    "cycles": "cycles of a core's model for what was counted",
    "packets": "packets that an emulated Hexagon executed",
    "instructions": "instructions that an emulated AArch64 executed",
}
STATUSES = ("ok", "wrong", "failed")

KnobValues = Mapping[str, int | str]


@dataclass(frozen=True)
class Place:
    """Whose kernels a record is of.

    Attributes:
        soc: name of the SoC file, "sm8650".
        core: of the SoC, "cortex-x4", or the version of its DSP, "v75".
        level: instruction set of the kernels, "i8mm".
    """

    soc: str
    core: str
    level: str


@dataclass(frozen=True)
class Record:
    """One measured point of a knob space.

    Attributes:
        place: SoC, core and level.
        family: of the kernel.
        shape: its fields, as JSON values.
        knobs: the point.
        status: "ok"; "wrong": its result differs from the reference; "failed": it did not compile
            or crashed.
        cost: in the unit of `kind`, 0 if it is not "ok".
        kind: a key of KINDS.
        noise: half the spread of repeated measurements, relative to the cost.
        code: hash of the machine code.
        device: what it was measured on.
        template: VERSION of the family, and the hash of all generators.
        tools: versions of what compiled it.
        time: when, UTC in ISO form.
        note: why it is not "ok".
        predicted: what the tuner's model expected it to cost, 0 if it could not tell.
    """

    place: Place
    family: str
    shape: Mapping[str, Any]
    knobs: KnobValues
    status: str
    cost: float
    kind: str
    noise: float = 0.0
    code: str = ""
    device: str = ""
    template: Mapping[str, int | str] = field(default_factory=dict)
    tools: Mapping[str, str] = field(default_factory=dict)
    time: str = ""
    note: str = ""
    predicted: float = 0.0

    @property
    def version(self) -> int:
        """VERSION of the family that made the kernel; 0 if the record does not say."""
        return int(self.template.get("version", 0))

    def to_json(self) -> str:
        """The record as one line, without the line's end."""
        fields = {"format": FORMAT, **asdict(self.place)}
        fields |= {name: value for name, value in vars(self).items() if name != "place"}
        for name in ("note", "predicted"):
            if not fields[name]:
                del fields[name]
        return json.dumps(fields, separators=(",", ":"))

    @classmethod
    def from_json(cls, line: str) -> Record:
        """Read a line.

        Raises:
            ValueError: it is no JSON: a torn line.
            KeyError, TypeError: it is JSON, but no record of this format.
        """
        data = json.loads(line)
        if data.pop("format") != FORMAT:
            raise KeyError("format")
        if data["status"] not in STATUSES or data["kind"] not in KINDS:
            raise KeyError("status or kind")
        place = Place(*(str(data.pop(name)) for name in ("soc", "core", "level")))
        if not all(isinstance(data[name], dict) for name in ("shape", "knobs")):
            raise TypeError("shape or knobs")
        return cls(place=place, **(data | {"cost": float(data["cost"])}))


def same(values: Mapping[str, Any]) -> str:
    """Text that is the same for equal fields: tuples are lists in JSON, and order is nothing."""
    return json.dumps(values, sort_keys=True)


@dataclass(frozen=True)
class RecordFile:
    """What a file held.

    Attributes:
        path: of the file.
        records: in their order.
        torn: lines that were skipped.
    """

    path: Path
    records: tuple[Record, ...]
    torn: int = 0


def read_records(path: Path) -> RecordFile:
    """Read a file of records; lines that are no JSON are skipped.

    Raises:
        RecordsInvalid: it cannot be read, or a line is JSON of another kind or format.
    """
    try:
        lines = path.read_bytes().splitlines()
    except OSError as error:
        raise RecordsInvalid(
            f"the records {path} cannot be read",
            cause=str(error.strerror),
            fix="give a file that `llamac tune` wrote",
        ) from error
    records, torn = [], 0
    for number, line in enumerate(lines, 1):
        try:
            if line.strip():
                records.append(Record.from_json(line.decode()))
        except ValueError:
            torn += 1
        except (KeyError, TypeError, AttributeError) as error:
            raise _invalid(
                path, f"line {number} is no record of format {FORMAT}: {error}"
            ) from None
    if torn and not records:
        raise _invalid(path, "none of its lines is a record")
    return RecordFile(path, tuple(records), torn)


def _invalid(path: Path, cause: str) -> RecordsInvalid:
    return RecordsInvalid(
        f"{path} does not hold tuning records",
        cause=cause,
        fix="give a file of this version's `llamac tune`, or delete it and tune again",
    )


class RecordWriter:
    """Appends records to a file, each with one write and on the disk before the next.

    Args:
        path: the file; its folder is made. Half a line at its end is closed first.

    Raises:
        OutputError: it cannot be written.
    """

    def __init__(self, path: Path) -> None:
        self.path = path
        try:
            path.parent.mkdir(parents=True, exist_ok=True)
            self._file = os.open(path, os.O_RDWR | os.O_CREAT | os.O_APPEND, 0o644)
            size = os.fstat(self._file).st_size
            if size and os.pread(self._file, 1, size - 1) != b"\n":
                os.write(self._file, b"\n")
        except OSError as error:
            raise self._failed(error) from error

    def append(self, *records: Record) -> None:
        """Append records."""
        data = "".join(f"{record.to_json()}\n" for record in records).encode()
        try:
            os.write(self._file, data)
            os.fsync(self._file)
        except OSError as error:
            raise self._failed(error) from error

    def close(self) -> None:
        """Close the file."""
        os.close(self._file)

    def _failed(self, error: OSError) -> OutputError:
        return OutputError(
            f"the records {self.path} cannot be written",
            cause=str(error.strerror),
            fix="free space, or name another file with --records",
        )


def write_records(records: Iterable[Record], path: Path) -> None:
    """Write a whole file of records, which appears when it is complete.

    Raises:
        OutputError: it cannot be written.
    """
    partial = path.with_name(f"{path.name}.partial")
    partial.unlink(missing_ok=True)
    writer = RecordWriter(partial)
    writer.append(*records)
    writer.close()
    partial.replace(path)


def user_folder() -> Path:
    """Where `llamac tune` keeps records and `llamac compile` finds them."""
    data = os.environ.get("XDG_DATA_HOME") or Path.home() / ".local" / "share"
    return Path(data) / "llamac" / "records"


def user_file(soc: str) -> Path:
    """The user's records of a SoC."""
    return user_folder() / f"{soc}{SUFFIX}"


def read_folder(folder: Path) -> tuple[RecordFile, ...]:
    """All record files of a folder by name; none if there is no folder.

    Raises:
        RecordsInvalid: see `read_records`.
    """
    return tuple(read_records(path) for path in sorted(folder.glob(f"*{SUFFIX}")))
