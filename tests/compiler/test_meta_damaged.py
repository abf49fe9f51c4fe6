"""Files damaged by chance are read or refused with an error of ours, nothing else."""

from __future__ import annotations

import json
import zipfile
from collections.abc import Callable
from pathlib import Path
from types import ModuleType

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from llamac.compiler.checkpoint import Checkpoint
from llamac.compiler.frontends.meta import from_meta
from llamac.runtime.errors import (
    LlamacError,
)

FORMS = ("spinquant", "qlora", "ptq", "float")


FUZZ = settings(
    max_examples=150,
    deadline=5000,  # milliseconds: a hang is a failure
    suppress_health_check=[HealthCheck.function_scoped_fixture, HealthCheck.too_slow],
)


@pytest.fixture(scope="module")
def smallest(meta_layout: ModuleType, tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("fuzz")
    for form in FORMS:
        meta_layout.write_checkpoint(folder / form, form, config=meta_layout.SMALLEST)
    return folder


@pytest.fixture(scope="session")
def opens_or_refuses(
    check_advice: Callable[[LlamacError], None], read_all: Callable[[Checkpoint], object]
) -> Callable[[Path], None]:
    """Open a checkpoint and read all of it; only a proper error of ours may stop that."""

    def attempt(path: Path) -> None:
        try:
            read_all(from_meta(path))
        except LlamacError as error:
            check_advice(error)

    return attempt


def spoiled_copy(source: Path, target: Path, name: str, content: bytes) -> Path:
    target.mkdir(exist_ok=True)
    for file in source.iterdir():
        data = content if file.name == name else file.read_bytes()
        (target / file.name).write_bytes(data)
    return target


def mutate(data: bytes, places: list[tuple[float, int]], length: float) -> bytes:
    spoiled = bytearray(data)
    for place, value in places:
        spoiled[int(place * (len(data) - 1))] = value
    return bytes(spoiled[: int(length * len(data))])


PLACES = st.lists(st.tuples(st.floats(0, 1), st.integers(0, 255)), min_size=1, max_size=8)
LENGTH = st.one_of(st.just(1.0), st.just(1.0), st.floats(0, 1))


@FUZZ
@given(form=st.sampled_from(FORMS), places=PLACES, length=LENGTH)
def test_a_mutated_pth_never_gives_another_exception(
    form: str,
    places: list[tuple[float, int]],
    length: float,
    smallest: Path,
    tmp_path: Path,
    opens_or_refuses: Callable[[Path], None],
) -> None:
    name = "consolidated.00.pth"
    data = mutate((smallest / form / name).read_bytes(), places, length)
    opens_or_refuses(spoiled_copy(smallest / form, tmp_path / form, name, data))


@FUZZ
@given(form=st.sampled_from(FORMS), places=PLACES, length=LENGTH)
def test_a_mutated_pickle_never_gives_another_exception(
    form: str,
    places: list[tuple[float, int]],
    length: float,
    smallest: Path,
    tmp_path: Path,
    meta_layout: ModuleType,
    opens_or_refuses: Callable[[Path], None],
) -> None:
    """With a right checksum, so that the pickle's own readers see the damage."""
    folder = spoiled_copy(smallest / form, tmp_path / form, "", b"")
    pth = folder / "consolidated.00.pth"
    with zipfile.ZipFile(pth) as archive:
        entry = next(e for e in archive.infolist() if e.filename.endswith("/data.pkl"))
        data = mutate(archive.read(entry), places, length)
    meta_layout.replace_pickle(pth, data)
    opens_or_refuses(folder)


JSON_VALUES = st.recursive(
    st.one_of(
        st.none(), st.booleans(), st.integers(), st.floats(), st.text(max_size=5), st.just(64)
    ),
    lambda inner: st.one_of(
        st.lists(inner, max_size=3), st.dictionaries(st.text(max_size=5), inner, max_size=3)
    ),
    max_leaves=5,
)


@FUZZ
@given(form=st.sampled_from(FORMS), data=st.data())
def test_mutated_params_never_give_another_exception(
    form: str,
    data: st.DataObject,
    smallest: Path,
    tmp_path: Path,
    opens_or_refuses: Callable[[Path], None],
) -> None:
    params = json.loads((smallest / form / "params.json").read_text())
    sections = [params, *(value for value in params.values() if isinstance(value, dict))]
    section = data.draw(st.sampled_from(sections))
    section[data.draw(st.sampled_from(sorted(section)))] = data.draw(JSON_VALUES)
    content = json.dumps(params).encode()
    opens_or_refuses(spoiled_copy(smallest / form, tmp_path / form, "params.json", content))


@FUZZ
@given(name=st.sampled_from(["params.json", "tokenizer.model"]), places=PLACES, length=LENGTH)
def test_mutated_text_files_never_give_another_exception(
    name: str,
    places: list[tuple[float, int]],
    length: float,
    smallest: Path,
    tmp_path: Path,
    opens_or_refuses: Callable[[Path], None],
) -> None:
    content = mutate((smallest / "qlora" / name).read_bytes(), places, length)
    opens_or_refuses(spoiled_copy(smallest / "qlora", tmp_path / "qlora", name, content))
