"""Which knobs kernels are compiled with: those of tuning records, else the generators' defaults."""

from __future__ import annotations

import itertools
from collections import Counter
from collections.abc import Iterable, Sequence
from dataclasses import asdict, dataclass
from types import ModuleType
from typing import Any

from llamac.runtime.errors import TuningMissing
from llamac.schedules.intrin.isa import Isa
from llamac.schedules.kernel import Knobs
from llamac.targets.tuning.book import DEFAULT, ORIGINS, Query, RecordBook
from llamac.targets.tuning.records import Place

# Both forms of a DSP's level have the same products, and an emulator counts only this one.
_SIMULATED = "-simulated"


@dataclass(frozen=True)
class Choice:
    """Knobs of a kernel, and where they came from: one of `book.ORIGINS`."""

    knobs: Knobs
    origin: str


def level_name(isa: Isa) -> str:
    """The name under which records keep an instruction set."""
    return isa.name.removesuffix(_SIMULATED)


def knob_points(family: ModuleType, shape: Any, isa: Isa) -> list[dict[str, int | str]]:
    """All valid points of a family's knob space for a kernel, the default first."""
    first: dict[str, int | str] = family.default(shape, isa)
    points = [first]
    for values in itertools.product(*family.KNOBS.values()):
        knobs = dict(zip(family.KNOBS, values, strict=True))
        is_default = all(knobs.get(name) == value for name, value in first.items())
        if family.valid(shape, isa, knobs) and not (is_default and _is_first(knobs, first, family)):
            points.append(knobs)
    return points


def _is_first(knobs: Knobs, first: Knobs, family: ModuleType) -> bool:
    """Whether knobs that a default leaves out have their first value, which means the same."""
    return all(knobs[name] == family.KNOBS[name][0] for name in knobs.keys() - first.keys())


class KnobChooser:
    """Chooses the knobs of kernels for one SoC.

    Args:
        soc: name of the SoC file.
        core: for which kernels are tuned, see `Place`.
        book: records to look up.
    """

    def __init__(self, soc: str, core: str, book: RecordBook) -> None:
        self._soc, self._core, self._book = soc, core, book
        self._choices: dict[tuple[str, Any, str], Choice] = {}

    def choose(self, name: str, family: ModuleType, shape: Any, isa: Isa) -> Choice:
        """The knobs of a kernel.

        Args:
            name: of the family.
            family: its module.
            shape: of the kernel.
            isa: that computes it.
        """
        key = (name, shape, isa.name)
        if key not in self._choices:
            self._choices[key] = self._look_up(name, family, shape, isa)
        return self._choices[key]

    def _look_up(self, name: str, family: ModuleType, shape: Any, isa: Isa) -> Choice:
        default = family.default(shape, isa)

        def is_valid(knobs: Knobs) -> bool:
            if not default.keys() <= knobs.keys() <= family.KNOBS.keys():
                return False
            known = (v in family.KNOBS[k] or v == default.get(k) for k, v in knobs.items())
            return all(known) and bool(family.valid(shape, isa, knobs))

        place = Place(self._soc, self._core, level_name(isa))
        found = None
        if family.KNOBS:
            query = Query(place, name, asdict(shape), family.VERSION, is_valid)
            found = self._book.find(query)
        return Choice(found.record.knobs, found.origin) if found else Choice(default, DEFAULT)


@dataclass(frozen=True)
class TunableKernel:
    """A kernel that has a choice of knobs, and where its choice came from."""

    name: str
    origin: str


def summary(kernels: Sequence[TunableKernel]) -> str:
    """One line for people: "knobs: 9 tuned, 2 near, 4 default"."""
    counts = Counter(kernel.origin for kernel in kernels)
    parts = [f"{counts[origin]} {origin}" for origin in ORIGINS if counts[origin]]
    return f"knobs: {', '.join(parts) or 'no kernel has any'}"


def check_all_tuned(kernels: Iterable[TunableKernel], level: str) -> None:
    """Refuse kernels whose knobs are only defaults.

    Raises:
        TuningMissing: there are some.
    """
    names = [kernel.name for kernel in kernels if kernel.origin == DEFAULT]
    if names:
        shown = ", ".join(names[:4]) + (f" and {len(names) - 4} more" if len(names) > 4 else "")
        raise TuningMissing(
            f"{len(names)} kernels of the level {level} have the generators' defaults: {shown}",
            cause="no record fits them, and --require-tuned was given",
            fix="run `llamac tune` for this model and SoC, or leave out --require-tuned",
        )
