"""SpinQuant's R4 for processors that know matrix products only.

Sylvester's matrix of n = r * c is the Kronecker product of those of r and c. For x as a grid
[r, c] the transform is H_r x H_c: two products with small matrices.
"""

from __future__ import annotations

import numpy as np
from numpy.typing import NDArray


def hadamard_grid(length: int) -> tuple[int, int]:
    """Rows r and columns c of the grid, r * c = length, a power of two; r is c or c / 2."""
    rows = 1 << (length.bit_length() - 1) // 2
    return rows, length // rows


def hadamard_signs(n: int) -> NDArray[np.int8]:
    """Sylvester's matrix: entry (i, j) is -1 to the number of bits that i and j share."""
    shared = np.arange(n)[:, None] & np.arange(n)
    parity = np.array([bin(v).count("1") & 1 for v in range(n)])
    return np.asarray(1 - 2 * parity[shared], np.int8)
