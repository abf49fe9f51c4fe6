"""The tuner: measures a few points of a kernel's space, and lets a model choose which.

    all valid points ─▶ compile, merge equal code ─▶ default, and points far from each other
                                                     then batches: most by the model, one by chance
                                                     until it is enough ─▶ the best ones once more

Everything that was measured is recorded at once, so that a run may be stopped at any time, and the
next one goes on where it was.
"""

from __future__ import annotations

import random
import statistics
import time
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass, field, replace
from datetime import UTC, datetime
from functools import cached_property
from importlib.metadata import version

from llamac.compiler.tuning.builder import Builder
from llamac.compiler.tuning.candidates import Space, find_candidates
from llamac.compiler.tuning.cost_model import CostModel, Sample, spread
from llamac.compiler.tuning.problems import make_problem
from llamac.schedules.intrin.isa import Isa
from llamac.targets.cpu.kernels import KernelSpec
from llamac.targets.cpu.knobs import level_name
from llamac.targets.cpu.object_cache import generators_hash
from llamac.targets.tuning.measure import Candidate, Measurement, Measurer, Problem
from llamac.targets.tuning.records import KnobValues, Place, Record, same

FIRST_POINTS = 7  # far from each other, beside the default
FIRST_POINTS_WITH_SAMPLES = 3  # where other shapes of the family have calibrated the model
ENOUGH_SAMPLES = 16
BATCH = 4
RANDOM_IN_BATCH = 1
BEST_OF_MODEL = 4  # it is enough when these are measured
CONFIRMED = 3  # the best ones and the default are measured again if measuring is noisy
HASH_DIGITS = 16


@dataclass(frozen=True)
class Limits:
    """When a kernel has been tuned enough.

    Attributes:
        trials: measured points, those of earlier runs included.
        seconds: for this kernel in this run; None: any.
    """

    trials: int
    seconds: float | None = None


@dataclass
class KernelState:
    """How far a kernel is; what is shown while it is tuned.

    Attributes:
        name: of the kernel.
        points: of its space; 0 before they are counted.
        compiled: of these.
        candidates: points with different code.
        trials: measured candidates, those of earlier runs included.
        resumed: of these, measured in earlier runs.
        wrong: candidates with wrong results, or that failed.
        budget: trials that it may have.
        kind: of its costs.
        default: cost of the default; 0: not measured.
        best: lowest cost so far.
        knobs: of the best.
        roof: the least that the device could need, in the unit of costs; 0: not known.
        model_error: median relative error of the model's predictions of the last batch; None: it
            predicted nothing.
        seconds: since it was begun.
        ended: why no more is measured, "" while it goes on.
    """

    name: str
    points: int = 0
    compiled: int = 0
    candidates: int = 0
    trials: int = 0
    resumed: int = 0
    wrong: int = 0
    budget: int = 0
    kind: str = ""
    default: float = 0.0
    best: float = 0.0
    knobs: KnobValues = field(default_factory=dict)
    roof: float = 0.0
    model_error: float | None = None
    seconds: float = 0.0
    ended: str = ""

    @property
    def gain(self) -> float:
        """How much less the best costs than the default, relative to the default."""
        return 1 - self.best / self.default if self.default else 0.0

    @property
    def roof_share(self) -> float | None:
        """How near the best is to the roof, 1: it cannot be faster; None: not known."""
        return self.roof / self.best if self.roof and self.best else None


Show = Callable[[KernelState], None]


class Tuner:
    """Tunes kernels of one level.

    Args:
        place: of the records.
        measurer: measures.
        history: records of earlier runs.
        sink: called with new records, as soon as there are some.
        show: called with the state of a kernel whenever it changed.
        seed: of chance.
        builder: compiles candidates; None: this process does.
    """

    def __init__(
        self,
        place: Place,
        measurer: Measurer,
        history: Iterable[Record],
        sink: Callable[[Sequence[Record]], None],
        show: Show,
        seed: int = 0,
        builder: Builder | None = None,
    ) -> None:
        self._place, self._measurer, self._sink, self._show = place, measurer, sink, show
        self._history = [record for record in history if self._is_fresh(record)]
        self._random = random.Random(seed)
        self._builder = builder or Builder()
        self._samples: dict[tuple[str, str, bool], list[Sample]] = {}

    def _is_fresh(self, record: Record) -> bool:
        """Whether a record is of the same generators and device."""
        return (
            record.place.soc == self._place.soc
            and record.place.core == self._place.core
            and record.device == self._measurer.device
            and record.template.get("hash") == template_hash()
        )

    def tune(self, spec: KernelSpec, level: Isa, limits: Limits) -> KernelState:
        """Tune one kernel."""
        problem = make_problem(spec, level)
        place = replace(self._place, level=level_name(problem.isa))
        return _KernelRun(self, place, problem, limits).run()


