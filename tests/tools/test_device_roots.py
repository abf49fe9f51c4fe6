"""Folders for tests of other processors: complete or not there, from sources that apt knows.

Nothing is downloaded: roots are made up, and the archive of packages is a folder.
"""

from __future__ import annotations

import hashlib
import json
import subprocess
from collections.abc import Callable
from pathlib import Path

import pytest

from llamac.runtime.errors import BuildFailed, LlamacError, OutputError, ToolchainMissing
from llamac.tools import device_roots
from llamac.tools.device_roots import RECIPE_FILE, Root, main, make_root, runtime_requirements
from llamac.tools.private_apt import Archive, PrivateApt, host_archive, run_tool


def root(make: Callable[[Path], None], **recipe: str) -> Root:
    """A root that is right when it has a file `program`."""

    def check(folder: Path) -> str:
        if not (folder / "program").is_file():
            raise BuildFailed("no program", cause="none was made", fix="make one")
        return (folder / "program").read_text()

    return Root("board", dict(recipe), make, check)


def writes(text: str) -> Callable[[Path], None]:
    return lambda folder: (folder / "program").write_text(text) and None


def test_a_root_is_made_once(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    make_root(root(writes("first"), suite="a"), tmp_path)
    make_root(root(writes("second"), suite="a"), tmp_path)
    assert (tmp_path / "board" / "program").read_text() == "first"
    assert json.loads((tmp_path / "board" / RECIPE_FILE).read_text()) == {"suite": "a"}
    assert capsys.readouterr().err.endswith("board: first, is there\n")


def test_another_recipe_makes_it_again(tmp_path: Path) -> None:
    make_root(root(writes("first"), suite="a"), tmp_path)
    make_root(root(writes("second"), suite="b"), tmp_path)
    assert (tmp_path / "board" / "program").read_text() == "second"
    assert [path.name for path in tmp_path.iterdir()] == ["board"]


@pytest.mark.parametrize("error", [KeyboardInterrupt, BuildFailed("", cause="", fix="")])
def test_what_is_not_complete_is_removed(error: BaseException, tmp_path: Path) -> None:
    """And what was there before stays."""

    def interrupted(folder: Path) -> None:
        writes("half")(folder)
        raise error

    with pytest.raises((KeyboardInterrupt, BuildFailed)):
        make_root(root(interrupted), tmp_path)
    assert list(tmp_path.iterdir()) == []
    make_root(root(writes("first"), suite="a"), tmp_path)
    with pytest.raises((KeyboardInterrupt, BuildFailed)):
        make_root(root(interrupted, suite="b"), tmp_path)
    assert (tmp_path / "board" / "program").read_text() == "first"
    assert [path.name for path in tmp_path.iterdir()] == ["board"]


def test_what_does_not_run_is_removed(tmp_path: Path) -> None:
    with pytest.raises(BuildFailed, match="no program"):
        make_root(root(lambda folder: None), tmp_path)
    assert list(tmp_path.iterdir()) == []


def test_a_file_in_the_way(tmp_path: Path) -> None:
    (tmp_path / "devices").touch()
    with pytest.raises(OutputError, match="board cannot be written"):
        make_root(root(writes("first")), tmp_path / "devices")


def test_the_command_line(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    def fail(folder: Path) -> None:
        raise ToolchainMissing("no apt", cause="this is not Debian", fix="use Debian")

    def interrupt(folder: Path) -> None:
        raise KeyboardInterrupt

    for make, status in ((writes("first"), 0), (fail, 1), (interrupt, 130)):
        known = [root(make, status=str(status))]
        monkeypatch.setattr(device_roots, "roots", lambda known=known: iter(known))
        assert main(["board", "-o", str(tmp_path)]) == status
    assert "error[toolchain-missing]: no apt\n  cause: this is not" in capsys.readouterr().err
    with pytest.raises(SystemExit, match="2"):
        main(["bord"])
    assert "there is no 'bord'; choose from board" in capsys.readouterr().err


def test_the_wheels_are_those_of_the_runtime() -> None:
    """With what they need in turn, and nothing of the compiler."""
    names = [line.partition("==")[0] for line in runtime_requirements()]
    assert {"numpy", "tiktoken", "rich", "regex", "requests", "markdown-it-py"} <= set(names)
    assert not {"apache-tvm", "torch", "onnx", "ziglang", "pytest"} & set(names)


DEB822 = """\
# The archive
Types: deb deb-src
URIs: http://mirror.example/debian
Suites: bookworm bookworm-updates
Components: main contrib
Signed-By:
 -----BEGIN PGP PUBLIC KEY BLOCK-----
 .
 -----END PGP PUBLIC KEY BLOCK-----
"""
ONE_LINE = "deb [arch=amd64 signed-by=/keys/debian.gpg] http://mirror.example/debian bookworm main"
KEY = "\n -----BEGIN PGP PUBLIC KEY BLOCK-----\n .\n -----END PGP PUBLIC KEY BLOCK-----"


@pytest.fixture
def system(tmp_path: Path) -> Callable[..., Archive]:
    """Ask a system that has these files below etc/apt for its archive."""

    def ask(release: str = "ID=debian\nVERSION_CODENAME=bookworm\n", **files: str) -> Archive:
        apt = tmp_path / "apt"
        (apt / "sources.list.d").mkdir(parents=True, exist_ok=True)
        for name, text in files.items():
            (apt / name.replace("__", "/").replace("_", ".")).write_text(text)
        (tmp_path / "os-release").write_text(release)
        return host_archive(apt, tmp_path / "os-release")

    return ask


@pytest.mark.parametrize(
    ("files", "trust"),
    [
        ({"sources_list_d__debian_sources": DEB822}, (f"signed-by: {KEY}",)),
        ({"sources_list": f"# old\n{ONE_LINE}\n"}, ("signed-by: /keys/debian.gpg",)),
        ({"sources_list_d__b_list": f"{ONE_LINE} # main"}, ("signed-by: /keys/debian.gpg",)),
        ({"sources_list": "deb http://mirror.example/debian bookworm main"}, ()),
    ],
)
def test_packages_come_from_where_apt_has_them(
    files: dict[str, str], trust: tuple[str, ...], system: Callable[..., Archive]
) -> None:
    assert system(**files) == Archive("http://mirror.example/debian", trust)


@pytest.mark.parametrize(
    "entry",
    [
        "",
        "deb-src http://mirror.example/debian bookworm main\n",
        "deb http://mirror.example/debian bookworm-updates main\n",
        "deb http://mirror.example/tools bookworm stable\n",
        "# deb http://mirror.example/debian bookworm main\n",
    ],
)
def test_a_system_without_an_archive(entry: str, system: Callable[..., Archive]) -> None:
    with pytest.raises(ToolchainMissing, match="no source for bookworm"):
        system(sources_list=entry, sources_list_d__x_sources=f"Enabled: no\n{DEB822}")


def test_a_system_that_is_not_debian(system: Callable[..., Archive]) -> None:
    with pytest.raises(ToolchainMissing, match="not Debian") as caught:
        system('ID=ubuntu\nPRETTY_NAME="Ubuntu 24.04"\nVERSION_CODENAME=noble\n')
    assert "Ubuntu 24.04" in caught.value.cause


@pytest.fixture
def archive(tmp_path: Path) -> Archive:
    """An archive in a folder: `board` for arm64, which needs `library`."""
    folder = tmp_path / "archive"
    binary = folder / "dists" / "bookworm" / "main" / "binary-arm64"
    binary.mkdir(parents=True)
    index = ""
    for name, needs in (("board", "Depends: library\n"), ("library", "")):
        package = tmp_path / name
        (package / "DEBIAN").mkdir(parents=True)
        control = f"Package: {name}\nVersion: 1:2.5\nArchitecture: arm64\n{needs}"
        control += "Maintainer: nobody <nobody@example.org>\nDescription: made up\n"
        (package / "DEBIAN" / "control").write_text(control)
        (package / f"{name}.txt").write_text(name)
        file = folder / f"{name}.deb"
        subprocess.run(["dpkg-deb", "-b", package, file], check=True, capture_output=True)
        content = file.read_bytes()
        index += f"{control}Filename: {file.name}\nSize: {len(content)}\n"
        index += f"SHA256: {hashlib.sha256(content).hexdigest()}\n\n"
    (binary / "Packages").write_text(index)
    digest = hashlib.sha256(index.encode()).hexdigest()
    (folder / "dists" / "bookworm" / "Release").write_text(
        "Origin: made up\nSuite: bookworm\nCodename: bookworm\nArchitectures: arm64\n"
        "Components: main\nDate: Thu, 01 Jan 2026 00:00:00 UTC\n"
        f"SHA256:\n {digest} {len(index)} main/binary-arm64/Packages\n"
    )
    return Archive(f"file:{folder}", ("trusted: yes",))


@pytest.mark.needs("apt-get", "dpkg-deb")
def test_packages_are_unpacked(archive: Archive, tmp_path: Path) -> None:
    """With and without what they depend on; nothing stays but the files."""
    work = tmp_path / "work"
    work.mkdir()
    with PrivateApt(archive, suite="bookworm", architecture="arm64", work=work) as apt:
        assert apt.version("board") == "1:2.5"
        assert apt.unpack(["board"], work / "alone", with_dependencies=False) == 1
        assert [path.name for path in (work / "alone").iterdir()] == ["board.txt"]
        assert apt.unpack(["board"], work / "all", with_dependencies=True) == 2
    names = sorted(str(path.relative_to(work)) for path in work.rglob("*.*"))
    assert names == ["all/board.txt", "all/library.txt", "alone/board.txt"]
    assert sorted(path.name for path in work.iterdir()) == ["all", "alone"]


@pytest.mark.needs("apt-get", "dpkg-deb")
@pytest.mark.parametrize(("suite", "package"), [("bookworm", "tablet"), ("sarge", "board")])
def test_what_the_archive_lacks(suite: str, package: str, archive: Archive, tmp_path: Path) -> None:
    work = tmp_path / "work"
    work.mkdir()
    with (
        pytest.raises(BuildFailed, match="apt-get failed") as caught,
        PrivateApt(archive, suite=suite, architecture="arm64", work=work) as apt,
    ):
        apt.unpack([package], work / "out", with_dependencies=True)
    assert (package if suite == "bookworm" else suite) in caught.value.cause
    assert list(work.iterdir()) == []


def test_a_tool_that_is_missing() -> None:
    with pytest.raises(LlamacError, match="a-program-that-nobody-has does not run"):
        run_tool("a-program-that-nobody-has")
