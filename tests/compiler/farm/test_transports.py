"""Ways to a device: a program is run here, through a real sshd, and through a double of adb."""

from __future__ import annotations

import asyncio
import getpass
import os
import pwd
import re
import shutil
import signal
import socket
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest

from llamac.compiler.farm.canary import Canary, make_canaries
from llamac.compiler.farm.devices import Device, open_transport
from llamac.compiler.farm.keys import key_of, target_of
from llamac.compiler.farm.processes import DeviceLost
from llamac.compiler.farm.transports import OUTPUT, Transport
from llamac.runtime.errors import DeviceError, FarmUnfit, UsageError

HOST = "host-x86-64"
SSHD = shutil.which("sshd") or "/usr/sbin/sshd"


@dataclass(frozen=True)
class Ssh:
    """A server on loopback.

    Attributes:
        config: for ssh, in which the host is called "device".
        home: in which its shells begin.
    """

    config: str
    home: Path


@pytest.fixture(scope="module")
def sshd(loopback: ModuleType, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Ssh]:
    """OpenSSH, for whoever runs the tests, with keys of its own."""
    folder = tmp_path_factory.mktemp("sshd")
    folder.chmod(0o700)
    for name in ("host", "user"):
        command = ["ssh-keygen", "-q", "-t", "ed25519", "-N", "", "-f", str(folder / name)]
        subprocess.run(command, check=True)
    port = loopback.free_port()
    (folder / "sshd_config").write_text(
        f"Port {port}\nListenAddress 127.0.0.1\nHostKey {folder}/host\nPidFile none\n"
        f"AuthorizedKeysFile {folder}/user.pub\nStrictModes no\nUsePAM no\n"
        f"Subsystem sftp internal-sftp\n"
    )
    config = folder / "config"
    config.write_text(
        f"Host device\n  HostName 127.0.0.1\n  Port {port}\n  User {getpass.getuser()}\n"
        f"  IdentityFile {folder}/user\n  IdentitiesOnly yes\n  StrictHostKeyChecking no\n"
        f"  UserKnownHostsFile /dev/null\n  LogLevel ERROR\n"
    )
    if os.geteuid() == 0:
        Path("/run/sshd").mkdir(exist_ok=True)
    with (folder / "log").open("wb") as log:
        process = subprocess.Popen(
            [SSHD, "-D", "-e", "-f", str(folder / "sshd_config")], stdout=log, stderr=log
        )
    ready = ["ssh", "-F", str(config), "-o", "BatchMode=yes", "device", "true"]

    def answers() -> bool:
        return subprocess.run(ready, check=False, capture_output=True).returncode == 0

    try:
        assert loopback.eventually(answers, 20), (folder / "log").read_text()
        yield Ssh(str(config), Path(pwd.getpwuid(os.getuid()).pw_dir))
    finally:
        process.kill()
        process.wait()


@pytest.fixture(scope="module")
def phone(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Path]:
    """The folder that stands for a phone."""
    root = tmp_path_factory.mktemp("phone")
    (root / "data/local/tmp").mkdir(parents=True)
    programs = tmp_path_factory.mktemp("bin")
    double = Path(__file__).parent / "adb_double.py"
    (programs / "adb").write_text(f'#!/bin/sh\nexec {sys.executable} {double} "$@"\n')
    (programs / "adb").chmod(0o755)
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("PATH", f"{programs}:{os.environ['PATH']}")
        patch.setenv("ADB_DOUBLE_ROOT", str(root))
        yield root


@pytest.fixture(params=["local", "ssh", "adb"])
def transport(request: pytest.FixtureRequest) -> Transport:
    """Each way, in turn."""
    target = target_of(HOST)
    if request.param == "local":
        return open_transport(Device.parse("local", 0), target)
    if request.param == "adb":
        request.getfixturevalue("phone")
        return open_transport(Device.parse("adb:0a1b2c3d", 0), target)
    if not Path(SSHD).exists():
        pytest.skip("needs sshd")
    config = request.getfixturevalue("sshd").config
    return open_transport(Device.parse("ssh:device", 0, config), target)


@pytest.fixture(scope="module")
def canary() -> Canary:
    """Of the lowest level, which every machine has."""
    return make_canaries(target_of(HOST), "time_us")[-1]


def run_bad(
    transport: Transport, program: bytes, folder: Path, seconds: float = 2, most: int = 1 << 16
) -> Any:
    (folder / "program").write_bytes(program)
    (folder / "call").write_bytes(b"")
    return asyncio.run(transport.run(folder, seconds, most))


def test_the_canary_is_right_on_each(transport: Transport, canary: Canary, tmp_path: Path) -> None:
    """Its result is the reference's, its time is kept; nothing is left on the device."""
    assert asyncio.run(canary.check(transport, tmp_path)) == ""
    assert 1 < canary.costs[-1] < 1e6
    assert transport.device
    degrees = asyncio.run(transport.temperature())
    assert degrees is None or 0 < degrees < 150