class _KernelRun:
    """Tuning of one kernel."""

    def __init__(self, tuner: Tuner, place: Place, problem: Problem, limits: Limits) -> None:
        self._tuner, self._place, self._problem, self._limits = tuner, place, problem, limits
        spec = problem.spec
        self._kind = tuner._measurer.kind(problem)
        self.state = KernelState(spec.name, budget=limits.trials, kind=self._kind)
        self._fields = spec.shape_fields()
        self._shape = same(self._fields)
        is_token = 1 in (self._fields.get("m"), self._fields.get("tokens"))
        self._samples = tuner._samples.setdefault((spec.family, self._kind, is_token), [])
        self._model = CostModel(self._shape)
        self._measured: dict[str, Measurement] = {}
        self._start = time.monotonic()

    def run(self) -> KernelState:
        """Measure until it is enough."""
        space = find_candidates(self._problem, self._compiling, self._tuner._builder)
        self._candidates = space.candidates
        self._record_failures(space)
        self.state.candidates = len(space.candidates)
        self.state.budget = min(self._limits.trials, self.state.candidates)
        self._resume()
        if space.candidates:
            self._measure(self._first_points())
        while not (reason := self._enough()):
            self._measure(self._next_batch())
        if not self._tuner._measurer.is_exact and self.state.trials > self.state.resumed:
            self._confirm()
        self.state.ended = reason
        self._changed()
        return self.state

    def _compiling(self, done: int, points: int) -> None:
        self.state.compiled, self.state.points = done, points
        self._changed()

    def _changed(self) -> None:
        self.state.seconds = time.monotonic() - self._start
        self._tuner._show(self.state)

    def _resume(self) -> None:
        """Take over what earlier runs measured of this code."""
        mine = [
            record
            for record in self._tuner._history
            if record.place == self._place
            and record.family == self._problem.spec.family
            and record.kind == self._kind
            and same(record.shape) == self._shape
        ]
        results = {record.code: record for record in mine}
        for candidate in self._candidates:
            if record := results.get(candidate.code):
                measurement = Measurement(record.status, record.kind, record.cost, record.noise)
                self._take(candidate, measurement)
                self.state.resumed += 1

    def _first_points(self) -> list[Candidate]:
        """The default and some points far from each other, as far as they are not measured."""
        known = [i for i, c in enumerate(self._candidates) if c.code in self._measured]
        is_known = len(self._samples) - len(known) >= ENOUGH_SAMPLES
        wanted = FIRST_POINTS_WITH_SAMPLES if is_known else FIRST_POINTS
        knobs = [candidate.knobs for candidate in self._candidates]
        chosen = [] if 0 in known else [0]
        if len(known) < 1 + wanted:
            chosen += spread(knobs, 1 + wanted - len(known) - len(chosen), [*known, *chosen])
        left = max(1, self.state.budget - self.state.trials) if chosen else 0
        return [self._candidates[i] for i in chosen[:left]]

    def _enough(self) -> str:
        """Why nothing more is to be measured; "" if something is."""
        limits, state = self._limits, self.state
        if state.trials >= state.candidates:
            return "all measured"
        if state.trials >= limits.trials:
            return "trials"
        if limits.seconds is not None and time.monotonic() - self._start >= limits.seconds:
            return "time"
        self._model.fit(self._samples)
        if self._model.is_fitted:
            best = self._by_prediction(self._candidates)[:BEST_OF_MODEL]
            if all(candidate.code in self._measured for candidate in best):
                return "best of the model measured"
        return ""

    def _next_batch(self) -> list[Candidate]:
        """The best unmeasured candidates by the model, and some by chance."""
        left = [c for c in self._candidates if c.code not in self._measured]
        batch = max(BATCH, self._tuner._measurer.parallel)
        count = min(batch, self.state.budget - self.state.trials, len(left))
        by_model = []
        if self._model.is_fitted:
            by_model = self._by_prediction(left)[: max(1, count - RANDOM_IN_BATCH)]
        others = [candidate for candidate in left if candidate not in by_model]
        more = min(count - len(by_model), len(others))
        return [*by_model, *self._tuner._random.sample(others, more)]

    def _by_prediction(self, candidates: Sequence[Candidate]) -> list[Candidate]:
        costs = self._predict(candidates)
        order = sorted(range(len(candidates)), key=lambda i: costs[i])
        return [candidates[i] for i in order]

    def _predict(self, candidates: Sequence[Candidate]) -> list[float]:
        found = self._model.predict([c.features for c in candidates], [c.knobs for c in candidates])
        return [float(cost) for cost in found]

    def _measure(self, candidates: Sequence[Candidate]) -> None:
        """Measure candidates, record and learn."""
        if not candidates:
            return
        self.state.roof = self._roof
        predicted = self._predict(candidates) if self._model.is_fitted else None
        results = self._tuner._measurer.measure(self._problem, candidates)
        pairs = list(zip(candidates, results, strict=True))
        expected = predicted or [0.0] * len(pairs)
        self._tuner._sink(
            [
                replace(
                    self._record(c.knobs, c.code, result), predicted=_digits(guess * self._unit)
                )
                for (c, result), guess in zip(pairs, expected, strict=True)
            ]
        )
        for candidate, result in pairs:
            self._take(candidate, result)
        if predicted is not None:
            errors = [
                abs(guess * self._unit / result.cost - 1)
                for guess, result in zip(predicted, results, strict=True)
                if result.status == "ok"
            ]
            self.state.model_error = statistics.median(errors) if errors else None
        self._changed()

    @cached_property
    def _roof(self) -> float:
        """The least cost; nothing is asked for it before something is measured."""
        return self._tuner._measurer.roof(self._problem)

    @property
    def _unit(self) -> int:
        """Products that a sample's cost is divided by."""
        return self._problem.products or 1

    def _take(self, candidate: Candidate, result: Measurement) -> None:
        """Believe a measurement."""
        is_new = candidate.code not in self._measured
        self._measured[candidate.code] = result
        state = self.state
        state.trials += is_new
        if result.status != "ok":
            state.wrong += is_new
            return
        cost = result.cost / self._unit
        if is_new:
            sample = Sample(self._shape, candidate.features, candidate.knobs, cost)
            self._samples.append(sample)
        if candidate is self._candidates[0]:
            state.default = result.cost
        right = [(m.cost, c) for c in self._candidates if (m := self._right(c)) is not None]
        state.best, best = min(right, key=lambda pair: pair[0])
        state.knobs = best.knobs

    def _right(self, candidate: Candidate) -> Measurement | None:
        """The measurement of a candidate whose result was right."""
        found = self._measured.get(candidate.code)
        return found if found is not None and found.status == "ok" else None

    def _confirm(self) -> None:
        """Measure the default and the best ones again, side by side: luck does not come twice."""
        right = [c for c in self._candidates if self._right(c) is not None]
        order = sorted(right, key=lambda c: self._measured[c.code].cost)[:CONFIRMED]
        again = [c for c in right if c in order or c is self._candidates[0]]
        if len(again) < 2:
            return
        results = self._tuner._measurer.measure(self._problem, again)
        pairs = list(zip(again, results, strict=True))
        self._tuner._sink([self._record(c.knobs, c.code, result) for c, result in pairs])
        for candidate, result in pairs:
            self._take(candidate, result)

    def _record_failures(self, space: Space) -> None:
        known = {
            same(record.knobs)
            for record in self._tuner._history
            if record.family == self._problem.spec.family and same(record.shape) == self._shape
        }
        self.state.wrong += len(space.failed)
        records = [
            self._record(knobs, "", Measurement("failed", self._kind, note=why))
            for knobs, why in space.failed
            if same(knobs) not in known
        ]
        if records:
            self._tuner._sink(records)

    def _record(self, knobs: KnobValues, code: str, result: Measurement) -> Record:
        spec = self._problem.spec
        return Record(
            place=self._place,
            family=spec.family,
            shape=self._fields,
            knobs=knobs,
            status=result.status,
            cost=_digits(result.cost),
            kind=result.kind,
            noise=round(result.noise, 4),
            code=code,
            device=self._tuner._measurer.device,
            template={"version": spec.version, "hash": template_hash()},
            tools={name: version(name) for name in ("llamac", "apache-tvm", "apache-tvm-ffi")},
            time=datetime.now(UTC).strftime("%Y-%m-%dT%H:%M:%SZ"),
            note=result.note,
        )


def _digits(cost: float) -> float:
    """A cost as records have it."""
    return float(f"{cost:.6g}")


def template_hash() -> str:
    """Hash of the source of all generators, as records have it."""
    return generators_hash()[:HASH_DIGITS]
