"""Where work is done beside this process: others of this machine, or a Dask cluster.

    local        as many processes as there are CPUs
    local[N]     N processes; local[1] is this one
    dask://H:P   the workers of a scheduler, with the same llamac and TVM

All stand behind `concurrent.futures.Executor`, so that nothing depends on which it is.
"""

from __future__ import annotations

import os
import re
import signal
from collections.abc import Callable
from concurrent.futures import Executor, ProcessPoolExecutor
from importlib.metadata import version
from multiprocessing import get_context
from typing import Any

from llamac.runtime.errors import ToolchainMissing, UsageError
from llamac.targets.tuning.measure import last_line

PACKAGES = ("llamac", "apache-tvm", "apache-tvm-ffi")
_DASK_SECONDS = 10


def executor_of(text: str) -> Callable[[], Executor] | None:
    """What starts the executor of that name; None: this process does the work.

    Raises:
        UsageError: there is none of that name; or, when it is started, the cluster does not fit.
        ToolchainMissing: when it is started, Dask is not installed.
    """
    if text.startswith("dask://"):
        return lambda: _cluster(text.removeprefix("dask://"))
    found = re.fullmatch(r"local(?:\[(\d{1,3})\])?", text)
    processes = int(found[1] or os.cpu_count() or 1) if found else 0
    if not processes:
        raise UsageError(
            f"{text!r} is no builder",
            cause="builders are local, local[N] and dask://HOST:PORT",
            fix="leave out --builder for local",
        )
    return None if processes == 1 else lambda: _processes(processes)


def _processes(count: int) -> Executor:
    """Processes of this machine, which leave Ctrl-C to this one."""
    return ProcessPoolExecutor(
        count, get_context("spawn"), signal.signal, (signal.SIGINT, signal.SIG_IGN)
    )


def versions() -> dict[str, str]:
    """Versions of what compiles candidates, in this process."""
    return {name: version(name) for name in PACKAGES}


def _cluster(address: str) -> Executor:
    """The workers of a Dask scheduler."""
    try:
        from distributed import Client  # noqa: PLC0415
    except ImportError as error:
        raise ToolchainMissing(
            "Dask is not installed",
            cause="--builder dask:// compiles on a Dask cluster",
            fix="pip install 'llamac[dask]'",
        ) from error
    try:
        client: Any = Client(  # type: ignore[no-untyped-call]
            f"tcp://{address}", timeout=_DASK_SECONDS, set_as_default=False
        )
        workers = client.run(versions)
    except Exception as error:  # Dask raises all kinds, and those of its workers
        raise UsageError(
            f"the Dask cluster at {address} cannot be used",
            cause=last_line(error),
            fix="give the address of a scheduler whose workers have this llamac installed",
        ) from error
    different = {name: found for name, found in workers.items() if found != versions()}
    if different or not workers:
        client.close()
        raise UsageError(
            f"the Dask cluster at {address} compiles something else",
            cause=f"its workers have {next(iter(different.values()), 'not begun')}",
            fix=f"install {versions()} there",
        )
    return _ClosingExecutor(client)


class _ClosingExecutor(Executor):
    """A Dask client as an executor that is closed with it."""

    def __init__(self, client: Any) -> None:
        self._client, self._executor = client, client.get_executor(pure=False)

    def submit(self, function: Any, /, *args: Any, **kwargs: Any) -> Any:
        """See `Executor.submit`."""
        return self._executor.submit(function, *args, **kwargs)

    def shutdown(self, wait: bool = True, *, cancel_futures: bool = False) -> None:
        """Close the client; what was not done is not done."""
        self._executor.shutdown(wait=wait and not cancel_futures)
        self._client.close()
