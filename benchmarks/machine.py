"""What the machine reads and multiplies at most, with as many threads as the engines have."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path
from typing import Any

BYTES = 1 << 30
SECONDS = 0.5

_PRODUCTS = """
from llamac.schedules.intrin.x86 import X86_LEVELS
from llamac.targets.tuning.host import cpu_features
from llamac.targets.tuning.roofs import products_per_us
level = next(level for level in X86_LEVELS if set(level.features) <= cpu_features())
print(max(products_per_us("u8s8", level) for _ in range(20)) / 1e3)
"""


def measure_machine(bundle: Path, threads: int) -> dict[str, Any]:
    """Read bandwidth and int8 products.

    Args:
        bundle: whose library has the probe of bandwidth.
        threads: that read; as many processes multiply side by side.

    Returns:
        "read_gb_s", and "gmac_s" of the rates of all threads together.
    """
    from llamac.runtime import load  # noqa: PLC0415
    from llamac.runtime.library import NativeModel  # noqa: PLC0415

    with load(bundle, threads=threads) as model:
        assert isinstance(model.native, NativeModel)
        read = model.native.library.read_bandwidth(threads, BYTES, SECONDS)
    command = [sys.executable, "-c", _PRODUCTS]
    started = [subprocess.Popen(command, stdout=subprocess.PIPE, text=True) for _ in range(threads)]
    rates = [float(process.communicate()[0]) for process in started]
    return {"read_gb_s": read, "gmac_s": sum(rates)}
