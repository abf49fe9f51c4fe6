"""Hot loops of kernels, and what llvm-mca says of them."""

from __future__ import annotations

import pytest

from llamac.targets import mca
from llamac.targets.machine_code import Instruction, parse_assembly
from llamac.targets.mca import CORES, MODELS, Loop, hot_loop, macs_per_cycle
from llamac.targets.soc import load_soc, soc_files

# An outer loop with a product before the inner one, then a loop with fewer products.
NESTED = """\
.LBB0_1:
\tsdot\tv0.4s, v1.16b, v2.16b
.LBB0_2:
\tldr\tq1, [x0], #16
\tsdot\tv0.4s, v1.16b, v2.4b[0]
\tsmmla\tv3.4s, v1.16b, v2.16b
\tcbz\tx2, .LBB0_3
\tsmull\tx5, w6, w7
.LBB0_3:
\tsubs\tx1, x1, #1
\tb.ne\t.LBB0_2
\tcbnz\tx3, .LBB0_1
.LBB0_4:
\tsmull\tv0.8h, v1.8b, v2.8b
\tsmlal2\tv0.8h, v1.16b, v2.16b
\tsmlal\tv4.4s, v5.4h, v6.4h
\ttbnz\tw1, #0, .LBB0_4
\tret
"""


def loop_of(*instructions: str) -> Loop | None:
    """The hot loop of a function that is one loop of these instructions."""
    lines = [".Lloop:", *(f"\t{text}" for text in instructions), "\tcbnz\tx0, .Lloop"]
    return hot_loop(parse_assembly("\n".join(lines)))


def test_the_innermost_loop_with_the_most_products_is_hot() -> None:
    """Branches forward do not end it; products of 64 and of 16 bits are not int8."""
    loop = hot_loop(parse_assembly(NESTED))
    assert loop is not None
    assert [i.mnemonic for i in loop.code] == "ldr sdot smmla cbz smull subs b.ne".split()
    assert (loop.instructions, loop.macs) == (7, 16 + 32)


def test_products_of_plain_neon_count() -> None:
    """Eight to a widening multiplication of bytes."""
    rest = NESTED[NESTED.index(".LBB0_4") :]
    loop = hot_loop(parse_assembly(rest))
    assert loop is not None
    assert (loop.instructions, loop.macs) == (4, 16)


@pytest.mark.parametrize("text", ["fmla\tv0.4s, v1.4s, v2.4s", "smull\tx0, w1, w2"])
def test_a_loop_without_int8_products_is_not_hot(text: str) -> None:
    """Attention and norms have none."""
    assert loop_of(text) is None


@pytest.mark.parametrize(
    "text",
    [
        "sdot\tz0.s, z1.b, z2.b[1]",
        "smmla\tz0.s, z1.b, z2.b",
        "smopa\tza0.s, p0/m, p1/m, z0.b, z1.b",
    ],
)
def test_scalable_products_are_left_out(text: str) -> None:
    """The models know no vector length; a rest in NEON does not stand for the kernel."""
    assert loop_of(text) is None
    assert loop_of(text, "sdot\tv0.4s, v1.16b, v2.16b") is None


@pytest.mark.needs("llvm-mca-19")
def test_cycles_are_those_of_a_running_loop() -> None:
    """A V1 starts four dot products in a cycle; one that needs the last one's sum waits for it."""
    chain = loop_of("sdot\tv0.4s, v1.16b, v2.16b")
    assert chain is not None
    assert macs_per_cycle(chain, "neoverse-v1") == pytest.approx(8)  # two cycles of latency
    wide = loop_of(*(f"sdot\tv{i}.4s, v30.16b, v31.16b" for i in range(16)))
    assert wide is not None
    assert macs_per_cycle(wide, "neoverse-v1") == pytest.approx(64)
    for model in MODELS.values():
        assert macs_per_cycle(wide, model) is not None, model


@pytest.mark.needs("llvm-mca-19")
def test_a_loop_that_a_model_rejects_has_no_figure() -> None:
    """It is no error: other models may take it."""
    loop = Loop((Instruction(0, "unknown", "x0"),), 1)
    assert macs_per_cycle(loop, "neoverse-v1") is None


def test_without_llvm_mca_there_is_no_figure(monkeypatch: pytest.MonkeyPatch) -> None:
    """Nothing is run."""
    monkeypatch.setattr(mca, "find_mca", lambda: None)
    loop = loop_of("sdot\tv0.4s, v1.16b, v2.16b")
    assert loop is not None
    assert macs_per_cycle(loop, "neoverse-v1") is None


def test_every_core_of_our_socs_has_a_model_or_is_known_to_have_none() -> None:
    """LLVM's model of Oryon rejects dot products, and generic cores are no cores."""
    assert set(CORES.values()) <= set(MODELS)
    cores = {c.mcpu for name in soc_files() for c in load_soc(name).clusters}
    assert {c for c in cores - set(CORES) if c.startswith(("cortex-", "c1-"))} == set()
