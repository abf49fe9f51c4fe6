"""The tile of `qmatmul_int8.py` on Arm: dot products by lane, codes and weights both signed.

    acc[4 rows] += dot(4 codes of a token, 4 codes of each row)         one sdot, or its substitute

Sixteen rows are four vectors, which stay in registers for all tokens of the tile. A GEMV loads 16
codes and uses their four lanes in turn. Of many tokens the codes come in pairs, two chunks of four
of each token in a vector (`quantize.py`), in the order of a whole group of 32 columns.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from tvm.tirx.script.builder import ir as T

from llamac.schedules.intrin.arm import ArmNeon
from llamac.schedules.kernel import local, sum_chains
from llamac.schedules.loop import loop
from llamac.schedules.quantize import CHUNK_PAIRS, GROUP, PANEL

ROWS = 16
QUADS = ROWS // 4
CHUNKS = GROUP // 4


@dataclass(frozen=True)
class QMatmulInt8Shape:
    """y [m, n] = x [m, k] times int8 weights [n, k]; n a multiple of 16, k of 32."""

    m: int
    n: int
    k: int

    @property
    def work(self) -> int:
        """Work items: packed blocks of 16 rows."""
        return self.n // ROWS


def valid(shape: QMatmulInt8Shape, knobs: Mapping[str, int]) -> bool:
    """Whether accumulators and weights fit the registers and no tile leaves its panel.

    There is no prefetch.
    """
    mr, chains = knobs["mr"], knobs["chains"]
    fits = QUADS * mr * chains + QUADS + 4 <= 32
    tile = mr == 1 if shape.m == 1 else mr in (2, 4)
    return tile and fits and chains <= 4 and not knobs.get("prefetch", 0)


def default(shape: QMatmulInt8Shape) -> dict[str, int]:
    """Sixteen accumulators: they hide the latency of the dot product."""
    if shape.m == 1:
        return {"mr": 1, "chains": 4, "prefetch": 0}
    return {"mr": 4, "chains": 1, "prefetch": 0}


class Tile:
    """Some tokens times one block of 16 columns."""

    def __init__(
        self, shape: QMatmulInt8Shape, isa: ArmNeon, tensors: Mapping[str, Any], chains: int
    ) -> None:
        self._shape, self._isa, self._t, self._chains = shape, isa, tensors, chains

    def emit(self, block: Any, row0: Any, rows: int) -> None:
        """Compute and store the results of `rows` tokens from `row0`."""
        acc = local("int32x4", rows * QUADS * self._chains)
        for i in range(rows * QUADS * self._chains):
            T.buffer_store(acc, self._isa.splat(T.int32(0)), [i])
        with loop(self._shape.k // GROUP) as group:
            codes = [self._codes(row0, row, group) for row in range(rows)]
            for chunk in range(CHUNKS):
                self._chunk(acc, block, group * CHUNKS + chunk, chunk, codes)
        for row in range(rows):
            self._finish(acc, block, row0 + row, row)

    def _codes(self, row0: Any, row: int, group: Any) -> list[tuple[Any, Any]]:
        """For each chunk of a token's group the vector that holds it, and the lane."""
        if self._shape.m == 1:
            x = [self._words(0, group * GROUP + i) for i in (0, 16)]
            return [(x[chunk // 4], chunk % 4) for chunk in range(CHUNKS)]
        if self._isa.codes == "panels":
            return self._panel_codes(row0, row, group)
        token = T.Bind((row0 + row) % PANEL)
        place = token // 2 * (2 * GROUP) + token % 2 * 8
        found = {}
        for t, chunks in enumerate(CHUNK_PAIRS):
            half = self._isa.load(
                self._t["codes"], (row0 + row) // PANEL, group, place + t * 16, lanes=8
            )
            words = T.Bind(T.reinterpret("int32x2", half))
            for lane, chunk in enumerate(chunks):
                found[chunk] = (words, lane)
        return [found[chunk] for chunk in range(CHUNKS)]

    def _panel_codes(self, row0: Any, row: int, group: Any) -> list[tuple[Any, Any]]:
        """The same from panels, where the codes of two tokens lie side by side; `row0` is even."""
        pair = T.Bind(row0 + row // 2 * 2)
        found = []
        for chunk in range(CHUNKS):
            place = chunk * 4 * PANEL + pair % PANEL * 4
            both = self._isa.load(self._t["codes"], pair // PANEL, group, place, lanes=8)
            found.append((T.Bind(T.reinterpret("int32x2", both)), row % 2))
        return found

    def _words(self, *place: Any) -> Any:
        """Sixteen codes as four words."""
        return T.Bind(T.reinterpret("int32x4", self._isa.load(self._t["codes"], *place, lanes=16)))

    def _chunk(self, acc: Any, block: Any, k4: Any, chunk: int, codes: list[Any]) -> None:
        """Add the products of four columns for all tokens of the tile."""
        chain = chunk % self._chains
        for quad in range(QUADS):
            rows = T.Bind(self._isa.load(self._t["weights"], block, k4, quad * 16, lanes=16))
            for row, lanes in enumerate(codes):
                words, lane = lanes[chunk]
                i = (row * QUADS + quad) * self._chains + chain
                T.buffer_store(acc, self._isa.dot_lane(acc[i], rows, words, lane), [i])

    def _finish(self, acc: Any, block: Any, token: Any, row: int) -> None:
        """Take the zero point out and scale."""
        isa, t = self._isa, self._t
        scale = isa.splat(t["qparams"][token, 0])
        zero = isa.splat(T.Cast("int32", t["qparams"][token, 1]))
        for quad in range(QUADS):
            total = sum_chains(acc, (row * QUADS + quad) * self._chains, self._chains)
            column = block * ROWS + quad * 4
            exact = total - zero * isa.load(t["wsum"], column)
            factor = scale * isa.load(t["scales"], column)
            isa.store(t["result"], factor * isa.to_float32(exact), token, column)
