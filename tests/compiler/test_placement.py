"""Which processors go together, and who computes which function."""

from __future__ import annotations

import importlib.metadata
from collections.abc import Sequence
from dataclasses import replace
from importlib.metadata import PackageNotFoundError

import pytest

from llamac.compiler import placement
from llamac.compiler.placement import Placement, place_processors
from llamac.runtime.errors import TargetUnknown, UsageError
from llamac.targets.arm_cpu import ArmCpu
from llamac.targets.base import Scheme
from llamac.targets.hexagon_hvx import HexagonHvx
from llamac.targets.qnn_htp.plugin import QnnHtp
from llamac.targets.soc import load_soc

SOC = "sm8650"
DTYPES = {"--scales": "float16", "--kv-cache": "float16"}
CLASSES = {"arm-cpu": ArmCpu, "hexagon-hvx": HexagonHvx, "qnn-htp": QnnHtp}


@pytest.fixture(autouse=True)
def without_tools(monkeypatch: pytest.MonkeyPatch) -> None:
    """Plug-ins are made without asking whether their tools are installed."""
    monkeypatch.setattr(placement, "make_target", lambda name, soc: CLASSES[name](soc))


def place(*processors: str, **wanted: str) -> Placement:
    return place_processors(SOC, processors, wanted, DTYPES)


def test_one_processor_has_everything() -> None:
    for kind, plugin in (("cpu", "arm-cpu"), ("hvx", "hexagon-hvx")):
        placed = place(kind)
        assert (placed.target.name, placed.accelerator) == (plugin, None)
        assert placed.offloaded((128, 8)) == []
        assert placed.processor_of("decode") == kind


@pytest.mark.parametrize("processors", [("cpu", "htp"), ("htp", "cpu")])
def test_an_accelerator_has_all_layers_unless_told_otherwise(processors: tuple[str, ...]) -> None:
    placed = place(*processors)
    assert (placed.target.name, placed.accelerator.name) == ("arm-cpu", "qnn-htp")
    assert placed.offloaded((128, 8)) == ["prefill_128", "prefill_8", "decode"]
    assert placed.processor_of("prefill_8") == "htp"


def test_phases_are_placed_one_by_one() -> None:
    placed = place("cpu", "htp", decode="cpu")
    assert placed.offloaded((128, 8)) == ["prefill_128", "prefill_8"]
    assert placed.processor_of("decode") == "cpu"
    assert place("cpu", "htp", prefill="cpu", decode="htp").offloaded((128,)) == ["decode"]


@pytest.mark.parametrize(
    ("processors", "wanted", "error", "words"),
    [
        (("apu",), {}, TargetUnknown, "no processor 'apu'"),
        (("htp",), {}, TargetUnknown, "htp computes layers only"),
        (("cpu", "hvx"), {}, TargetUnknown, "no model for cpu, hvx"),
        (("hvx", "htp"), {}, TargetUnknown, "no model for hvx, htp"),
        ((), {}, TargetUnknown, "no model for none"),
        (("cpu", "htp"), {"decode": "hvx"}, UsageError, "--place decode=hvx"),
        (("cpu", "htp"), {"sampling": "cpu"}, UsageError, "--place sampling=cpu"),
        (("cpu",), {"decode": "htp"}, UsageError, "--place decode=htp"),
        (("cpu", "htp"), {"prefill": "cpu", "decode": "cpu"}, UsageError, "nothing for htp"),
    ],
)
def test_what_does_not_go_together_is_refused(
    processors: tuple[str, ...], wanted: dict[str, str], error: type[Exception], words: str
) -> None:
    with pytest.raises(error, match=words):
        place(*processors, **wanted)


def test_all_processors_must_know_the_dtypes() -> None:
    with pytest.raises(UsageError, match="--kv-cache int8 is not known to qnn-htp"):
        place_processors(SOC, ("cpu", "htp"), {}, DTYPES | {"--kv-cache": "int8"})


class Integers(QnnHtp):
    """A second scheme, with integers and a cache of its own."""

    def schemes(self) -> Sequence[Scheme]:
        return (*super().schemes(), Scheme("a16w8", "", "int8", "int8", is_calibrated=True))


