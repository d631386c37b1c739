"""Keys of a configuration: which there are, and refusing the others by name."""

from __future__ import annotations

import dataclasses
from collections.abc import Iterable, Mapping
from difflib import get_close_matches
from typing import Any, Literal, get_args, get_origin

import msgspec

from saeguard_sae.train.run.errors import BadConfig

_MISSING = "Object missing required field `"


def names_of(kind: type) -> tuple[str, ...]:
    """Fields of a msgspec struct or a dataclass."""
    if issubclass(kind, msgspec.Struct):
        return kind.__struct_fields__
    assert dataclasses.is_dataclass(kind)
    return tuple(one.name for one in dataclasses.fields(kind))


def table(name: str, value: object) -> Mapping[str, Any]:
    """What must be a table.

    Raises:
        BadConfig: it is something else.
    """
    if not isinstance(value, Mapping):
        raise BadConfig(f"{name}: must be a table, got {value!r}")
    return value


def refuse_unknown(where: str, found: Iterable[str], allowed: Iterable[str]) -> None:
    """Looks at keys.

    Raises:
        BadConfig: one is not among those allowed.
    """
    names = list(allowed)
    for key in found:
        if key not in names:
            close = get_close_matches(key, names, n=1)
            meant = f" (did you mean {close[0]}?)" if close else ""
            full = f"{where}.{key}" if where else key
            raise BadConfig(f"{full}: no such key{meant}; there are {', '.join(names)}")


def converted(where: str, value: object, hint: Any) -> Any:
    """A value as ``hint`` wants it.

    Raises:
        BadConfig: it is none; a choice that there is not is told with those that there are.
    """
    if get_origin(hint) is Literal and value not in get_args(hint):
        raise BadConfig(f"{where}: must be one of {', '.join(get_args(hint))}, got {value!r}")
    try:
        return msgspec.convert(value, hint)
    except msgspec.ValidationError as err:
        raise BadConfig(said(where, err)) from err


def said(name: str, err: msgspec.ValidationError) -> str:
    """What msgspec, or a check of our own under it, objects to in a table, with the key in front."""
    text, _, where = str(err).partition(" - at `$")
    key = ".".join(filter(None, (name, where.rstrip("`").lstrip("."))))
    if text.startswith(_MISSING):
        return f"{key}.{text.removeprefix(_MISSING).rstrip('`')}: must be given"
    # Settings that are also built without a file name their table themselves.
    return text if text.startswith(f"{name}.") else f"{key}: {text}"
