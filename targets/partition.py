"""How a target claims composites: it marks their functions with its name.

A composite function stands for all of its calls, so claiming it claims them. Targets partition in
the SoC's order of processors, and what one has claimed no later one sees.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Iterator
from typing import Any, TypeAlias

from tvm import relax
from tvm.ir import GlobalVar, IRModule

CLAIM_ATTR = "llamac.target"

Takes: TypeAlias = Callable[[str, dict[str, Any]], bool]
"""Called with a composite's kind, "llamac.qlinear", and its attributes; true: take it."""


def composites(mod: IRModule) -> Iterator[tuple[GlobalVar, relax.Function]]:
    """Yield the composite functions of a module."""
    untyped: Any = mod
    for var, function in untyped.functions_items():
        if isinstance(function, relax.Function) and _attr(function, "Composite"):
            yield var, function


def owner_of(function: relax.Function) -> str:
    """Return which target claimed a composite function, or "" if none did."""
    return _attr(function, CLAIM_ATTR)


def claim(mod: IRModule, target: str, takes: Takes) -> IRModule:
    """Return the module with every unclaimed composite that `takes` accepts marked for `target`."""
    untyped: Any = mod  # TVM gives IRModule no type hints
    functions = dict(untyped.functions_items())
    for var, function in composites(mod):
        attrs = json.loads(_attr(function, "llamac.attrs") or "{}")
        if not owner_of(function) and takes(_attr(function, "Composite"), attrs):
            functions[var] = function.with_attr(CLAIM_ATTR, target)
    claimed: IRModule = type(untyped)(functions, attrs=untyped.attrs)
    return claimed


def _attr(function: relax.Function, name: str) -> str:
    return str(function.attrs[name]) if function.attrs and name in function.attrs else ""
