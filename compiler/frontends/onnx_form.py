"""Tell whether a file is an ONNX model, without loading onnx."""

from __future__ import annotations

from pathlib import Path

_MODEL = "model.onnx"
# A message begins with its fields: 1, the version of the form, as a small number; then 2 to 8
# (producer, domain, graph, ..., versions of operators), as texts and messages.
_FIRST, _VERSIONS, _NEXT = 0x08, range(3, 32), {n << 3 | 2 for n in range(2, 9)} | {5 << 3}


def is_onnx(path: Path) -> bool:
    """Whether a file, or `model.onnx` in a folder that is no other form, begins like one."""
    return find_model(path) is not None


def find_model(path: Path) -> Path | None:
    """The file; None if there is none."""
    if path.is_dir():
        others = ("config.json", "params.json")
        if any((path / name).is_file() for name in others):
            return None
        path = path / _MODEL
    try:
        with path.open("rb") as file:
            start = file.read(3)
    except OSError:
        return None
    if len(start) < 3 or start[0] != _FIRST or start[1] not in _VERSIONS or start[2] not in _NEXT:
        return None
    return path
