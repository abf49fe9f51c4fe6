"""Tensors of a Hugging Face directory as stored weights: taken by name, rows in our order."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray

from llamac.compiler.floats import from_bfloat16
from llamac.compiler.frontends.forms import Rows
from llamac.compiler.frontends.safetensors_file import SafeTensor, SafeTensors
from llamac.runtime.errors import TensorInvalid

FLOATS = ("BF16", "F16", "F32")


def interleaved_order(num_rows: int, head_dim: int) -> NDArray[np.intp]:
    """Which row of Hugging Face's q or k stands at each of Meta's places.

    Hugging Face turns value i of a head with value i + D/2, Meta value 2i with 2i + 1.
    """
    places = np.arange(num_rows, dtype=np.intp).reshape(-1, 2, head_dim // 2)
    return places.transpose(0, 2, 1).reshape(-1)


class RowOrder:
    """Rows of the file for rows of ours.

    Args:
        num_rows: of both.
        order: row of the file for each of ours; None if they are the same.
    """

    def __init__(self, num_rows: int, order: NDArray[np.intp] | None = None) -> None:
        self.num_rows, self._order = num_rows, order

    def rows(self, rows: Rows) -> Rows:
        """Rows of the file; a slice if that is possible, because a slice is a view."""
        return rows if self._order is None else self._order[rows]

    def indices(self, rows: Rows) -> NDArray[np.intp]:
        """The same, as numbers."""
        found = self.rows(rows)
        return np.arange(self.num_rows)[found] if isinstance(found, slice) else found


class TensorTable:
    """The tensors of a directory; those that nobody took are counted at the end."""

    def __init__(self, files: SafeTensors) -> None:
        self.files = files
        self._taken: set[str] = set()

    def __contains__(self, name: str) -> bool:
        return name in self.files.tensors

    def take(self, name: str, dtypes: Sequence[str], shape: tuple[int, ...]) -> SafeTensor:
        """A tensor that must be there, in this form.

        Raises:
            TensorInvalid: it is missing, or of another type or shape.
        """
        tensor = self.files.tensors.get(name)
        if tensor is None or tensor.dtype not in dtypes or tensor.shape != shape:
            found = "missing" if tensor is None else f"{tensor.dtype} {list(tensor.shape)}"
            raise TensorInvalid(
                f"{self.files.path}: {name} is {found}, expected {' or '.join(dtypes)} "
                f"{list(shape)}.",
                cause="The weights are incomplete, or config.json belongs to another model.",
                fix="Fetch config.json and all weights again, from the same place.",
            )
        self._taken.add(name)
        return tensor

    def refuse_others(self) -> None:
        """Refuse tensors that the model would be computed without.

        Raises:
            TensorInvalid: there is one that means something.
        """
        for name, tensor in self.files.tensors.items():
            if name in self._taken or self._is_harmless(name, tensor):
                continue
            raise TensorInvalid(
                f"{self.files.path} holds {name!r:.100}, which a plain Llama does not have.",
                cause="The model has parts that llamac does not know (biases, adaptors, scales of "
                "a cache), or more layers than config.json says.",
                fix="Leaving a tensor out would change the results; use another model.",
            )

    @staticmethod
    def _is_harmless(name: str, tensor: SafeTensor) -> bool:
        """Constants of RoPE, and biases that are 0, which some quantizers write."""
        if name.endswith("rotary_emb.inv_freq"):
            return True
        return name.endswith(".bias") and tensor.dtype in FLOATS and not tensor.data.any()


@dataclass(frozen=True, eq=False)
class FloatWeights:
    """A tensor of bfloat16, float16 or float32 (a `Stored`)."""

    tensor: SafeTensor
    order: RowOrder

    @property
    def name(self) -> str:
        """In the file."""
        return self.tensor.name

    @property
    def type(self) -> str:
        """The format's name of the dtype."""
        return self.tensor.dtype

    @property
    def shape(self) -> tuple[int, ...]:
        """Rows first."""
        return self.tensor.shape

    @property
    def is_float(self) -> bool:
        """Always."""
        return True

    def values(self, rows: Rows) -> NDArray[np.float32]:
        """Some rows, float32 [n, k]."""
        data = self._rows(rows)
        return from_bfloat16(data) if self.type == "BF16" else data.astype(np.float32)

    def bits(self, rows: Rows) -> NDArray[np.uint16]:
        """Some rows of BF16."""
        return self._rows(rows)

    def int4(self, rows: Rows) -> tuple[NDArray[np.int8], NDArray[np.float32]]:
        """Never: floats have no codes."""
        raise NotImplementedError

    def _rows(self, rows: Rows) -> NDArray[Any]:
        return self.tensor.data[self.order.rows(rows)]
