"""The machine code of a model's kernels stands alone: no heap, no libm, no helpers of LLVM."""

from __future__ import annotations

import re
from collections.abc import Callable
from typing import Any

import pytest

from llamac.schedules.intrin.isa import Isa
from llamac.schedules.intrin.x86 import X86_LEVELS
from llamac.schedules.kernel import compile_kernels

OUTSIDE = re.compile(r"\b([A-Za-z_][\w.]*)@(?:PLT|GOTPCREL|GOTPCRELX)\b")


ALLOWED = {"TVMFFIErrorSetRaisedFromCStrParts", "memcpy", "memset"}


@pytest.mark.slow
@pytest.mark.parametrize("isa", X86_LEVELS, ids=lambda isa: isa.name)
def test_kernels_call_nothing_outside(lowered: Callable[..., Any], isa: Isa) -> None:
    """What records a wrong argument, and what every libc has.

    LLVM turns some casts and loops into calls that its own code does not declare (`__extendhfsf2`,
    `memset`), so the assembly is searched.
    """
    kernels = {}
    for form, options in (("qlora", {"kv_dtype": "int8"}), ("spinquant", {}), ("float", {})):
        model = lowered(form, chunks=(8,), shared=form == "float", **options)
        kernels |= model.selection.kernels
    library = compile_kernels({name: spec.make(isa) for name, spec in kernels.items()}, isa)
    names = set(OUTSIDE.findall(library.inspect_source("asm")))
    outside = names - {f"__tvm_ffi_{name}" for name in kernels}
    assert "TVMFFIErrorSetRaisedFromCStrParts" in outside
    assert outside <= ALLOWED