def test_devices_are_left_as_they_were(
    transport: Transport, canary: Canary, tmp_path: Path, request: pytest.FixtureRequest
) -> None:
    asyncio.run(canary.check(transport, tmp_path))
    if "ssh" in transport.name:
        assert list(request.getfixturevalue("sshd").home.glob("llamac-farm*")) == []
    elif "adb" in transport.name:
        root = request.getfixturevalue("phone")
        assert list((root / "data/local/tmp").iterdir()) == []


@pytest.mark.parametrize(
    ("name", "problem"),
    [("crash", "SIGILL"), ("endless", "longer than 2 s"), ("large", "SIGXFSZ")],
)
def test_what_is_wrong_with_a_program(
    transport: Transport,
    bad_program: Callable[[str, str], bytes],
    tmp_path: Path,
    name: str,
    problem: str,
) -> None:
    """And it does not go on behind the end of its time."""
    ran = run_bad(transport, bad_program(name, HOST), tmp_path)
    assert re.search(problem, ran.problem), ran.problem


def test_output_comes_back_whole(transport: Transport, bad_program: Any, tmp_path: Path) -> None:
    assert run_bad(transport, bad_program("silent", HOST), tmp_path).problem == ""
    assert (tmp_path / OUTPUT).read_bytes() == b""


def test_a_program_ends_with_its_agent(bad_program: Any, tmp_path: Path) -> None:
    """Also with one that is killed, and cannot end anything any more."""
    code = (
        "import asyncio, sys; from pathlib import Path;"
        "from llamac.compiler.farm.transports import LocalTransport;"
        "asyncio.run(LocalTransport('local', 'x').run(Path(sys.argv[1]), 60, 1))"
    )
    (tmp_path / "program").write_bytes(bad_program("endless", HOST))
    (tmp_path / "call").write_bytes(b"")
    agent = subprocess.Popen([sys.executable, "-c", code, str(tmp_path)])
    deadline = time.monotonic() + 60
    children = Path(f"/proc/{agent.pid}/task/{agent.pid}/children")
    while not (found := children.read_text().split()) and time.monotonic() < deadline:
        time.sleep(0.05)
    agent.send_signal(signal.SIGKILL)
    agent.wait()
    while Path(f"/proc/{found[0]}").exists() and time.monotonic() < deadline:
        time.sleep(0.05)
    assert not Path(f"/proc/{found[0]}").exists()


def test_a_device_that_is_gone(
    phone: Path, canary: Canary, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Is the device's fault while it serves, and an error when it is to be served."""
    transport = open_transport(Device.parse("adb:0a1b2c3d", None), target_of(HOST))
    monkeypatch.setenv("ADB_DOUBLE_OFFLINE", "device offline")
    with pytest.raises(DeviceLost, match="offline"):
        asyncio.run(canary.check(transport, tmp_path))
    with pytest.raises(DeviceError) as error:
        open_transport(Device.parse("adb:0a1b2c3d", None), target_of(HOST))
    assert "offline" in error.value.cause


@pytest.mark.parametrize(
    "text", ["usb", "ssh", "local:x", "adb:", "ssh:-oProxyCommand=touch x", "a b"]
)
def test_words_that_are_no_device(text: str) -> None:
    with pytest.raises(UsageError):
        open_transport(Device.parse(text, None), target_of(HOST))


def test_a_device_of_another_architecture() -> None:
    with pytest.raises(FarmUnfit, match="aarch64"):
        open_transport(Device.parse("local", None), target_of("sm8650-cortex-x4"))
    with pytest.raises(FarmUnfit, match="no emulator"):
        open_transport(Device.parse("qemu", None), target_of(HOST))


def test_keys_name_a_soc_and_its_core() -> None:
    assert key_of(target_of("sm8650-v75")) == "sm8650-v75"
    assert target_of("rpi5-cortex-a76").arch == "aarch64"
    for wrong in ("sm8650", "sm8650-", "sm8650-cortex-a53", "nothing-x"):
        with pytest.raises(UsageError) as error:
            target_of(wrong)
        assert "sm8650-cortex-x4" in error.value.cause


def test_a_farm_on_another_host(sshd: Ssh, loopback: ModuleType, tmp_path: Path) -> None:
    """The agent reaches its tracker, and clients the agent, through ssh alone."""
    pytest.importorskip("tornado")
    farm = loopback.Farm(tmp_path)
    farm.start_tracker()
    farm.serve("local", HOST, via="device", ssh_config=sshd.config)
    try:
        [info] = farm.wait_until_free(HOST)
        host, port = info["addr"]
        assert host == "127.0.0.1"
        with socket.create_connection((host, port), 5) as connection:
            connection.sendall(b"nothing that an agent knows")
            assert connection.recv(1) == b""
    finally:
        farm.close()
