"""Targets claim composites one after the other; what is claimed stays claimed."""

from __future__ import annotations

from tvm import relax
from tvm.ir import IRModule

from llamac.compiler.composites import CompositeBuilder
from llamac.targets.partition import claim, composites, owner_of


def module() -> IRModule:
    """swiglu, then two RMSNorms of different epsilon."""
    builder = relax.BlockBuilder()
    calls = CompositeBuilder(builder)
    x, y = (relax.Var(name, relax.TensorType((3, 8), "float32")) for name in "xy")
    gamma = relax.Var("gamma", relax.TensorType((8,), "float32"))
    with builder.function("main", [x, y, gamma]):
        with builder.dataflow():
            value = calls.call("swiglu", [x, y])
            for eps in (1e-5, 1e-6):
                value = calls.call("rms_norm", [value, gamma], eps=eps)
            result = builder.emit_output(value)
        builder.emit_func_output(result)
    return builder.finalize()


def owners(mod: IRModule) -> list[tuple[str, str]]:
    """Kind and owner of each composite, sorted."""
    return sorted((str(f.attrs["Composite"]), owner_of(f)) for _, f in composites(mod))


def test_nothing_is_claimed_at_first() -> None:
    assert owners(module()) == [
        ("llamac.rms_norm", ""),
        ("llamac.rms_norm", ""),
        ("llamac.swiglu", ""),
    ]


def test_a_claim_is_by_kind_and_attributes() -> None:
    """The module that was given stays as it was."""
    mod = module()
    first = claim(mod, "npu", lambda kind, attrs: attrs.get("eps") == 1e-6)
    assert owners(first)[:2] == [("llamac.rms_norm", ""), ("llamac.rms_norm", "npu")]
    assert {owner for _, owner in owners(mod)} == {""}


def test_a_later_target_gets_only_the_rest() -> None:
    npu = claim(module(), "npu", lambda kind, attrs: kind == "llamac.swiglu")
    both = claim(npu, "cpu", lambda kind, attrs: True)
    assert owners(both) == [
        ("llamac.rms_norm", "cpu"),
        ("llamac.rms_norm", "cpu"),
        ("llamac.swiglu", "npu"),
    ]


def test_a_claimed_module_still_runs_as_before() -> None:
    """A claim changes an attribute, never what is computed."""
    mod = module()
    claimed = claim(mod, "npu", lambda kind, attrs: True)
    assert claimed["main"].same_as(mod["main"])
