"""Keep numpy's matrix products on one thread while the reference runs.

OpenBLAS shares every product among all CPUs and lets its threads wait for each other in a loop. On
a machine that does anything else at the same time, as a compiling one does, the products of the
reference (thousands of small ones) then take ten times as long as on one thread.
"""

from __future__ import annotations

import ctypes
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

# Builds of OpenBLAS with 64-bit integers, as in numpy's wheels, have names of their own.
_NAMES = (
    "scipy_openblas_{}_num_threads64_",
    "openblas_{}_num_threads64_",
    "openblas_{}_num_threads",
)


@contextmanager
def single_threaded_blas() -> Iterator[None]:
    """Let numpy use one thread in this block; does nothing where there is no OpenBLAS."""
    controls = [(get(), set_) for get, set_ in _find_controls()]
    for _, set_ in controls:
        set_(1)
    try:
        yield
    finally:
        for count, set_ in controls:
            set_(count)


def _find_controls() -> Iterator[tuple[Any, Any]]:
    """How to get and set the number of threads of every OpenBLAS in this process."""
    for path in _loaded_libraries("openblas"):
        library = ctypes.CDLL(path)
        for name in _NAMES:
            get = getattr(library, name.format("get"), None)
            set_ = getattr(library, name.format("set"), None)
            if get is not None and set_ is not None:
                yield get, set_
                break


def _loaded_libraries(word: str) -> list[str]:
    """Paths of loaded libraries with a word in their file name; none where Linux does not tell."""
    try:
        lines = Path("/proc/self/maps").read_text("utf-8", "replace").splitlines()
    except OSError:
        return []
    fields = (line.split(None, 5) for line in lines)
    paths = {field[5] for field in fields if len(field) == 6}
    return sorted(path for path in paths if word in Path(path).name)
