"""A checkpoint whose layers are converted when they are read: what GGUF and Hugging Face share."""

from __future__ import annotations

import shutil
import tempfile
import weakref
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from llamac.compiler.checkpoint import TensorInfo, check_finite, check_scales, same_values
from llamac.compiler.config import QuantConfig
from llamac.compiler.frontends.forms import FORMS, Form, Loss, Stored, measure
from llamac.compiler.frontends.hf_tensors import FloatWeights
from llamac.compiler.frontends.onnx_packed import BlockWeights


@dataclass(frozen=True)
class Layer:
    """One layer of the model, the weights that it comes from, and what becomes of them."""

    name: str
    stored: Stored
    form: Form


class ConvertedWeights:
    """The tensors of a model, converted when they are read (a `WeightSource`).

    Args:
        layers: in the order of use.
        check_values: check scales and floats of every tensor when it is read.
    """

    def __init__(self, layers: Iterable[Layer], check_values: bool) -> None:
        self._parts = {
            f"{layer.name}.{part}": (layer, part) for layer in layers for part in layer.form.parts
        }
        self._check_values = check_values

    def names(self) -> Sequence[str]:
        """All tensors, in the order of use."""
        return tuple(self._parts)

    def info(self, name: str) -> TensorInfo:
        """Shape and dtype as `read` returns them."""
        layer, part = self._parts[name]
        return layer.form.info(layer.stored, part)

    def read(self, name: str) -> NDArray[Any]:
        """One tensor; types of the file that no kernel reads are converted here, in pieces."""
        layer, part = self._parts[name]
        array = layer.form.read(layer.stored, part)
        if self._check_values:
            if part == "scales":
                check_scales(name, array, signed=layer.form.signed)
            elif array.dtype != np.int8:
                check_finite(name, array)
        array.flags.writeable = False
        return array


def read_quant(layers: Iterable[Layer]) -> QuantConfig:
    """Which arithmetic the layers need."""
    forms = [layer.form for layer in layers]
    if not any(form.is_int4 for form in forms):
        return QuantConfig("float")
    return QuantConfig("ptq", signed_scales=any(form.signed for form in forms))


def conversion_notes(layers: Sequence[Layer]) -> Iterator[str]:
    """What became of the tensors of each type, and how much it loses."""
    losses: dict[tuple[str, str, Form, bool], list[Loss]] = {}
    is_tied = layers[0].stored is layers[-1].stored
    for layer in layers[:-1] if is_tied else layers:
        if layer.form is FORMS["norm"]:
            continue
        what = "linear layers" if layer.name.startswith("layers.") else layer.name
        key = (what, layer.stored.type, layer.form, layer.form.is_exact(layer.stored))
        losses.setdefault(key, []).append(measure(layer.stored, layer.form))
    for (what, kind, form, is_exact), parts in losses.items():
        total = sum(parts[1:], parts[0])
        count = f"{len(parts)} {what}" if what == "linear layers" else what
        loss = f"{total.decibels:.1f} dB of signal to noise" if total.noise else "no loss"
        where = "without loss" if is_exact else f"{loss} on the rows that were measured"
        yield f"{count} of type {kind}: {form.title}, {where}"


def make_tokenizer(weights: ConvertedWeights, write: Callable[[Path], None]) -> Path:
    """Have a tokenizer written into a folder that lives as long as the weights."""
    folder = tempfile.mkdtemp(prefix="llamac-")
    weakref.finalize(weights, shutil.rmtree, folder, ignore_errors=True)
    path = Path(folder) / "tokenizer.model"
    write(path)
    return path


def is_same_table(first: Stored, last: Stored) -> bool:
    """Whether embedding and output are one tensor, or equal ones of floats or blocks of codes."""
    if first is last:
        return True
    if isinstance(first, BlockWeights):
        return first.is_same(last)
    if not isinstance(first, FloatWeights) or not isinstance(last, FloatWeights):
        return False
    return first.type == last.type and same_values(first.tensor.data, last.tensor.data)
