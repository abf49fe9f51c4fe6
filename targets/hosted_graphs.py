"""Graphs of a bundle's library that this process executes (`runtime/c/hosted`).

    host = GraphHost(open_graph)
    library = Library(path)
    host.serve(library)            # before a model is opened with it

The library calls back into Python, from the thread that evaluates tokens.
"""

from __future__ import annotations

import ctypes
import itertools
import os
from collections.abc import Callable, Mapping
from ctypes import POINTER, c_char_p, c_int32, c_uint32, c_uint64, c_void_p
from pathlib import Path
from typing import Any, Protocol

import numpy as np
from numpy.typing import NDArray

from llamac.runtime.errors import LlamacError
from llamac.runtime.library import Library

Bytes = NDArray[np.uint8]


class HostedGraph(Protocol):
    """A graph that was opened."""

    def run(self, inputs: Mapping[str, Bytes], outputs: Mapping[str, Bytes]) -> None:
        """Execute it.

        Args:
            inputs: bytes of every input, by its name.
            outputs: memory of every output, to be written.
        """


class _Operand(ctypes.Structure):
    _fields_ = (("name", c_char_p), ("data", c_void_p), ("bytes", c_uint64))


_Open = ctypes.CFUNCTYPE(
    c_int32, c_void_p, c_char_p, c_char_p, POINTER(c_void_p), c_void_p, c_uint64
)
_Call = ctypes.CFUNCTYPE(
    c_int32, c_void_p, c_void_p, POINTER(_Operand), c_uint32, c_uint32, c_void_p, c_uint64
)
_Close = ctypes.CFUNCTYPE(None, c_void_p, c_void_p)


class GraphHost:
    """Executes the graphs of libraries; it must live as long as their models.

    Args:
        open_graph: opens a file of the bundle.
    """

    def __init__(self, open_graph: Callable[[Path], HostedGraph]) -> None:
        self._open_graph = open_graph
        self._graphs: dict[int, HostedGraph] = {}
        self._numbers = itertools.count(1)
        # The library has their addresses only, so that nothing but this keeps them.
        self._functions = (_Open(self._open), _Call(self._call), _Close(self._close))

    @property
    def num_open(self) -> int:
        """How many graphs are open."""
        return len(self._graphs)

    def serve(self, library: Library) -> None:
        """Execute the graphs of all models that are opened with the library from now on."""
        library.value("llamac_hosted_graphs_set", *self._functions, None)

    def _open(
        self, _: int, folder: bytes, file: bytes, handle: Any, message: int, capacity: int
    ) -> int:
        def work() -> None:
            number = next(self._numbers)
            self._graphs[number] = self._open_graph(Path(os.fsdecode(folder), os.fsdecode(file)))
            handle[0] = number

        return _guarded(work, message, capacity)

    def _call(
        self,
        _: int,
        handle: int,
        operands: Any,
        num_inputs: int,
        num_outputs: int,
        message: int,
        capacity: int,
    ) -> int:
        def work() -> None:
            views = [_view(operands[i]) for i in range(num_inputs + num_outputs)]
            inputs, outputs = dict(views[:num_inputs]), dict(views[num_inputs:])
            self._graphs[handle].run(inputs, outputs)

        return _guarded(work, message, capacity)

    def _close(self, _: int, handle: int) -> None:
        self._graphs.pop(handle, None)


def _view(operand: _Operand) -> tuple[str, Bytes]:
    """Name and memory of an operand."""
    memory = (ctypes.c_uint8 * operand.bytes).from_address(operand.data)
    return operand.name.decode(), np.frombuffer(memory, np.uint8)


def _guarded(work: Callable[[], None], message: int, capacity: int) -> int:
    """Do something for the library, which must learn of any error: ctypes would drop it."""
    try:
        work()
    except BaseException as error:  # an interrupt, too, must stop the evaluation
        text = error.message if isinstance(error, LlamacError) else str(error)
        line = " ".join((text or type(error).__name__).split()).encode()[: capacity - 1]
        ctypes.memmove(message, line + b"\0", len(line) + 1)
        return 1
    return 0
