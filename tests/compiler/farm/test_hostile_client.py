"""Whoever reaches an agent without a lease gets nothing; with one, a program's run and no more."""

from __future__ import annotations

import json
import os
import socket
import struct
import tempfile
from collections.abc import Iterator
from contextlib import closing
from pathlib import Path
from typing import Any

import pytest

from llamac.compiler.farm.client import Lease, LeaseLost
from llamac.compiler.farm.protocol import (
    MAGIC,
    MOST_CALL_BYTES,
    MOST_JSON_BYTES,
    Hello,
    Measure,
    Outcome,
    ProtocolError,
    Welcome,
    decode,
    encode,
)
from llamac.compiler.farm.tracker import Address, Offer, request

HOST = "host-x86-64"


@pytest.fixture(scope="module")
def farm(loopback: Any, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Any]:
    """This machine alone."""
    pytest.importorskip("tornado")
    farm = loopback.Farm(tmp_path_factory.mktemp("farm"))
    farm.start_tracker()
    farm.serve("local", HOST)
    try:
        farm.wait_until_free(HOST)
        yield farm
    finally:
        farm.close()


@pytest.fixture
def agent(farm: Any) -> Address:
    """Where the agent listens; it must be free and well when the test has ended."""
    [info] = farm.wait_until_free(HOST)
    return Address(*info["addr"])


@pytest.fixture(autouse=True)
def still_serves(farm: Any, bad_program: Any) -> Iterator[None]:
    """Whatever a test did, the next client is served."""
    yield
    [info] = farm.wait_until_free(HOST)
    offer = request(farm.tracker, HOST, 30)
    assert offer is not None
    with Lease(offer) as lease:
        outcome, output = lease.measure(bad_program("silent", HOST), b"", 0, 10, 10)
    assert (outcome.outcome, output) == ("ok", b"")
    assert info["device_faults"] == 0


def talk(agent: Address, *pieces: bytes) -> bytes:
    """Send something; all that comes back until the agent closes the connection."""
    with closing(socket.create_connection((agent.host, agent.port), 10)) as connection:
        received = b""
        try:
            for piece in pieces:
                connection.sendall(piece)
            while piece := connection.recv(1 << 16):
                received += piece
        except ConnectionResetError:
            pass
        return received


def lease_of(farm: Any) -> tuple[Address, str]:
    offer = request(farm.tracker, HOST, 30)
    assert offer is not None
    return offer.address, offer.match


@pytest.mark.parametrize(
    "words",
    [
        b"",
        b"GET / HTTP/1.1\r\n\r\n",
        struct.pack("<i", 0xFF271) + struct.pack("<i", 6) + b"client",
        MAGIC,
        MAGIC + struct.pack("<I", 0xFFFFFFFF),
        MAGIC + struct.pack("<I", 2) + b"{}",
        MAGIC + struct.pack("<I", 4) + b"\xff\xfe{}",
        MAGIC + struct.pack("<I", 10000) + b"[" * 10000,
        MAGIC + encode(Hello("", 1.0)),
        MAGIC + encode(Hello(f"{HOST}:guessed", 1.0)),
        MAGIC + encode(Hello(f"{HOST}:\ud800", 1.0)),
    ],
    ids=lambda words: repr(words[:24]),
)
def test_strangers_get_no_answer(agent: Address, words: bytes) -> None:
    """A silent one is closed after its time, all others at once."""
    assert talk(agent, words) == b""


def test_silent_strangers_do_not_block_a_client(farm: Any, agent: Address) -> None:
    """Even when many keep their connections open; `still_serves` is the client."""
    strangers = [socket.create_connection((agent.host, agent.port)) for _ in range(40)]
    offer = request(farm.tracker, HOST, 30)
    assert offer is not None
    for stranger in strangers:
        stranger.close()
    Lease(offer).close()


def test_a_match_key_is_good_for_one_lease(farm: Any) -> None:
    address, match = lease_of(farm)
    Lease(Offer(address, match)).close()
    farm.wait_until_free(HOST)
    with pytest.raises(LeaseLost):
        Lease(Offer(address, match))


