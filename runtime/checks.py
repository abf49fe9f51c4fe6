"""What is checked before a bundle is mapped: files, CPU, memory.

Nothing here runs code of the bundle. A bundle is a program, though: checksums tell that it is
complete, not that it is harmless.
"""

from __future__ import annotations

import struct
from dataclasses import dataclass
from pathlib import Path
from typing import ClassVar

from llamac.runtime import system
from llamac.runtime.digest import file_sha256, sample_sha256
from llamac.runtime.errors import (
    AbiMismatch,
    BundleCorrupt,
    BundleInvalid,
    CpuUnsupported,
    OutOfMemory,
    UsageError,
)
from llamac.runtime.manifest import ABI_VERSION, Manifest

__all__ = [
    "MEMORY_RESERVE_BYTES",
    "WeightsHeader",
    "bundle_file",
    "check_abi",
    "check_level",
    "check_memory",
    "check_target",
    "file_of_role",
    "library_name",
    "verify_files",
    "verify_sizes",
]

MEMORY_RESERVE_BYTES = 64 << 20

# The same kernel below; which C library a process has decides about its library.
FLAVOURED_SYSTEMS = ("linux", "android")


@dataclass(frozen=True)
class WeightsHeader:
    """The start of weights.bin, which ties it to the library of the same build.

    Args:
        build_id: 64 hexadecimal digits, as in the manifest.
        file_bytes: size of the whole file.
    """

    build_id: str
    file_bytes: int

    MAGIC: ClassVar[bytes] = b"LLAMACWT"
    VERSION: ClassVar[int] = 1
    BYTES: ClassVar[int] = 4096
    _LAYOUT: ClassVar[struct.Struct] = struct.Struct("<8sII32sQ")

    def pack(self) -> bytes:
        """Return the 4096 bytes with which weights.bin starts."""
        fields = self._LAYOUT.pack(
            self.MAGIC, self.VERSION, self.BYTES, bytes.fromhex(self.build_id), self.file_bytes
        )
        return fields.ljust(self.BYTES, b"\0")

    @classmethod
    def read(cls, path: Path) -> WeightsHeader:
        """Read the header of a weights file.

        Raises:
            BundleCorrupt: the file is too short or does not start with a header of this version.
        """
        with path.open("rb") as file:
            data = file.read(cls.BYTES)
        if len(data) < cls.BYTES:
            raise _corrupt(f"{path} is cut off: it has {len(data)} bytes")
        magic, version, header_bytes, build_id, file_bytes = cls._LAYOUT.unpack_from(data)
        if (magic, version, header_bytes) != (cls.MAGIC, cls.VERSION, cls.BYTES):
            raise _corrupt(f"{path} does not start with the header of a weights file")
        return cls(build_id.hex(), file_bytes)


def bundle_file(bundle: Path, name: str) -> Path:
    """Return the path of a file that the manifest names.

    Raises:
        BundleInvalid: a symbolic link leads out of the bundle.
        BundleCorrupt: the file is missing.
    """
    path = bundle / name
    try:
        is_inside = path.resolve().is_relative_to(bundle.resolve())
    except (OSError, RuntimeError) as error:  # a loop of symbolic links
        raise _corrupt(f"{path} cannot be found: {error}") from error
    if not is_inside:
        raise BundleInvalid(
            f"{path} leads out of the bundle, to {path.resolve()}",
            cause="a part of the path is a symbolic link",
            fix="put the file itself into the bundle, for example by copying with `cp -L`",
        )
    if not path.is_file():
        raise _corrupt(f"{path} is missing")
    return path


def file_of_role(bundle: Path, manifest: Manifest, role: str, what: str) -> Path:
    """Return the path of the one file of a role.

    Args:
        bundle: its folder.
        manifest: its manifest.
        role: of the file, "runner".
        what: the file in words, "runner to emulate".

    Raises:
        BundleInvalid: there is none, or more than one; or see `bundle_file`.
        BundleCorrupt: the file is missing.
    """
    names = [name for name, entry in manifest.files.items() if entry.role == role]
    if len(names) != 1:
        raise BundleInvalid(
            f"{bundle} has no {what}",
            cause=f"its manifest names no file of role {role!r}: it was compiled without one",
            fix="compile the model again",
        )
    return bundle_file(bundle, names[0])


def verify_sizes(bundle: Path, manifest: Manifest) -> None:
    """Check that every file of the manifest is there with the right size.

    Raises:
        BundleInvalid, BundleCorrupt: see `bundle_file`; or a size differs.
    """
    for name, entry in manifest.files.items():
        actual = bundle_file(bundle, name).stat().st_size
        if actual != entry.bytes:
            raise _corrupt(f"{name} has {actual} bytes, the manifest says {entry.bytes}")


