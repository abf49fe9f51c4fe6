"""Counting instructions: classes, regions, and what cannot be counted."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import replace
from pathlib import Path

import pytest

from llamac.runtime.errors import DeviceError, ToolchainMissing
from llamac.targets.count import Counts, count_instructions, counting
from llamac.targets.emulator import Emulator, find_emulator
from llamac.targets.kernel_runner import SOURCES, STATIC_TARGET
from llamac.targets.toolchain import find_toolchain, link_executable

# x9 points to a buffer; p0 is all true, and the vectors that are offsets are zero.
CLASSES: Mapping[str, Sequence[str]] = {
    "load": [
        "ldr x0, [x9]",
        "ldrsw x0, [x9]",
        "ldrb w0, [x9, x10]",
        "ldp x0, x1, [x9]",
        "ldr q0, [x9]",
        "ldur d0, [x9, #1]",
        "ldp q0, q1, [x9]",
        "ld1 {v0.16b}, [x9]",
        "ld1r {v0.4s}, [x9]",
        "ldar w0, [x9]",
        "prfm pldl1keep, [x9]",
        "ldr z0, [x9]",
        "ld1b {z0.b}, p0/z, [x9]",
        "ld1rqb {z0.b}, p0/z, [x9]",
        "ld1rw {z0.s}, p0/z, [x9]",
        "ld4b {z0.b-z3.b}, p0/z, [x9]",
        "ld1w {z0.s}, p0/z, [x9, z7.s, uxtw]",
        "ld1d {z0.d}, p0/z, [x9, z7.d]",
        "prfb pldl1keep, p0, [x9]",
    ],
    "store": [
        "str x0, [x9]",
        "strb w0, [x9]",
        "stp x0, x1, [x9]",
        "str q0, [x9]",
        "stur s0, [x9, #1]",
        "stp q0, q1, [x9]",
        "st1 {v0.16b}, [x9]",
        "stlr w0, [x9]",
        "str z0, [x9]",
        "st1b {z0.b}, p0, [x9]",
        "st2w {z0.s-z1.s}, p0, [x9]",
        "st1w {z0.s}, p0, [x9, z7.s, uxtw]",
        "stnt1b {z0.b}, p0, [x9]",
    ],
    "dot": [
        "sdot v0.4s, v1.16b, v2.16b",
        "udot v0.2s, v1.8b, v2.8b",
        "usdot v0.4s, v1.16b, v2.16b",
        "sdot v0.4s, v1.16b, v2.4b[3]",
        "usdot v0.4s, v1.16b, v2.4b[1]",
        "sudot v0.4s, v1.16b, v2.4b[2]",
        "sdot z0.s, z1.b, z2.b",
        "udot z0.s, z1.b, z2.b",
        "usdot z0.s, z1.b, z2.b",
        "sdot z0.s, z1.b, z2.b[3]",
        "usdot z0.s, z1.b, z2.b[1]",
        "sudot z0.s, z1.b, z2.b[1]",
    ],
    "mmla": [
        "smmla v0.4s, v1.16b, v2.16b",
        "ummla v0.4s, v1.16b, v2.16b",
        "usmmla v0.4s, v1.16b, v2.16b",
        "smmla z0.s, z1.b, z2.b",
        "ummla z0.s, z1.b, z2.b",
        "usmmla z0.s, z1.b, z2.b",
    ],
    "vector": [
        "fmla v0.4s, v1.4s, v2.s[1]",
        "fadd s0, s1, s2",
        "scvtf v0.4s, v1.4s, #4",
        "shl v0.16b, v1.16b, #4",
        "smull v0.8h, v1.8b, v2.8b",
        "dup v0.4s, w0",
        "fcvtl v0.4s, v1.4h",
        "fmla z0.s, p0/m, z1.s, z2.s",
        "ptrue p1.b",
        "whilelo p1.s, x0, x1",
        "lsl z0.b, z1.b, #4",
    ],
    "branch": ["b 1f; 1:", "cbz x0, 1f; 1:", "b.eq 1f; 1:", "tbz x0, #1, 1f; 1:", "nop"],
    "scalar": ["add x0, x0, #1", "madd x0, x0, x1, x2", "adr x0, .", "csel x0, x0, x1, eq"],
}
STREAMING: Mapping[str, Sequence[str]] = {
    "sme": [
        "smopa za0.s, p0/m, p0/m, z1.b, z2.b",
        "fmopa za1.s, p0/m, p0/m, z1.s, z2.s",
        "mova z0.s, p0/m, za0h.s[w12, 0]",
        "zero {za}",
    ],
    "load": ["ldr za[w12, 0], [x9]", "ld1w {za0h.s[w12, 0]}, p0/z, [x9]"],
    "store": ["str za[w12, 0], [x9]", "st1w {za0h.s[w12, 0]}, p0, [x9]"],
}
BEGIN, END = "orr x10, x10, x10", "orr x11, x11, x11"

Build = Callable[[str, str], Path]


@pytest.fixture(scope="module")
def build(tmp_path_factory: pytest.TempPathFactory) -> Build:
    """`build(name, source) -> program` for AArch64, static."""
    folder = tmp_path_factory.mktemp("programs")

    def make(name: str, source: str) -> Path:
        (folder / f"{name}.c").write_text(source)
        link_executable(
            find_toolchain(),
            sources=[folder / f"{name}.c"],
            include_dirs=[SOURCES],
            out=folder / name,
            target=STATIC_TARGET,
            cflags=["-static", "-DLLAMAC_MARK_KERNELS"],
        )
        return folder / name

    return make


def assembly(instructions: Sequence[str]) -> str:
    """A C program that executes each instruction in a region of its own."""
    prepare = ["ptrue p0.b", "dup z7.b, #0"]  # smstart and smstop clear them
    lines = [".arch armv9-a+sme+i8mm", "mov x9, %0", "mov x10, 0", "mov w12, 0", *prepare]
    for instruction in instructions:
        is_mode = instruction == "smstart"
        lines += [instruction, *prepare] if is_mode else [BEGIN, instruction, END, *prepare]
    lines.append("smstop")
    text = "\\n".join(lines)
    clobbers = ", ".join(f'"{name}"' for name in ("x0", "x1", "x2", "x9", "x10", "x12", "memory"))
    vectors = ", ".join(f'"v{i}"' for i in range(32))
    return f"""
