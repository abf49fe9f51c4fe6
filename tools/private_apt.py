"""Unpack Debian packages of another suite or processor into a folder, beside the system's own.

    archive = host_archive()
    with PrivateApt(archive, suite="bookworm", architecture="arm64", work=Path("build")) as apt:
        apt.unpack(["python3.11"], Path("sysroot"), with_dependencies=True)

apt works on state and cache folders of its own, so that neither root nor a change of the system is
needed. Where packages come from is what the system's own apt was told; its keys and its proxy
count too.
"""

from __future__ import annotations

import subprocess
import tempfile
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from types import TracebackType
from typing import Self

from llamac.runtime.errors import BuildFailed, ToolchainMissing

APT_FOLDER = Path("/etc/apt")
OS_RELEASE = Path("/etc/os-release")
TRUST_FIELDS = ("signed-by", "trusted")

# Lines of a failing tool's output that are worth showing.
_LAST_LINES = 12

# Hooks of the host's apt (which empty its cache, or tell its package manager) are not for us.
# Descriptions in other languages would be a second download of the size of the package list.
_CONFIG = """\
APT::Architecture "{architecture}";
#clear APT::Architectures;
APT::Architectures {{ "{architecture}"; }};
#clear APT::Update;
#clear DPkg;
APT::Sandbox::User "root";
Acquire::Languages "none";
Dir::State "{folder}/state";
Dir::State::status "{folder}/status";
Dir::Cache "{folder}/cache";
Dir::Etc::sourcelist "{folder}/private.sources";
Dir::Etc::sourceparts "/dev/null";
"""


@dataclass(frozen=True)
class Archive:
    """Where the system gets its packages from.

    Attributes:
        uri: of the archive, the folder of `dists`.
        trust: the fields of its entry that say whose signatures count, as apt writes them.
    """

    uri: str
    trust: tuple[str, ...] = ()


def host_archive(apt_folder: Path = APT_FOLDER, os_release: Path = OS_RELEASE) -> Archive:
    """Return the archive from which the system's own packages come.

    Raises:
        ToolchainMissing: this is not Debian, or its apt has no source for its release.
    """
    fields = dict(
        line.partition("=")[::2] for line in _read(os_release).splitlines() if "=" in line
    )
    codename = fields.get("VERSION_CODENAME", "").strip('"')
    if fields.get("ID", "").strip('"') != "debian" or not codename:
        raise ToolchainMissing(
            "the devices are made of Debian packages, and this system is not Debian",
            cause=f"{os_release} says {fields.get('PRETTY_NAME', 'nothing')}",
            fix="make the devices on Debian or in a container of it, and copy the folder",
        )
    for entry in _entries(apt_folder):
        if codename in entry["suites"].split() and "main" in entry["components"].split():
            trust = tuple(f"{name}: {entry[name]}" for name in TRUST_FIELDS if name in entry)
            return Archive(entry["uris"].split()[0], trust)
    raise ToolchainMissing(
        f"apt has no source for {codename}, the release of this system",
        cause=f"no entry below {apt_folder} has that suite and the component main",
        fix=f"add one to {apt_folder / 'sources.list'}",
    )


def _entries(apt_folder: Path) -> Iterator[dict[str, str]]:
    """Yield the fields of all sources of binary packages, in both forms that apt knows."""
    for path in sorted(apt_folder.glob("sources.list.d/*.sources")):
        for block in _read(path).split("\n\n"):
            yield from _paragraph(block)
    for path in [apt_folder / "sources.list", *sorted(apt_folder.glob("sources.list.d/*.list"))]:
        for line in _read(path).splitlines():
            yield from _one_line(line)


def _paragraph(block: str) -> Iterator[dict[str, str]]:
    """Read a paragraph of a .sources file: `Field: value`, indented lines continue a value."""
    fields: dict[str, str] = {}
    name = ""
    for line in block.splitlines():
        if line.startswith("#"):
            continue
        if line[:1].isspace():
            fields[name] = f"{fields.get(name, '')}\n{line}"
            continue
        name, _, value = line.partition(":")
        name = name.strip().lower()
        fields[name] = value.strip()
    is_enabled = fields.get("enabled", "yes").lower() in ("yes", "true", "1")
    is_binary = "deb" in fields.get("types", "").split()
    if is_enabled and is_binary and {"uris", "suites", "components"} <= fields.keys():
        yield fields


