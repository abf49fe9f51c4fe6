"""What the code of a kernel says before it runs: a hash, and instructions per product by kind.

LLVM's assembly is read as text, for x86-64, AArch64 and Hexagon alike. The loop with the most
products is where a kernel spends its time; how many instructions of each kind it has for one
product is what a cost model needs of it. Equal hashes are equal code, and need no second
measurement.
"""

from __future__ import annotations

import hashlib
import re
from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass

# Products of all levels; those of one kernel are of one kind, so that they can be counted alike.
_PRODUCT = re.compile(
    r"vpdpbusd|vpmaddubsw|pmaddwd|pmulld|mulps|vfn?m(add|sub)\w*ps"
    r"|[su]dot|usdot|u?smmla|fml[as]|smull2?|smlal2?|[su]mopa|fmopa|fmul"
    r"|.*\bvrmpy|.*\bvmpy|.*\bsfmpy"
)
_PREFETCH = re.compile(r"prefetch|prfm|dcfetch")
_BROADCAST = re.compile(r"v?p?broadcast|dup|ld1r|vsplat")
_VECTOR = re.compile(r"%[xyz]mm|\b[vz]\d+[.:]|\b[qz]\d+\b|\bv\d+\b")
_STACK = re.compile(r"\(%r[sb]p\)|\[sp\b|\br29\+#|\br30\+#|\bmemw\(r29")
_MEMORY = re.compile(r"\(%|\(,|\[(x|w|sp)|\bv?mem\w*\(")
_STORE = re.compile(r"st[rpu]\w*|st\d\w?|v?mem\w*\(.*\)\s*=")
_LABEL = re.compile(r"^(\.L\w+):")
_LABEL_USE = re.compile(r"\.L\w+")
_DATA = re.compile(r"\.(long|quad|byte|short|zero|ascii|xword|word|hword)\b")
_COMMENT = re.compile(r"\s*(#|//).*$")

KINDS = (
    "product",
    "product_memory",
    "broadcast",
    "load",
    "store",
    "spill",
    "prefetch",
    "vector",
    "scalar",
)


@dataclass(frozen=True)
class CodeFeatures:
    """What was read of a kernel's assembly.

    Attributes:
        code: hash of instructions and constants.
        loops: innermost loops with products, most products first: instructions by kind.
    """

    code: str
    loops: tuple[Counter[str], ...]


def read_assembly(text: str) -> CodeFeatures:
    """Read a kernel's assembly, as LLVM prints it."""
    lines, labels = _instructions(text)
    digest = hashlib.sha256()
    names: dict[str, str] = {}
    for line in lines:
        same = _LABEL_USE.sub(lambda m: names.setdefault(m[0], f".{len(names)}"), line)
        digest.update(same.encode() + b"\n")
    code = [line for line in lines if not line.startswith(".")]
    places = {name: sum(not x.startswith(".") for x in lines[:i]) for name, i in labels.items()}
    loops = [
        Counter(map(_kind, code[first : last + 1])) for first, last in _innermost(code, places)
    ]
    found = sorted((c for c in loops if _products(c)), key=_products, reverse=True)
    return CodeFeatures(digest.hexdigest()[:16], tuple(found))


def per_product(code: CodeFeatures, tokens: int, tile: int) -> dict[str, float]:
    """Instructions of each kind for one product of the loops that do the work.

    Args:
        code: of the kernel.
        tokens: that a call computes.
        tile: that its main loop computes together; those left over have a loop of their own.

    Returns:
        By the names in KINDS; empty if there is no loop with products.
    """
    if not code.loops:
        return {}
    main = code.loops[0]
    mixed = {kind: main[kind] / _products(main) for kind in KINDS}
    full, rest = divmod(tokens, tile) if 0 < tile <= tokens else (1, 0)
    wanted = _products(main) * rest / tile if rest else 0
    others = [loop for loop in code.loops if _products(loop) == wanted]
    if not rest or not others:
        return mixed
    share = rest / (full * tile + rest)
    other = others[0]
    return {
        kind: (1 - share) * mixed[kind] + share * other[kind] / _products(other) for kind in KINDS
    }


def _products(loop: Counter[str]) -> int:
    return loop["product"] + loop["product_memory"]


def _instructions(text: str) -> tuple[list[str], dict[str, int]]:
    """Instructions and data, and for each label the number of the line behind it."""
    lines: list[str] = []
    labels: dict[str, int] = {}
    for raw in text.splitlines():
        line = _COMMENT.sub("", raw).strip()
        if label := _LABEL.match(line):
            labels[label[1]] = len(lines)
        elif line and line not in "{}" and not line.endswith(":"):
            if not line.startswith(".") or _DATA.match(line):
                lines.append(" ".join(line.split()))
    return lines, labels


def _innermost(code: Sequence[str], places: dict[str, int]) -> list[tuple[int, int]]:
    """First and last instruction of loops that have no loop in them."""
    spans = set()
    started: dict[str, str] = {}  # Hexagon: the label that a hardware loop begins at
    for i, line in enumerate(code):
        if found := re.search(r"\bloop([01])\((\.L\w+)", line):
            started[found[1]] = found[2]
        elif found := re.search(r":endloop([01])", line):
            label = started.get(found[1], "")
            spans |= {(places[label], i)} if label in places else set()
        else:
            targets = (places.get(name, i + 1) for name in _LABEL_USE.findall(line))
            spans |= {(target, i) for target in targets if target <= i and _is_branch(line)}
    return sorted(
        span
        for span in spans
        if not any(o != span and span[0] <= o[0] and o[1] <= span[1] for o in spans)
    )


def _is_branch(line: str) -> bool:
    return re.match(r"j\w+ |b\w*(\.\w+)? |cbn?z |tbn?z |.*\bjump", line) is not None


def _kind(line: str) -> str:
    """What an instruction does, one of KINDS."""
    mnemonic, _, operands = line.partition(" ")
    in_memory = _MEMORY.search(operands) is not None
    if _PRODUCT.match(line):
        return "product_memory" if in_memory else "product"
    for kind, pattern in (("prefetch", _PREFETCH), ("broadcast", _BROADCAST)):
        if pattern.match(mnemonic):
            return kind
    if _STACK.search(line):
        return "spill"
    is_memory = in_memory or _MEMORY.search(line) is not None
    if is_memory and not mnemonic.startswith("lea"):
        is_x86_store = re.match(r"v?mov", mnemonic) and operands.endswith(")")
        return "store" if _STORE.match(line) or is_x86_store else "load"
    return "vector" if _VECTOR.search(operands or line) else "scalar"