static char buffer[1 << 16];
int main(void) {{
  __asm__ volatile("{text}" :: "r"(buffer + 256) : {clobbers}, {vectors});
  return 0;
}}
"""


def emulator(cpu: str = "max,sme=on") -> Emulator:
    """An emulator with plug-ins; skips the test without."""
    found = find_emulator(cpu)
    if not found.has_plugins:
        pytest.skip("missing program: a qemu-aarch64 that loads plug-ins")
    return found


@pytest.mark.needs("qemu-aarch64")
def test_each_instruction_is_counted_in_its_class(build: Build) -> None:
    """One region for each, of the mark and the instruction."""
    plain, streaming = (
        {text: name for name, texts in classes.items() for text in texts}
        for classes in (CLASSES, STREAMING)
    )
    source = assembly([*plain, "smstart", *streaming])
    _, regions = count_instructions(emulator(), [build("classes", source)])
    classes = plain | streaming
    found = dict(zip(classes, regions, strict=True))
    expected = {text: Counts(scalar=1) + Counts(**{name: 1}) for text, name in classes.items()}
    assert {text: counts for text, counts in found.items() if counts != expected[text]} == {}


MARKS = """
#include <stdio.h>
#include "kernel_marks.h"
int main(int argc, char **argv) {
  volatile int x = 0;
  for (int n = 0; n < 3; n++) {
    llamac_mark_begin();
    for (int i = 0; i < n * 1000; i++) x++;
    llamac_mark_end();
  }
  llamac_mark_end();
  int c = getchar();
  putchar(c);
  fprintf(stderr, "%d arguments", argc);
  return c == 'f' ? 7 : 0;
}
"""


@pytest.mark.needs("qemu-aarch64")
def test_regions_are_those_between_the_marks(build: Build) -> None:
    """In order, equal in every run, and without what is outside; the program reads and writes."""
    program = build("marks", MARKS)
    output, regions = count_instructions(emulator(), [program, "a"], b"x")
    assert output == b"x"
    assert len(regions) == 3
    none, once, twice = (counts.total for counts in regions)
    assert none < 20
    assert twice - once == once - none > 3000
    assert count_instructions(emulator(), [program, "a"], b"x")[1] == regions


@pytest.mark.needs("qemu-aarch64")
def test_a_program_that_fails_is_an_error(build: Build) -> None:
    """With its own words."""
    with pytest.raises(DeviceError, match="marks ended with code 7 while it was counted") as caught:
        count_instructions(emulator(), [build("marks", MARKS)], b"f")
    assert caught.value.cause == "1 arguments"


def test_an_emulator_without_plug_ins_is_an_error(tmp_path: Path) -> None:
    """As the static builds of QEMU are; nothing is built or run."""
    static = Emulator("qemu-aarch64-static", (10, 0, 2), "max", has_plugins=False)
    with pytest.raises(ToolchainMissing, match=r"qemu-aarch64-static 10\.0\.2 has no") as caught:
        counting(static, tmp_path / "counts")
    assert "dynamic build" in caught.value.fix


def test_the_emulator_gets_the_plug_in_and_the_file(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """QEMU divides arguments at commas, so that one in a path is doubled."""
    monkeypatch.setattr("llamac.targets.count.counter_plugin", lambda: Path("c.so"))
    dynamic = Emulator("qemu-aarch64", (7, 2, 0), "max", has_plugins=True)
    counted = counting(dynamic, tmp_path / "a,b")
    assert counted == replace(dynamic, plugin=f"c.so,out={tmp_path}/a,,b")
    assert counted.command("p")[3:] == ["-plugin", counted.plugin, "p"]


def test_counts_add_up() -> None:
    """By class, and in total."""
    both = Counts(load=1, dot=2) + Counts(load=10, scalar=5)
    assert both == Counts(load=11, dot=2, scalar=5)
    assert both.total == 18
