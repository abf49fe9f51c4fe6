"""The reference model with an eye on what goes into its linear layers: calibration data."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from llamac.compiler.checkpoint import Checkpoint
from llamac.compiler.reference import Float64
from llamac.compiler.reference_model import ReferenceModel


class ObservedModel(ReferenceModel):
    """A reference model that shows every linear layer's input before it is multiplied.

    Args:
        checkpoint: the model.
        observe: gets the layer's name without ".weight" ("layers.0.attention.wq", "output") and
            its input [T, K]: float, after RMSNorm and, before w2, after R4 where there is one.
        options: of `ReferenceModel`.
    """

    def __init__(
        self, checkpoint: Checkpoint, observe: Callable[[str, Float64], None], **options: Any
    ) -> None:
        super().__init__(checkpoint, **options)
        self._see_input = observe

    def _linear(self, name: str, x: Float64) -> Float64:
        self._see_input(name, x)
        return super()._linear(name, x)
