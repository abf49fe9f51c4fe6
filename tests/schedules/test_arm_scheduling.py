"""LLVM's model of a core decides the order of instructions, never which ones there are."""

from __future__ import annotations

import pytest

from llamac.schedules import qmatmul_quads
from llamac.schedules.intrin.arm import SCHEDULING_MODELS, ArmDotprod, ArmNeon, scheduling_model
from llamac.schedules.intrin.arm_levels import ARM_LEVELS
from llamac.schedules.kernel import MCPU_ATTR, compile_kernels
from llamac.schedules.qmatmul import QMatmulShape

SHAPE = QMatmulShape(1, 32, 128)


def make(isa, **knobs):
    return qmatmul_quads.make(SHAPE, isa, **qmatmul_quads.default(SHAPE, isa), **knobs)


def assembly(func, isa):
    return compile_kernels({"kernel": func}, isa).inspect_source("asm")


@pytest.mark.parametrize("mcpu", SCHEDULING_MODELS)
def test_the_knob_compiles_as_the_instruction_set_would(mcpu):
    isa = ArmDotprod()
    func = make(isa, mcpu=mcpu)
    assert func.attrs[MCPU_ATTR] == mcpu
    named = assembly(make(isa), isa.scheduled_for(mcpu))
    assert assembly(func, isa) == named


def test_models_differ():
    isa = ArmDotprod()
    assert len({assembly(make(isa, mcpu=mcpu), isa) for mcpu in SCHEDULING_MODELS}) > 2


@pytest.mark.parametrize("isa", ARM_LEVELS, ids=lambda isa: isa.name)
@pytest.mark.parametrize("mcpu", [*SCHEDULING_MODELS, "cortex-x925", "cortex-a520", "c1-ultra"])
def test_features_stay_those_of_the_level(isa, mcpu):
    """Whatever the core has beyond them is switched off, before they are switched on."""
    mattr = isa.scheduled_for(mcpu).target["mattr"]
    on = [feature for feature in mattr if feature.startswith("+")]
    assert on == isa.target["mattr"]
    assert mattr[len(mattr) - len(on) :] == on


def test_scheduling_twice_is_scheduling_once():
    isa = ArmNeon()
    assert isa.scheduled_for("cortex-x4").scheduled_for("apple-m4").target == (
        isa.scheduled_for("apple-m4").target
    )


def test_unknown_cores_change_nothing():
    assert ArmNeon().scheduled_for("cortex-z9").target == ArmNeon.target


@pytest.mark.parametrize(("core", "model"), [("cortex-a520", "generic"), ("oryon", "neoverse-v2")])
def test_cores_that_issue_in_order_have_a_model_of_their_own(core, model):
    assert scheduling_model(core) == model


def test_kernels_of_one_module_are_scheduled_alike():
    isa = ArmDotprod()
    functions = {mcpu: make(isa, mcpu=mcpu) for mcpu in ("generic", "apple-m4")}
    with pytest.raises(ValueError, match="different cores"):
        compile_kernels(functions, isa)
