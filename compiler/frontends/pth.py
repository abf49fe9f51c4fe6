"""Open a `.pth` file from anybody, without running code from it and without copying it.

A `.pth` is a zip archive: `data.pkl`, a pickle that names the tensors, and one uncompressed record
per tensor, so tensors can be views of the mapped file. A pickle is a program; torch's
`weights_only=True` interprets only a safe part of it. Before that we list what the pickle wants to
call, so that an attack and a damaged file are told apart, and refuse all but plain tensors.
"""

from __future__ import annotations

import pickletools
import warnings
import zipfile
from pathlib import Path
from typing import TYPE_CHECKING, Any

from llamac.runtime.errors import CheckpointUnreadable, CheckpointUnsafe

if TYPE_CHECKING:
    import torch

# All that torch.save writes for a dictionary of plain tensors and parameters.
_REBUILD = {"_rebuild_tensor_v2", "_rebuild_tensor_v3", "_rebuild_parameter"}

# 600 tensors take 60 KB; a longer pickle only wastes our time.
_LARGEST_PICKLE_BYTES = 64 << 20


def _unreadable(path: Path, what: str, error: Exception | None = None) -> CheckpointUnreadable:
    cause = "The file is truncated, damaged, or not a checkpoint at all."
    if error is not None:
        first_line = (str(error).splitlines() or [""])[0][:300]
        # A damaged name may hold anything; keep what a terminal can print.
        text = first_line.encode("ascii", "backslashreplace").decode()
        cause += f" The reader said: {type(error).__name__}: {text}"
    return CheckpointUnreadable(
        f"{path} {what}.",
        cause=cause,
        fix="Fetch the file again, and compare its size and checksum with the publisher's "
        "(checklist.chk).",
    )


def _read_pickle(path: Path) -> bytes:
    """The bytes of `data.pkl`; zipfile checks their CRC."""
    with zipfile.ZipFile(path) as archive:
        entries = archive.infolist()
        pickles = [entry for entry in entries if entry.filename.endswith("/data.pkl")]
        if len(pickles) != 1 or any(e.filename.endswith("/constants.pkl") for e in entries):
            raise ValueError("the zip archive was not written by torch.save")
        if any(entry.compress_type != zipfile.ZIP_STORED for entry in entries):
            raise ValueError("a record of the archive is compressed and cannot be mapped")
        if pickles[0].file_size > _LARGEST_PICKLE_BYTES:
            raise ValueError(f"data.pkl has {pickles[0].file_size} bytes")
        return archive.read(pickles[0])


def _is_plain(module: str, name: str) -> bool:
    """Whether a pickled global belongs to a dictionary of tensors and nothing more."""
    return (
        (module == "torch._utils" and name in _REBUILD)
        or (module in ("torch", "torch.storage") and name.endswith("Storage"))
        or (module == "torch" and name in ("uint16", "uint32", "uint64"))
        or (module, name) == ("collections", "OrderedDict")
    )


def _refuse_code(path: Path, data: bytes) -> None:
    """Raise CheckpointUnsafe when the pickle names anything but tensors and their containers."""
    for opcode, argument, _ in pickletools.genops(data):
        if opcode.name in ("GLOBAL", "INST"):
            module, _, name = str(argument).partition(" ")
            if _is_plain(module, name):
                continue
            wanted = f"{module}.{name}"
        elif opcode.name in ("STACK_GLOBAL", "EXT1", "EXT2", "EXT4"):
            wanted = f"a name computed by {opcode.name}"  # torch.save never writes these
        else:
            continue
        raise CheckpointUnsafe(
            f"{path} asks Python to call {wanted}, which no dictionary of tensors needs.",
            cause="The pickle inside the file could run code; nothing of it was executed.",
            fix="Do not load this file elsewhere either. Fetch it from the publisher, or save the "
            "plain state dict with torch.save.",
        )
    if not data.startswith(b"\x80\x02"):
        raise ValueError("data.pkl is not of pickle protocol 2, which torch.save writes")


def _load(path: Path) -> Any:
    import torch  # noqa: PLC0415 (two seconds; only who opens a .pth pays)

    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # torch warns about oddities that we check or refuse
        return torch.load(str(path), map_location="cpu", weights_only=True, mmap=True)


def open_pth(path: Path) -> dict[str, torch.Tensor]:
    """Map a `.pth` and return its tensors by name, without reading their data.

    Args:
        path: a file that `torch.save` wrote from a flat dictionary of tensors.

    Returns:
        Tensors whose storage is the mapped file. Shapes never exceed what the file holds.

    Raises:
        CheckpointUnreadable: not a file, truncated, damaged, in torch's old format, or no flat
            dictionary of tensors.
        CheckpointUnsafe: the pickle wants to call something else than torch's tensor builders.
    """
    try:
        if path.is_dir():
            raise _unreadable(path, "is a folder, not a checkpoint file")
        if path.stat().st_size == 0:
            raise _unreadable(path, "is empty")
        if not zipfile.is_zipfile(path):
            raise _unreadable(path, "is not a torch zip archive, or its end is missing")
        _refuse_code(path, _read_pickle(path))
    except (CheckpointUnreadable, CheckpointUnsafe):
        raise
    except Exception as error:  # zipfile and pickletools document no closed set of exceptions
        raise _unreadable(path, "cannot be read as a torch checkpoint", error) from error
    try:
        content = _load(path)
    except Exception as error:  # torch neither
        raise _unreadable(path, "cannot be read by torch", error) from error
    return _flat_tensors(path, content)


def _flat_tensors(path: Path, content: Any) -> dict[str, torch.Tensor]:
    """Check that what was unpickled is a flat dictionary of honest tensors."""
    import torch  # noqa: PLC0415 (as above)

    if not isinstance(content, dict):
        raise _unreadable(path, f"holds a {type(content).__name__}, not named tensors")
    tensors = {}
    for name, tensor in content.items():
        if not isinstance(name, str) or not isinstance(tensor, torch.Tensor):
            what = f"{name!r:.80} -> {type(tensor).__name__}"
            raise _unreadable(path, f"holds {what}, not a flat dictionary of tensors")
        # Stride 0 lets a tiny file claim a huge tensor; reading it would fill the memory.
        if tensor.numel() * tensor.element_size() > tensor.untyped_storage().nbytes():
            shape = tuple(tensor.shape)
            raise _unreadable(path, f"claims shape {shape} for {name!r:.80}, but lacks the data")
        tensors[name] = tensor.detach()
    return tensors
