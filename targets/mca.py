"""What a processor model says of a kernel's hot loop: llvm-mca, where it is installed.

The hot loop is the innermost loop with the most int8 products. llvm-mca predicts the cycles of an
iteration from a core's pipes, latencies and width. It knows no caches, so its figures are ceilings.
It does not know the length of vectors either: loops with products of SVE or SME are left out.
"""

from __future__ import annotations

import re
import subprocess
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

from llamac.targets.machine_code import Instruction, find_llvm_tool

# Core models of LLVM 19, by the cores that they stand for.
MODELS: Mapping[str, str] = {
    "A53": "cortex-a53",
    "A55": "cortex-a55",
    "A510": "cortex-a510",
    "N1": "neoverse-n1",
    "N2": "neoverse-n2",
    "V1": "neoverse-v1",
    "V2": "neoverse-v2",
    "M1": "apple-m1",
}

# Phone cores have no models of their own: the server core of the same family stands for them, as
# in LLVM itself (AArch64Processors.td) but for A76 to X1, to which it gives the model of the A57.
# The C1 cores follow the X925 and the A725; that their pipes are like those is our assumption. All
# of Apple's have one model in LLVM, an old one. That of Oryon rejects dot products (LLVM 19).
CORES: Mapping[str, str] = {
    "cortex-a53": "A53",
    "cortex-a55": "A55",
    "cortex-a510": "A510",
    "cortex-a520": "A510",
    "cortex-a76": "N1",
    "cortex-a77": "N1",
    "cortex-a78": "N1",
    "cortex-x1": "V1",
    "neoverse-v1": "V1",
    "cortex-a710": "N2",
    "cortex-a715": "N2",
    "cortex-a720": "N2",
    "cortex-a725": "N2",
    "cortex-x2": "N2",
    "cortex-x3": "N2",
    "cortex-x4": "N2",
    "cortex-x925": "V2",
    "c1-ultra": "V2",
    "c1-premium": "V2",
    "c1-pro": "N2",
    "apple-a14": "M1",
    "apple-a17": "M1",
    "apple-m4": "M1",
}

_ITERATIONS = 50
# int8 products of one instruction, by its mnemonic and the type of its destination.
_PRODUCTS = {
    ("sdot", "4s"): 16,
    ("udot", "4s"): 16,
    ("usdot", "4s"): 16,
    ("smmla", "4s"): 32,
    ("usmmla", "4s"): 32,
    ("smull", "8h"): 8,
    ("smull2", "8h"): 8,
    ("smlal", "8h"): 8,
    ("smlal2", "8h"): 8,
}
_NEON = re.compile(r"v\d+\.(\w+)")
_SCALABLE = re.compile(r"[a-z]*(dot|mmla|mop[as])")


@dataclass(frozen=True)
class Loop:
    """The instructions of a loop and how many int8 products one iteration makes."""

    code: tuple[Instruction, ...]
    macs: int

    @property
    def instructions(self) -> int:
        """Instructions of one iteration."""
        return len(self.code)


def hot_loop(code: Sequence[Instruction]) -> Loop | None:
    """Find the innermost loop with the most int8 products.

    Args:
        code: a kernel, in the order of addresses.

    Returns:
        None if no loop has any, or if products of scalable vectors are in a loop.
    """
    spans = [(i.target, i.address) for i in code if i.target is not None and i.target <= i.address]
    innermost = [
        span
        for span in spans
        if not any(other != span and span[0] <= other[0] and other[1] <= span[1] for other in spans)
    ]
    loops = [tuple(i for i in code if start <= i.address <= end) for start, end in innermost]
    if any(_is_scalable(i) for loop in loops for i in loop):
        return None
    found = (Loop(loop, sum(map(_products, loop))) for loop in loops)
    return max((loop for loop in found if loop.macs), key=lambda loop: loop.macs, default=None)


def _products(instruction: Instruction) -> int:
    match = _NEON.match(instruction.operands)
    return _PRODUCTS.get((instruction.mnemonic, match[1]), 0) if match else 0


def _is_scalable(instruction: Instruction) -> bool:
    is_product = _SCALABLE.fullmatch(instruction.mnemonic) is not None
    return is_product and instruction.operands.startswith("z")


def find_mca() -> str | None:
    """Path of an llvm-mca that knows these cores; None if there is none."""
    return find_llvm_tool("llvm-mca")


def macs_per_cycle(loop: Loop, model: str) -> float | None:
    """Predict the int8 products per cycle of a loop on a core, once the loop is running.

    Args:
        loop: from `hot_loop`.
        model: LLVM's name of the core, a value of MODELS.

    Returns:
        None if llvm-mca is missing or its model rejects the loop.
    """
    program = find_mca()
    if program is None:
        return None
    # The difference is without the cycles in which pipes fill and empty.
    few, many = (_cycles(program, loop, model, n) for n in (_ITERATIONS, 2 * _ITERATIONS))
    if few is None or many is None:
        return None
    return _ITERATIONS * loop.macs / (many - few)


def _cycles(program: str, loop: Loop, model: str, iterations: int) -> int | None:
    command = [program, "-mtriple=aarch64", f"-mcpu={model}", "-mattr=+dotprod,+i8mm"]
    command += [f"-iterations={iterations}", "-instruction-info=0", "-resource-pressure=0"]
    text = "\n".join(instruction.text for instruction in loop.code) + "\n"
    done = subprocess.run(command, input=text, capture_output=True, text=True, check=False)
    found = re.search(r"Total Cycles:\s+(\d+)", done.stdout)
    return int(found[1]) if done.returncode == 0 and found else None
