"""A client's lease of a device: it connects, sends programs, and gets what they wrote."""

from __future__ import annotations

import contextlib
import socket

from llamac.compiler.farm.protocol import (
    MAGIC,
    MOST_LEASE_SECONDS,
    OUTCOMES,
    PROTOCOL,
    Hello,
    Measure,
    Outcome,
    ProtocolError,
    Welcome,
    encode,
    receive,
    receive_exactly,
)
from llamac.compiler.farm.tracker import ANSWER_SECONDS, Offer


class LeaseLost(Exception):
    """The agent is gone, does not answer, or does not answer as an agent."""


class Lease:
    """A leased device; a context manager that gives it back.

    Args:
        offer: what the tracker gave.

    Raises:
        LeaseLost: there is no agent, or it has given the device to another.

    Attributes:
        welcome: what the agent says of the device.
    """

    def __init__(self, offer: Offer) -> None:
        address = (offer.address.host, offer.address.port)
        try:
            self._connection = socket.create_connection(address, ANSWER_SECONDS)
        except OSError as error:
            raise LeaseLost(f"no agent answers at {offer.address}") from error
        try:
            self._connection.sendall(MAGIC + encode(Hello(offer.match, MOST_LEASE_SECONDS)))
            self.welcome = receive(self._connection, Welcome)
            if self.welcome.protocol != PROTOCOL:
                raise ProtocolError(f"protocol {self.welcome.protocol} instead of {PROTOCOL}")
        except (OSError, ProtocolError) as error:
            self._connection.close()
            raise LeaseLost(f"the agent at {offer.address} does not answer: {error}") from error

    def measure(
        self, program: bytes, call: bytes, most_output: int, seconds: float, grace: float
    ) -> tuple[Outcome, bytes]:
        """Run a program on the device.

        Args:
            program: a static program.
            call: its standard input.
            most_output: bytes that it writes.
            seconds: after which the agent ends it.
            grace: seconds more for the agent to copy files, and to ask its canary.

        Raises:
            LeaseLost: no answer in this time.
        """
        request = Measure(len(program), len(call), most_output, seconds)
        try:
            self._connection.settimeout(grace)
            self._connection.sendall(encode(request))
            self._connection.sendall(program)
            self._connection.sendall(call)
            self._connection.settimeout(seconds + grace)
            outcome = receive(self._connection, Outcome)
            if outcome.outcome not in OUTCOMES or outcome.output > most_output:
                raise ProtocolError(f"it answers {outcome.outcome!r:.40}")
            return outcome, receive_exactly(self._connection, outcome.output)
        except (OSError, ProtocolError) as error:
            raise LeaseLost(f"{self.welcome.name}: {error}") from error

    def close(self) -> None:
        """Give the device back; a thread that waits for an answer waits no more."""
        with contextlib.suppress(OSError):
            self._connection.shutdown(socket.SHUT_RDWR)
        self._connection.close()

    def __enter__(self) -> Lease:
        return self

    def __exit__(self, *error: object) -> None:
        self.close()