def test_no_second_client_during_a_lease(farm: Any) -> None:
    address, match = lease_of(farm)
    with Lease(Offer(address, match)), pytest.raises(LeaseLost):
        Lease(Offer(address, match))


def test_tvm_cannot_talk_to_an_agent(agent: Address) -> None:
    """So none of its functions that write files and load libraries are there."""
    rpc = pytest.importorskip("tvm.rpc")
    with pytest.raises(Exception, match=r"(?i)socket|magic|connect|recv|closed|not"):
        rpc.connect(agent.host, agent.port, session_timeout=5)


def test_a_lease_ends_whatever_the_client_does(farm: Any, bad_program: Any) -> None:
    """A frozen client keeps its connection, but not the device."""
    address, match = lease_of(farm)
    program = bad_program("endless", HOST)
    request_ = encode(Measure(len(program), 0, 0, 60.0))
    received = talk(address, MAGIC + encode(Hello(match, 1.5)), request_, program)
    (length,) = struct.unpack_from("<I", received)
    decode(Welcome, received[4 : 4 + length])
    assert len(received) == 4 + length


@pytest.mark.parametrize(
    "wrong",
    [
        {"program": -1},
        {"program": 1 << 40},
        {"program": "64"},
        {"call": MOST_CALL_BYTES + 1},
        {"seconds": 1e9},
        {"seconds": float("nan")},
        {"output": True},
        {"output": None},
    ],
    ids=str,
)
def test_sizes_beyond_the_limits_end_the_lease(farm: Any, wrong: dict[str, Any]) -> None:
    """Before anything is read or written."""
    address, match = lease_of(farm)
    values = {"program": 4, "call": 0, "output": 0, "seconds": 1.0} | wrong
    data = json.dumps(values).encode()
    message = struct.pack("<I", len(data)) + data
    received = talk(address, MAGIC + encode(Hello(match, 10.0)), message)
    (length,) = struct.unpack_from("<I", received)
    assert len(received) == 4 + length


def test_names_and_paths_in_messages_are_nothing(farm: Any, bad_program: Any) -> None:
    """Fields that no message has are not looked at; a program has the name that we give it."""
    address, match = lease_of(farm)
    program = bad_program("silent", HOST)
    outside = Path(tempfile.gettempdir()) / f"llamac-escaped-{os.getpid()}"
    values = {"program": len(program), "call": 0, "output": 0, "seconds": 5.0}
    values |= {"name": f"../../{outside.name}", "path": str(outside), "op": "load_module"}
    data = json.dumps(values).encode()
    message = struct.pack("<I", len(data)) + data
    with closing(socket.create_connection((address.host, address.port), 10)) as connection:
        connection.sendall(MAGIC + encode(Hello(match, 10.0)) + message + program)
        connection.recv(1 << 16)
        connection.recv(1 << 16)
    assert not outside.exists()


def test_what_is_no_program_is_the_candidates_fault(farm: Any) -> None:
    offer = request(farm.tracker, HOST, 30)
    assert offer is not None
    with Lease(offer) as lease:
        outcome, _ = lease.measure(b"\x7fELF, or not", b"", 0, 5, 10)
    assert outcome.outcome == "candidate"
    assert outcome.note


def test_nothing_is_left_behind(farm: Any, agent: Address) -> None:
    """Of all that ran here: no program, no folder but that of the next lease."""
    assert farm.processes("program") == []
    left = [path for path in Path(tempfile.gettempdir()).glob("llamac-farm-*") if path.is_dir()]
    mine = [path for path in left if path.stat().st_mtime > farm.folder.stat().st_ctime]
    assert mine == []


@pytest.mark.parametrize(
    "data",
    [b"[]", b"null", b'{"outcome": "ok"}', b'{"outcome": 1, "output": 0, "count": 0, "note": ""}'],
)
def test_a_client_does_not_trust_an_agent_either(data: bytes) -> None:
    with pytest.raises(ProtocolError):
        decode(Outcome, data)


def test_messages_are_what_they_were() -> None:
    for message in (Measure(1, 2, 3, 4.5), Outcome("ok", 5, 6, "note")):
        data = encode(message)
        assert len(data) < MOST_JSON_BYTES
        assert decode(type(message), data[4:]) == message
