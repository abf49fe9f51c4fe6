"""Devices by the words of the command line: "local", "qemu", "ssh:HOST", "adb:SERIAL"."""

from __future__ import annotations

import platform
import subprocess
from dataclasses import dataclass

from llamac.compiler.farm.protocol import printable
from llamac.compiler.farm.transports import (
    AdbTransport,
    LocalTransport,
    QemuTransport,
    SshTransport,
    Transport,
)
from llamac.runtime.errors import DeviceError, FarmUnfit, ToolchainMissing, UsageError
from llamac.targets.cpu.target import CpuTarget
from llamac.targets.emulator import AARCH64, ARCHITECTURES, find_emulator
from llamac.targets.emulator import FIRST_VERSION_WITH_SME as WITH_SME
from llamac.targets.tuning.emulated import CPUS
from llamac.targets.tuning.host import cpu_name

KINDS = ("local", "qemu", "ssh", "adb")
_MACHINES = {"x86_64": "x86_64", "AMD64": "x86_64", "aarch64": "aarch64", "arm64": "aarch64"}
_SECONDS = 30
_SHELL_MACHINE = "uname -m"
_SHELL_NAME = "getprop ro.product.model 2>/dev/null || uname -n"


@dataclass(frozen=True)
class Device:
    """The way to a device.

    Attributes:
        kind: one of KINDS.
        place: host of ssh, or serial number of adb; else "".
        cpu: see `Transport.cpu`.
        ssh_config: a file in place of ssh's own configuration.
    """

    kind: str
    place: str = ""
    cpu: int | None = None
    ssh_config: str = ""

    @classmethod
    def parse(cls, text: str, cpu: int | None, ssh_config: str = "") -> Device:
        """Read the words of the command line.

        Raises:
            UsageError: there is no such transport.
        """
        kind, _, place = text.partition(":")
        if kind not in KINDS or bool(place) != (kind in ("ssh", "adb")):
            raise UsageError(
                f"{text!r} is no device",
                cause="a device is local, qemu, ssh:HOST or adb:SERIAL",
                fix="give one of these with --device",
            )
        return cls(kind, place, cpu, ssh_config)


def open_transport(device: Device, target: CpuTarget) -> Transport:
    """The way to a device, after asking it what it is.

    Raises:
        FarmUnfit: it is no device for the target.
        DeviceError: it cannot be reached.
        ToolchainMissing: what leads to it is not installed.
    """
    if device.kind == "qemu":
        return _qemu(target)
    if device.kind == "local":
        _check_machine(platform.machine(), device, target)
        return LocalTransport("local", cpu_name(), device.cpu)
    transport: AdbTransport | SshTransport
    if device.kind == "adb":
        transport = AdbTransport(device.place, device.cpu)
    else:
        transport = SshTransport(device.place, device.cpu, device.ssh_config)
    _check_machine(_ask(transport.shell(_SHELL_MACHINE)), device, target)
    transport.device = _ask(transport.shell(_SHELL_NAME)) or device.place
    return transport


def _qemu(target: CpuTarget) -> QemuTransport:
    if target.arch not in ARCHITECTURES:
        raise FarmUnfit(
            f"there is no emulator of {target.arch}",
            cause=f"qemu is for {' and '.join(ARCHITECTURES)}",
            fix="serve this machine itself with --device local",
        )
    if target.arch != AARCH64.name:
        return QemuTransport(find_emulator(arch=target.arch))
    emulator = find_emulator(CPUS["sve"], AARCH64.name)
    if emulator.version >= WITH_SME:  # one CPU for all levels: code of the lower ones is the same
        emulator = find_emulator(f"{CPUS['sme']},sve-default-vector-length=32", AARCH64.name)
    return QemuTransport(emulator)


def _check_machine(machine: str, device: Device, target: CpuTarget) -> None:
    found = _MACHINES.get(machine, machine)
    if found != target.arch:
        raise FarmUnfit(
            f"the device {device.kind} is {found}, and {target.soc.name} is {target.arch}",
            cause="a device runs programs of its own architecture only",
            fix="give the key of its SoC with --key"
            + (", or --device qemu" if target.arch in ARCHITECTURES else ""),
        )


def _ask(command: list[str]) -> str:
    """What a device answers, without control characters."""
    try:
        done = subprocess.run(
            command, stdin=subprocess.DEVNULL, capture_output=True, timeout=_SECONDS, check=False
        )
    except FileNotFoundError as error:
        raise ToolchainMissing(
            f"{command[0]} is not installed",
            cause="devices are reached with it",
            fix="apt-get install openssh-client, or Android's platform-tools",
        ) from error
    except subprocess.TimeoutExpired as error:
        raise _lost(command, f"no answer within {_SECONDS} s") from error
    if done.returncode:
        said = done.stderr.decode(errors="replace").strip().splitlines()
        raise _lost(command, said[-1] if said else f"it ended with {done.returncode}")
    return printable(done.stdout.decode(errors="replace").strip())[:200]


def _lost(command: list[str], cause: str) -> DeviceError:
    return DeviceError(
        f"the device cannot be reached with {command[0]}",
        cause=cause,
        fix=f"try `{' '.join(command[:-1])} true`; it must work without a question",
    )
