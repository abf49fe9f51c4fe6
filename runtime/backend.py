"""What runs a model: the bundle's library in this process, or a program that has it linked in.

`Model`, `Session` and verification use nothing else of what is below them. `NativeModel`
(`library.py`) and `RemoteModel` (`remote.py`) are the two that there are.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING, Protocol

if TYPE_CHECKING:
    from pathlib import Path

    import numpy as np
    from numpy.typing import NDArray

    from llamac.runtime.library import NativeInfo
    from llamac.runtime.manifest import Manifest

__all__ = ["BackendModel", "BackendSession", "Machine"]


class BackendSession(Protocol):
    """An open session; every call but `close` raises SessionClosed after it was closed."""

    @property
    def is_closed(self) -> bool:
        """Whether it was closed, or what ran it is gone."""

    def close(self) -> None:
        """Free its memory; more calls do nothing."""

    def eval(self, tokens: NDArray[np.int32]) -> None:
        """Append tokens, at least one, and compute the logits of the last."""

    def logits(self) -> NDArray[np.float32]:
        """Return a copy of the logits (vocab) of the last evaluated token."""

    def argmax(self) -> int:
        """Return the token with the highest logit."""

    def position(self) -> int:
        """Return the number of tokens in the KV cache."""

    def rewind(self, position: int) -> None:
        """Forget all tokens from `position` on."""

    def run_steps(self, function: str, first: int, count: int) -> None:
        """Run some steps of a compiled function on the memory as it is."""

    def read_memory(self, space: int, offset: int, num_bytes: int) -> bytes:
        """Return a copy of a part of a space: 0 weights, 1 arena, 2 KV."""

    def write_memory(self, space: int, offset: int, data: bytes) -> None:
        """Replace a part of the arena or of the KV cache."""

    def profile(self, enable: bool) -> None:
        """Start or stop measuring how long each step takes."""

    def step_ns(self, function: str) -> NDArray[np.uint64]:
        """Return the nanoseconds spent in each step of a function since profiling started."""


class BackendModel(Protocol):
    """An open model."""

    @property
    def info(self) -> NativeInfo:
        """What the library says about the model."""

    @property
    def is_closed(self) -> bool:
        """Whether it was closed, or what ran it is gone."""

    def close(self) -> None:
        """Give back what it holds; more calls do nothing."""

    def open_session(self, threads: int, cpus: Sequence[int]) -> BackendSession:
        """Open a session; without CPUs its threads may move."""


class Machine(Protocol):
    """Where a bundle runs: this machine, an emulated one, or another one that is connected."""

    def check(self, bundle: Path, manifest: Manifest) -> None:
        """Say whether it can run the bundle, before any file but the manifest is read.

        Raises:
            BundleError, CpuUnsupported, UsageError: it cannot.
        """

    def open(self, bundle: Path, manifest: Manifest, level: str | None) -> BackendModel:
        """Map the weights and choose kernels, the best of this machine for level None."""
