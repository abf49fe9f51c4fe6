"""`--dump DIR`: the IR after each stage, for people."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from llamac.runtime.errors import OutputError


class Dump:
    """Writes the IR of stages into a folder, or nothing.

    Raises:
        OutputError: the folder cannot be made or written.
    """

    def __init__(self, folder: Path | None) -> None:
        self._folder, self._count = folder, 0
        if folder is not None:
            with _dumping_into(folder):
                folder.mkdir(parents=True, exist_ok=True)

    def __call__(self, name: str, module: Any) -> None:
        """Write a module as TVMScript."""
        if self._folder is not None:
            self.text(f"{name}.py", module.script())

    def text(self, name: str, text: str) -> None:
        """Write a file under the next number."""
        if self._folder is not None:
            self._count += 1
            with _dumping_into(self._folder):
                (self._folder / f"{self._count}-{name}").write_text(text, encoding="utf-8")


@contextmanager
def _dumping_into(folder: Path) -> Iterator[None]:
    """Say which folder could not be written, which is not that of the bundle."""
    try:
        yield
    except OSError as error:
        raise OutputError(
            f"the IR cannot be dumped into {folder}: {error.strerror}",
            cause="the operating system refused to write there",
            fix="give --dump a folder that you may write to, with some space left",
        ) from error