def _one_line(line: str) -> Iterator[dict[str, str]]:
    """Read a line of a .list file: `deb [option=value ...] URI SUITE COMPONENT...`."""
    kind, _, rest = line.partition("#")[0].strip().partition(" ")
    if kind != "deb":
        return
    options, rest = "", rest.strip()
    if rest.startswith("["):
        options, _, rest = rest[1:].partition("]")
    uri, suite, *components = rest.split()
    fields = dict(option.partition("=")[::2] for option in options.split())
    yield fields | {"uris": uri, "suites": suite, "components": " ".join(components)}


def _read(path: Path) -> str:
    """Return a text, empty if there is no such file."""
    try:
        return path.read_text("utf-8")
    except FileNotFoundError:
        return ""


class PrivateApt:
    """apt for one suite and processor, in a temporary folder that goes with the `with` block.

    Args:
        archive: where packages come from.
        suite: a release of it, such as "bookworm-backports".
        architecture: as Debian names it, "arm64" or "amd64".
        work: folder in which the temporary one is made.
    """

    def __init__(self, archive: Archive, *, suite: str, architecture: str, work: Path) -> None:
        self._temporary = tempfile.TemporaryDirectory(prefix="apt-", dir=work)
        self._folder = Path(self._temporary.name).resolve()
        for name in ("state/lists/partial", "cache/archives/partial"):
            (self._folder / name).mkdir(parents=True)
        # No package counts as installed, so that all dependencies are fetched.
        (self._folder / "status").touch()
        config = _CONFIG.format(architecture=architecture, folder=self._folder)
        (self._folder / "apt.conf").write_text(config, "utf-8")
        fields = ("Types: deb", f"URIs: {archive.uri}", f"Suites: {suite}", "Components: main")
        source = "\n".join((*fields, *archive.trust)) + "\n"
        (self._folder / "private.sources").write_text(source, "utf-8")

    def __enter__(self) -> Self:
        try:
            self._apt("update", "--error-on=any")
        except BaseException:
            self._temporary.cleanup()
            raise
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        traceback: TracebackType | None,
    ) -> None:
        self._temporary.cleanup()

    def version(self, package: str) -> str:
        """Return the version of a package that would be unpacked; "" if there is none."""
        lines = run_tool("apt-cache", "-c", str(self._folder / "apt.conf"), "show", package)
        found = [line for line in lines.splitlines() if line.startswith("Version: ")]
        return found[0].partition(": ")[2] if found else ""

    def unpack(self, packages: Sequence[str], folder: Path, *, with_dependencies: bool) -> int:
        """Fetch packages and unpack their files; none of their scripts is run.

        Args:
            packages: names.
            folder: where they are unpacked; made if it is missing.
            with_dependencies: also whatever they depend on, but not what they recommend.

        Returns:
            The number of packages.

        Raises:
            BuildFailed: one does not exist or could not be fetched.
        """
        names = list(packages)
        if with_dependencies:
            # Not `install --download-only`: it leaves packages of a file: archive where they are.
            plan = self._apt("install", "--simulate", "--no-install-recommends", *packages)
            names = [line.split()[1] for line in plan.splitlines() if line.startswith("Inst ")]
        with tempfile.TemporaryDirectory(dir=self._folder) as downloads:
            self._apt("download", *names, cwd=Path(downloads))
            files = sorted(Path(downloads).glob("*.deb"))
            for file in files:
                run_tool("dpkg-deb", "-x", str(file), str(folder))
        return len(files)

    def _apt(self, command: str, *arguments: str, cwd: Path | None = None) -> str:
        config = str(self._folder / "apt.conf")
        return run_tool("apt-get", "-q", "-c", config, command, *arguments, cwd=cwd)


def run_tool(*command: str, cwd: Path | None = None) -> str:
    """Run a program and return what it wrote to standard output.

    Raises:
        ToolchainMissing: there is no such program.
        BuildFailed: it failed; the cause is the end of what it wrote.
    """
    try:
        done = subprocess.run(
            command,
            cwd=cwd,
            stdin=subprocess.DEVNULL,
            capture_output=True,
            text=True,
            errors="replace",
            check=False,
        )
    except OSError as error:
        raise ToolchainMissing(
            f"{command[0]} does not run",
            cause=str(error),
            fix="install what debian-packages.txt lists; apt and dpkg are parts of Debian",
        ) from error
    if done.returncode != 0:
        lines = (done.stderr.strip() or done.stdout.strip()).splitlines()[-_LAST_LINES:]
        raise BuildFailed(
            f"{Path(command[0]).name} failed (exit status {done.returncode})",
            cause="\n".join(lines) or "it wrote no message",
            fix=f"check the network and the disk, then run it by hand: {' '.join(command)}",
        )
    return done.stdout
