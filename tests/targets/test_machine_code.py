"""Reading assembly and disassembly: labels, addresses, functions without names; finding LLVM."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import pytest

from llamac.runtime.errors import DeviceError
from llamac.targets.machine_code import Disassembly, disassemble, find_llvm_tool, parse_assembly

ASSEMBLY = """\
\t.globl\tkernel
kernel:
\t.cfi_startproc
\tcbz\tx1, .LBB0_3
.LBB0_1:                                // =>This Inner Loop Header: Depth=1
\tldr\tq0, [x0], #16
\tsdot\tv1.4s, v0.16b, v2.4b[1]     // a comment
\tsubs\tx1, x1, #1
\tb.ne\t.LBB0_1
// %bb.2:
.LBB0_3:
\tret
"""

# What llvm-objdump prints of a stripped library: `one` calls code that has no name and the PLT,
# and ends with a jump to more code without a name; `two` is exported and called by `one`.
DISASSEMBLY = """
lib.so:\tfile format elf64-littleaarch64

Disassembly of section .text:

0000000000001000 <one>:
    1000:      \tstp\tx29, x30, [sp, #-0x10]!
    1004:      \tbl\t0x1018 <one+0x18>
    1008:      \tbl\t0x1028 <two>
    100c:      \tbl\t0x2000 <two@plt>
    1010:      \tadrp\tx8, 0x3000 <table>
    1014:      \tb\t0x1034 <two+0xc>
    1018:      \tsubs\tx0, x0, #0x1            // =1
    101c:      \tb.ne\t0x1018 <one+0x18>
    1020:      \tcbnz\tx0, 0x1020 <one+0x20>
    1024:      \tret

0000000000001028 <two>:
    1028:      \tadd\tx0, x0, #0x1
    102c:      \tret
    1030:      \tbl\t0x1034 <two+0xc>
    1034:      \tmov\tx0, xzr
\t\t...
    1040:      \tret
"""


def test_assembly_with_labels() -> None:
    """Directives, comments and plain labels are not code; targets are numbers of instructions."""
    code = parse_assembly(ASSEMBLY)
    assert [i.mnemonic for i in code] == ["cbz", "ldr", "sdot", "subs", "b.ne", "ret"]
    assert [i.target for i in code] == [5, None, None, None, 1, None]
    assert code[2].text == "\tsdot\tv1.4s, v0.16b, v2.4b[1]"


def test_a_function_has_the_nameless_ones_that_it_calls() -> None:
    """Called, jumped to; neither what is exported itself nor what is in other libraries."""
    code = Disassembly(DISASSEMBLY)
    assert [i.address for i in code.function("one")] == [
        *range(0x1000, 0x1028, 4),
        0x1034,
        0x1040,
    ]
    assert [i.address for i in code.function("two")] == [0x1028, 0x102C, 0x1030, 0x1034, 0x1040]
    assert code.function("three") == []
    assert Disassembly("").function("one") == []


def test_places_in_disassembly_become_labels() -> None:
    """An assembler takes the line; branches know their target, adrp is none."""
    by_address = {i.address: i for i in Disassembly(DISASSEMBLY).function("one")}
    assert by_address[0x101C].text == "\tb.ne\t.Ltarget"
    assert by_address[0x101C].target == 0x1018
    assert by_address[0x1020].text == "\tcbnz\tx0, .Ltarget"
    assert by_address[0x1010].target is None
    assert by_address[0x1018].operands == "x0, x0, #0x1"


@pytest.fixture
def path(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Path]:
    """A folder that alone is PATH."""
    monkeypatch.setenv("PATH", str(tmp_path))
    find_llvm_tool.cache_clear()
    yield tmp_path
    find_llvm_tool.cache_clear()


def add_tool(path: Path, name: str, version: str) -> Path:
    """A program that says a version, and fails otherwise."""
    tool = path / name
    tool.write_text(f'#!/bin/sh\n[ "$1" = --version ] && echo "LLVM version {version}" && exit\n')
    with tool.open("a") as file:
        file.write('echo "error: not an object file" >&2\nexit 1\n')
    tool.chmod(0o755)
    return tool


def test_the_newest_tool_is_found(path: Path) -> None:
    """By version in its name, then the plain name."""
    add_tool(path, "llvm-mca", "19.1.0")
    add_tool(path, "llvm-mca-17", "17.0.6")
    newest = add_tool(path, "llvm-mca-18", "18.1.8")
    assert find_llvm_tool("llvm-mca") == str(newest)
    assert find_llvm_tool("llvm-objdump") is None


def test_an_old_tool_does_not_count(path: Path) -> None:
    """LLVM before 16 lacks models."""
    add_tool(path, "llvm-mca", "14.0.6")
    assert find_llvm_tool("llvm-mca") is None


def test_a_library_that_cannot_be_read_is_an_error(path: Path) -> None:
    """With the words of llvm-objdump."""
    tool = add_tool(path, "llvm-objdump", "19.1.0")
    with pytest.raises(DeviceError, match=r"llvm-objdump cannot read .*lib\.so") as caught:
        disassemble(path / "lib.so", str(tool))
    assert caught.value.cause == "error: not an object file"
