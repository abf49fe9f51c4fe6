"""Which kernels a model has: from its name, its checkpoint, or its bundle; and what is refused."""

from __future__ import annotations

from dataclasses import asdict
from pathlib import Path

import pytest

from llamac.compiler.tuning.kernels import ModelOptions, model_kernels, spec_of
from llamac.runtime.errors import SocUnknown, TuningImpossible, UsageError
from llamac.schedules.attention import AttentionShape
from llamac.schedules.qmatmul import QMatmulShape
from llamac.schedules.rope import CacheShape
from llamac.targets.program import Program, ProgramKernel
from llamac.targets.tuning.records import same

SMALL = ModelOptions(context_length=100, chunks=(8,))


def names(model: str, soc: str = "host", processor: str = "cpu") -> list[str]:
    found = model_kernels(model, soc, processor, SMALL)
    return [spec.name for spec in found.tunable(found.level(None))]


@pytest.mark.parametrize(
    ("form", "part"),
    [("", "hadamard"), (":spinquant", "hadamard"), (":qlora", "lora_a"), (":float", "f32_bf16")],
)
def test_a_named_model_has_the_kernels_of_its_form(form: str, part: str) -> None:
    """Each once, although every layer calls them."""
    found = names(f"llama-3.2-1b{form}")
    assert any(part in name for name in found)
    assert len(set(found)) == len(found) <= 20


def test_processors_have_their_own_kernels() -> None:
    found = model_kernels("llama-3.2-1b", "sm8650", "hvx", SMALL)
    assert found.target.tuned_core == "v75"
    assert {spec.family for spec in found.kernels} >= {"qmatmul_hvx", "qmatmul_int8_hvx"}
    assert model_kernels("llama-3.2-1b", "sm8650", "cpu", SMALL).target.tuned_core == "cortex-x4"


def test_a_checkpoint_is_read(checkout: Path) -> None:
    found = model_kernels(str(checkout / "examples/tiny-llama/qlora"), "host", "cpu", SMALL)
    assert any(spec.family == "lora" for spec in found.kernels)


def test_a_program_gives_the_same_kernels_back() -> None:
    """Shapes of program.json, with lists for tuples, are those that selection made."""
    for family, shape in (
        ("qmatmul", QMatmulShape(1, 192, 64, "float16", "none", 4, 2.0, (64, 64, 64))),
        ("attention", AttentionShape(8, 4, CacheShape(2, 16, 64, "int8"))),
    ):
        kernel = ProgramKernel("k", family, asdict(shape), 4)
        program = Program((), (kernel,), (), 0, 0, 0)
        [read] = Program.from_json(program.to_json()).kernels
        spec = spec_of(read)
        assert (spec.name, spec.family, spec.shape) == ("k", family, shape)
        assert same(spec.shape_fields()) == same(read.shape)


@pytest.mark.parametrize(
    ("arguments", "error", "words"),
    [
        (("llama-3.2-1b", None, "cpu"), UsageError, "many SoCs"),
        (("llama-3.2-1b:int2", "host", "cpu"), UsageError, "int2"),
        (("llama-3.2-1b", "sm9999", "cpu"), SocUnknown, "sm9999"),
        (("llama-3.2-1b", "host", "hvx"), UsageError, "hvx"),
    ],
)
def test_what_does_not_fit_is_refused(
    arguments: tuple[str, str | None, str], error: type[Exception], words: str
) -> None:
    with pytest.raises(error, match=words):
        model_kernels(*arguments, SMALL)


def test_levels_and_kernels_that_are_not_there() -> None:
    found = model_kernels("llama-3.2-1b", "host", "cpu", SMALL)
    assert found.level("avx2").name == "avx2"
    with pytest.raises(UsageError, match="sse9"):
        found.level("sse9")
    with pytest.raises(TuningImpossible, match="softmax"):
        found.tunable(found.level(None), "softmax")
