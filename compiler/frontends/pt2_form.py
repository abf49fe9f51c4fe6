"""Tell whether a file is an archive of torch.export, without loading torch."""

from __future__ import annotations

import zipfile
from pathlib import Path


def is_pt2(path: Path) -> bool:
    """Whether a file is such an archive, told by what is in it."""
    try:
        with zipfile.ZipFile(path) as archive:
            name = next((n for n in archive.namelist() if n.endswith("/archive_format")), None)
            return name is not None and archive.read(name) == b"pt2"
    except (OSError, zipfile.BadZipFile, ValueError, NotImplementedError, RuntimeError):
        return False
