"""Tuned knobs in compilation: spaces of all kernels, the choice, its line, and --require-tuned."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import asdict, replace
from pathlib import Path
from typing import Any

import pytest

from llamac.runtime.errors import TuningMissing
from llamac.schedules.intrin.arm_levels import ARM_LEVELS
from llamac.schedules.intrin.hexagon import HexagonHvx
from llamac.schedules.intrin.isa import Isa
from llamac.schedules.intrin.x86 import X86_LEVELS
from llamac.schedules.qmatmul import QMatmulShape
from llamac.schedules.qmatmul_int8 import QMatmulInt8Shape
from llamac.targets.base import LowerOptions
from llamac.targets.cpu.kernels import KernelSpec, tunable_kernels
from llamac.targets.cpu.knobs import KnobChooser, summary
from llamac.targets.cpu.object_cache import compile_object
from llamac.targets.soc import load_soc
from llamac.targets.tuning.book import DEFAULT, EXACT, NEAR, RecordBook
from llamac.targets.tuning.records import Place, Record, RecordFile
from llamac.targets.x86_cpu import X86Cpu

AVX512 = X86_LEVELS[0]
SHAPE = QMatmulShape(64, 2048, 2048)
RECORD = Record(
    Place("host", "x86-64", AVX512.name),
    "qmatmul",
    asdict(SHAPE),
    {"mr": 4, "unroll": 2, "prefetch": 0},
    "ok",
    1.0,
    "time_us",
    template={"version": 1},
)


def chooser(*records: Record) -> KnobChooser:
    return KnobChooser("host", "x86-64", RecordBook([RecordFile(Path("r"), records)]))


def spec(shape: Any, *records: Record, family: str = "qmatmul") -> KernelSpec:
    return KernelSpec("k", family, shape, chooser(*records))


def test_a_record_decides() -> None:
    """Its knobs are built into the kernel, and another level keeps its default."""
    kernel = spec(SHAPE, RECORD)
    assert kernel.choice(AVX512).knobs == RECORD.knobs
    assert kernel.choice(AVX512).origin == EXACT
    assert kernel.choice(X86_LEVELS[2]).origin == DEFAULT
    untuned = KernelSpec("k", "qmatmul", SHAPE)
    assert kernel.make(AVX512).script() == untuned.make_with(RECORD.knobs, AVX512, "k").script()
    assert kernel.make(AVX512).script() != untuned.make(AVX512).script()


@pytest.mark.parametrize(
    "knobs",
    [
        {"mr": 12, "unroll": 1, "prefetch": 0},  # does not fit one token
        {"mr": 1, "unroll": 0, "prefetch": 0},
        {"mr": 1, "unroll": "x", "prefetch": 0},
        {"mr": 1, "unroll": 1},
        {"mr": 1, "unroll": 1, "prefetch": 0, "colour": 3},
        {},
    ],
)
def test_knobs_that_the_generator_does_not_know_are_not_used(knobs: dict[str, Any]) -> None:
    """Records of other versions, or edited by hand, must not break a compilation."""
    shape = QMatmulShape(1, 2048, 2048)
    kernel = spec(shape, replace(RECORD, shape=asdict(shape), knobs=knobs))
    assert kernel.choice(AVX512).origin == DEFAULT


def test_other_knobs_are_another_object(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The cache of compiled kernels tells them apart."""
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    monkeypatch.delenv("LLAMAC_KERNEL_CACHE", raising=False)
    small = QMatmulShape(8, 64, 128)
    record = replace(RECORD, shape=asdict(small))
    one, other = tmp_path / "1.o", tmp_path / "2.o"
    assert not compile_object(KernelSpec("k", "qmatmul", small), AVX512, "k", one)
    assert not compile_object(spec(small, record), AVX512, "k", other)
    assert one.read_bytes() != other.read_bytes()


