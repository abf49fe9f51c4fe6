"""An agent: lends one device to whoever the tracker gives a lease, and keeps it fit.

    starting ─▶ free ─▶ leased ─▶ free            offered to the tracker, then to one client
                  ▲        │
                  └─ sick ◀┘                      until the canary is as it should be again

It runs programs that clients send, and offers nothing else (`protocol.py`). After a program that
crashed or took too long it asks the canary whose fault that was. A tracker that goes away is waited
for, however long it takes.
"""

from __future__ import annotations

import asyncio
import contextlib
import hmac
import secrets
import sys
import tempfile
import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from llamac.compiler.farm.canary import Canary
from llamac.compiler.farm.processes import DeviceLost
from llamac.compiler.farm.protocol import (
    MAGIC,
    PROTOCOL,
    Hello,
    Measure,
    Outcome,
    ProtocolError,
    Welcome,
    encode,
    read_message,
)
from llamac.compiler.farm.tracker import Address, Registration, TrackerLost
from llamac.compiler.farm.transports import CALL, OUTPUT, PROGRAM, Transport

_PIECE = 1 << 20
_MOST_STRANGERS = 16  # connections that have not said who they are


@dataclass(frozen=True)
class Patience:
    """How long an agent waits for what.

    Attributes:
        hello: for a client's first words.
        claim: for the client that got a lease; then the device is offered again.
        poll: between looks at the tracker.
        retry: for a tracker that is gone, and the first time for a sick device.
        most_retry: for a sick device, after it was sick often.
        canary: between canaries of a device that is well.
    """

    hello: float = 5.0
    claim: float = 10.0
    poll: float = 1.0
    retry: float = 5.0
    most_retry: float = 300.0
    canary: float = 300.0


def to_stderr(line: str) -> None:
    """Say something to whoever started this process."""
    sys.stderr.write(f"{time.strftime('%H:%M:%S')} {line}\n")
    sys.stderr.flush()


