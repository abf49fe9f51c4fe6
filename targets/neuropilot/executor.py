"""LiteRT's interpreter, set up so that a .tflite computes what it says.

Imported by processes that execute graphs: LiteRT's library is loaded.
"""

from __future__ import annotations

import importlib
import math
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from llamac.runtime.errors import AcceleratorError


def open_interpreter(path: Path, *, keep_all: bool = False) -> Any:
    """Open a .tflite and allocate its tensors.

    Args:
        path: of the file; a damaged one may end the process.
        keep_all: values inside the graph can be read after a call.
    """
    module = importlib.import_module("ai_edge_litert.interpreter")
    # Nothing but LiteRT's own kernels: delegates compute some operations by other rules.
    resolver = module.OpResolverType.BUILTIN_WITHOUT_DEFAULT_DELEGATES
    interpreter = module.Interpreter(
        model_path=str(path),
        experimental_op_resolver_type=resolver,
        experimental_preserve_all_tensors=keep_all,
    )
    interpreter.allocate_tensors()
    return interpreter


class LiteRtGraph:
    """A .tflite as a graph of a library (`targets/hosted_graphs.py`)."""

    def __init__(self, path: Path) -> None:
        try:
            self._interpreter = open_interpreter(path)
        except (ValueError, RuntimeError) as error:
            raise AcceleratorError(
                f"LiteRT's interpreter does not take {path.name}: {error}",
                cause="the file is damaged, or of another version of LiteRT",
                fix="compile the model again",
            ) from error
        self._inputs = {d["name"]: d for d in self._interpreter.get_input_details()}
        self._outputs = {d["name"]: d for d in self._interpreter.get_output_details()}
        self._name = path.name

    def run(
        self, inputs: Mapping[str, NDArray[np.uint8]], outputs: Mapping[str, NDArray[np.uint8]]
    ) -> None:
        """Execute it.

        Raises:
            AcceleratorError: its inputs or outputs are others, or the interpreter failed.
        """
        self._check(self._inputs, inputs)
        self._check(self._outputs, outputs)
        for name, data in inputs.items():
            details = self._inputs[name]
            values = data.view(details["dtype"]).reshape(details["shape"])
            self._interpreter.set_tensor(details["index"], values)
        self._interpreter.invoke()
        for name, data in outputs.items():
            result: NDArray[Any] = self._interpreter.get_tensor(self._outputs[name]["index"])
            data[:] = np.ascontiguousarray(result).reshape(-1).view(np.uint8)

    def _check(self, has: Mapping[str, Any], given: Mapping[str, NDArray[np.uint8]]) -> None:
        """Compare names and sizes."""
        expected = {
            (name, math.prod(details["shape"]) * np.dtype(details["dtype"]).itemsize)
            for name, details in has.items()
        }
        wrong = sorted(expected ^ {(name, data.nbytes) for name, data in given.items()})
        if wrong:
            raise AcceleratorError(
                f"{self._name} and the library differ in {wrong[0][0]}",
                cause="they are of different builds",
                fix="compile the model again",
            )