def verify_files(bundle: Path, manifest: Manifest, *, full: bool = False) -> None:
    """Check size and content of every file of a bundle.

    Args:
        bundle: its folder.
        manifest: its manifest.
        full: hash all of the weights too (a second or so per GB); otherwise a sample of them.

    Raises:
        BundleInvalid, BundleCorrupt: the first file that differs, with expected and actual value.
    """
    verify_sizes(bundle, manifest)
    weights = manifest.file("weights")
    header = WeightsHeader.read(bundle / weights)
    if header != WeightsHeader(manifest.build_id, manifest.files[weights].bytes):
        raise _corrupt(f"{weights} belongs to build {header.build_id}, not {manifest.build_id}")
    for name, entry in manifest.files.items():
        if name == weights and not full:
            expected, actual = entry.sample_sha256, sample_sha256(bundle / name)
        else:
            expected, actual = entry.sha256, file_sha256(bundle / name)
        if actual != expected:
            raise _corrupt(f"{name} has sha256 {actual}, the manifest says {expected}")


def _corrupt(message: str) -> BundleCorrupt:
    return BundleCorrupt(
        message,
        cause="the bundle was copied in part or changed after it was compiled",
        fix="copy the bundle again, or compile it again",
    )


def check_abi(manifest: Manifest) -> None:
    """Check that bundle and runtime speak the same version of the interface.

    Raises:
        AbiMismatch: they do not.
    """
    if manifest.abi_version != ABI_VERSION:
        is_newer = manifest.abi_version > ABI_VERSION
        raise AbiMismatch(
            f"the bundle has ABI version {manifest.abi_version}, this runtime {ABI_VERSION}",
            cause="bundle and runtime come from different versions of llamac",
            fix="update llamac on this machine" if is_newer else "compile the model again",
        )


def check_target(manifest: Manifest) -> None:
    """Check that this machine and this runtime can run the bundle's library.

    Raises:
        AbiMismatch: the library was made for another version of the runtime.
        CpuUnsupported: it was made for another architecture, operating system or C library.
    """
    check_abi(manifest)
    target = manifest.target
    here = (system.machine(), system.operating_system())
    has_flavours = manifest.libraries().keys() - {None}
    systems = FLAVOURED_SYSTEMS if has_flavours else (target.os,)
    if here[0] != target.arch or here[1] not in systems:
        raise CpuUnsupported(
            f"the bundle is for {target.arch} {' and '.join(systems)} ({target.soc}), "
            f"this machine is {here[0]} {here[1]}",
            cause="a bundle holds machine code for one architecture and operating system",
            fix="compile with `--target host`, or run the bundle with `llamac run --emulate`",
        )
    library_name(manifest)


def library_name(manifest: Manifest) -> str:
    """Return the name of the library that this process can load: the one for its C library.

    Raises:
        CpuUnsupported: there is none.
    """
    libraries = manifest.libraries()
    wanted = None if None in libraries else system.c_library()
    if wanted not in libraries:
        flavours = ", ".join(sorted(filter(None, libraries)))
        raise CpuUnsupported(
            f"the bundle has no library for {wanted or 'this C library'}, it has {flavours}",
            cause="a library works with one C library only, that of the process which loads it",
            fix="compile the model again with this version of llamac, or use a Python that was "
            f"built for {flavours}",
        )
    return libraries[wanted]


def check_level(manifest: Manifest, level: str | None) -> None:
    """Check that the bundle has kernels of that level.

    Raises:
        UsageError: it has not.
    """
    names = [entry.name for entry in manifest.target.levels]
    if level is not None and level not in names:
        raise UsageError(
            f"the bundle has no level {level!r}",
            cause=f"it was compiled with {', '.join(names) or 'no levels'}",
            fix="leave the level out, so that the best one for this CPU is taken",
        )


def check_memory(required_bytes: int, what: str) -> None:
    """Check that the free memory covers a plan and leaves a reserve for the rest of the process.

    Weights do not count: they are mapped, and the system drops them when it needs the memory.

    Raises:
        OutOfMemory: it does not. Where the free memory is unknown, nothing is checked.
    """
    available = system.available_memory()
    needed = required_bytes + MEMORY_RESERVE_BYTES
    if available is not None and available < needed:
        raise OutOfMemory(
            f"{what} needs {needed >> 20} MiB, {available >> 20} MiB are free",
            cause="the KV cache and the working memory were planned when the bundle was compiled",
            fix="close other programs, compile with a shorter context or an int8 KV cache, "
            "or pass check_memory=False",
        )