class Agent:
    """Lends one device.

    Args:
        key: under which it is leased.
        arch: of the programs that it runs.
        transport: the way to the device.
        canaries: of all levels; the device offers those that are right on it.
        tracker: where to offer it.
        patience: how long to wait for what.
        say: called with a line for people.
    """

    def __init__(
        self,
        key: str,
        arch: str,
        transport: Transport,
        canaries: list[Canary],
        tracker: Address,
        patience: Patience,
        say: Callable[[str], None] = to_stderr,
    ) -> None:
        self.key, self.arch, self.transport, self.tracker = key, arch, transport, tracker
        self.name = f"{transport.name} {secrets.token_hex(4)}"
        self._canaries, self._patience, self._say = canaries, patience, say
        self._levels: list[Canary] = []
        self._state, self._note = "starting", ""
        self._trials = self._candidate_faults = self._device_faults = self._faults_in_row = 0
        self._temperature: float | None = None
        self._checked = -1e9  # when the canary was last right
        self._match = ""
        self._strangers = 0
        self._claimed, self._over = asyncio.Event(), asyncio.Event()
        self._over.set()
        self._port = 0

    # -- Offering the device -----------------------------------------------------------------------

    async def run(self, address: Address, port: int = 0) -> None:
        """Lend the device until cancelled.

        Args:
            address: where to listen; port 0 is any.
            port: that clients connect to; 0: the one that it listens on.

        Raises:
            OSError: the address cannot be had.
        """
        server = await asyncio.start_server(self._connected, address.host, address.port)
        self._port = port or server.sockets[0].getsockname()[1]
        said = ""
        async with server:
            while True:
                try:
                    await self._offer(address.host)
                except TrackerLost as error:
                    if str(error) != said:  # once, however long it takes
                        self._say(
                            f"{self.name}: waiting for the tracker at {self.tracker}: {error}"
                        )
                    said = str(error)
                    await asyncio.sleep(self._patience.retry)

    async def _offer(self, host: str) -> None:
        """Offer leases, one after the other, while the tracker is there."""
        registration = await Registration.open(self.tracker)
        try:
            await registration.update(self._info(host))
            while True:
                await self._over.wait()
                await self._get_well(registration, host)
                self._match = f"{self.key}:{secrets.token_hex(16)}"
                self._claimed.clear()
                await self._enter("free", "", registration, host)
                await registration.put(self.key, self._port, self._match, host)
                await self._wait_for_client(registration, host)
        finally:
            registration.close()
            if not self._claimed.is_set():
                self._match = ""

    async def _wait_for_client(self, registration: Registration, host: str) -> None:
        """Wait for a client and the end of its lease, or for one that never comes."""
        missing_since: float | None = None
        while not self._claimed.is_set():
            with contextlib.suppress(TimeoutError):
                async with asyncio.timeout(self._patience.poll):
                    await self._claimed.wait()
                    break
            if self._match in await registration.offered():
                missing_since = None
            elif missing_since is None:
                missing_since = time.monotonic()
            elif time.monotonic() - missing_since > self._patience.claim:
                self._say(f"{self.name}: the client that got the lease never came")
                self._match = ""
                return
        await self._enter("leased", "", registration, host)
        while not self._over.is_set():
            with contextlib.suppress(TimeoutError):
                async with asyncio.timeout(5 * self._patience.poll):
                    await self._over.wait()
            await registration.update(self._info(host))

    async def _get_well(self, registration: Registration, host: str) -> None:
        """Return when the canary is right; at once if it was lately."""
        tries = 0
        while time.monotonic() - self._checked > self._patience.canary:
            wrong = await self._check_levels()
            if not wrong:
                return
            if not tries:
                self._say(f"{self.name}: {wrong}")
            await self._enter("sick", wrong, registration, host)
            factor: int = 1 << min(tries + self._faults_in_row, 16)
            await asyncio.sleep(min(self._patience.retry * factor, self._patience.most_retry))
            tries += 1

    async def _enter(self, state: str, note: str, registration: Registration, host: str) -> None:
        if state != self._state:
            self._say(f"{self.name}: {state}" + (f": {note}" if note else ""))
        self._state, self._note = state, note
        await registration.update(self._info(host))

    def _info(self, host: str) -> Mapping[str, Any]:
        """What is shown of this agent."""
        return {
            "key": f"server:{self.key}",
            "addr": [host, self._port],
            "name": self.name,
            "device": self.transport.device,
            "arch": self.arch,
            "cost": self.transport.cost,
            "levels": [canary.level for canary in self._levels],
            "state": self._state,
            "note": self._note,
            "trials": self._trials,
            "candidate_faults": self._candidate_faults,
            "device_faults": self._device_faults,
            "temperature": self._temperature,
        }

    # -- The device --------------------------------------------------------------------------------

    async def _check_levels(self) -> str:
        """Run the canary of each level; those that are right are offered. What is wrong, or ""."""
        first, levels = "", []
        for canary in self._levels or self._canaries:
            wrong = await self._check(canary)
            first = first or wrong
            if not wrong:
                levels.append(canary)
        if not levels:
            return first
        self._levels = self._levels or levels
        if len(levels) < len(self._levels):
            return first
        self._checked = time.monotonic()
        return ""

    async def _check(self, canary: Canary) -> str:
        with tempfile.TemporaryDirectory(prefix="llamac-farm-") as folder:
            try:
                wrong = await canary.check(self.transport, Path(folder))
                self._temperature = await self.transport.temperature()
            except DeviceLost as error:
                return str(error)
        return wrong

    async def _run(self, folder: Path, request: Measure) -> Outcome:
        """Run a client's program, and find out whose fault it is if that fails."""
        try:
            ran = await self.transport.run(folder, request.seconds, request.output)
            wrong = await self._check(self._levels[-1]) if ran.problem else ""
        except DeviceLost as error:
            wrong = str(error)
        self._trials += 1
        if wrong:
            self._device_faults += 1
            self._faults_in_row += 1
            self._checked = -1e9
            return Outcome("device", note=_text(wrong))
        if ran.problem:
            self._candidate_faults += 1
            return Outcome("candidate", note=_text(ran.problem))
        self._faults_in_row = 0
        return Outcome("ok", (folder / OUTPUT).stat().st_size, ran.count)

    # -- Clients -----------------------------------------------------------------------------------

    async def _connected(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        """Talk to whoever connected: the one with the match key is a client."""
        try:
            hello = await self._greet(reader)
            if hello is not None:
                await self._lend(hello, reader, writer)
        except (OSError, EOFError, ProtocolError, TimeoutError):
            pass
        finally:
            writer.close()

    async def _greet(self, reader: asyncio.StreamReader) -> Hello | None:
        """The words of a client whose lease it is; None: it is somebody else."""
        if self._strangers >= _MOST_STRANGERS:
            return None
        self._strangers += 1
        try:
            async with asyncio.timeout(self._patience.hello):
                if await reader.readexactly(len(MAGIC)) != MAGIC:
                    return None
                hello = await read_message(reader, Hello)
        finally:
            self._strangers -= 1
        is_it = bool(self._match) and hmac.compare_digest(
            hello.match.encode(errors="replace"), self._match.encode()
        )
        return hello if is_it and hello.protocol == PROTOCOL else None

    async def _lend(
        self, hello: Hello, reader: asyncio.StreamReader, writer: asyncio.StreamWriter
    ) -> None:
        """Answer a client until it goes, its time is over, or the device is sick."""
        self._match = ""
        self._over.clear()
        self._claimed.set()
        try:
            with tempfile.TemporaryDirectory(prefix="llamac-farm-") as folder:
                async with asyncio.timeout(hello.lease_seconds):
                    device, cost = self.transport.device, self.transport.cost
                    writer.write(encode(Welcome(device, self.arch, cost, self.name)))
                    while await self._answer(Path(folder), reader, writer):
                        pass
        finally:
            self._over.set()

    async def _answer(
        self, folder: Path, reader: asyncio.StreamReader, writer: asyncio.StreamWriter
    ) -> bool:
        """Do what a client asks for once; whether the lease goes on."""
        request = await read_message(reader, Measure)
        await _receive_file(reader, folder / PROGRAM, request.program)
        await _receive_file(reader, folder / CALL, request.call)
        running = asyncio.create_task(self._run(folder, request))
        gone = asyncio.create_task(reader.read(1))  # a client waits in silence, or is gone
        try:
            await asyncio.wait({running, gone}, return_when=asyncio.FIRST_COMPLETED)
            if not running.done():
                return False
            outcome = running.result()
        finally:
            for task in (running, gone):
                task.cancel()
            await asyncio.gather(running, gone, return_exceptions=True)
        writer.write(encode(outcome))
        if outcome.output:
            await _send_file(writer, folder / OUTPUT)
        await writer.drain()
        return outcome.outcome != "device"


async def _receive_file(reader: asyncio.StreamReader, path: Path, size: int) -> None:
    with path.open("wb") as file:
        while size:
            data = await reader.read(min(size, _PIECE))
            if not data:
                raise EOFError
            file.write(data)
            size -= len(data)


async def _send_file(writer: asyncio.StreamWriter, path: Path) -> None:
    with path.open("rb") as file:
        while data := file.read(_PIECE):
            writer.write(data)
            await writer.drain()


def _text(text: str) -> str:
    """A note as messages may have it."""
    return "".join(c if c.isprintable() else " " for c in text)[:400]
