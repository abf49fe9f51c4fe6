"""A farm on this machine: a tracker and agents, each a process as `llamac farm` starts it.

Agents wait a second where those of a real farm wait a minute; nothing else is different.
"""

from __future__ import annotations

import json
import os
import signal
import socket
import subprocess
import sys
import time
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

from llamac.compiler.farm.tracker import Address, agents
from llamac.runtime.errors import FarmUnreachable

ARM, DSP, HOST = "sm8650-cortex-x4", "sm8650-v75", "host-x86-64"
START_SECONDS = 180.0

_SERVE = """
import json, sys
from llamac.compiler.farm.agent import Patience
from llamac.compiler.farm.devices import Device
from llamac.compiler.farm.supervisor import Service, supervise
from llamac.compiler.farm.tracker import Address
given = json.loads(sys.argv[1])
address = Address("127.0.0.1", 0)
patience = Patience(hello=2, claim=2, poll=0.2, retry=0.5, most_retry=2, canary=60)
device = Device.parse(given["device"], None, given["ssh_config"])
tracker = Address("127.0.0.1", given["port"])
supervise(Service(given["key"], device, tracker, address, via=given["via"],
                  ssh_config=given["ssh_config"], patience=patience, most_silence=4))
"""
_TRACK = "import sys; from llamac.tools.cli import main; sys.exit(main(sys.argv[1:]))"


def free_port() -> int:
    """A port that nobody listens on."""
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return int(probe.getsockname()[1])


def start(code: str, *arguments: str, log: Path) -> subprocess.Popen[bytes]:
    """Start Python in a process group of its own."""
    source = str(Path(__file__).parents[3] / "src")
    path = os.pathsep.join([source, os.environ.get("PYTHONPATH", "")])
    with log.open("ab") as file:
        return subprocess.Popen(
            [sys.executable, "-c", code, *arguments],
            stdin=subprocess.DEVNULL,
            stdout=file,
            stderr=file,
            start_new_session=True,
            env=os.environ | {"PYTHONPATH": path},
        )


class Farm:
    """The processes.

    Attributes:
        tracker: its address.
    """

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        self.tracker = Address("127.0.0.1", free_port())
        self._tracker: subprocess.Popen[bytes] | None = None
        self._supervisors: list[subprocess.Popen[bytes]] = []

    def start_tracker(self) -> None:
        """Start the tracker, at the same address as before."""
        port = str(self.tracker.port)
        log = self.folder / "tracker.log"
        self._tracker = start(_TRACK, "farm", "tracker", "--port", port, log=log)

    def stop_tracker(self) -> None:
        """End the tracker without a word."""
        assert self._tracker is not None
        self._tracker.kill()
        self._tracker.wait()

    def serve(self, device: str, key: str, *, via: str = "", ssh_config: str = "") -> None:
        """Start an agent and what keeps it alive."""
        given = {
            "device": device,
            "key": key,
            "port": self.tracker.port,
            "via": via,
            "ssh_config": ssh_config,
        }
        log = self.folder / f"{key}-{len(self._supervisors)}.log"
        self._supervisors.append(start(_SERVE, json.dumps(given), log=log))

    def agents(self, key: str) -> list[Mapping[str, Any]]:
        """What agents of a key say; none while the tracker is away."""
        try:
            found = agents(self.tracker)
        except FarmUnreachable:
            return []
        return [info for info in found if info["key"] == f"server:{key}"]

    def wait_until_free(self, key: str, count: int = 1) -> list[Mapping[str, Any]]:
        """Wait until so many agents of a key are free."""
        deadline = time.monotonic() + START_SECONDS
        while time.monotonic() < deadline:
            found = [info for info in self.agents(key) if info["state"] == "free"]
            if len(found) >= count:
                return found
            time.sleep(0.2)
        raise TimeoutError(self.log())

    def processes(self, what: str) -> list[int]:
        """Processes below the supervisors: "agent" or "program"."""
        parents: dict[int, int] = {}
        for path in Path("/proc").glob("[0-9]*/stat"):
            try:
                fields = path.read_text("utf-8").rpartition(")")[2].split()
            except OSError:
                continue
            parents[int(path.parent.name)] = int(fields[1])
        mine = {process.pid for process in self._supervisors}
        agents_ = {pid for pid, parent in parents.items() if parent in mine and _is_agent(pid)}
        programs = {pid for pid, parent in parents.items() if parent in agents_}
        return sorted(agents_ if what == "agent" else programs)

    def log(self) -> str:
        """What all said."""
        return "\n".join(
            f"{path.name}: {path.read_text('utf-8', 'replace')[-2000:]}"
            for path in sorted(self.folder.glob("*.log"))
        )

    def close(self) -> None:
        """End everything."""
        for process in [*self._supervisors, *([self._tracker] if self._tracker else [])]:
            os.killpg(process.pid, signal.SIGKILL)
            process.wait()


def _is_agent(pid: int) -> bool:
    """Whether a process is no helper of multiprocessing."""
    try:
        return b"spawn_main" in Path(f"/proc/{pid}/cmdline").read_bytes()
    except OSError:
        return False


def eventually(true: Callable[[], Any], seconds: float = 60.0) -> Any:
    """Wait until something is true; what it was in the end."""
    deadline = time.monotonic() + seconds
    while not (found := true()) and time.monotonic() < deadline:
        time.sleep(0.1)
    return found
