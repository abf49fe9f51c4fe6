"""Turn JSON into frozen dataclasses, checking every value against its annotation.

The annotations of a dataclass are its schema: `str`, `bool`, `int`, `float`, `X | None`,
`tuple[X, ...]`, `Mapping[str, X]`, another dataclass, and `Annotated[X, AtLeast(1)]` or
`Annotated[str, Matches("[a-z]+")]`. Fields with a default may be absent; unknown keys are ignored,
so that a writer may add a field without a new format version.
"""

from __future__ import annotations

import dataclasses
import math
import re
import types
from collections.abc import Mapping
from dataclasses import dataclass
from functools import cache
from typing import Annotated, Any, TypeVar, Union, get_args, get_origin, get_type_hints

__all__ = ["AtLeast", "Count", "Matches", "Name", "NotNegative", "SchemaError", "decode"]

T = TypeVar("T")
_INT_LIMIT = 2**63


class SchemaError(ValueError):
    """A value does not fit its schema; readers turn it into an error of their own.

    Args:
        where: path of the value, such as `model.num_layers`; empty for the whole document.
        problem: what is wrong with it, to be read after `where`.
    """

    def __init__(self, where: str, problem: str) -> None:
        super().__init__(f"{where or 'the document'} {problem}")
        self.where = where
        self.problem = problem


@dataclass(frozen=True)
class AtLeast:
    """Constraint on a number: not below `limit`."""

    limit: float

    def check(self, value: Any, where: str) -> None:
        """Raise SchemaError if `value` is too small."""
        if value < self.limit:
            raise SchemaError(where, f"is {value}, less than {self.limit:g}")


@dataclass(frozen=True)
class Matches:
    """Constraint on a string: the whole of it matches the regular expression."""

    pattern: str

    def check(self, value: Any, where: str) -> None:
        """Raise SchemaError if `value` does not match."""
        if not re.fullmatch(self.pattern, value):
            raise SchemaError(where, f"is {value!r}, which is not of the form {self.pattern}")


Count = Annotated[int, AtLeast(1)]
NotNegative = Annotated[int, AtLeast(0)]
Name = Annotated[str, Matches(".+")]


def decode(kind: type[T], value: object) -> T:
    """Make a `kind` (a dataclass) from parsed JSON.

    Raises:
        SchemaError: a field is missing, of another type, or outside its constraint.
    """
    result: T = _decode(kind, value, "")
    return result


def _decode(kind: Any, value: object, where: str) -> Any:
    origin = get_origin(kind)
    if origin is Annotated:
        base, *constraints = get_args(kind)
        result = _decode(base, value, where)
        for constraint in constraints:
            constraint.check(result, where)
        return result
    if origin in (Union, types.UnionType):
        (base,) = (arg for arg in get_args(kind) if arg is not type(None))
        return None if value is None else _decode(base, value, where)
    if origin is tuple:
        items = _expect(list, value, where, "a list")
        return tuple(_decode(get_args(kind)[0], x, f"{where}[{i}]") for i, x in enumerate(items))
    if dataclasses.is_dataclass(kind):
        return _decode_dataclass(kind, value, where)
    if origin is Mapping:
        entries = _expect(dict, value, where, "an object")
        item = get_args(kind)[1]
        return {_string(k, where): _decode(item, v, f"{where}[{k!r}]") for k, v in entries.items()}
    return _SCALARS[kind](value, where)


def _decode_dataclass(kind: Any, value: object, where: str) -> Any:
    entries = _expect(dict, value, where, "an object")
    hints = _hints(kind)
    arguments = {}
    for field in dataclasses.fields(kind):
        path = f"{where}.{field.name}" if where else field.name
        if field.name in entries:
            arguments[field.name] = _decode(hints[field.name], entries[field.name], path)
        elif field.default is dataclasses.MISSING and field.default_factory is dataclasses.MISSING:
            raise SchemaError(path, "is missing")
    return kind(**arguments)


@cache
def _hints(kind: type) -> dict[str, Any]:
    return get_type_hints(kind, include_extras=True)


def _expect(kind: type, value: object, where: str, name: str) -> Any:
    if not isinstance(value, kind):
        raise SchemaError(where, f"is {_describe(value)}, not {name}")
    return value


def _describe(value: object) -> str:
    text = repr(value)
    return text if len(text) <= 40 else f"{text[:37]}..."


def _string(value: object, where: str) -> str:
    text: str = _expect(str, value, where, "a string")
    # JSON can spell half of a surrogate pair and NUL; neither can be a file name or be printed.
    if "\0" in text or any("\ud800" <= char <= "\udfff" for char in text):
        raise SchemaError(where, "holds a character that is not text")
    return text


def _boolean(value: object, where: str) -> bool:
    result: bool = _expect(bool, value, where, "true or false")
    return result


def _integer(value: object, where: str) -> int:
    if isinstance(value, bool) or not isinstance(value, int):
        raise SchemaError(where, f"is {_describe(value)}, not a whole number")
    if not -_INT_LIMIT <= value < _INT_LIMIT:
        raise SchemaError(where, "does not fit into 64 bits")
    return value


def _number(value: object, where: str) -> float:
    if isinstance(value, int):
        return float(_integer(value, where))
    if not isinstance(value, float) or not math.isfinite(value):
        raise SchemaError(where, f"is {_describe(value)}, not a finite number")
    return value


_SCALARS = {str: _string, bool: _boolean, int: _integer, float: _number}