KERNELS = [
    *(("qmatmul", QMatmulShape(m, 2048, 2048), isa) for m in (1, 3, 128) for isa in X86_LEVELS),
    *(("qmatmul_int8", QMatmulInt8Shape(m, 2048, 2048), X86_LEVELS[0]) for m in (1, 8)),
    *(
        ("qmatmul_quads", QMatmulShape(m, 2048, 2048), isa.scheduled_for("neoverse-v2"))
        for m in (1, 8, 128)
        for isa in ARM_LEVELS
    ),
    *(("qmatmul_int8", QMatmulInt8Shape(m, 2048, 2048), ARM_LEVELS[2]) for m in (1, 8)),
    *(("qmatmul_hvx", QMatmulShape(m, 2048, 2048), HexagonHvx(75, simulate=True)) for m in (1, 8)),
]


@pytest.mark.parametrize(
    ("family", "shape", "isa"), KERNELS, ids=lambda value: getattr(value, "name", str(value))
)
def test_points_are_valid_and_differ(family: str, shape: Any, isa: Isa) -> None:
    """The default is the first; every space is small."""
    kernel = KernelSpec("k", family, shape)
    points = kernel.points(isa)
    assert points[0] == kernel.choice(isa).knobs
    assert len({tuple(sorted(point.items())) for point in points}) == len(points) <= 300


def test_kernels_of_one_token_have_a_space_on_arm() -> None:
    """Its tile of one token is among the declared ones."""
    isa = ARM_LEVELS[3].scheduled_for("neoverse-v2")
    assert len(KernelSpec("k", "qmatmul_quads", QMatmulShape(1, 2048, 2048)).points(isa)) > 10


def test_the_line_counts_kernels_with_a_choice(lowered: Callable[..., Any]) -> None:
    """Norms have no knobs and are not counted."""
    kernels = lowered("spinquant").selection.kernels
    found = tunable_kernels(kernels, AVX512)
    assert {kernel.origin for kernel in found} == {DEFAULT}
    names = {kernel.name for kernel in found}
    assert any(name.startswith("qmatmul") for name in names)
    assert not any(name.startswith("rms_norm") for name in names)
    assert summary(found) == f"knobs: {len(found)} default"
    assert summary([]) == "knobs: no kernel has any"


def lower(module: Any, records: RecordBook | None, *, require_tuned: bool = False) -> Any:
    options = LowerOptions(48, (16, 8), "float16", "float16", None, records, require_tuned)
    return X86Cpu(load_soc("host")).lower(module, options)


def test_lowering_uses_the_records_and_says_so(lowered: Callable[..., Any]) -> None:
    """One exact record and the kernels near it; without a book there is no line."""
    model = lowered("spinquant")
    kernels = model.selection.kernels
    name = next(n for n, k in kernels.items() if k.family == "qmatmul" and k.shape.m == 16)
    shape = kernels[name].shape
    book = RecordBook(
        [RecordFile(Path("r"), (replace(RECORD, shape=asdict(shape)),))],
    )
    result = lower(model.module, book)
    [line] = result.notes
    assert line.startswith("knobs: 1 tuned, ")
    assert result.kernels[name].choice(AVX512).knobs == RECORD.knobs
    origins = [k.origin for k in tunable_kernels(result.kernels, AVX512)]
    assert line == (f"knobs: 1 tuned, {origins.count(NEAR)} near, {origins.count(DEFAULT)} default")
    assert lower(model.module, None).notes == ()


def test_required_records_that_are_missing_are_an_error(lowered: Callable[..., Any]) -> None:
    """The error counts the kernels and names some."""
    with pytest.raises(TuningMissing, match=r"kernels of the level avx512vnni .* and \d+ more"):
        lower(lowered("spinquant").module, RecordBook(), require_tuned=True)


def test_required_records_that_are_there_suffice(lowered: Callable[..., Any]) -> None:
    """A record for every kernel with a choice: nothing is raised."""
    model = lowered("spinquant")
    records = tuple(
        replace(
            RECORD,
            family=spec.family,
            shape=asdict(spec.shape),
            knobs=spec.points(AVX512)[-1],
        )
        for spec in model.selection.kernels.values()
        if len(spec.points(AVX512)) > 1
    )
    result = lower(model.module, RecordBook([RecordFile(Path("r"), records)]), require_tuned=True)
    assert result.notes == (f"knobs: {len(records)} tuned",)
