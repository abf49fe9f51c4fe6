"""Packets of every kernel family at one shape of the 1B model, in the levels that bundles have.

Exact, so a change of 2 % is one of the code; LLAMAC_UPDATE_GOLDEN=1 writes the figures anew.
"""

from __future__ import annotations

import json
import os
from pathlib import Path

import numpy as np
import pytest

from llamac.schedules.attention import AttentionShape
from llamac.schedules.embedding import EmbeddingShape
from llamac.schedules.hadamard import HadamardShape
from llamac.schedules.intrin.hexagon import VERSIONS, HexagonHvx
from llamac.schedules.kernel import work_items
from llamac.schedules.lora import LoraShape
from llamac.schedules.matmul import MatmulShape
from llamac.schedules.norm import RmsNormShape
from llamac.schedules.qmatmul import QMatmulShape
from llamac.schedules.qmatmul_int8 import QMatmulInt8Shape
from llamac.schedules.quantize import QuantizeShape
from llamac.schedules.rope import CacheShape, RopeShape
from llamac.schedules.sampling import ArgmaxShape
from llamac.schedules.select import TakeRowShape
from llamac.targets.cpu.kernels import FAMILIES, KernelSpec
from llamac.targets.kernel_runner import KernelCall, build_kernel_program, count_kernel_program

GOLDEN = Path(__file__).parents[1] / "golden" / "hexagon_packets.json"
UPDATE = "LLAMAC_UPDATE_GOLDEN"
TOLERANCE = 0.02
CACHE = CacheShape(8, 64, 512)
POSITION = 100  # of the token in the cache

SPECS = {
    "attention": AttentionShape(1, 32, CACHE),
    "embedding": EmbeddingShape(1, 2048, 2048, blocks=True, hvx=True),
    "hadamard": HadamardShape(1, 8192),
    "lora": LoraShape(1, 48, 2048),
    "matmul": MatmulShape(1, 512, 2048),
    "norm": RmsNormShape(1, 2048, 1e-5),
    "qmatmul_hvx": QMatmulShape(1, 2048, 2048, "float16", "residual"),
    "qmatmul_int8_hvx": QMatmulInt8Shape(1, 2048, 2048),
    "quantize": QuantizeShape(1, 2048),
    "rope": RopeShape(1, 32, 512, CACHE),
    "sampling": ArgmaxShape(128256),
    "select": TakeRowShape(8, 2048),
}


def inputs(func):
    """Numbers that no branch depends on, but for the position."""
    *buffers, _begin, _end = func.params
    rng = np.random.default_rng(0)
    for buffer in buffers:
        shape, dtype = [int(n) for n in buffer.shape], str(buffer.dtype)
        if str(buffer.name) == "meta":
            yield np.array([POSITION, 0], np.int32)
        elif dtype == "float32":
            yield rng.normal(size=shape).astype(dtype)
        else:
            yield np.zeros(shape, dtype)


def test_every_family_of_a_bundle_is_counted():
    """The others are for CPUs, and for what surrounds graphs."""
    others = {"qmatmul", "qmatmul_int8", "qmatmul_quads"}
    others |= {"append", "convert", "graph", "positions"}
    assert set(SPECS) == set(FAMILIES) - others


@pytest.mark.needs("qemu-hexagon")
@pytest.mark.parametrize("family", SPECS)
@pytest.mark.parametrize(
    "version",
    [v if v == 75 else pytest.param(v, marks=pytest.mark.slow) for v in VERSIONS],
)
def test_packets_of_a_level(version, family, tmp_path):
    level = HexagonHvx(version, simulate=True)
    isa = level.for_family(family)
    func = KernelSpec("kernel", family, SPECS[family]).make(level)
    program = build_kernel_program(func, isa, tmp_path / "kernel")
    call = KernelCall(list(inputs(func)), 0, work_items(func), alignment=isa.alignment)
    _, packets = count_kernel_program(["qemu-hexagon", "-cpu", "v67", str(program)], call)
    assert packets.packets <= packets.instructions <= 4 * packets.packets
    assert (packets.vector_instructions > 0) == (isa is level)
    name = f"v{version} {family}"
    golden = json.loads(GOLDEN.read_text("utf-8"))
    if os.environ.get(UPDATE) == "1":
        golden[name] = vars(packets)
        GOLDEN.write_text(json.dumps(golden, indent=2, sort_keys=True) + "\n", "utf-8")
    assert abs(packets.packets / golden[name]["packets"] - 1) <= TOLERANCE
