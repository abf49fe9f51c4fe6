"""Pieces of generated C."""

from __future__ import annotations

from collections.abc import Iterable


def c_table(ctype: str, name: str, rows: Iterable[str]) -> str:
    """A static array."""
    body = "".join(f"  {row},\n" for row in rows)
    return f"static {ctype} {name}[] = {{\n{body}}};\n"


def c_text(value: str) -> str:
    """A C string; what C might read as something else is written as octal bytes of UTF-8."""
    plain = b"abcdefghijklmnopqrstuvwxyzABCDEFGHIJKLMNOPQRSTUVWXYZ0123456789 _-.+"
    escaped = (chr(byte) if byte in plain else f"\\{byte:03o}" for byte in value.encode())
    return f'"{"".join(escaped)}"'
