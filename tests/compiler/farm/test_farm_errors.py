"""What is wrong with a farm, or with how it is asked, is said within seconds."""

from __future__ import annotations

import asyncio
import json
import time
from contextlib import asynccontextmanager
from pathlib import Path
from typing import Any

import pytest

from llamac.compiler.farm.tracker import Registration
from llamac.tools.cli import main
from llamac.tools.tune import DEFAULT_WAIT

ARM = "sm8650-cortex-x4"
TUNE = ("tune", "llama-3.2-1b", "--target", "sm8650", "--kernels", "residual_8x2048x2048")
AGENT = {
    "key": f"server:{ARM}",
    "addr": ["127.0.0.1", 1],
    "name": "nobody",
    "device": "a phone that is none",
    "arch": "aarch64",
    "cost": "instructions",
    "levels": ["i8mm"],
    "state": "free",
    "note": "",
    "trials": 0,
}


@pytest.fixture(scope="module")
def farm(empty_farm: Any) -> Any:
    """A tracker without devices."""
    return empty_farm


@asynccontextmanager
async def registered(farm: Any, *changes: dict[str, Any]) -> Any:
    """Agents that say something and offer nothing."""
    found = [await Registration.open(farm.tracker) for _ in changes]
    for registration, change in zip(found, changes, strict=True):
        await registration.update(AGENT | change)
    try:
        yield
    finally:
        for registration in found:
            registration.close()


def tune(farm: Any, tmp_path: Path, *options: str, agents: tuple[dict[str, Any], ...] = ()) -> int:
    """Tune with a farm of such agents."""
    records = str(tmp_path / "records.jsonl")

    async def run() -> int:
        async with registered(farm, *agents):
            arguments = [*TUNE, "--farm", str(farm.tracker), "--records", records, *options]
            return await asyncio.to_thread(main, arguments)

    started = time.monotonic()
    code = asyncio.run(run())
    assert time.monotonic() - started < DEFAULT_WAIT / 2  # it says so, and does not wait
    return code


@pytest.mark.parametrize(
    ("agents", "options", "words"),
    [
        ((), (), ("farm-unfit", "no devices at all", "llamac farm serve")),
        (({"key": "server:rpi5-cortex-a76"},), (), ("farm-unfit", "it has rpi5-cortex-a76")),
        (({"arch": "x86_64"},), (), ("farm-unfit", "is x86_64, and the kernels are aarch64")),
        (({"levels": ["neon"]},), (), ("farm-unfit", "cannot run kernels of i8mm", "neon")),
        (({"levels": [], "state": "sick", "note": "adb: offline"},), (), ("sick", "adb: offline")),
        (({}, {"cost": "time_us"}), (), ("farm-unfit", "measure different things")),
        (({},), ("--cost", "time"), ("usage", "do not measure time", "cycles and instructions")),
        (({},), ("--farm-wait", "2"), ("farm-unreachable", "for 2 s", "or sick")),
    ],
    ids=["empty", "key", "arch", "level", "sick", "mixed", "cost", "busy"],
)
def test_a_farm_that_does_not_fit(
    farm: Any,
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
    agents: tuple[dict[str, Any], ...],
    options: tuple[str, ...],
    words: tuple[str, ...],
) -> None:
    """The message has what was found, and the command leaves no half record."""
    assert tune(farm, tmp_path, *options, agents=agents) == (2 if words[0] == "usage" else 1)
    said = capsys.readouterr().err
    assert all(word in said for word in words), said
    assert "Traceback" not in said


def test_no_tracker(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """Neither nothing nor something else that answers is taken for one."""
    assert main([*TUNE, "--farm", "127.0.0.1:9", "--records", str(tmp_path / "r.jsonl")]) == 1
    assert "farm-unreachable" in capsys.readouterr().err
    assert main(["farm", "status", "--tracker", "127.0.0.1:9"]) == 1
    assert "farm-unreachable" in capsys.readouterr().err


def test_records_that_are_none(farm: Any, tmp_path: Path, capsys: Any) -> None:
    """An incompatible file is refused before a device is asked for."""
    (tmp_path / "records.jsonl").write_text(json.dumps({"format": 99}) + "\n")
    assert tune(farm, tmp_path, agents=({},)) == 1
    assert "records-invalid" in capsys.readouterr().err


@pytest.mark.parametrize(
    ("arguments", "word"),
    [
        (("tracker", "--bind", "0.0.0.0"), "--expose"),
        (("tracker", "--bind", "everywhere"), "no address"),
        (("serve", "--device", "local", "--key", "host-x86-64", "--bind", "192.0.2.1"), "--expose"),
        (("serve", "--device", "usb", "--key", "host-x86-64"), "no device"),
        (("serve", "--device", "local", "--key", "sm8650"), "sm8650-cortex-x4"),
        (("serve", "--device", "local", "--key", "host-x86-64", "--tracker", "a:b"), "no address"),
        (("serve", "--device", "qemu", "--key", ARM, "--via=-oProxyCommand=x"), "no name"),
        (("serve", "--device", "ssh:a", "--key", ARM, "--ssh-config", "/nowhere"), "no file"),
        (("status", "--tracker", "host:99999"), "no address"),
        ((), "PART"),
    ],
)
def test_wrong_command_lines(arguments: tuple[str, ...], word: str, capsys: Any) -> None:
    assert main(["farm", *arguments]) == 2
    assert word in capsys.readouterr().err


def test_a_port_that_is_taken(farm: Any, capsys: Any) -> None:
    assert main(["farm", "tracker", "--port", str(farm.tracker.port)]) == 2
    assert "cannot be listened on" in capsys.readouterr().err


def test_status_does_not_trust_agents(farm: Any, capsys: Any) -> None:
    """What they say is shown without control characters, and cut."""
    evil = {"name": "\x1b[2J" + "x" * 200, "state": "sick", "note": "hot\nshe said"}

    async def run() -> None:
        async with registered(farm, evil):
            status = ["farm", "status", "--tracker", str(farm.tracker), "--plain"]
            assert await asyncio.to_thread(main, status) == 0
            assert await asyncio.to_thread(main, [*status[:-1], "--json"]) == 0

    asyncio.run(run())
    shown, _, as_json = capsys.readouterr().out.partition("[\n")
    assert "\x1b" not in shown
    assert "x" * 81 not in shown
    assert "sick: hotshe said" in shown
    assert json.loads("[\n" + as_json)[0]["arch"] == "aarch64"
