"""Fields of our own JSON: addresses are hexadecimal strings, ranges half-open "0x0-0x10000", counts are numbers.

Every reader here takes what `json.loads` made of a field, and raises ValueError or TypeError, in words fit for a user, when it
is not what it must be: whoever reads a whole file knows its name and adds it.
"""

from __future__ import annotations

from typing import Any, TypeVar

from crashkernel.memory import Range

_T = TypeVar("_T", bound=str)


def one_of(value: Any, allowed: tuple[_T, ...]) -> _T:
    """Return the value, one of a few words."""
    if not isinstance(value, str) or value not in allowed:
        raise ValueError(f"{value!r} is none of {', '.join(allowed)}")
    return value


def text(value: Any) -> str:
    """Return any string."""
    if not isinstance(value, str):
        raise TypeError(f"{value!r} is no string")
    return value


def line(value: Any) -> str:
    """Return a string fit to be printed: no control characters, no halves of surrogate pairs."""
    if not text(value).isprintable():
        raise ValueError(f"{value!r} is no printable text")
    return str(value)


def number(value: Any) -> int:
    """Return a hexadecimal string's value, of at most 64 bits."""
    return _number(text(value))


def _number(digits: str) -> int:
    result = int(digits, 16)
    if not 0 <= result < 1 << 64:
        raise ValueError(f"{digits} is no 64-bit address")
    return result


def count(value: Any, limit: int) -> int:
    """Return a number, not negative and below `limit`."""
    if not isinstance(value, int) or isinstance(value, bool) or not 0 <= value < limit:
        raise ValueError(f"{value!r} is no count below {limit:#x}")
    return value


def boolean(value: Any) -> bool:
    """Return true or false."""
    if not isinstance(value, bool):
        raise TypeError(f"{value!r} is neither true nor false")
    return value


def items(value: Any, length: int | None = None) -> list[Any]:
    """Return a list, of `length` elements when that is given."""
    if not isinstance(value, list) or (length is not None and len(value) != length):
        raise TypeError(f"{value!r} is no list" + (f" of {length}" if length is not None else ""))
    return value


def mapping(value: Any) -> dict[str, Any]:
    """Return an object."""
    if not isinstance(value, dict):
        raise TypeError(f"{value!r} is no object")
    return value


def pair(value: Any) -> tuple[int, int]:
    """Return two hexadecimal strings' values."""
    first, second = items(value, 2)
    return number(first), number(second)


def one_range(value: Any) -> Range:
    """Return the range of a string like "0x0-0x10000"."""
    start, _, end = text(value).partition("-")
    return Range(_number(start), _number(end))


def ranges(value: Any) -> list[Range]:
    """Return the ranges of a list, in its order."""
    return [one_range(item) for item in items(value)]
