"""TVM's RPC tracker: which devices there are, and who has them.

    python -m tvm.exec.rpc_tracker  ──  llamac farm tracker     keeps keys, devices and queues
    an agent    PUT key, its port and a match key      ──▶  one lease is to be had
    a client    REQUEST key                            ◀──  address and match key of a device

A match key is good for one lease: the agent refuses all others, and offers a new one when the lease
is over. So a device is never two clients'. The tracker forgets an agent whose connection ends.
Only the tracker is TVM's. Agents speak `protocol.py`, not TVM's RPC, which lets whoever connects
write files and load code.
"""

from __future__ import annotations

import asyncio
import json
import socket
import struct
from collections.abc import Callable, Mapping
from contextlib import closing
from dataclasses import dataclass
from typing import Any

from tvm.rpc.base import RPC_TRACKER_MAGIC, TrackerCode

from llamac.compiler.farm.protocol import receive_exactly
from llamac.runtime.errors import FarmUnreachable, ToolchainMissing, UsageError

DEFAULT_PORT = 9190
ANSWER_SECONDS = 5.0
_MOST_BYTES = 1 << 20
_NUMBER = struct.Struct("<i")


@dataclass(frozen=True)
class Address:
    """Where something listens."""

    host: str
    port: int

    def __str__(self) -> str:
        return f"{self.host}:{self.port}"

    @classmethod
    def parse(cls, text: str, default_port: int = DEFAULT_PORT) -> Address:
        """Read "HOST", "HOST:PORT" or ":PORT".

        Raises:
            UsageError: it is none of them.
        """
        host, colon, port = text.rpartition(":")
        if not colon:
            host, port = text, str(default_port)
        if not port.isdecimal() or not 0 < int(port) < 1 << 16 or ":" in host:
            raise UsageError(
                f"{text!r} is no address",
                cause="an address is HOST:PORT, with a port up to 65535",
                fix=f"write it like 127.0.0.1:{default_port}",
            )
        return cls(host or "127.0.0.1", int(port))


@dataclass(frozen=True)
class Offer:
    """A lease that the tracker gave: where the agent is, and its match key."""

    address: Address
    match: str


class TrackerLost(Exception):
    """The tracker does not answer, or something else does."""


# -- A client's side -------------------------------------------------------------------------------


def connect(tracker: Address, seconds: float = ANSWER_SECONDS) -> socket.socket:
    """Connect to a tracker.

    Raises:
        TrackerLost: nothing answers there, or something else.
    """
    try:
        connection = socket.create_connection((tracker.host, tracker.port), seconds)
    except OSError as error:
        raise TrackerLost(f"{error.strerror or error}") from error
    try:
        connection.sendall(_NUMBER.pack(RPC_TRACKER_MAGIC))
        answer = receive_exactly(connection, _NUMBER.size)
    except OSError as error:
        connection.close()
        raise TrackerLost("it does not answer as a tracker") from error
    if answer != _NUMBER.pack(RPC_TRACKER_MAGIC):
        connection.close()
        raise TrackerLost("what answers is no tracker")
    return connection


def ask(connection: socket.socket, *question: Any) -> Any:
    """Ask the tracker something.

    Raises:
        TrackerLost: it does not answer in the connection's time.
    """
    try:
        connection.sendall(_frame(question))
        (size,) = _NUMBER.unpack(receive_exactly(connection, _NUMBER.size))
        if not 0 < size <= _MOST_BYTES:
            raise TrackerLost("what answers is no tracker")
        return json.loads(receive_exactly(connection, size))
    except (OSError, ValueError) as error:
        raise TrackerLost(f"it does not answer: {error}") from error


def _frame(question: Any) -> bytes:
    data = json.dumps(list(question)).encode()
    return _NUMBER.pack(len(data)) + data


def agents(tracker: Address) -> list[Mapping[str, Any]]:
    """What each agent says of itself; see `Agent.info`.

    Raises:
        FarmUnreachable: the tracker does not answer.
    """
    try:
        with closing(connect(tracker)) as connection:
            code, summary = ask(connection, TrackerCode.SUMMARY)
        if code != TrackerCode.SUCCESS:
            raise TrackerLost(f"it says {code}")
        found = [info for info in summary["server_info"] if isinstance(info, dict)]
    except (TrackerLost, TypeError, KeyError, ValueError) as error:
        raise unreachable(tracker, error) from error
    return sorted(found, key=lambda info: (str(info.get("key")), str(info.get("name"))))


def unreachable(tracker: Address, error: object) -> FarmUnreachable:
    """The error for a tracker that does not answer."""
    return FarmUnreachable(
        f"no tracker answers at {tracker}",
        cause=str(error),
        fix="start one there (llamac farm tracker), or name another with HOST:PORT",
    )