def test_a_scheme_brings_its_cache(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(CLASSES, "qnn-htp", Integers)
    dtypes = {"--scales": "float16", "--kv-cache": None}
    placed = place_processors(SOC, ("cpu", "htp"), {}, dtypes, "a16w8")
    assert (placed.scheme.name, placed.kv_dtype) == ("a16w8", "int8")
    assert placed.phases == {"prefill", "decode"}
    given = place_processors(SOC, ("cpu", "htp"), {}, dtypes | {"--kv-cache": "int8"}, "a16w8")
    assert given == replace(placed, target=given.target, accelerator=given.accelerator)
    default = place_processors(SOC, ("cpu", "htp"), {"decode": "cpu"}, dtypes)
    assert (default.scheme.name, default.kv_dtype) == ("float16", "float16")
    alone = place_processors(SOC, ("cpu",), {}, dtypes | {"--kv-cache": "int8"})
    assert (alone.scheme, alone.kv_dtype) == (None, "int8")


@pytest.mark.parametrize(
    ("processors", "wanted", "kv_dtype", "scheme", "words"),
    [
        (("cpu", "htp"), {}, "float16", "a16w8", "--kv-cache float16 does not go with"),
        (("cpu", "htp"), {"decode": "cpu"}, None, "a16w8", "cannot divide a model in the scheme"),
        (("cpu", "htp"), {}, None, "a8w8", "--scheme a8w8 cannot be used"),
        (("cpu",), {}, None, "a16w8", "--scheme a16w8 cannot be used"),
        (("cpu",), {}, "int16", None, "--kv-cache int16 is not known to arm-cpu"),
    ],
)
def test_schemes_that_do_not_fit_are_refused(
    monkeypatch: pytest.MonkeyPatch,
    processors: tuple[str, ...],
    wanted: dict[str, str],
    kv_dtype: str | None,
    scheme: str | None,
    words: str,
) -> None:
    monkeypatch.setitem(CLASSES, "qnn-htp", Integers)
    dtypes = {"--scales": "float16", "--kv-cache": kv_dtype}
    with pytest.raises(UsageError, match=words):
        place_processors(SOC, processors, wanted, dtypes, scheme)


def test_layers_are_left_to_the_cpu(monkeypatch: pytest.MonkeyPatch) -> None:
    """With a cache that its kernels read, whatever the scheme has."""
    monkeypatch.setitem(CLASSES, "qnn-htp", Integers)
    dtypes = {"--scales": "float16", "--kv-cache": None}
    placed = place_processors(SOC, ("cpu", "htp"), {}, dtypes, "a16w8").with_cpu_layers((3, 0), 4)
    assert placed.cpu_layers == {0, 3}
    assert (placed.kv_dtype, placed.cpu_kv_dtype) == ("int8", "float16")
    assert place("cpu", "htp").with_cpu_layers((), 4).cpu_layers == frozenset()


@pytest.mark.parametrize(
    ("processors", "layers", "words"),
    [
        (("cpu",), (0,), "--cpu-layers 0 has no effect"),
        (("cpu", "htp"), (1, 4), "--cpu-layers 1,4 names layers that the model does not have"),
        (("cpu", "htp"), (0, 1, 2, 3), "leaves nothing for htp"),
    ],
)
def test_layers_that_cannot_be_left_are_refused(
    processors: tuple[str, ...], layers: tuple[int, ...], words: str
) -> None:
    with pytest.raises(UsageError, match=words):
        place(*processors).with_cpu_layers(layers, 4)


def test_an_accelerator_has_no_kernels() -> None:
    target = QnnHtp(load_soc(SOC))
    assert target.is_accelerator and not ArmCpu(load_soc(SOC)).is_accelerator
    with pytest.raises(NotImplementedError):
        ArmCpu(load_soc(SOC)).offload(None, (), None, None, None)


def test_without_the_extra_it_says_what_to_install(monkeypatch: pytest.MonkeyPatch) -> None:
    def absent(package: str) -> str:
        raise PackageNotFoundError(package)

    monkeypatch.setattr(importlib.metadata, "version", absent)
    [missing] = QnnHtp(load_soc(SOC)).check()
    assert missing.what == "onnxruntime-qnn 2.7.0"
    assert "not installed" in missing.why and "licence" in missing.why
    assert "pip install 'llamac[qnn]'" in missing.fix
