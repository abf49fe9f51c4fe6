"""Hashes of a bundle's files: of all of a file, or of a sample of a large one."""

from __future__ import annotations

import hashlib
import os
from pathlib import Path

__all__ = ["file_sha256", "sample_sha256"]

_BLOCK_BYTES = 1 << 20
_SAMPLE_BYTES = 4096
_NUM_SAMPLES = 64


def file_sha256(path: Path) -> str:
    """Return the sha256 of a file's content, in lower-case hexadecimal."""
    digest = hashlib.sha256()
    with path.open("rb") as file:
        while block := file.read(_BLOCK_BYTES):
            digest.update(block)
    return digest.hexdigest()


def sample_sha256(path: Path) -> str:
    """Return the sha256 of a sample of a file, cheap enough to compute at each load.

    The sample is the first MiB, the last MiB, and 64 blocks of 4096 bytes, the i-th at offset
    i * (bytes // 64) rounded down to a multiple of 4096, in this order. It finds a truncated or
    exchanged file in milliseconds; it does not find every flipped bit.
    """
    digest = hashlib.sha256()
    with path.open("rb") as file:
        num_bytes = os.fstat(file.fileno()).st_size
        stride = num_bytes // _NUM_SAMPLES
        spans = [(0, _BLOCK_BYTES), (max(0, num_bytes - _BLOCK_BYTES), _BLOCK_BYTES)]
        for i in range(_NUM_SAMPLES):
            spans.append((i * stride // _SAMPLE_BYTES * _SAMPLE_BYTES, _SAMPLE_BYTES))
        for offset, length in spans:
            file.seek(offset)
            digest.update(file.read(length))
    return digest.hexdigest()
