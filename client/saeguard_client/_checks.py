"""Checks of what callers pass in; each raises a ValueError that begins with the argument's name.

Only what Python or the wire cannot hold is refused here. Ranges that depend on the served model are the server's.
"""

from __future__ import annotations

import operator
from typing import Any, Final

MAX_UINT32: Final = 2**32 - 1
MAX_UINT64: Final = 2**64 - 1


def text(name: str, value: object) -> str:
    """A string that UTF-8 can carry."""
    if not isinstance(value, str):
        raise ValueError(f"{name}: must be a string, got {value!r}")
    try:
        value.encode()
    except UnicodeEncodeError as err:
        raise ValueError(f"{name}: holds a lone surrogate at character {err.start}, which UTF-8 cannot carry") from None
    return value


def whole(name: str, value: Any, most: int = MAX_UINT32) -> int:
    """An integer from 0 to ``most``; numpy's integers are welcome, bools are not."""
    try:
        number = operator.index(value)
    except TypeError:
        raise ValueError(f"{name}: must be an integer, got {value!r}") from None
    if isinstance(value, bool):
        raise ValueError(f"{name}: must be an integer, got {value!r}")
    if not 0 <= number <= most:
        raise ValueError(f"{name}: must be 0 to {most}, got {number}")
    return number


def number(name: str, value: Any) -> float:
    """A real number; strings and bools are not."""
    if isinstance(value, str | bytes | bool):
        raise ValueError(f"{name}: must be a number, got {value!r}")
    try:
        return float(value)
    except (TypeError, ValueError, OverflowError):
        raise ValueError(f"{name}: must be a number, got {value!r}") from None


def flag(name: str, value: object) -> bool:
    """True or False."""
    if not isinstance(value, bool):
        raise ValueError(f"{name}: must be True or False, got {value!r}")
    return value


def choice(name: str, value: object, choices: tuple[str, ...]) -> str:
    """One of ``choices``."""
    if not isinstance(value, str) or value not in choices:
        raise ValueError(f"{name}: must be one of {', '.join(choices)}, got {value!r}")
    return value


def seconds(name: str, value: Any) -> float:
    """A length of time above 0."""
    length = number(name, value)
    if not length > 0:
        raise ValueError(f"{name}: must be above 0 seconds, got {length}")
    return length
