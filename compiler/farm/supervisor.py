"""What keeps an agent alive: a process beside it that starts it again when it dies or freezes.

    llamac farm serve ── supervisor ─┬─ agent ── program of a client
                                     └─ ssh tunnel, with --via

An agent says every second that it is there. Whoever ends the supervisor ends all of it.
"""

from __future__ import annotations

import asyncio
import multiprocessing
import secrets
import signal
import subprocess
import time
from dataclasses import dataclass, field, replace
from multiprocessing.connection import Connection
from multiprocessing.process import BaseProcess

from llamac.compiler.farm.agent import Agent, Patience, to_stderr
from llamac.compiler.farm.canary import make_canaries
from llamac.compiler.farm.devices import Device, open_transport
from llamac.compiler.farm.keys import target_of
from llamac.compiler.farm.processes import die_with_parent
from llamac.compiler.farm.tracker import Address
from llamac.compiler.farm.transports import check_host, ssh_options

START_SECONDS = 300.0  # TVM is imported and canaries are compiled, on a busy machine
BEAT_SECONDS = 1.0
LOOPBACK = "127.0.0.1"
_FIRST_PORT, _PORTS = 20000, 20000  # of tunnels


@dataclass(frozen=True)
class Service:
    """What `farm serve` serves.

    Attributes:
        key: of the device, "sm8650-cortex-x4".
        device: the way to it.
        tracker: where it is offered; with `via` as that host sees it.
        address: where the agent listens; port 0 is any.
        port: that clients connect to; 0: the one that it listens on.
        via: host through which tracker and clients are reached, by ssh; "": directly.
        ssh_config: a file in place of ssh's own configuration.
        patience: of the agent.
        quiet: whether the agent keeps its states to itself.
        most_silence: seconds after which a silent agent is taken for frozen.
    """

    key: str
    device: Device
    tracker: Address
    address: Address
    port: int = 0
    via: str = ""
    ssh_config: str = ""
    patience: Patience = field(default_factory=Patience)
    quiet: bool = False
    most_silence: float = 30.0


def supervise(service: Service) -> None:
    """Serve until interrupted.

    Raises:
        LlamacError: key, device or host are wrong; that is found out before anything is served.
    """
    target = target_of(service.key)
    open_transport(service.device, target)
    if service.via:
        check_host(service.via)
    failures = 0
    while True:
        started = time.monotonic()
        why = _serve_once(service)
        failures = 0 if time.monotonic() - started > START_SECONDS else failures + 1
        wait = min(service.patience.retry * 2 ** min(failures - 1, 16), service.patience.most_retry)
        to_stderr(f"{service.key}: {why}; next start in {wait:.0f} s")
        time.sleep(wait)


def _serve_once(service: Service) -> str:
    """Run an agent, and its tunnel, until one of them is no more; return why."""
    tunnel: subprocess.Popen[bytes] | None = None
    if service.via:
        service, command = through_tunnel(service)
        tunnel = subprocess.Popen(  # this process has one thread
            command,
            stdin=subprocess.DEVNULL,
            preexec_fn=die_with_parent,  # noqa: PLW1509
        )
    context = multiprocessing.get_context("spawn")
    ours, theirs = context.Pipe(duplex=False)
    agent = context.Process(target=serve, args=(service, theirs))
    agent.start()
    theirs.close()
    try:
        return _watch(service, agent, ours, tunnel)
    finally:
        agent.kill()
        agent.join()
        ours.close()
        if tunnel is not None:
            tunnel.terminate()
            tunnel.wait()


def _watch(
    service: Service,
    agent: BaseProcess,
    beats: Connection,
    tunnel: subprocess.Popen[bytes] | None,
) -> str:
    """Wait until something ends."""
    last, limit = time.monotonic(), START_SECONDS
    while True:
        try:
            if beats.poll(BEAT_SECONDS):
                beats.recv_bytes(1)
                last, limit = time.monotonic(), service.most_silence
        except (EOFError, OSError):
            agent.join(BEAT_SECONDS)
            return f"the agent ended with {agent.exitcode}"
        if time.monotonic() - last > limit:
            return f"the agent says nothing for {limit:.0f} s"
        if tunnel is not None and tunnel.poll() is not None:
            return f"the tunnel to {service.via} ended with {tunnel.returncode}"


def through_tunnel(service: Service) -> tuple[Service, list[str]]:
    """The service as the agent sees it, and the command of the tunnel that makes it so.

    The tracker's port of the other host comes here, and the agent's port goes there, both on
    loopback. Ports are chosen by chance; one that is taken ends the tunnel, and others are tried.
    """
    agent, tracker, port = (_FIRST_PORT + secrets.randbelow(_PORTS) for _ in range(3))
    forward = f"{LOOPBACK}:{tracker}:{service.tracker.host}:{service.tracker.port}"
    back = f"{LOOPBACK}:{port}:{LOOPBACK}:{agent}"
    options = [*ssh_options(service.ssh_config), "-o", "ExitOnForwardFailure=yes"]
    command = ["ssh", "-N", *options, "-L", forward, "-R", back, service.via]
    inner = replace(
        service,
        tracker=Address(LOOPBACK, tracker),
        address=Address(LOOPBACK, agent),
        port=port,
    )
    return inner, command


def serve(service: Service, beats: Connection) -> None:
    """The whole life of an agent's process."""
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # the supervisor ends this one
    die_with_parent()
    target = target_of(service.key)
    transport = open_transport(service.device, target)
    canaries = make_canaries(target, transport.cost)
    say = _nothing if service.quiet else to_stderr
    agent = Agent(
        service.key, target.arch, transport, canaries, service.tracker, service.patience, say
    )
    asyncio.run(_run(agent, service, beats))


def _nothing(line: str) -> None:
    """Say nothing."""


async def _run(agent: Agent, service: Service, beats: Connection) -> None:
    beating = asyncio.create_task(_beat(beats))
    try:
        await agent.run(service.address, service.port)
    finally:
        beating.cancel()


async def _beat(beats: Connection) -> None:
    while True:
        beats.send_bytes(b".")
        await asyncio.sleep(BEAT_SECONDS)
