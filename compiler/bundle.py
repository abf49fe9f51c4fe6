"""Writing a bundle: a folder that appears under its name when it is complete, and not before."""

from __future__ import annotations

import errno
import hashlib
import shutil
import tempfile
from collections.abc import Callable, Iterator, Sequence
from contextlib import AbstractContextManager, contextmanager
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from llamac.runtime.checks import WeightsHeader
from llamac.runtime.digest import file_sha256, sample_sha256
from llamac.runtime.errors import OutputError
from llamac.runtime.manifest import MANIFEST_NAME, FileEntry
from llamac.targets.base import Artifact
from llamac.targets.program import Pack, ProgramTensor

WEIGHTS = "weights.bin"
PROGRAM = "program.json"
TOKENIZER = "tokenizer.model"

Pieces = Callable[[Pack], Iterator[NDArray[Any]]]


def bundle_folder(out: Path, overwrite: bool) -> AbstractContextManager[Path]:
    """Give a temporary folder beside `out` that becomes the bundle `out` if the block ends well.

    Raises:
        OutputError: see `output_folder`.
    """
    return output_folder(out, overwrite, MANIFEST_NAME, "bundle")


@contextmanager
def output_folder(out: Path, overwrite: bool, marker: str, what: str) -> Iterator[Path]:
    """Give a temporary folder beside `out` that becomes `out` if the block ends well.

    Whatever goes wrong in the block, Ctrl-C too, the temporary folder is removed and what was at
    `out` before is still there.

    Args:
        out: the folder.
        overwrite: replace what is there, if it is of the same kind.
        marker: file by which that is told.
        what: the kind, for messages: "bundle".

    Raises:
        OutputError: `out` exists (and `overwrite` is not set, or it is of another kind), or the
            disk is full or not writable.
    """
    if out.exists():
        _check_replaceable(out, overwrite, marker, what)
    try:
        out.parent.mkdir(parents=True, exist_ok=True)
        partial = Path(tempfile.mkdtemp(prefix=f".{out.name}.", dir=out.parent))
    except OSError as error:
        raise _cannot_write(out, error) from error
    try:
        yield partial
        partial.chmod(0o755)
        _replace(partial, out)
    except OSError as error:
        raise _cannot_write(out, error) from error
    finally:
        shutil.rmtree(partial, ignore_errors=True)


def _check_replaceable(out: Path, overwrite: bool, marker: str, what: str) -> None:
    """Refuse to replace what nobody asked to replace, and folders that hold something else."""
    if not overwrite:
        raise OutputError(
            f"{out} exists already",
            cause=f"a {what} is never written over something else without being asked",
            fix="choose another name, or give --force to replace it",
        )
    if not (out / marker).is_file() and not (out.is_dir() and not any(out.iterdir())):
        raise OutputError(
            f"{out} is not a {what}",
            cause=f"--force replaces {what}s only, and there is no {marker} in it",
            fix="choose another name, or remove it yourself",
        )


def _replace(partial: Path, out: Path) -> None:
    """Rename `partial` to `out`; what was there is removed only after that."""
    old = partial.with_name(partial.name + ".old")
    try:
        if out.exists():
            out.rename(old)
        partial.rename(out)
    except BaseException:  # Ctrl-C too: the old bundle goes back to its place
        if old.exists() and not out.exists():
            old.rename(out)
        raise
    if old.is_symlink():
        old.unlink()
    shutil.rmtree(old, ignore_errors=True)


def _cannot_write(out: Path, error: OSError) -> OutputError:
    is_full = error.errno in (errno.ENOSPC, errno.EDQUOT)
    return OutputError(
        f"{out} cannot be written: {error.strerror or error}",
        cause="the disk is full" if is_full else "the operating system refused to write there",
        fix="free some space, or choose a folder on another disk"
        if is_full
        else "choose a folder that you may write to",
    )


def check_space(folder: Path, needed_bytes: int) -> None:
    """Refuse to start writing what cannot fit.

    Raises:
        OutputError: the disk has less than `needed_bytes` left.
    """
    free = shutil.disk_usage(folder).free
    if free < needed_bytes:
        raise OutputError(
            f"the output needs {needed_bytes / 1e6:.0f} MB and the disk has {free / 1e6:.0f} MB",
            cause="the disk is too full",
            fix="free some space, or choose a folder on another disk",
        )


def write_weights(
    path: Path,
    tensors: Sequence[ProgramTensor],
    num_bytes: int,
    pieces: Pieces,
    advance: Callable[[int, str], None],
) -> str:
    """Write all packed tensors at their offsets; returns the SHA-256 of all after the header.

    Args:
        path: the file; its header stays zero until `write_header`.
        tensors: of the weights space, with ascending offsets.
        num_bytes: size of the file.
        pieces: yields a packed tensor in consecutive pieces.
        advance: called with (bytes written, tensor's name).
    """
    digest = hashlib.sha256()
    with path.open("wb") as file:
        file.seek(WeightsHeader.BYTES)
        position = WeightsHeader.BYTES

        def put(data: Any, size: int) -> None:
            nonlocal position
            file.write(data)
            digest.update(data)
            position += size

        for tensor in tensors:
            put(bytes(tensor.offset - position), tensor.offset - position)
            assert tensor.pack is not None  # every weight has one
            for piece in pieces(tensor.pack):
                put(piece.reshape(-1).view(np.uint8), piece.nbytes)
                advance(piece.nbytes, tensor.name)
            if position != tensor.offset + tensor.num_bytes:
                written = position - tensor.offset
                raise RuntimeError(f"{tensor.name}: {written} bytes, planned {tensor.num_bytes}")
        put(bytes(num_bytes - position), num_bytes - position)
    return digest.hexdigest()


def write_header(path: Path, build_id: str, num_bytes: int) -> None:
    """Complete weights.bin with its header."""
    with path.open("r+b") as file:
        file.write(WeightsHeader(build_id, num_bytes).pack())


def file_entry(bundle: Path, name: str, role: str) -> FileEntry:
    """Size and hashes of a file of the bundle."""
    path = bundle / name
    sample = sample_sha256(path) if role == "weights" else None
    return FileEntry(role, path.stat().st_size, file_sha256(path), sample)


def artifact_entry(bundle: Path, artifact: Artifact) -> FileEntry:
    """The entry of a file that a target wrote, with what the target says of it."""
    entry = file_entry(bundle, str(artifact.path), artifact.role)
    return replace(entry, flavour=artifact.flavour, note=artifact.note)


def sync_folder(bundle: Path) -> None:
    """Make files readable for everyone, as an installed program's are."""
    for path in bundle.rglob("*"):
        is_program = path.suffix == ".so" or path.parent.name == "bin"
        path.chmod(0o755 if path.is_dir() or is_program else 0o644)


def remove_build_files(bundle: Path) -> None:
    """Remove what targets needed only while they built."""
    shutil.rmtree(bundle / "build", ignore_errors=True)
