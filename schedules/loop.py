"""Loops and branches of a kernel as Python context managers, with the index type that we use."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

from tvm.tirx.script.builder import ir as T


def loop(stop: Any, start: Any = 0) -> Any:
    """Loop from `start` up to `stop` with an int64 index."""
    return T.serial(_int64(start), _int64(stop))


@contextmanager
def when(condition: Any) -> Iterator[None]:
    """Run the body only if a scalar condition holds."""
    with T.If(condition), T.Then():
        yield


def _int64(value: Any) -> Any:
    return T.int64(value) if isinstance(value, int) else value
