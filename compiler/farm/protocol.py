"""What a client and an agent say to each other: one question, one answer, nothing else.

    client                                agent
      MAGIC, Hello {match, ...}      ──▶    does the match key fit the lease that the tracker gave?
                                     ◀──  Welcome {device, arch, ...}
      Measure {sizes, seconds} bytes ──▶    runs the program on its device
                                     ◀──  Outcome {outcome, note, ...} bytes
      ...                                 until one of the two closes the connection

A message is the length of its JSON (4 bytes, little endian), the JSON, then bytes whose number the
JSON says. Every number is compared with a limit before anything is read. No message has a path, a
name of a file, or anything else that an agent would open, load or hand to a shell.
"""

from __future__ import annotations

import asyncio
import json
import socket
import struct
from dataclasses import asdict, dataclass, fields
from typing import Any, TypeVar, cast, get_type_hints

MAGIC = b"LLAMACF1"
PROTOCOL = 1
MOST_JSON_BYTES = 16 << 10
MOST_PROGRAM_BYTES = 64 << 20
MOST_CALL_BYTES = 1 << 30
MOST_SECONDS = 600.0
MOST_LEASE_SECONDS = 3600.0
MOST_TEXT = 1000

_LENGTH = struct.Struct("<I")
_LIMITS = {
    "program": MOST_PROGRAM_BYTES,
    "call": MOST_CALL_BYTES,
    "output": MOST_CALL_BYTES,
    "seconds": MOST_SECONDS,
    "lease_seconds": MOST_LEASE_SECONDS,
}


class ProtocolError(Exception):
    """The other side says something that is no message, or one beyond the limits."""


@dataclass(frozen=True)
class Hello:
    """A client's first words.

    Attributes:
        match: the match key that the tracker gave it with the lease.
        lease_seconds: after which the agent ends the connection, whatever the client does.
        protocol: PROTOCOL of the client.
    """

    match: str
    lease_seconds: float
    protocol: int = PROTOCOL


@dataclass(frozen=True)
class Welcome:
    """What an agent says of its device.

    Attributes:
        device: what it is, for records.
        arch: of the programs that it runs, "aarch64".
        cost: kind of cost that it measures: "time_us", "instructions" or "packets".
        name: of the agent, which no other of its tracker has.
        protocol: PROTOCOL of the agent.
    """

    device: str
    arch: str
    cost: str
    name: str
    protocol: int = PROTOCOL


@dataclass(frozen=True)
class Measure:
    """Run a program; its bytes and those of its standard input follow.

    Attributes:
        program: number of its bytes.
        call: number of bytes of its standard input.
        output: most bytes that it may write.
        seconds: after which it is ended.
    """

    program: int
    call: int
    output: int
    seconds: float


@dataclass(frozen=True)
class Outcome:
    """How it went; the program's output follows.

    Attributes:
        outcome: "ok"; "candidate": the program crashed, or took too long, and right afterwards the
            canary was as it should be; "device": it was not, or the device cannot be reached.
        output: number of bytes of the program's output.
        count: instructions that an emulator counted; 0 where it did not.
        note: why it is not "ok".
    """

    outcome: str
    output: int = 0
    count: int = 0
    note: str = ""


OUTCOMES = ("ok", "candidate", "device")

M = TypeVar("M", Hello, Welcome, Measure, Outcome)


def encode(message: Hello | Welcome | Measure | Outcome) -> bytes:
    """A message without the bytes that follow."""
    data = json.dumps(asdict(message)).encode()
    return _LENGTH.pack(len(data)) + data


def decode(kind: type[M], data: bytes) -> M:
    """A message from its JSON.

    Raises:
        ProtocolError: it is no such message, or beyond the limits.
    """
    try:
        values = json.loads(data)
        hints = get_type_hints(kind)
        found = {field.name: values[field.name] for field in fields(kind)}
    except (ValueError, KeyError, TypeError, RecursionError) as error:
        raise ProtocolError(f"no {kind.__name__}: {type(error).__name__}") from None
    for name, value in found.items():
        _check(name, value, hints[name])
    return kind(**found)


def _check(name: str, value: Any, kind: type) -> None:
    wanted = (int, float) if kind is float else kind
    if isinstance(value, bool) or not isinstance(value, wanted):
        raise ProtocolError(f"{name} is no {kind.__name__}")
    if isinstance(value, str):
        if len(value) > MOST_TEXT or not value.isprintable():
            raise ProtocolError(f"{name} is no short text")
    elif not 0 <= cast("float", value) <= _LIMITS.get(name, 1 << 62):
        raise ProtocolError(f"{name} is {value!r:.40}")


def printable(text: str) -> str:
    """What others say, without characters that move a terminal's cursor."""
    return "".join(character for character in text if character.isprintable())


def decode_length(data: bytes) -> int:
    """Length of the JSON.

    Raises:
        ProtocolError: it is longer than messages are.
    """
    (length,) = _LENGTH.unpack(data)
    if length > MOST_JSON_BYTES:
        raise ProtocolError(f"a message of {length} bytes")
    return int(length)


# -- An agent's side -------------------------------------------------------------------------------


async def read_message(reader: asyncio.StreamReader, kind: type[M]) -> M:
    """The next message.

    Raises:
        ProtocolError: it is something else.
        EOFError: the connection ended.
    """
    length = decode_length(await reader.readexactly(_LENGTH.size))
    return decode(kind, await reader.readexactly(length))


# -- A client's side -------------------------------------------------------------------------------


def receive(connection: socket.socket, kind: type[M]) -> M:
    """The next message.

    Raises:
        ProtocolError: it is something else.
        OSError: the connection ended, or nothing came in its time.
    """
    length = decode_length(receive_exactly(connection, _LENGTH.size))
    return decode(kind, receive_exactly(connection, length))


def receive_exactly(connection: socket.socket, size: int) -> bytes:
    """Some bytes.

    Raises:
        OSError: the connection ended, or nothing came in its time.
    """
    data = bytearray(size)
    view, done = memoryview(data), 0
    while done < size:
        received = connection.recv_into(view[done:])
        if not received:
            raise ConnectionResetError("the connection was closed")
        done += received
    return bytes(data)
