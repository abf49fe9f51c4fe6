"""An agent takes a device that is sick out of service, and offers it again when it is well."""

from __future__ import annotations

import asyncio
import time
from pathlib import Path
from typing import Any

import pytest

from llamac.compiler.farm.agent import Agent, Patience
from llamac.compiler.farm.canary import LEAST_HISTORY, Canary, make_canaries
from llamac.compiler.farm.client import Lease
from llamac.compiler.farm.keys import target_of
from llamac.compiler.farm.processes import DeviceLost
from llamac.compiler.farm.tracker import Address, request
from llamac.compiler.farm.transports import LocalTransport, Ran

HOST = "host-x86-64"
PATIENCE = Patience(hello=2, claim=2, poll=0.1, retry=0.2, most_retry=1, canary=60)


class Unplugged(LocalTransport):
    """This machine, which can be unplugged."""

    is_there = True

    async def run(self, folder: Path, seconds: float, most_output: int) -> Ran:
        if not self.is_there:
            raise DeviceLost("unplugged")
        return await super().run(folder, seconds, most_output)


@pytest.fixture(scope="module")
def farm(empty_farm: Any) -> Any:
    """A tracker without devices."""
    return empty_farm


@pytest.fixture(scope="module")
def canary() -> Canary:
    """Of a level that every machine has."""
    return make_canaries(target_of(HOST), "time_us")[-1]


async def state(farm: Any, wanted: str) -> dict[str, Any]:
    """What the agent says as soon as it is in a state."""
    deadline = time.monotonic() + 30
    while time.monotonic() < deadline:
        found = await asyncio.to_thread(farm.agents, HOST)
        if found and found[0]["state"] == wanted:
            return dict(found[0])
        await asyncio.sleep(0.05)
    raise TimeoutError(found)


def test_a_sick_device_is_not_offered(farm: Any, canary: Canary, bad_program: Any) -> None:
    """From the start; and when it becomes sick in a lease, which is the device's fault."""
    transport = Unplugged("local", "this machine")
    transport.is_there = False
    said: list[str] = []
    agent = Agent(HOST, "x86_64", transport, [canary], farm.tracker, PATIENCE, said.append)

    def measure() -> str:
        offer = request(farm.tracker, HOST, 30)
        assert offer is not None
        with Lease(offer) as lease:
            transport.is_there = False
            return lease.measure(bad_program("silent", HOST), b"", 1, 5, 10)[0].outcome

    async def run() -> None:
        running = asyncio.create_task(agent.run(Address("127.0.0.1", 0)))
        try:
            assert (await state(farm, "sick"))["note"] == "unplugged"
            assert await asyncio.to_thread(request, farm.tracker, HOST, 0.5) is None
            transport.is_there = True
            assert (await state(farm, "free"))["levels"] == [canary.level]
            assert await asyncio.to_thread(measure) == "device"
            info = await state(farm, "sick")
            assert (info["device_faults"], info["candidate_faults"]) == (1, 0)
            transport.is_there = True
            await state(farm, "free")
        finally:
            running.cancel()

    asyncio.run(run())
    assert [line.partition(": ")[2] for line in said if "sick" in line] == ["sick: unplugged"] * 2


def test_a_slow_canary_is_wrong(canary: Canary, tmp_path: Path) -> None:
    """It is compared with what it took before on this device, once there is enough of that."""
    transport = LocalTransport("local", "this machine")
    fresh = Canary(canary.level, canary.trial)
    assert asyncio.run(fresh.check(transport, tmp_path)) == ""
    fresh.costs.extend([fresh.costs[0] / 1000] * LEAST_HISTORY)
    assert "the canary took" in asyncio.run(fresh.check(transport, tmp_path))
    assert len(fresh.costs) == 1 + LEAST_HISTORY
    assert fresh._compare(fresh.costs[-1]) == ""


def test_a_canary_with_another_result_is_wrong(canary: Canary, tmp_path: Path) -> None:
    """A device that computes something else, as a broken one does."""

    class Broken(LocalTransport):
        async def run(self, folder: Path, seconds: float, most_output: int) -> Ran:
            ran = await super().run(folder, seconds, most_output)
            data = bytearray((folder / "output").read_bytes())
            data[:64] = bytes(64)
            (folder / "output").write_bytes(data)
            return ran

    fresh = Canary(canary.level, canary.trial)
    assert "the canary is wrong" in asyncio.run(fresh.check(Broken("local", "x"), tmp_path))
    assert not fresh.costs