def request(tracker: Address, key: str, seconds: float) -> Offer | None:
    """Wait for a device; None: there was none in time.

    Raises:
        TrackerLost: the tracker does not answer.
    """
    with closing(connect(tracker)) as connection:
        connection.settimeout(seconds)
        try:
            connection.sendall(_frame([TrackerCode.REQUEST, key, "", 0]))
            first = connection.recv(1, socket.MSG_PEEK)
        except TimeoutError:
            return None
        except OSError as error:
            raise TrackerLost(str(error)) from error
        if not first:
            raise TrackerLost("it closed the connection")
        connection.settimeout(ANSWER_SECONDS)
        try:
            (size,) = _NUMBER.unpack(receive_exactly(connection, _NUMBER.size))
            if not 0 < size <= _MOST_BYTES:
                raise TrackerLost("what answers is no tracker")
            code, (host, port, match) = json.loads(receive_exactly(connection, size))
        except (OSError, ValueError, TypeError) as error:
            raise TrackerLost(str(error)) from error
        if code != TrackerCode.SUCCESS:
            raise TrackerLost(f"it says {code}")
        return Offer(Address(str(host), int(port)), str(match))


# -- An agent's side -------------------------------------------------------------------------------


class Registration:
    """An agent's connection to the tracker; a context manager that ends it."""

    def __init__(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        self._reader, self._writer = reader, writer
        self._turn = asyncio.Lock()

    @classmethod
    async def open(cls, tracker: Address) -> Registration:
        """Connect.

        Raises:
            TrackerLost: nothing answers there, or something else.
        """
        try:
            async with asyncio.timeout(ANSWER_SECONDS):
                reader, writer = await asyncio.open_connection(tracker.host, tracker.port)
                writer.write(_NUMBER.pack(RPC_TRACKER_MAGIC))
                answer = await reader.readexactly(_NUMBER.size)
        except (OSError, EOFError, TimeoutError) as error:
            raise TrackerLost(str(error) or "it does not answer") from error
        if answer != _NUMBER.pack(RPC_TRACKER_MAGIC):
            writer.close()
            raise TrackerLost("what answers is no tracker")
        return cls(reader, writer)

    async def put(self, key: str, port: int, match: str, host: str) -> None:
        """Offer one lease."""
        await self._ask(TrackerCode.PUT, key, (port, match), host)

    async def update(self, info: Mapping[str, Any]) -> None:
        """Tell what is shown of this agent."""
        await self._ask(TrackerCode.UPDATE_INFO, dict(info))

    async def offered(self) -> list[str]:
        """Match keys that no client has yet."""
        found = await self._ask(TrackerCode.GET_PENDING_MATCHKEYS)
        return found if isinstance(found, list) else []

    async def _ask(self, *question: Any) -> Any:
        try:
            async with self._turn, asyncio.timeout(ANSWER_SECONDS):
                self._writer.write(_frame(question))
                (size,) = _NUMBER.unpack(await self._reader.readexactly(_NUMBER.size))
                if not 0 < size <= _MOST_BYTES:
                    raise TrackerLost("what answers is no tracker")
                return json.loads(await self._reader.readexactly(size))
        except (OSError, EOFError, ValueError, TimeoutError) as error:
            raise TrackerLost(str(error) or "it does not answer") from error

    def close(self) -> None:
        """End the connection; the tracker forgets the agent."""
        self._writer.close()


# -- The tracker itself ----------------------------------------------------------------------------


def serve(address: Address, ready: Callable[[], None] = lambda: None) -> None:
    """Be a tracker until the process ends.

    Args:
        address: to listen on.
        ready: called when it does.

    Raises:
        UsageError: the address cannot be had.
        ToolchainMissing: the packages that TVM's tracker needs are not there.
    """
    try:
        from tvm.rpc.tracker import TrackerServerHandler  # noqa: PLC0415
    except ImportError as error:
        raise ToolchainMissing(
            "TVM's tracker cannot start",
            cause=str(error).strip().splitlines()[0],
            fix="pip install 'llamac[farm]'",
        ) from error
    with socket.socket() as listening:
        listening.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        try:
            listening.bind((address.host, address.port))
        except OSError as error:
            raise UsageError(
                f"{address} cannot be listened on",
                cause=str(error.strerror),
                fix="choose another port with --port; perhaps a tracker runs there already",
            ) from error
        listening.listen(64)
        ready()
        asyncio.set_event_loop(asyncio.new_event_loop())
        # Nobody knows the key with which a client could stop it.
        TrackerServerHandler(listening, object()).run()
